"""The update of the TG optimizers, written once, and the ways to run it: one by one, in stacks, in compiled kernels.

Which averages there are makes the method (all others are ``None``):

    TGAdamW     exp_avg             momentum, then normalise
    TGLaProp    exp_avg_normalized  normalise, then momentum; of its own for baseline and per-sample direction
    TGRMSProp   neither             normalise

and the averages of squares normalise: ``exp_avg_sq`` for the baseline, ``exp_avg_per_sample_sq`` for the direction that is
taken.

Grafting needs the norms of both directions over the whole tensor before the parameter can move, so an update has two
parts: `_update_averages` (reads gradient, statistic and averages, writes the averages) and `_update_param` (reads what
the direction needs, moves the parameter). Bytes of traffic for a float32 element: TGAdamW 48, TGLaProp 52, TGRMSProp
40, against 28 of AdamW.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from graphopt.optim.flat_kernels import MAX_SMALL, NUM_SAMPLE_ELEMENTS, compile_flat, flatten
from graphopt.optim.foreach import foreach

Preconditioner = Literal["mean_square", "variance", "squared_mean"]

# Elements from which kernels are compiled unasked: with about 4 ns saved per element and step, some 1000 steps of 2**20
# elements win back the seconds that compiling takes.
_COMPILE_FROM = 2**20

# Elements for each thread of the CPU to work on at a time, so that intermediate results stay in its cache.
_BLOCK = 2**16

_UNCOMPILED = (
    "{optimizer} runs uncompiled, several times slower, because torch.compile failed ({type}: {error}). "
    "Pass foreach=True to go on so without this warning, or fused=True to make it an error"
)


class Tensors(NamedTuple):
    """The tensors of one update, all of one shape."""

    param: Tensor
    grad: Tensor
    statistic: Tensor | None  # None: the baseline step, or a preconditioner that does not read it
    pull: Tensor | None  # what a WeightDecayChain subtracts; None: plain decay
    exp_avg: Tensor | None  # momentum of the gradient
    exp_avg_sq: Tensor | None  # None: neither grafting nor the baseline needs it
    exp_avg_normalized: Tensor | None  # momentum of the normalised gradient, for the baseline
    exp_avg_per_sample_sq: Tensor | None  # None: the baseline step
    exp_avg_per_sample_normalized: Tensor | None

    def flat(self) -> Tensors | None:
        """The same as one-dimensional views, where there are such."""
        views = flatten(self, read_only=(1, 2))
        return None if views is None else Tensors._make(views)


NUM_INPUTS = 4
AVERAGES = Tensors._fields[NUM_INPUTS:]


class Coefficients(NamedTuple):
    """What changes from step to step: numbers, tensors of shape (), or columns with one row for each row of a stack."""

    weight: Any  # 1 - beta of exp_avg or exp_avg_normalized
    weight_sq: Any
    weight_per_sample: Any
    weight_per_sample_sq: Any
    num_samples: Any
    debias_sq: Any  # √(1 - beta^t) of exp_avg_sq
    debias_per_sample_sq: Any
    eps: Any
    scale: Any  # what the norm of the baseline's direction lacks
    scale_per_sample: Any  # what the norm of the per-sample direction lacks
    step_size: Any
    decay: Any  # 1 - lr weight_decay
    pull: Any  # lr weight_decay


class Numbers(NamedTuple):
    """The options of a group as numbers."""

    lr: float
    beta: float  # of the momentum, for the baseline where the two directions have their own
    beta_sq: float
    beta_per_sample: float
    beta_per_sample_sq: float
    eps: float
    weight_decay: float


class Update(NamedTuple):
    """One parameter's update, ready to run."""

    group: dict[str, Any]
    state: dict[str, Any]
    tensors: Tensors
    is_flat: bool
    coefficients: Coefficients

    @property
    def is_adamw(self) -> bool:
        """Whether this is the step of `torch.optim.AdamW`, which has kernels of its own."""
        return self.tensors.exp_avg_per_sample_sq is None and self.tensors.exp_avg is not None

    @property
    def leaves_choice(self) -> bool:
        """Whether the group asks for no implementation."""
        return self.group["fused"] is None and self.group["foreach"] is None

    @property
    def num_kernel_elements(self) -> int:
        """Elements, if a compiled kernel could take them."""
        numel = self.tensors.param.numel()
        return numel if self.is_flat and numel > MAX_SMALL and not self.is_adamw else 0

    @property
    def kind(self) -> _Kind:
        """What a kernel is compiled for, and what the rows of a stack have in common."""
        dtypes = tuple([None if tensor is None else tensor.dtype for tensor in self.tensors])
        return _Kind(self.tensors.param.device, dtypes, self.flags)

    @property
    def flags(self) -> Flags:
        """The choices that are made when a kernel is compiled."""
        grafts = self.group["graft"] and self.tensors.exp_avg_per_sample_sq is not None
        return Flags(grafts, self.group["maximize"], self.group["preconditioner"])


class Flags(NamedTuple):
    """The choices that are made when a kernel is compiled."""

    graft: bool
    maximize: bool
    preconditioner: Preconditioner


class _Kind(NamedTuple):
    device: torch.device
    dtypes: tuple[torch.dtype | None, ...]
    flags: Flags


@functools.lru_cache(maxsize=64)  # the same for nearly all parameters of a group
def make_coefficients(
    numbers: Numbers,
    step: float,
    num_statistics: float,
    num_samples: float,
    normalizes_first: bool,
    is_baseline: bool,
) -> Coefficients:
    """The coefficients of step number ``step``, with statistic number ``num_statistics``.

    Args:
        numbers: options of the group.
        step: counts from 1.
        num_statistics: counts from 1.
        num_samples: what the statistic is multiplied with.
        normalizes_first: the momentum follows the normalisation (TGLaProp), so that each direction has its own.
        is_baseline: the step is the baseline's.
    """
    lr, beta, beta_sq, beta_per_sample, beta_per_sample_sq, eps, weight_decay = numbers
    debias_sq = math.sqrt(1 - beta_sq**step)
    debias_per_sample_sq = math.sqrt(1 - beta_per_sample_sq**num_statistics)
    if normalizes_first:
        scale, scale_per_sample = 1 / (1 - beta**step), 1 / (1 - beta_per_sample**num_statistics)
    else:  # the correction of the roots; that of the momentum is the same for both directions, and no part of the norms
        scale, scale_per_sample = debias_sq, debias_per_sample_sq
    step_size = lr * (scale if is_baseline else scale_per_sample)
    return Coefficients(
        weight=1 - beta,
        weight_sq=1 - beta_sq,
        weight_per_sample=1 - beta_per_sample,
        weight_per_sample_sq=1 - beta_per_sample_sq,
        num_samples=num_samples,
        debias_sq=debias_sq,
        debias_per_sample_sq=debias_per_sample_sq,
        eps=eps,
        scale=scale,
        scale_per_sample=scale_per_sample,
        step_size=step_size if normalizes_first else step_size / (1 - beta**step),
        decay=1 - lr * weight_decay,
        pull=lr * weight_decay,
    )


def plan(optimizer: str, updates: Sequence[Update]) -> list[Callable[[], None]]:
    """Choose how each update runs, and compile what has to be compiled.

    Args:
        optimizer: name for a warning.
        updates: all updates of a step.

    Returns:
        Functions without arguments that make the updates.

    Raises:
        Exception: compiling failed in a group with ``fused=True``; nothing was changed.
    """
    compile_unasked = sum(u.num_kernel_elements for u in updates if u.leaves_choice) >= _COMPILE_FROM
    compiled: defaultdict[_Kind, list[Update]] = defaultdict(list)
    stacked: defaultdict[tuple[_Kind, int], list[Update]] = defaultdict(list)
    adamws: defaultdict[tuple[int, bool], list[Update]] = defaultdict(list)
    rest: list[Update] = []
    for update in updates:
        group, numel = update.group, update.tensors.param.numel()
        if update.is_adamw:
            adamws[id(group), update.is_flat].append(update)
        elif update.num_kernel_elements and (group["fused"] or (update.leaves_choice and compile_unasked)):
            compiled[update.kind].append(update)
        elif update.is_flat and numel <= MAX_SMALL and (group["fused"] or group["foreach"] or update.leaves_choice):
            stacked[update.kind, numel].append(update)
        else:
            rest.append(update)
    runs: list[Callable[[], None]] = []
    for kind, batch in compiled.items():
        kernels = _compile_kernels(kind)
        if isinstance(kernels, _Kernels):
            runs.append(functools.partial(_run_compiled, batch, kernels))
        elif any(update.group["fused"] for update in batch):
            raise kernels
        else:
            text = _UNCOMPILED.format(optimizer=optimizer, type=type(kernels).__name__, error=kernels)
            warnings.warn(text, stacklevel=2)
            rest += batch
    runs += [functools.partial(_run_stacked, batch) for batch in stacked.values()]
    runs += [functools.partial(_run_adamw, batch) for batch in adamws.values()]
    runs.append(functools.partial(_run_one_by_one, rest))
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# The maths: on a tensor, a part of one, or a stack of small ones; eager and compiled


def _update_averages(
    tensors: Tensors, c: Coefficients, flags: Flags, dim: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Update the averages; with grafting, return the norms of baseline and direction before scaling.

    Debiasing is left to the coefficients: m / max(√(w / d²), ε) = d · m / max(√w, ε d).
    """
    grad = _ascent(tensors, flags)
    if tensors.exp_avg is not None:
        tensors.exp_avg.lerp_(grad, c.weight)
    if tensors.exp_avg_sq is not None:
        tensors.exp_avg_sq.lerp_(grad * grad, c.weight_sq)
    if tensors.exp_avg_per_sample_sq is not None:
        square = _square(grad, tensors.statistic, c.num_samples, flags.preconditioner)
        tensors.exp_avg_per_sample_sq.lerp_(square, c.weight_per_sample_sq)
    if tensors.exp_avg_normalized is not None:
        normalized = _normalize(grad, tensors.exp_avg_sq, c.eps * c.debias_sq) * c.debias_sq
        tensors.exp_avg_normalized.lerp_(normalized, c.weight)
    if tensors.exp_avg_per_sample_normalized is not None:
        floor = c.eps * c.debias_per_sample_sq
        normalized = _normalize(grad, tensors.exp_avg_per_sample_sq, floor) * c.debias_per_sample_sq
        tensors.exp_avg_per_sample_normalized.lerp_(normalized, c.weight_per_sample)
    if not flags.graft:
        return None
    keep = dim is not None
    return (
        torch.linalg.vector_norm(_baseline_direction(tensors, c, flags), dim=dim, keepdim=keep),
        torch.linalg.vector_norm(_direction(tensors, c, flags), dim=dim, keepdim=keep),
    )


def _update_param(tensors: Tensors, c: Coefficients, flags: Flags, norms: tuple[Tensor, Tensor] | None) -> None:
    """Move the parameter by the averages that `_update_averages` left."""
    param, pull, step_size = tensors.param, tensors.pull, c.step_size
    if norms is not None:
        step_size = step_size * (c.scale * norms[0]) / (c.scale_per_sample * norms[1] + c.eps)
    is_baseline = tensors.exp_avg_per_sample_sq is None
    change = (_baseline_direction if is_baseline else _direction)(tensors, c, flags) * step_size
    if pull is not None:
        change = change + pull * c.pull
    # Decay and step together, so that a parameter of low precision is rounded once.
    wide = param if param.dtype == change.dtype else param.to(change.dtype)
    if pull is None:
        wide.mul_(c.decay)
    wide.sub_(change)
    if wide is not param:
        param.copy_(wide)


def _direction(tensors: Tensors, c: Coefficients, flags: Flags) -> Tensor:
    if tensors.exp_avg_per_sample_normalized is not None:
        return tensors.exp_avg_per_sample_normalized
    numerator = _ascent(tensors, flags) if tensors.exp_avg is None else tensors.exp_avg
    return _normalize(numerator, tensors.exp_avg_per_sample_sq, c.eps * c.debias_per_sample_sq)


def _baseline_direction(tensors: Tensors, c: Coefficients, flags: Flags) -> Tensor:
    if tensors.exp_avg_normalized is not None:
        return tensors.exp_avg_normalized
    numerator = _ascent(tensors, flags) if tensors.exp_avg is None else tensors.exp_avg
    return _normalize(numerator, tensors.exp_avg_sq, c.eps * c.debias_sq)


def _normalize(numerator: Tensor, square: Tensor | None, floor: Any) -> Tensor:
    assert square is not None
    root: Tensor = square.sqrt().clamp_(min=floor)
    return numerator / root


def _square(grad: Tensor, statistic: Tensor | None, num_samples: Any, preconditioner: Preconditioner) -> Tensor:
    if preconditioner == "squared_mean":
        return grad * grad
    assert statistic is not None
    mean_square: Tensor = statistic.to(grad.dtype) * num_samples
    return mean_square if preconditioner == "mean_square" else (mean_square - grad * grad).clamp_(min=0)


def _ascent(tensors: Tensors, flags: Flags) -> Tensor:
    """The gradient of what is minimised, in the dtype of the averages."""
    grad = tensors.grad.to(_state(tensors).dtype)
    return -grad if flags.maximize else grad


def _state(tensors: Tensors) -> Tensor:
    state = tensors.exp_avg_per_sample_sq if tensors.exp_avg_sq is None else tensors.exp_avg_sq
    assert state is not None
    return state


# ----------------------------------------------------------------------------------------------------------------------
# The ways to run it


def _run_one_by_one(batch: Sequence[Update]) -> None:
    for update in batch:
        parts, c = _blocks(update), update.coefficients
        norms = [_update_averages(part, c, update.flags) for part in parts]
        norm = norms[0]
        if norm is not None and len(parts) > 1:
            baselines, directions = zip(*norms, strict=True)
            norm = (
                torch.linalg.vector_norm(torch.stack(baselines)),
                torch.linalg.vector_norm(torch.stack(directions)),
            )
        for part in parts:
            _update_param(part, c, update.flags, norm)


def _blocks(update: Update) -> list[Tensors]:
    tensors, block = update.tensors, _BLOCK * torch.get_num_threads()
    numel = tensors.param.numel()
    if not (update.is_flat and tensors.param.is_cpu and numel > block):
        return [tensors]
    columns = [(None,) * math.ceil(numel / block) if tensor is None else tensor.split(block) for tensor in tensors]
    return [Tensors._make(part) for part in zip(*columns, strict=True)]


def _run_stacked(batch: Sequence[Update]) -> None:
    """Flat tensors of one kind and size, as the rows of matrices."""
    if len(batch) == 1:
        _run_one_by_one(batch)
        return
    columns = list(zip(*(update.tensors for update in batch), strict=True))
    stack = Tensors._make(None if column[0] is None else torch.stack(column) for column in columns)
    c = Coefficients._make(_coefficient_rows(batch).T.unsqueeze(-1))
    norms = _update_averages(stack, c, batch[0].flags, dim=1)
    _update_param(stack, c, batch[0].flags, norms)
    for index, (column, rows) in enumerate(zip(columns, stack, strict=True)):
        if rows is not None and (index == 0 or index >= NUM_INPUTS):
            torch._foreach_copy_(list(column), list(rows))


def _run_compiled(batch: Sequence[Update], kernels: _Kernels) -> None:
    for update, row in zip(batch, _coefficient_rows(batch), strict=True):
        kernels(update.tensors, row)


def _coefficient_rows(batch: Sequence[Update]) -> Tensor:
    state = _state(batch[0].tensors)
    return torch.tensor([update.coefficients for update in batch], dtype=state.dtype, device=state.device)


def _run_adamw(batch: Sequence[Update]) -> None:
    """The step of `torch.optim.AdamW`, for updates of one group that are all flat, or all not."""
    group = batch[0].group
    tensors = [update.tensors for update in batch]
    averages = [t.exp_avg for t in tensors if t.exp_avg is not None]
    params = [t.param.to(exp_avg.dtype) for t, exp_avg in zip(tensors, averages, strict=True)]
    pulls = [t.pull for t in tensors if t.pull is not None]
    if pulls:
        foreach("sub_", params, foreach("mul_", pulls, batch[0].coefficients.pull))
    in_lists, in_kernel = group["foreach"], group["fused"]
    # torch's fused kernel reads memory in order, so it needs flat views; off the CPU it wants `step` on the device,
    # too.
    if batch[0].is_flat and all(param.is_cpu for param in params) and (in_kernel or batch[0].leaves_choice):
        in_lists, in_kernel = False, True
    elif in_kernel:
        in_lists, in_kernel = True, False
    adamw(
        params,
        [t.grad.to(exp_avg.dtype) for t, exp_avg in zip(tensors, averages, strict=True)],
        averages,
        [t.exp_avg_sq for t in tensors if t.exp_avg_sq is not None],
        [],
        [update.state["step"] for update in batch],
        foreach=in_lists,
        fused=in_kernel,
        amsgrad=False,
        beta1=float(group["betas"][0]),
        beta2=float(group["betas"][1]),
        lr=float(group["lr"]),
        weight_decay=0.0 if pulls else float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=group["maximize"],
    )
    for t, param in zip(tensors, params, strict=True):
        if param is not t.param:
            t.param.copy_(param)


class _Kernels:
    """The compiled update of one kind of tensors: two kernels with grafting, one without."""

    def __init__(self, kind: _Kind) -> None:
        self._flags = kind.flags
        if kind.flags.graft:
            self._averages, self._param = compile_flat(_averages_kernel), compile_flat(_param_kernel)
        else:
            self._both = compile_flat(_both_kernel)
        size, device = NUM_SAMPLE_ELEMENTS, kind.device
        tensors = Tensors._make(
            None if dtype is None else torch.zeros(size, dtype=dtype, device=device) for dtype in kind.dtypes
        )
        rows = torch.ones(2, len(Coefficients._fields), dtype=_state(tensors).dtype, device=device)
        self(tensors, rows[1])  # compiles; a row of a matrix, as in _run_compiled

    def __call__(self, tensors: Tensors, row: Tensor) -> None:
        if self._flags.graft:
            norms = self._averages(tensors, row, self._flags)
            self._param(tensors, row, self._flags, norms)
        else:
            self._both(tensors, row, self._flags)


@functools.cache
def _compile_kernels(kind: _Kind) -> _Kernels | Exception:
    try:
        return _Kernels(kind)
    except Exception as error:  # many types: no C++ compiler, a cache folder that cannot be written, a bug in Inductor
        return error  # remembered, so that not every step tries again


def _averages_kernel(tensors: Tensors, row: Tensor, flags: Flags) -> tuple[Tensor, Tensor] | None:
    return _update_averages(tensors, _from_row(row), flags)


def _param_kernel(tensors: Tensors, row: Tensor, flags: Flags, norms: tuple[Tensor, Tensor]) -> None:
    _update_param(tensors, _from_row(row), flags, norms)


def _both_kernel(tensors: Tensors, row: Tensor, flags: Flags) -> None:
    c = _from_row(row)
    _update_param(tensors, c, flags, _update_averages(tensors, c, flags))


def _from_row(row: Tensor) -> Coefficients:
    return Coefficients._make(row[index] for index in range(len(Coefficients._fields)))
