"""Arithmetic that rules share, on tensors and on numbers that may be tensors of shape ().

Rules take the reductions of a whole tensor from here, so that a chain can be run on one-dimensional views, and on many small
tensors side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt._compat import amax, is_transformed, replicated
from graphopt.optim.core.context import Number


def state_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of what is remembered of a parameter: its own, at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def zeros(param: Tensor) -> Tensor:
    """Zeros like the parameter, for its state."""
    return torch.zeros_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format, requires_grad=False)


def full(param: Tensor, value: Number) -> Tensor:
    """A constant like the parameter, for its state."""
    return zeros(param) + value


def scalar(param: Tensor, value: float = 0.0) -> Tensor:
    """A number of shape () that is remembered of a parameter, on its device."""
    return torch.full((), value, dtype=state_dtype(param), device=param.device)


def mix(old: Tensor, new: Tensor, weight: Number) -> Tensor:
    """``(1 - weight) old + weight new``."""
    if isinstance(weight, Tensor):
        weight = weight.to(old.dtype)
    return torch.lerp(old, new.to(old.dtype), weight)


def average(old: Tensor, new: Tensor, decay: Number) -> Tensor:
    """An exponential moving average: ``decay old + (1 - decay) new``."""
    return mix(old, new, 1 - decay)


def debias(decay: Number, count: Tensor) -> Tensor:
    """``1 - decay ** count``: what an average of zeros at first has of the values since, shape ()."""
    return 1 - decay**count


def root(number: Number) -> Number:
    """The square root."""
    return number.sqrt() if isinstance(number, Tensor) else math.sqrt(number)


def larger(tensor: Tensor, floor: Number) -> Tensor:
    """The larger of each element and a number."""
    if isinstance(floor, Tensor):
        return torch.maximum(tensor, floor.to(tensor.dtype))
    return tensor.clamp(min=floor)


def smaller(tensor: Tensor, ceiling: Number) -> Tensor:
    """The smaller of each element and a number."""
    if isinstance(ceiling, Tensor):
        return torch.minimum(tensor, ceiling.to(tensor.dtype))
    return tensor.clamp(max=ceiling)


def choose(condition: bool | Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """``yes`` where the condition holds, else ``no``."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


_T = TypeVar("_T")


def when(condition: bool | Tensor, yes: Callable[[], _T], no: Callable[[], _T]) -> _T:
    """What one of two functions returns (tensors of equal shapes, or tuples of them); the other one is not called.

    Where the condition has no value yet (it is batched, traced or captured), both are called, and one result is chosen.
    """
    if isinstance(condition, Tensor) and _is_unknown(condition):
        chosen: _T = pytree.tree_map(lambda left, right: torch.where(condition, left, right), yes(), no())
        return chosen
    return yes() if condition else no()


def _is_unknown(condition: Tensor) -> bool:
    return is_transformed(condition) or (condition.is_cuda and torch.cuda.is_current_stream_capturing())


# ----------------------------------------------------------------------------------------------------------------------
# Reductions of one whole tensor, to shape (). Those of a DTensor are the same number in all processes.


def total(tensor: Tensor) -> Tensor:
    """The sum of all elements."""
    return replicated(tensor.sum())


def dot(left: Tensor, right: Tensor) -> Tensor:
    """The sum of products."""
    return replicated((left * right).sum())


def largest(tensor: Tensor) -> Tensor:
    """The largest element."""
    return amax(tensor)


def norm(tensor: Tensor, order: float = 2.0) -> Tensor:
    """The vector norm of order 1, 2, infinity or any other positive number."""
    if order == 2:
        return total(tensor * tensor).sqrt()
    if order == 1:
        return total(tensor.abs())
    if math.isinf(order):
        return largest(tensor.abs())
    return total(tensor.abs() ** order) ** (1 / order)


# ----------------------------------------------------------------------------------------------------------------------
# Reductions of all tensors together, to shape () on the device of the first; for `Rule.measure`


def total_of_all(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all elements of all tensors."""
    return _gather([total(tensor) for tensor in tensors]).sum()


def dot_of_all(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """The sum of products of all elements."""
    return _gather([dot(left, right) for left, right in zip(lefts, rights, strict=True)]).sum()


def norm_of_all(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm of all tensors as one vector."""
    norms = [norm(tensor, order) for tensor in tensors if tensor.numel() or not math.isinf(order)]
    return norm(_gather(norms), order) if norms else tensors[0].sum()


def _gather(numbers: Sequence[Tensor]) -> Tensor:
    return torch.stack([number.to(numbers[0].device) for number in numbers])
