"""The update of TGAdamW, written once, and the ways to run it: tensor by tensor, in stacks, in compiled kernels.

Grafting needs the norms of two directions over the whole tensor before the parameter can move, so an update has two
parts: `_update_moments` (reads gradient, statistic and averages, writes the averages) and `_update_param` (reads two
averages, moves the parameter): 48 bytes of traffic for a float32 element, against 28 of AdamW.
"""

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

from graphopt.optim.flat_kernels import MAX_SMALL, NUM_SAMPLE_ELEMENTS, compile_flat, flatten

# Elements from which kernels are compiled unasked: with about 4 ns saved per element and step, some 1000 steps of 2**20
# elements win back the seconds that compiling takes.
_COMPILE_FROM = 2**20

# Elements for each thread of the CPU to work on at a time, so that intermediate results stay in its cache.
_BLOCK = 2**16

_UNCOMPILED = (
    "TGAdamW runs uncompiled, several times slower, because torch.compile failed ({type}: {error}). "
    "Pass foreach=True to go on so without this warning, or fused=True to make it an error"
)


class Tensors(NamedTuple):
    """The tensors of one update, all of one shape."""

    param: Tensor
    grad: Tensor
    statistic: Tensor | None  # None: the baseline step
    exp_avg: Tensor
    exp_avg_sq: Tensor | None  # None: neither grafting nor the baseline needs it
    exp_avg_per_sample_sq: Tensor | None  # None: the baseline step

    def flat(self) -> Tensors | None:
        """The same as one-dimensional views, where there are such."""
        views = flatten(self, read_only=(1, 2))
        return None if views is None else Tensors._make(views)


class Coefficients(NamedTuple):
    """What changes from step to step: numbers, tensors of shape (), or columns with one row for each row of a stack."""

    weight: Any  # 1 - beta1
    weight_sq: Any  # 1 - beta2
    weight_per_sample_sq: Any  # 1 - beta3
    num_samples: Any
    debias_sq: Any  # √(1 - beta2^t)
    debias_per_sample_sq: Any  # √(1 - beta3^k)
    eps: Any
    step_size: Any  # lr debias_per_sample_sq / (1 - beta1^t)
    decay: Any  # 1 - lr weight_decay


class Update(NamedTuple):
    """One parameter's update, ready to run."""

    group: dict[str, Any]
    state: dict[str, Any]
    tensors: Tensors
    is_flat: bool
    coefficients: Coefficients

    @property
    def leaves_choice(self) -> bool:
        """Whether the group asks for no implementation."""
        return self.group["fused"] is None and self.group["foreach"] is None

    @property
    def num_kernel_elements(self) -> int:
        """Elements, if a compiled kernel could take them."""
        numel = self.tensors.param.numel()
        return numel if self.is_flat and numel > MAX_SMALL and self.tensors.statistic is not None else 0

    @property
    def kind(self) -> _Kind:
        """What a kernel is compiled for, and what the rows of a stack have in common."""
        dtypes = tuple([None if tensor is None else tensor.dtype for tensor in self.tensors])
        return _Kind(self.tensors.param.device, dtypes, self.group["graft"], self.group["maximize"])


class _Kind(NamedTuple):
    device: torch.device
    dtypes: tuple[torch.dtype | None, ...]
    graft: bool
    maximize: bool


@functools.lru_cache(maxsize=64)  # the same for nearly all parameters of a group
def make_coefficients(
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    eps: float,
    weight_decay: float,
    step: float,
    num_statistics: float,
    num_samples: float,
) -> Coefficients:
    """The coefficients of step number ``step``, with statistic number ``num_statistics``."""
    debias_per_sample_sq = math.sqrt(1 - beta3**num_statistics)
    return Coefficients(
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


def plan(updates: Sequence[Update]) -> list[Callable[[], None]]:
    """Choose how each update runs, and compile what has to be compiled.

    Returns:
        Functions without arguments that make the updates.

    Raises:
        Exception: compiling failed in a group with ``fused=True``; nothing was changed.
    """
    compile_unasked = sum(u.num_kernel_elements for u in updates if u.leaves_choice) >= _COMPILE_FROM
    compiled: defaultdict[_Kind, list[Update]] = defaultdict(list)
    stacked: defaultdict[tuple[_Kind, int], list[Update]] = defaultdict(list)
    baseline: defaultdict[tuple[int, bool], list[Update]] = defaultdict(list)
    rest: list[Update] = []
    for update in updates:
        group, numel = update.group, update.tensors.param.numel()
        if update.tensors.statistic is None:
            baseline[id(group), update.is_flat].append(update)
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
            warnings.warn(_UNCOMPILED.format(type=type(kernels).__name__, error=kernels), stacklevel=2)
            rest += batch
    runs += [functools.partial(_run_stacked, batch) for batch in stacked.values()]
    runs += [functools.partial(_run_baseline, batch) for batch in baseline.values()]
    runs.append(functools.partial(_run_one_by_one, rest))
    return runs


# ----------------------------------------------------------------------------------------------------------------------
# The maths: on a tensor, a part of one, or a stack of small ones; eager and compiled


def _update_moments(
    tensors: Tensors, c: Coefficients, graft: bool, maximize: bool, dim: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """Update the averages; with grafting, return the norms of baseline and direction before debiasing.

    Debiasing is left to the coefficients: m / max(√(w / d²), ε) = d · m / max(√w, ε d).
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


def _update_param(tensors: Tensors, c: Coefficients, norms: tuple[Tensor, Tensor] | None) -> None:
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


# ----------------------------------------------------------------------------------------------------------------------
# The ways to run it


def _run_one_by_one(batch: Sequence[Update]) -> None:
    for update in batch:
        parts, c = _blocks(update), update.coefficients
        norms = [_update_moments(part, c, update.group["graft"], update.group["maximize"]) for part in parts]
        norm = norms[0]
        if norm is not None and len(parts) > 1:
            baselines, directions = zip(*norms, strict=True)
            norm = (
                torch.linalg.vector_norm(torch.stack(baselines)),
                torch.linalg.vector_norm(torch.stack(directions)),
            )
        for part in parts:
            _update_param(part, c, norm)


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
    norms = _update_moments(stack, c, batch[0].group["graft"], batch[0].group["maximize"], dim=1)
    _update_param(stack, c, norms)
    for name, column, rows in zip(Tensors._fields, columns, stack, strict=True):
        if rows is not None and name not in ("grad", "statistic"):
            torch._foreach_copy_(list(column), list(rows))


def _run_compiled(batch: Sequence[Update], kernels: _Kernels) -> None:
    for update, row in zip(batch, _coefficient_rows(batch), strict=True):
        kernels(update.tensors, row)


def _coefficient_rows(batch: Sequence[Update]) -> Tensor:
    exp_avg = batch[0].tensors.exp_avg
    return torch.tensor([update.coefficients for update in batch], dtype=exp_avg.dtype, device=exp_avg.device)


def _run_baseline(batch: Sequence[Update]) -> None:
    """The step of `torch.optim.AdamW`, for updates of one group that are all flat, or all not."""
    group = batch[0].group
    tensors = [update.tensors for update in batch]
    params = [t.param.to(t.exp_avg.dtype) for t in tensors]
    foreach, fused = group["foreach"], group["fused"]
    # torch's fused kernel reads memory in order, so it needs flat views; off the CPU it wants `step` on the device,
    # too.
    if batch[0].is_flat and all(param.is_cpu for param in params) and (fused or batch[0].leaves_choice):
        foreach, fused = False, True
    elif fused:
        foreach, fused = True, False
    adamw(
        params,
        [t.grad.to(t.exp_avg.dtype) for t in tensors],
        [t.exp_avg for t in tensors],
        [t.exp_avg_sq for t in tensors if t.exp_avg_sq is not None],
        [],
        [update.state["step"] for update in batch],
        foreach=foreach,
        fused=fused,
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
    """The compiled update of one kind of tensors: two kernels with grafting, one without."""

    def __init__(self, kind: _Kind) -> None:
        self._flags = kind.graft, kind.maximize
        if kind.graft:
            self._moments, self._param = compile_flat(_moments_kernel), compile_flat(_param_kernel)
        else:
            self._both = compile_flat(_both_kernel)
        size, device = NUM_SAMPLE_ELEMENTS, kind.device
        tensors = Tensors._make(
            None if dtype is None else torch.zeros(size, dtype=dtype, device=device) for dtype in kind.dtypes
        )
        rows = torch.ones(2, len(Coefficients._fields), dtype=tensors.exp_avg.dtype, device=device)
        self(tensors, rows[1])  # compiles; a row of a matrix, as in _run_compiled

    def __call__(self, tensors: Tensors, row: Tensor) -> None:
        graft, maximize = self._flags
        if graft:
            norms = self._moments(tensors, row, graft, maximize)
            self._param(tensors, row, norms)
        else:
            self._both(tensors, row, graft, maximize)


@functools.cache
def _compile_kernels(kind: _Kind) -> _Kernels | Exception:
    try:
        return _Kernels(kind)
    except Exception as error:  # many types: no C++ compiler, a cache folder that cannot be written, a bug in Inductor
        return error  # remembered, so that not every step tries again


def _moments_kernel(tensors: Tensors, row: Tensor, graft: bool, maximize: bool) -> tuple[Tensor, Tensor] | None:
    return _update_moments(tensors, _from_row(row), graft, maximize)


def _param_kernel(tensors: Tensors, row: Tensor, norms: tuple[Tensor, Tensor]) -> None:
    _update_param(tensors, _from_row(row), norms)


def _both_kernel(tensors: Tensors, row: Tensor, graft: bool, maximize: bool) -> None:
    c = _from_row(row)
    _update_param(tensors, c, _update_moments(tensors, c, graft, maximize))


def _from_row(row: Tensor) -> Coefficients:
    return Coefficients._make(row[index] for index in range(len(Coefficients._fields)))
