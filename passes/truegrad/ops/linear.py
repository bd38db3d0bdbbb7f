"""``graphopt::linear``: ``aten.linear`` with the statistics of weight and bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt import _compat
from graphopt.passes.truegrad.ops import sums as sums  # registers graphopt::sums
from graphopt.passes.truegrad.ops.product import product
from graphopt.passes.truegrad.ops.registration import decomposition, differentiable
from graphopt.passes.truegrad.ops.statistics import (
    NORM,
    POSITION,
    SQUARE,
    by_sample,
    in_order,
    split,
    square_sum,
    squared_norms,
    wide,
)


@torch.library.custom_op("graphopt::linear", mutates_args=())
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_companions: Sequence[Tensor],
    bias_companions: Sequence[Tensor],
    wanted: str,
    axis: int,
    outer: int,
    num: int,
    inner: int,
    per_token: bool,
    square_dtype: torch.dtype | None,
) -> Tensor:
    """``aten.linear`` of a weight (O, I) and a bias (O,)."""
    with _compat.disable_autocast():
        return F.linear(input, weight, bias)


def linear_fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """The shape of the result."""
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, weight_companions, bias_companions, ctx.wanted, *ctx.rows, ctx.per_token, ctx.square_dtype = (
        inputs
    )
    ctx.save_for_backward(input, weight)
    ctx.of_weight, ctx.of_bias = ctx.wanted if weight_companions else "", ctx.wanted if bias_companions else ""
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    grad_input = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight, of_weight = weight_gradients(ctx, grad, input) if ctx.needs_input_grad[1] else (None, [])
    grad_bias, of_bias = bias_gradients(ctx, grad) if ctx.needs_input_grad[2] else (None, [])
    return grad_input, grad_weight, grad_bias, of_weight, of_bias, None, None, None, None, None, None, None


def weight_gradients(ctx: Any, grad: Tensor, input: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradient (O, I) and statistics of the weight.

    Args:
        ctx: has ``of_weight`` (statistics wanted), ``rows`` (grouping), ``per_token``, ``square_dtype`` and ``dtypes``.
        grad: (..., O).
        input: (..., I).
    """
    flat_grad, flat_input = grad.flatten(0, -2), input.flatten(0, -2)
    if not ctx.of_weight:
        return flat_grad.t() @ flat_input, []
    wanted = split(ctx.of_weight)
    found: dict[str, Tensor] = {}
    if ctx.per_token or _one_position(ctx, input):  # the closed form: the square of an outer product is one
        total = product(flat_grad, flat_input)
        found[SQUARE] = _squares_of_rows(ctx, flat_grad, flat_input)
        found[POSITION] = found[SQUARE]
        if NORM in wanted:
            found[NORM] = wide(flat_grad).square().sum(1) * wide(flat_input).square().sum(1)
    else:
        grad_NSO, input_NSI = by_sample(grad, ctx.rows, 1), by_sample(input, ctx.rows, 1)
        total, found[SQUARE], found[NORM] = torch.ops.graphopt.sums(grad_NSO, input_NSI, NORM in wanted)
        if POSITION in wanted:
            found[POSITION] = _squares_of_rows(ctx, flat_grad, flat_input)
    return total.to(ctx.dtypes[0]), in_order(ctx.of_weight, found)


def bias_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradient (O,) and statistics of the bias; ``ctx`` has ``of_bias``, ``rows`` and ``per_token``."""
    flat = grad.flatten(0, -2)
    if not ctx.of_bias:
        return flat.sum(0), []
    wanted = split(ctx.of_bias)
    rows = flat if ctx.per_token else by_sample(grad, ctx.rows, 1).sum(1)
    found = {SQUARE: square_sum(rows)}
    if NORM in wanted:
        found[NORM] = squared_norms(rows)
    if POSITION in wanted:
        found[POSITION] = square_sum(flat)
    return rows.sum(0), in_order(ctx.of_bias, found)


def _squares_of_rows(ctx: Any, grad: Tensor, input: Tensor) -> Tensor:
    """(R, O), (R, I) -> sum over rows of the squared outer products, (O, I)."""
    dtype = ctx.square_dtype or torch.promote_types(grad.dtype, torch.float32)
    left, right = grad.square().to(dtype), input.square().to(dtype)
    squares = product(left, right)
    return squares.to(torch.promote_types(ctx.dtypes[0], torch.float32))


def _one_position(ctx: Any, input: Tensor) -> bool:
    axis, outer, _, inner = ctx.rows
    others = [size for position, size in enumerate(input.shape[:-1]) if position != axis]
    return all(isinstance(size, int) and size == 1 for size in (*others, outer, inner))


differentiable(linear, linear_fake, _setup, _backward)


@decomposition(linear)
def plain_linear(input: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    """What Inductor compiles."""
    return cast(Tensor, torch.ops.aten.linear.default(input, weight, bias))
