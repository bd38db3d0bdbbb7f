"""`learn_init`: the whole algorithm of GradInit, and two older ones through the same call."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import nn

from graphopt.compilation import check_compiler
from graphopt.errors import MixedPrecisionInit, OptionError
from graphopt.initialization import meta_init
from graphopt.initialization.batches import Draws, Overlap
from graphopt.initialization.grad_init import GradInitSearch
from graphopt.initialization.init_result import InitResult, InitStep
from graphopt.initialization.lsuv import LSUVSearch
from graphopt.initialization.meta_init import MetaInitSearch
from graphopt.initialization.rescale_adam import RescaleAdam
from graphopt.initialization.scaled_model import MIXED_PRECISION, ScaledModel
from graphopt.initialization.searching import LossFunction, Search, deterministic, he_scales
from graphopt.runtime import data_parallel
from graphopt.transform import handle_of, restore, transform

Method = Literal["gradinit", "metainit", "lsuv"]
Optimizer = Literal["adam", "sgd"]
Start = Literal["as_is", "he"]
Space = Literal["linear", "log"]

_NUM_MEASURED = 4  # batches from which the variance of gradients is taken, before and after
_TINY = 1e-30  # in log space, where only the sign of a gradient counts


@dataclass(frozen=True)
class GradInitDefaults:
    """What the authors' scripts use for an optimizer.

    Attributes:
        eta: size of the step that is looked ahead.
        gamma: bound of the norm of the gradient.
        lr: step size of the scales.
        steps: iterations.
        betas: of Adam for the scales.
        clip: bound of each scale's gradient.
    """

    eta: float
    gamma: float
    lr: float
    steps: int
    betas: tuple[float, float]
    clip: float | None


# https://github.com/zhuchen03/gradinit, launch/: IWSLT14 for Adam, and CIFAR for SGD, whose step sizes go from 1e-3 to 1e-1.
DEFAULTS: dict[str, GradInitDefaults] = {
    "adam": GradInitDefaults(eta=1e-3, gamma=1000.0, lr=2.5e-3, steps=780, betas=(0.9, 0.98), clip=None),
    "sgd": GradInitDefaults(eta=0.1, gamma=1.0, lr=1e-2, steps=390, betas=(0.9, 0.999), clip=1.0),
}


def learn_init(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Any],
    *,
    method: Method = "gradinit",
    optimizer: Optimizer = "adam",
    eta: float | None = None,
    gamma: float | None = None,
    lr: float | None = None,
    steps: int | None = None,
    start: Start = "as_is",
    space: Space = "linear",
    overlap: Overlap = "halves",
    accumulate: int = 1,
    normalize_grad: bool = True,
    clip: float | None = None,
    min_scale: float = 0.01,
    max_scale: float | None = None,
    compiler: str | None = None,
    progress: bool = True,
) -> InitResult:
    """Learn how large each parameter of a model should be, before training it.

    Every trainable parameter gets one scale m. With S a batch, g the gradient of the loss L(S) with respect to the scaled
    parameters w, and A the optimizer's first step (sign(g) for Adam, g / |g|_2 for SGD), each iteration lowers

        |g|_p                            where |g|_p > gamma (p = 1 for Adam, 2 for SGD), else
        L(S~; w - eta A) / eta           with S~ a batch of which half is in S, and A taken as a constant,

    by a step of Adam for the scales (`RescaleAdam`). Dropout is off and normalisations use the statistics of their batch
    meanwhile. In the end the scales are multiplied into the parameters, in place; buffers and ``train()`` or ``eval()`` are as
    they were. After an exception (or Ctrl-C) the model is as it was.

    Args:
        model: any module; also one that `graphopt.transform` has compiled, or in ``DistributedDataParallel`` (each rank gives its
            own batches, and all get the same scales).
        loss_fn: ``loss_fn(model, batch)`` returns a scalar loss, the mean over samples. It may enter autocast.
        batches: tensors, or tuples, lists or dicts of them, with samples on their first axis. Iterated again when they end.
        method: ``"gradinit"``; ``"metainit"``, which minimises the gradient quotient; or ``"lsuv"``, which brings the variance of
            every layer's output to 1 in a few forward passes. These two run eagerly. Of the options below, MetaInit takes ``lr``,
            ``steps``, ``start`` and ``accumulate``, and LSUV takes ``start``.
        optimizer: what will train the model: ``"adam"`` or ``"sgd"``.
        eta: length of the step A: the learning rate of training, about. Default 1e-3 and 0.1.
        gamma: bound of the norm of the gradient. Default 1000 and 1. The 1-norm grows with the size of a model: see
            ``result.trajectory`` for what it is.
        lr: of the scales. Default 2.5e-3 and 1e-2. The authors take 1e-3 to 1e-1 for different networks.
        steps: iterations. Default 780 and 390.
        start: ``"he"`` begins with scales that give every weight the standard deviation sqrt(2 / fan_in).
        space: ``"log"`` learns the logarithm of the scales, which moves at the same pace whatever the size of the gradient.
        overlap: how S~ is made: ``"halves"``; ``"thirds"`` of each batch, for batches that cannot be joined; ``"none"``.
        accumulate: how many batches make an S, one backward pass for each.
        normalize_grad: for SGD: whether A is g / |g|_2 or g.
        clip: bound of each scale's gradient; default: none and 1. Not in log space, where only signs count.
        min_scale: least scale of weights; biases (what has that in its name) may go to 0.
        max_scale: greatest scale; default none.
        compiler: ``"inductor"`` (default), ``"aot_eager"``, or ``"eager"``: no compilation at all. A model that is transformed
            keeps its own, unless this says ``"eager"``.
        progress: show a progress bar, if tqdm is installed.

    Returns:
        The scales, the iterations, and norms and gradient variances before and after: `InitResult`, with ``plot(path)``.

    Raises:
        OptionError: an option has no meaning, the batches end too early or cannot be cut, ``loss_fn`` returns no scalar loss.
        InitError: the loss or a gradient is not finite, or gradients underflow at the start; the text names the parameters.
        UnsupportedError: the model cannot be compiled so that its gradient can be differentiated.

    Reference: Zhu, Ni, Xu, Kong, Huang, Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and Efficient
    Training", arXiv:2102.08098, 2021, algorithm 1; the authors' code, https://github.com/zhuchen03/gradinit.
    """
    _check_choices(method=method, optimizer=optimizer, start=start, space=space)
    _check_numbers(eta=eta, gamma=gamma, lr=lr, clip=clip, min_scale=min_scale, max_scale=max_scale)
    _check_counts(steps=steps, accumulate=accumulate)
    if max_scale is not None and max_scale < min_scale:
        raise OptionError(f"learn_init(min_scale={min_scale!r}, max_scale={max_scale!r}): no scale lies between them")
    given: dict[str, object] = {
        "eta": eta,
        "gamma": gamma,
        "clip": clip,
        "max_scale": max_scale,
        "lr": lr,
        "steps": steps,
    }
    given |= {"space": space if space != "linear" else None, "accumulate": accumulate if accumulate > 1 else None}
    without_effect = {"metainit": ("eta", "gamma", "clip", "max_scale", "space"), "lsuv": tuple(given)}.get(method, ())
    if space == "log" and method == "gradinit":
        without_effect = ("clip",)
    if ignored := [option for option in without_effect if given[option] is not None]:
        where = "space='log'" if method == "gradinit" else f"method={method!r}"
        raise OptionError(f"learn_init({ignored[0]}={given[ignored[0]]!r}, {where}): the option has no effect there")
    if not callable(loss_fn):
        raise OptionError(
            f"loss_fn is {type(loss_fn).__name__}; it is a function loss_fn(model, batch) that returns a loss"
        )
    defaults = DEFAULTS[optimizer]
    draws = Draws(batches, accumulate, overlap)
    in_graphs = method == "gradinit" and compiler != "eager"
    with _compiled(model, compiler, in_graphs), _scaled(model, in_graphs) as scaled, deterministic(scaled.model):
        search = Search(scaled, loss_fn)
        measured = [draws.take() for _ in range(_NUM_MEASURED if method != "lsuv" else 1)]
        draws.again(measured)
        scales = torch.ones(len(search.weights), dtype=torch.float64, device=search.weights[0].device)
        before, unmoved = search.measure(scales, measured), list[str]()
        if start == "he":
            scales = he_scales(search)
        if method == "lsuv":
            iterations: Iterator[InitStep] = LSUVSearch(search, scales).run(draws)
        elif method == "metainit":
            iterations = MetaInitSearch(search, scales, lr=lr).run(draws, steps)
        else:
            log = space == "log"
            eps = _TINY if log else 1e-8
            unmoved = search.check_start(scales, measured[:1], eps)
            adam = RescaleAdam(
                scales,
                ~torch.tensor(search.is_zero, device=scales.device),
                lr=defaults.lr if lr is None else lr,
                betas=defaults.betas,
                eps=eps,
                clip=defaults.clip if clip is None else clip,
                min_scale=_min_scales(search, min_scale),
                max_scale=max_scale,
                in_log_space=log,
            )
            iterations = GradInitSearch(
                search,
                adam,
                optimizer=optimizer,
                eta=defaults.eta if eta is None else eta,
                gamma=defaults.gamma if gamma is None else gamma,
                normalize_grad=normalize_grad,
            ).run(draws, steps or defaults.steps)
        total = {"gradinit": steps or defaults.steps, "metainit": steps or meta_init.STEPS, "lsuv": None}[method]
        trajectory = _run(iterations, total, progress, method)
        if scaled.saw_autocast:
            warnings.warn(MIXED_PRECISION, MixedPrecisionInit, stacklevel=2)
        found = torch.stack([scale.detach().to(torch.float64) for scale in scaled.scales.scales])
        after = search.measure(found, measured)
        scaled.detach(fold=True)
    left_alone = dict.fromkeys(unmoved, "its gradient is too small to move a scale")
    left_alone |= {
        name: "all zero" if zero else "no gradient reaches it"
        for name, zero, scale in zip(search.names, search.is_zero, found.tolist(), strict=True)
        if zero or (scale == 1 and before[name].grad_norm == 0 == after[name].grad_norm)
    }
    return InitResult(
        method, dict(zip(search.names, found.tolist(), strict=True)), trajectory, before, after, left_alone
    )


def _check_choices(**given: str) -> None:
    allowed = {"method": Method, "optimizer": Optimizer, "start": Start, "space": Space}
    for option, value in given.items():
        if value not in get_args(allowed[option]):
            raise OptionError(f"learn_init({option}={value!r}): it is one of {list(get_args(allowed[option]))}")


def _check_numbers(**given: float | None) -> None:
    for option, number in given.items():
        if number is not None and not (isinstance(number, Real) and number >= 0):
            raise OptionError(f"learn_init({option}={number!r}): it is a number, not below 0")
    if given["eta"] == 0:
        raise OptionError("learn_init(eta=0): the loss is divided by the length of the step, so it is above 0")


def _check_counts(**given: int | None) -> None:
    for option, count in given.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise OptionError(f"learn_init({option}={count!r}): it is an int, at least 1")


@contextmanager
def _scaled(model: nn.Module, in_graphs: bool) -> Iterator[ScaledModel]:
    """The model with scales, which are gone at the end; its parameters are as they were, unless `detach` folds the scales in."""
    scaled = ScaledModel(model, in_graphs=in_graphs)
    try:
        yield scaled
    finally:
        scaled.detach(fold=False)


@contextmanager
def _compiled(model: nn.Module, compiler: str | None, in_graphs: bool) -> Iterator[None]:
    """Compile a model for the time being, if it is not compiled already."""
    if compiler is not None:
        check_compiler(compiler)
    handle = handle_of(model) if isinstance(model, nn.Module) else None
    if handle is not None and compiler not in (None, "eager", handle.setup.compiler):
        raise OptionError(
            f"learn_init(compiler={compiler!r}), but the model is transformed with compiler={handle.setup.compiler!r}: leave "
            "the option out, or say 'eager'"
        )
    if handle is not None or not in_graphs or not isinstance(model, nn.Module):
        yield
        return
    from graphopt.passes import GradInit, LayerToLayer

    inner = data_parallel.unwrap(model)
    if isinstance(inner, torch._dynamo.OptimizedModule):
        yield  # which is refused in a moment
        return
    transform(inner, [GradInit(), LayerToLayer()], compiler=compiler or "inductor")
    try:
        yield
    finally:
        restore(inner)


def _min_scales(search: Search, least: float) -> torch.Tensor:
    """The least scale of each parameter: biases may vanish."""
    return torch.tensor(
        [0.0 if "bias" in name.rpartition(".")[2] else least for name in search.names],
        device=search.weights[0].device,
    )


def _run(iterations: Iterator[InitStep], total: int | None, progress: bool, method: str) -> list[InitStep]:
    """Run all iterations, with a bar that shows how they go."""
    bar = _bar(total, method) if progress else None
    trajectory: list[InitStep] = []
    with bar if bar is not None else nullcontext():
        last = time.perf_counter()
        for step in iterations:
            now = time.perf_counter()
            trajectory.append(InitStep(**{**vars(step), "seconds": now - last}))
            last = now
            if bar is not None:
                shown = {"loss": step.loss, "after a step": step.lookahead_loss, "norm": step.grad_norm}
                bar.set_postfix(
                    {key: f"{value:.3g}" for key, value in shown.items() if value is not None}, refresh=False
                )
                bar.update()
    return trajectory


def _bar(total: int | None, method: str) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    make: Callable[..., Any] = tqdm
    return make(total=total, desc=method, leave=False)
