"""Lists of tensors as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import state_dtype

_PLAIN_DTYPES = {torch.float32, torch.float64}
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one new vector, at least float32."""
    if _are_plain(tensors):
        vector: Tensor = torch._C._nn.flatten_dense_tensors(list(tensors)).detach()
        return vector.clone() if len(tensors) == 1 else vector
    dtype = reduce(torch.promote_types, map(state_dtype, tensors))
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor], is_own: bool = False) -> list[Tensor]:
    """The parts of a vector in the shapes of other tensors and their dtypes, at least float32.

    No views of the vector, unless nobody else has it (``is_own``).
    """
    if _are_plain(like) and vector.dtype == like[0].dtype and all(tensor.numel() for tensor in like):
        return list(torch._C._nn.unflatten_dense_tensors(vector if is_own else vector.clone(), list(like)))
    parts = vector.split([tensor.numel() for tensor in like])
    return [
        part.reshape(tensor.shape).to(state_dtype(tensor), copy=True) for part, tensor in zip(parts, like, strict=True)
    ]


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether one call can copy them all: many small tensors would take longer than what is done with the vector."""
    dtypes = {tensor.dtype for tensor in tensors}
    return len(dtypes) == 1 and dtypes <= _PLAIN_DTYPES and set(map(type, tensors)) <= _PLAIN_TYPES


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The sum over all elements of the products of two lists of tensors."""
    return sum(float((a.to(state_dtype(b)) * b).sum()) for a, b in zip(left, right, strict=True))
