"""One operation on many tensors: one call of torch's ``_foreach`` functions where they are plain, a loop where not.

DTensors (parameters under ``fully_shard``) have no rules for many of the ``_foreach`` functions.
"""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor


def foreach(name: str, tensors: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """Call a method of tensors on each of them.

    Args:
        name: of a method that has a ``torch._foreach_`` function, for instance ``"lerp_"``.
        tensors: none, one or many.
        *arguments: lists as long as `tensors`, or numbers that are the same for all.

    Returns:
        What the calls returned.
    """
    if not tensors:
        return []
    if all([type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors]):
        found = getattr(torch, f"_foreach_{name}")(tensors, *arguments)
        return list(tensors) if found is None else list(found)
    method = getattr(Tensor, name)
    columns = [argument if isinstance(argument, (list, tuple)) else repeat(argument) for argument in arguments]
    return [method(*row) for row in zip(tensors, *columns, strict=False)]


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each tensor, shape (), not distributed."""
    return [whole(norm) for norm in foreach("norm", tensors)]


def whole(scalar: Tensor) -> Tensor:
    """A tensor of shape () as a plain one, the same in all processes."""
    if type(scalar) is Tensor:
        return scalar
    from torch.distributed.tensor import DTensor  # takes a second to import

    return scalar.full_tensor() if isinstance(scalar, DTensor) else scalar
