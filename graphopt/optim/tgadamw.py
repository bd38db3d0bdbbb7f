"""TGAdamW: AdamW whose second moment is the mean over samples of the squared per-sample gradient."""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from graphopt.errors import OptionError
from graphopt.optim.flat_kernels import MAX_SMALL, NUM_SAMPLE_ELEMENTS, compile_flat, flatten
from graphopt.optim.truegrad_optimizer import Gradient, TrueGradOptimizer, state_dtype

# Elements from which kernels are compiled unasked: at about 3 ns an element saved, 3 s of compiling are won back in 1000 steps.
_COMPILE_FROM = 2**20

# Elements that one thread of the CPU works on at a time, so that intermediate results stay in its cache.
_BLOCK = 2**16

# What a group lacks that another optimizer's state_dict, or an older one, brings along.
_DEFAULTS: dict[str, Any] = {
    "graft": True,
    "default_to_baseline": False,
    "enforce_baseline": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


class TGAdamW(TrueGradOptimizer):
    r"""AdamW with the true second moment: squares are taken per sample, then averaged.

    With :math:`g` the gradient, :math:`s` its ``SUM_GRAD_SQUARED`` and :math:`n` its ``NUM_SAMPLES``, in step :math:`t`::

        m = β1 m + (1 - β1) g                    exp_avg
        w = β2 w + (1 - β2) g²                   exp_avg_sq
        v = β3 v + (1 - β3) n s                  exp_avg_per_sample_sq
        u = m / max(√(v / (1 - β3^k)), ε)        the direction; k counts the statistics seen
        b = m / max(√(w / (1 - β2^t)), ε)        Adam's step, the baseline
        θ = θ - lr λ θ - lr / (1 - β1^t) · u · (‖b‖ / (‖u‖ + ε) if graft else 1)

    **The scale of the statistic.** For a mean loss over :math:`n` samples :math:`n s` is the mean of the squared per-sample
    gradients. It does not depend on the batch size, so batches of different sizes average with equal weight; it is at least
    :math:`g^2`, with equality where all samples agree, so without grafting the step is at most Adam's; and it scales with the
    loss as :math:`g^2` does, so sum losses and loss scaling need no care. :math:`s` alone would make the step grow with the
    square root of the batch size. With grafting any constant factor cancels.

    Gradients and statistics are paired by `graphopt.annotations`: what ``zero_grad``, ``GradScaler`` and clipping do to
    ``p.grad`` has been done to the statistic when it is used here.

    Args:
        params: parameters, ``named_parameters()`` (then errors name them), or groups with options of their own.
        lr: learning rate, a number or a tensor of one element.
        betas: :math:`(β1, β2, β3)` for gradient, squared gradient and statistic; with two, :math:`β3 = β2`.
        eps: lower limit of both roots, in units of the gradient. It is not added to them, except in the baseline step.
        weight_decay: :math:`λ`, decoupled, applied once per parameter and step.
        graft: give every parameter's step the norm of Adam's; needs ``exp_avg_sq``, as do the two options that follow.
        default_to_baseline: take AdamW's step, that of `torch.optim.AdamW`, for a parameter without statistic; otherwise this
            is an error unless its gradient is zero everywhere, which has zero for its statistic.
        enforce_baseline: take AdamW's step for every parameter of the group, and keep no ``exp_avg_per_sample_sq``.
        maximize: ascend instead of descend.
        foreach: work on small tensors of equal size together; ``False`` for one tensor after another.
        capturable: only ``False``.
        differentiable: only ``False``.
        fused: run compiled kernels on dense tensors of more than 4096 elements. They are compiled in the first step, before
            anything is changed (about 3 s on a CPU, less from Inductor's cache), and once only, whatever the number and sizes
            of the tensors or the learning rates. With ``foreach`` and ``fused`` both ``None``, from 2**20 elements on, and with
            a warning instead of an error where there is no compiler.
        default_to_adam: another name for ``default_to_baseline``, from TrueGrad's README.

    Raises:
        OptionError: an option is not valid.
        UnsupportedError: a parameter is complex.

    Reference: Nestler, "TrueGrad", github.com/ClashLuke/TrueGrad, 2022; Loshchilov, Hutter, "Decoupled Weight Decay
    Regularization", arXiv:1711.05101, 2017; Agarwal et al., "Disentangling Adaptive Gradient Methods from Learning Rates",
    arXiv:2002.11803, 2020 (grafting).

    Example:
        >>> from graphopt import annotations
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = TGAdamW([weight], lr=0.1, weight_decay=0.0, graft=False)
        >>> weight.grad = torch.tensor([0.5, 0.5])  # the mean of 0.5, 0.5 and the mean of 2, -1
        >>> annotations.publish(weight, torch.tensor([0.125, 1.25]), num_samples=2)
        >>> optimizer.step()
        >>> weight.detach()  # the gradient's sign is certain in the first entry only
        tensor([0.9000, 0.9684])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | tuple[float, float, float] = (0.9, 0.999, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 1e-2,
        graft: bool = True,
        default_to_baseline: bool = False,
        enforce_baseline: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        default_to_adam: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "graft": graft,
            "default_to_baseline": default_to_baseline or default_to_adam,
            "enforce_baseline": enforce_baseline,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in _DEFAULTS.items():
                group.setdefault(option, default)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and the gradients; called once, with gradients enabled.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            MissingAnnotation: parameters without a statistic; the text names them. Nothing was changed.
            StaleAnnotation: a gradient no longer belongs to its statistic. Nothing was changed.
            UnsupportedError: a gradient is sparse. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all()
        return loss

    @torch.compiler.disable(reason="TGAdamW reads annotations in Python and compiles its own kernels")
    def _update_all(self) -> None:
        updates = [self._prepare(gradient) for gradient in self._gradients()]
        plan = _plan(updates)  # compiles, so it can fail: before anything is changed
        counts = ("step", "num_statistics")
        counted = [update.state[name] for update in updates if update.tensors.statistic is not None for name in counts]
        if counted:  # torch's functional AdamW counts the steps of the others
            torch._foreach_add_(counted, 1)
        for run in plan:
            run()

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        lr, betas = group["lr"], group["betas"]
        if (isinstance(lr, Tensor) and lr.numel() != 1) or not float(lr) >= 0.0:
            raise OptionError(f"TGAdamW: lr={lr}; expected a number or a one-element tensor, at least 0")
        if len(betas) not in (2, 3) or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise OptionError(
                f"TGAdamW: betas={betas}; expected (beta1, beta2) or (beta1, beta2, beta3) for the averages of the gradient, its "
                "square and the statistic, each at least 0 and below 1"
            )
        for name in ("eps", "weight_decay"):
            if not float(group[name]) >= 0.0:
                raise OptionError(f"TGAdamW: {name}={group[name]}; expected a number, at least 0")

    def _prepare(self, gradient: Gradient) -> _Update:
        """The tensors and coefficients of one parameter's update; creates the state where there is none."""
        group, param, grad, statistic, num_samples = gradient
        state = self._init_state(group, param, grad)
        beta1, beta2, *beta3 = group["betas"]
        coefficients = _coefficients(
            float(group["lr"]),
            (float(beta1), float(beta2), float(beta3[0] if beta3 else beta2)),
            float(group["eps"]),
            float(group["weight_decay"]),
            state["step"].item() + 1,
            state["num_statistics"].item() + 1 if statistic is not None else 1,
            num_samples,
        )
        per_sample_sq = None if statistic is None else state["exp_avg_per_sample_sq"]
        tensors = _Tensors(param, grad, statistic, state["exp_avg"], state.get("exp_avg_sq"), per_sample_sq)
        flat = tensors.flat()
        return _Update(group, state, tensors if flat is None else flat, flat is not None, coefficients)

    def _init_state(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> dict[str, Any]:
        # Which entries there are depends on the options alone, never on whether a statistic has arrived yet: a checkpoint is
        # loaded into the entries that a fresh optimizer has.
        state: dict[str, Any] = self.state[param]
        dtype = state_dtype(param)
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        if "exp_avg_sq" not in state and (group["graft"] or group["default_to_baseline"] or group["enforce_baseline"]):
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            if state["step"] > 0:  # grafting was switched on later: as if the gradient had always been this one
                state["exp_avg_sq"].add_(grad.to(dtype).square(), alpha=1 - float(group["betas"][1]) ** state["step"].item())
        if "exp_avg_per_sample_sq" not in state and not group["enforce_baseline"]:
            state["exp_avg_per_sample_sq"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            state["num_statistics"] = torch.tensor(0.0)
        return state


# ---------------------------------------------------------------------------------------------------------------------
# The update, once: eager and compiled, on one tensor, a part of one, or a stack of small ones


class _Tensors(NamedTuple):
    param: Tensor
    grad: Tensor
    statistic: Tensor | None  # None: the baseline step
    exp_avg: Tensor
    exp_avg_sq: Tensor | None  # None: neither grafting nor the baseline needs it
    exp_avg_per_sample_sq: Tensor | None

    def flat(self) -> _Tensors | None:
        """The same as one-dimensional views, where there are such."""
        views = flatten(self, read_only=(1, 2))
        return None if views is None else _Tensors(*views)


class _Coefficients(NamedTuple):
    """What changes from step to step: numbers, tensors of shape (), or columns with a row for each row of a stack."""

    weight: Any  # 1 - beta1
    weight_sq: Any  # 1 - beta2
    weight_per_sample_sq: Any  # 1 - beta3
    num_samples: Any
    debias_sq: Any  # √(1 - beta2^t)
    debias_per_sample_sq: Any  # √(1 - beta3^k)
    eps: Any
    step_size: Any  # lr debias_per_sample_sq / (1 - beta1^t)
    decay: Any  # 1 - lr weight_decay


@functools.lru_cache(maxsize=64)  # nearly always the same for all parameters of a group
def _coefficients(
    lr: float,
    betas: tuple[float, float, float],
    eps: float,
    weight_decay: float,
    step: float,
    num_statistics: float,
    num_samples: int,
) -> _Coefficients:
    beta1, beta2, beta3 = betas
    debias_per_sample_sq = math.sqrt(1 - beta3**num_statistics)
    return _Coefficients(
        weight=1 - beta1,
        weight_sq=1 - beta2,
        weight_per_sample_sq=1 - beta3,
        num_samples=num_samples,
        debias_sq=math.sqrt(1 - beta2**step),
        debias_per_sample_sq=debias_per_sample_sq,
        eps=eps,
        step_size=lr * debias_per_sample_sq / (1 - beta1**step),
        decay=1 - lr * weight_decay,
    )


def _update_moments(
    tensors: _Tensors, c: _Coefficients, graft: bool, maximize: bool, dim: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Update the averages; with grafting, return the norms of the baseline and of the direction.

    Both are those of the debiased steps times ``debias_sq`` and ``debias_per_sample_sq``: m/√(w/d²) = d m/√w.
    """
    _, grad, statistic, exp_avg, exp_avg_sq, exp_avg_per_sample_sq = tensors
    assert statistic is not None
    assert exp_avg_per_sample_sq is not None
    grad = grad.to(exp_avg.dtype)
    if maximize:
        grad = -grad
    exp_avg.lerp_(grad, c.weight)
    exp_avg_per_sample_sq.lerp_(statistic.to(exp_avg.dtype) * c.num_samples, c.weight_per_sample_sq)
    if exp_avg_sq is not None:
        exp_avg_sq.lerp_(grad * grad, c.weight_sq)
    if not graft:
        return None
    assert exp_avg_sq is not None
    baseline = exp_avg / exp_avg_sq.sqrt().clamp_(min=c.eps * c.debias_sq)
    direction = exp_avg / exp_avg_per_sample_sq.sqrt().clamp_(min=c.eps * c.debias_per_sample_sq)
    keep = dim is not None
    return (
        torch.linalg.vector_norm(baseline, dim=dim, keepdim=keep),
        torch.linalg.vector_norm(direction, dim=dim, keepdim=keep),
    )


def _update_param(tensors: _Tensors, c: _Coefficients, norms: tuple[Tensor, Tensor] | None) -> None:
    """Move the parameter by the averages that `_update_moments` left."""
    param, exp_avg, exp_avg_per_sample_sq = tensors.param, tensors.exp_avg, tensors.exp_avg_per_sample_sq
    assert exp_avg_per_sample_sq is not None
    step_size = c.step_size
    if norms is not None:
        step_size = step_size * (c.debias_sq * norms[0]) / (c.debias_per_sample_sq * norms[1] + c.eps)
    change = exp_avg / exp_avg_per_sample_sq.sqrt().clamp_(min=c.eps * c.debias_per_sample_sq) * step_size
    if param.dtype == change.dtype:
        param.mul_(c.decay).sub_(change)
    else:
        param.copy_(param.to(change.dtype).mul_(c.decay).sub_(change))


# ---------------------------------------------------------------------------------------------------------------------
# The ways to run it


class _Update(NamedTuple):
    """One parameter's update, ready to run."""

    group: dict[str, Any]
    state: dict[str, Any]
    tensors: _Tensors
    is_flat: bool
    coefficients: _Coefficients


class _Kind(NamedTuple):
    """What a kernel is compiled for, and what the tensors of a stack have in common."""

    device: torch.device
    dtypes: tuple[torch.dtype | None, ...]
    graft: bool
    maximize: bool


def _plan(updates: Sequence[_Update]) -> list[Callable[[], None]]:
    """Sort the updates by the way in which they run; compiles what has to be compiled."""
    batches: defaultdict[tuple[Any, ...], list[_Update]] = defaultdict(list)
    compile_unasked = sum(_num_elements(update) for update in updates if _leaves_choice(update.group)) >= _COMPILE_FROM
    for update in updates:
        group, tensors = update.group, update.tensors
        if tensors.statistic is None:
            batches[_run_baseline, id(group), update.is_flat].append(update)
            continue
        unasked = _leaves_choice(group)
        numel = tensors.param.numel()
        if _num_elements(update) and (group["fused"] or (unasked and compile_unasked)):
            batches[_run_compiled, _kind(update)].append(update)
        elif update.is_flat and numel <= MAX_SMALL and (group["fused"] or group["foreach"] or unasked):
            batches[_run_stacked, _kind(update), numel].append(update)
        elif numel:
            batches[(_run_one_by_one,)].append(update)
    plan = []
    for (run, *key), batch in batches.items():
        if run is _run_compiled:
            kernels = _kernels(key[0])
            if isinstance(kernels, _Kernels):
                plan.append(functools.partial(_run_compiled, batch, kernels))
                continue
            if any(update.group["fused"] for update in batch):
                raise kernels
            run = _run_one_by_one
        plan.append(functools.partial(run, batch))
    return plan


def _leaves_choice(group: dict[str, Any]) -> bool:
    return group["fused"] is None and group["foreach"] is None


def _num_elements(update: _Update) -> int:
    """Elements that a kernel could take."""
    numel = update.tensors.param.numel()
    return numel if update.is_flat and numel > MAX_SMALL and update.tensors.statistic is not None else 0


def _kind(update: _Update) -> _Kind:
    dtypes = tuple([None if tensor is None else tensor.dtype for tensor in update.tensors])
    return _Kind(update.tensors.param.device, dtypes, update.group["graft"], update.group["maximize"])


def _run_one_by_one(batch: Sequence[_Update]) -> None:
    for update in batch:
        tensors, c = update.tensors, update.coefficients
        parts = [tensors]
        block = _BLOCK * torch.get_num_threads()
        if update.is_flat and tensors.param.is_cpu and tensors.param.numel() > block:
            columns = (
                [None] * math.ceil(tensors.param.numel() / block) if tensor is None else tensor.split(block) for tensor in tensors
            )
            parts = [_Tensors(*part) for part in zip(*columns, strict=True)]
        norms = [_update_moments(part, c, update.group["graft"], update.group["maximize"]) for part in parts]
        norm = norms[0]
        if norm is not None and len(parts) > 1:
            baselines, directions = zip(*norms, strict=True)
            norm = torch.linalg.vector_norm(torch.stack(baselines)), torch.linalg.vector_norm(torch.stack(directions))
        for part in parts:
            _update_param(part, c, norm)


def _run_stacked(batch: Sequence[_Update]) -> None:
    if len(batch) == 1:
        _run_one_by_one(batch)
        return
    columns = list(zip(*(update.tensors for update in batch), strict=True))
    stack = _Tensors(*(None if column[0] is None else torch.stack(column) for column in columns))
    c = _Coefficients(*_coefficient_rows(batch).T.unsqueeze(-1))
    norms = _update_moments(stack, c, batch[0].group["graft"], batch[0].group["maximize"], dim=1)
    _update_param(stack, c, norms)
    for name, column, rows in zip(_Tensors._fields, columns, stack, strict=True):
        if rows is not None and name not in ("grad", "statistic"):
            torch._foreach_copy_(list(column), list(rows))


def _run_compiled(batch: Sequence[_Update], kernels: _Kernels) -> None:
    for update, row in zip(batch, _coefficient_rows(batch), strict=True):
        kernels(update.tensors, row)


def _coefficient_rows(batch: Sequence[_Update]) -> Tensor:
    exp_avg = batch[0].tensors.exp_avg
    return torch.tensor([update.coefficients for update in batch], dtype=exp_avg.dtype, device=exp_avg.device)


def _run_baseline(batch: Sequence[_Update]) -> None:
    """The step of `torch.optim.AdamW`, for updates of one group."""
    group = batch[0].group
    tensors = [update.tensors for update in batch]
    params = [t.param.to(t.exp_avg.dtype) for t in tensors]
    foreach, fused = group["foreach"], group["fused"]
    if fused or _leaves_choice(group):
        # torch's fused kernel reads memory in order, so it needs flat views; off the CPU it also wants `step` on the device.
        fused = batch[0].is_flat and all(param.is_cpu for param in params)
        foreach = None if fused else group["fused"]
    adamw(
        params,
        [t.grad.to(t.exp_avg.dtype) for t in tensors],
        [t.exp_avg for t in tensors],
        [t.exp_avg_sq for t in tensors if t.exp_avg_sq is not None],
        [],
        [update.state["step"] for update in batch],
        foreach=foreach,
        fused=fused or None,
        amsgrad=False,
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        lr=float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=group["maximize"],
    )
    for t, param in zip(tensors, params, strict=True):
        if param is not t.param:
            t.param.copy_(param)


class _Kernels:
    """The compiled update of one kind of tensors: two kernels with grafting (the norms stand between), one without."""

    def __init__(self, kind: _Kind) -> None:
        self._flags = kind.graft, kind.maximize
        if kind.graft:
            self._moments, self._param = compile_flat(_moments_kernel), compile_flat(_param_kernel)
        else:
            self._both = compile_flat(_both_kernel)
        sample = (
            None if dtype is None else torch.zeros(NUM_SAMPLE_ELEMENTS, dtype=dtype, device=kind.device) for dtype in kind.dtypes
        )
        tensors = _Tensors(*sample)  # type: ignore[arg-type]
        self(tensors, torch.ones(2, len(_Coefficients._fields), dtype=tensors.exp_avg.dtype, device=kind.device)[1])

    def __call__(self, tensors: _Tensors, row: Tensor) -> None:
        graft, maximize = self._flags
        if graft:
            norms = self._moments(tensors, row, graft, maximize)
            self._param(tensors, row, norms)
        else:
            self._both(tensors, row, graft, maximize)


@functools.cache
def _kernels(kind: _Kind) -> _Kernels | Exception:
    try:
        return _Kernels(kind)
    except Exception as error:  # torch.compile fails in many ways: no C++ compiler, an unwritable cache, an Inductor bug
        warnings.warn(
            f"TGAdamW runs uncompiled and several times slower, because torch.compile failed ({type(error).__name__}: {error}). "
            "Pass foreach=True to run so without this warning, fused=True to make it an error",
            stacklevel=2,
        )
        return error


def _from_row(row: Tensor) -> _Coefficients:
    return _Coefficients(*(row[index] for index in range(len(_Coefficients._fields))))


def _moments_kernel(tensors: _Tensors, row: Tensor, graft: bool, maximize: bool) -> tuple[Tensor, Tensor] | None:
    return _update_moments(tensors, _from_row(row), graft, maximize)


def _param_kernel(tensors: _Tensors, row: Tensor, norms: tuple[Tensor, Tensor]) -> None:
    _update_param(tensors, _from_row(row), norms)


def _both_kernel(tensors: _Tensors, row: Tensor, graft: bool, maximize: bool) -> None:
    c = _from_row(row)
    _update_param(tensors, c, _update_moments(tensors, c, graft, maximize))
