"""Chains that equal one of torch's own optimizers, and its fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from graphopt.optim.core.context import Settings
from graphopt.optim.core.module import Rule


class Tensors(NamedTuple):
    """What a fused kernel is called with.

    Attributes:
        params: the parameters.
        grads: their gradients.
        states: for each of the kernel's state elements its tensors.
        steps: the number of steps made before, float32; the kernel adds one to each.
        settings: of each rule.
        maximize: whether to go up.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    steps: list[Tensor]
    settings: Mapping[str, Settings]
    maximize: bool


class TorchKernel(NamedTuple):
    """A fused kernel of torch.

    Attributes:
        name: of the optimizer in ``torch.optim``.
        states: paths of the state elements that it updates, in its own order.
        run: makes the step; of `Tensors` whose settings are by path.
    """

    name: str
    states: tuple[str, ...]
    run: Callable[[Tensors], None]


def recognize(
    rules: Sequence[Rule], settings_of: Callable[[Rule], Settings], path_of: Callable[[Rule], str]
) -> TorchKernel | None:
    """The fused kernel that computes what the rules compute, if there is one."""
    names = tuple(type(rule).__name__ for rule in rules)
    found = _KERNELS.get(names)
    if found is None or any(rule.children or not type(rule).__module__.startswith("graphopt.optim.") for rule in rules):
        return None
    settings = {type(rule).__name__: settings_of(rule) for rule in rules}
    if not found.fits(settings):
        return None
    paths = {type(rule).__name__: path_of(rule) for rule in rules}

    def run(given: Tensors) -> None:
        found.run(given._replace(settings={name: given.settings[path] for name, path in paths.items()}))

    states = found.states
    if "Adam" in settings and settings["Adam"].amsgrad:
        states = (*states, ("Adam", "max_exp_avg_sq"))
    return TorchKernel(found.name, tuple(f"{paths[owner]}.{state}" for owner, state in states), run)


class _Entry(NamedTuple):
    name: str
    states: tuple[tuple[str, str], ...]
    fits: Callable[[Mapping[str, Settings]], bool]
    run: Callable[[Tensors], None]


def _lr(settings: Mapping[str, Settings]) -> Any:
    return settings["LR"].lr if "LR" in settings else 1.0


def _decay(settings: Mapping[str, Settings]) -> float:
    return float(settings["WeightDecay"].weight_decay) if "WeightDecay" in settings else 0.0


def _is_plain_decay(settings: Mapping[str, Settings]) -> bool:
    return "WeightDecay" not in settings or settings["WeightDecay"].ord == 2


def _is_plain_adam(settings: Mapping[str, Settings]) -> bool:
    s = settings["Adam"]
    return s.debiased and not s.eps_inside and s.alpha == 1 and _is_plain_decay(settings)


def _adam(function: Callable[..., None]) -> Callable[[Tensors], None]:
    def run(given: Tensors) -> None:
        s = given.settings["Adam"]
        function(
            given.params,
            given.grads,
            given.states[0],
            given.states[1],
            given.states[2] if s.amsgrad else [],
            given.steps,
            fused=True,
            foreach=False,
            amsgrad=s.amsgrad,
            beta1=float(s.beta1),
            beta2=float(s.beta2),
            lr=_lr(given.settings),
            weight_decay=_decay(given.settings),
            eps=float(s.eps),
            maximize=given.maximize,
        )

    return run


def _is_plain_momentum(settings: Mapping[str, Settings]) -> bool:
    s = settings.get("HeavyBall") or settings.get("NAG")
    if s is None:
        return _is_plain_decay(settings)
    return s.dampening == 0 and not s.lerp and not s.get("debiased", False) and _is_plain_decay(settings)


def _sgd(given: Tensors) -> None:
    s = given.settings.get("HeavyBall") or given.settings.get("NAG")
    momentum: list[Tensor | None] = list(given.states[0]) if s is not None else [None] * len(given.params)
    sgd(
        given.params,
        given.grads,
        momentum,
        fused=True,
        foreach=False,
        weight_decay=_decay(given.settings),
        momentum=0.0 if s is None else float(s.momentum),
        lr=float(_lr(given.settings)),
        dampening=0.0,
        nesterov="NAG" in given.settings,
        maximize=given.maximize,
    )


def _is_plain_adagrad(settings: Mapping[str, Settings]) -> bool:
    s = settings["Adagrad"]
    return s.alpha == 1 and s.use_sqrt and s.pow == 2 and _is_plain_decay(settings)


def _adagrad(given: Tensors) -> None:
    s = given.settings["Adagrad"]
    adagrad(
        given.params,
        given.grads,
        given.states[0],
        given.steps,
        fused=True,
        foreach=False,
        has_sparse_grad=False,
        has_complex=False,
        differentiable=False,
        lr=float(_lr(given.settings)),
        weight_decay=_decay(given.settings),
        lr_decay=float(s.lr_decay),
        eps=float(s.eps),
        maximize=given.maximize,
    )


_ADAM = (("Adam", "exp_avg"), ("Adam", "exp_avg_sq"))
_KERNELS: dict[tuple[str, ...], _Entry] = {}
for _tail in ((), ("LR",)):
    _KERNELS["Adam", *_tail] = _Entry("Adam", _ADAM, _is_plain_adam, _adam(adam))
    _KERNELS["WeightDecay", "Adam", *_tail] = _Entry("Adam", _ADAM, _is_plain_adam, _adam(adam))
    _KERNELS["Adam", "WeightDecay", *_tail] = _Entry("AdamW", _ADAM, _is_plain_adam, _adam(adamw))
    for _head in ((), ("WeightDecay",)):
        if _head or _tail:
            _KERNELS[*_head, *_tail] = _Entry("SGD", (), _is_plain_momentum, _sgd)
        for _momentum in ("HeavyBall", "NAG"):
            _states = ((_momentum, "momentum_buffer"),)
            _KERNELS[*_head, _momentum, *_tail] = _Entry("SGD", _states, _is_plain_momentum, _sgd)
        _KERNELS[*_head, "Adagrad", *_tail] = _Entry("Adagrad", (("Adagrad", "sum"),), _is_plain_adagrad, _adagrad)


def supports(kernel: TorchKernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has the kernel for these parameters."""
    if dtype not in (torch.float32, torch.float64):
        return False  # it would keep state of low precision
    return device.type == "cpu" or (device.type == "cuda" and kernel.name != "Adagrad")
