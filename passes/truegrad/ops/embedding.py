"""``graphopt::embedding``: ``aten.embedding`` with the statistics of the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from graphopt.passes.truegrad.ops.registration import decomposition, differentiable
from graphopt.passes.truegrad.ops.statistics import NORM, POSITION, SQUARE, by_sample, in_order, split, wide


@torch.library.custom_op("graphopt::embedding_sums", mutates_args=())
def embedding_sums(
    grad: Tensor, indices: Tensor, owed: Tensor | None, num_rows: int, padding_idx: int, norms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, S, D), (N, S) -> gradient of the table, sum over samples of squared gradients, each (V, D), and squared norms (N,).

    Positions of one sample that look up the same row are added before squaring: they are sorted into segments of (sample, row),
    so memory is O(N S D) whatever V is. ``owed`` (N, S, D), if given, is what the sample's other uses of the table contribute
    to the row that the position looks up: it adds the cross term ``2 * grad * owed``. The norms are empty unless asked for.
    """
    num, positions, width = grad.shape
    dtype = torch.promote_types(grad.dtype, torch.float32)
    rows = grad.reshape(-1, width).to(dtype)
    flat = indices.reshape(-1)
    if padding_idx >= 0:
        rows = rows * (flat != padding_idx).unsqueeze(1)
    total = torch.zeros(num_rows, width, dtype=dtype, device=grad.device)
    squares = torch.zeros_like(total)
    per_sample = torch.zeros(num if norms else 0, dtype=dtype, device=grad.device)
    sample = torch.arange(num, device=grad.device).repeat_interleave(positions)
    keys, order = torch.sort(sample * num_rows + flat)
    starts = torch.ones_like(keys)
    starts[1:] = keys[1:] != keys[:-1]
    segment = starts.cumsum(0) - 1
    per_segment = torch.zeros_like(rows).index_add_(0, segment, rows[order])
    looked_up = torch.zeros_like(keys).index_copy_(0, segment, keys % num_rows)
    total.index_add_(0, looked_up, per_segment)
    squares_of_segments = per_segment.square()
    squares.index_add_(0, looked_up, squares_of_segments)
    if norms:
        owner = torch.zeros_like(keys).index_copy_(0, segment, keys // num_rows)
        per_sample.index_add_(0, owner, squares_of_segments.sum(1))
    if owed is not None:
        cross = 2 * rows * owed.reshape(-1, width).to(dtype)
        squares.index_add_(0, flat, cross)
        if norms:
            per_sample.add_(cross.view(num, -1).sum(1))
    return total, squares, per_sample


@embedding_sums.register_fake
def _(
    grad: Tensor, indices: Tensor, owed: Tensor | None, num_rows: int, padding_idx: int, norms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    shape = (num_rows, grad.shape[2])
    per_sample = grad.new_empty((grad.shape[0] if norms else 0,), dtype=dtype)
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype), per_sample


@torch.library.custom_op("graphopt::embedding", mutates_args=())
def embedding(
    weight: Tensor,
    companions: Sequence[Tensor],
    wanted: str,
    indices: Tensor,
    padding_idx: int,
    axis: int,
    outer: int,
    num: int,
    inner: int,
    per_token: bool,
) -> Tensor:
    """``aten.embedding`` of a table (V, D); the rows are those of ``indices``."""
    return cast(Tensor, torch.ops.aten.embedding.default(weight, indices, padding_idx))


def _fake(weight: Tensor, companions: Sequence[Tensor], wanted: str, indices: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


def embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save what `embedding_backward` needs."""
    weight, _, ctx.wanted, indices, ctx.padding_idx, *ctx.rows, ctx.per_token = inputs
    ctx.save_for_backward(indices)
    ctx.num_rows, ctx.dtype = weight.shape[0], weight.dtype


def embedding_backward(ctx: Any, grad: Tensor, owed: Tensor | None = None) -> tuple[Any, ...]:
    """Gradient and statistics of the table; ``owed`` as in `embedding_sums`."""
    (indices,) = ctx.saved_tensors
    wanted = split(ctx.wanted)
    found: dict[str, Tensor] = {}
    if POSITION in wanted:
        found[POSITION] = _squares_of_positions(ctx, grad, indices)
    if ctx.per_token:  # each look-up is a sample of one position
        indices, grad = indices.reshape(-1, 1), grad.reshape(-1, 1, grad.shape[-1])
    else:
        indices, grad = by_sample(indices, ctx.rows, 0), by_sample(grad, ctx.rows, 1)
    if owed is not None:
        owed = owed.reshape(grad.shape)
    total, found[SQUARE], found[NORM] = torch.ops.graphopt.embedding_sums(
        grad, indices, owed, ctx.num_rows, ctx.padding_idx, NORM in wanted
    )
    return total.to(ctx.dtype), in_order(ctx.wanted, found), None, None, None, None, None, None, None, None


def _squares_of_positions(ctx: Any, grad: Tensor, indices: Tensor) -> Tensor:
    rows, flat = wide(grad).square().reshape(-1, grad.shape[-1]), indices.reshape(-1)
    backward = torch.ops.aten.embedding_dense_backward.default
    return cast(Tensor, backward(rows, flat, ctx.num_rows, ctx.padding_idx, False))


differentiable(embedding, _fake, embedding_setup, embedding_backward)


@decomposition(embedding)
def _plain_embedding(
    weight: Tensor, companions: Sequence[Tensor], wanted: str, indices: Tensor, padding_idx: int, *_: Any
) -> Tensor:
    return cast(Tensor, torch.ops.aten.embedding.default(weight, indices, padding_idx))
