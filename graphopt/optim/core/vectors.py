"""Lists of tensors as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import state_dtype

_SMALL = 2**12  # elements of a tensor, on average
_PLAIN_DTYPES = {torch.float32, torch.float64}
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one new vector, at least float32."""
    if are_plain(tensors):
        vector: Tensor = torch._C._nn.flatten_dense_tensors(list(tensors)).detach()
        return vector.clone() if len(tensors) == 1 else vector
    dtype = reduce(torch.promote_types, map(state_dtype, tensors))
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor], is_own: bool = False) -> list[Tensor]:
    """The parts of a vector in the shapes of other tensors and their dtypes, at least float32.

    No views of the vector, unless nobody else has it (``is_own``).
    """
    if are_plain(like) and vector.dtype == like[0].dtype and all(map(Tensor.numel, like)):
        return list(torch._C._nn.unflatten_dense_tensors(vector if is_own else vector.clone(), list(like)))
    parts = vector.split([tensor.numel() for tensor in like])
    return [
        part.reshape(tensor.shape).to(state_dtype(tensor), copy=True) for part, tensor in zip(parts, like, strict=True)
    ]


def are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether one call can do the same to all: for many small tensors calls take longer than what they do."""
    dtypes = {tensor.dtype for tensor in tensors}
    return len(dtypes) == 1 and dtypes <= _PLAIN_DTYPES and set(map(type, tensors)) <= _PLAIN_TYPES


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The sum over all elements of the products of two lists of tensors."""
    if _are_small(left) and are_plain([*left, *right]):
        return float(flatten(left).dot(flatten(right)))
    return sum(float((a.to(state_dtype(b)) * b).sum()) for a, b in zip(left, right, strict=True))


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that belong to nobody else, without a graph."""
    if (
        _are_small(tensors)
        and are_plain(tensors)
        and all(map(Tensor.numel, tensors))
        and all(map(Tensor.is_contiguous, tensors))
    ):
        return list(torch._C._nn.unflatten_dense_tensors(flatten(tensors), list(tensors)))
    return [tensor.detach().clone() for tensor in tensors]


def _are_small(tensors: Sequence[Tensor]) -> bool:
    """Whether there are many, so small that copying all of them together takes less time than a call for each."""
    return len(tensors) > 1 and sum(map(Tensor.numel, tensors)) < _SMALL * len(tensors)


def move(targets: Sequence[Tensor], starts: Sequence[Tensor], updates: Sequence[Tensor], step_size: float) -> None:
    """``target = start - update * step_size``, rounded as `apply_updates` rounds when the updates have been scaled before."""
    if are_plain([*targets, *starts, *updates]):
        torch._foreach_copy_(
            list(targets), torch._foreach_sub(list(starts), torch._foreach_mul(list(updates), step_size))
        )
        return
    for target, start, update in zip(targets, starts, updates, strict=True):
        target.copy_(start.to(torch.promote_types(start.dtype, update.dtype)) - update * step_size)


def scaled(tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    """All tensors times a number."""
    return (
        list(torch._foreach_mul(list(tensors), factor))
        if are_plain(tensors)
        else [tensor * factor for tensor in tensors]
    )
