"""Lists of tensors as one vector."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import state_dtype


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements in one new vector, at least float32."""
    dtype = reduce(torch.promote_types, map(state_dtype, tensors))
    return torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a vector in the shapes of other tensors and their dtypes, at least float32; no views of the vector."""
    parts = vector.split([tensor.numel() for tensor in like])
    return [
        part.reshape(tensor.shape).to(state_dtype(tensor), copy=True) for part, tensor in zip(parts, like, strict=True)
    ]


def inner_product(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The sum over all elements of the products of two lists of tensors."""
    return sum(float((a.to(state_dtype(b)) * b).sum()) for a, b in zip(left, right, strict=True))
