"""The statistics that companions receive, and the rows they are computed from.

With G_n the gradient of sample n (shape of the parameter), and G_ns that of its position s:

    "square"    sum_n G_n^2                  shape of the parameter
    "norm"      sum over elements of G_n^2   (N,)
    "position"  sum_n sum_s G_ns^2           shape of the parameter
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SQUARE, NORM, POSITION = "square", "norm", "position"


def split(wanted: str) -> list[str]:
    """``"square,norm"`` -> its parts."""
    return wanted.split(",") if wanted else []


def in_order(wanted: str, found: dict[str, Tensor]) -> list[Tensor]:
    """The statistics in the order in which their companions stand."""
    return [found[name] for name in split(wanted)]


def by_sample(rows: Tensor, grouping: Sequence[int], trailing: int) -> Tensor:
    """(..., outer * N * inner, ..., *trailing) -> (N, S, *trailing); a view if the samples come first."""
    axis, outer, num, inner = grouping
    tail = rows.shape[rows.dim() - trailing :]
    if axis != 0 or not (isinstance(outer, int) and outer == 1):
        rows = rows.unflatten(axis, (outer, num, inner)).movedim(axis + 1, 0)
    positions = 1 if isinstance(num, int) and num == 0 else -1  # of no sample there is no number
    return rows.reshape(num, positions, *tail)


def wide(rows: Tensor) -> Tensor:
    """In at least float32."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def square_sum(rows: Tensor) -> Tensor:
    """Sum over the first axis of the squares, in at least float32."""
    return wide(rows).square().sum(0)


def squared_norms(rows: Tensor) -> Tensor:
    """(N, ...) -> (N,), in at least float32."""
    return wide(rows).square().reshape(rows.shape[0], -1).sum(1)
