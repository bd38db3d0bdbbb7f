"""``graphopt::per_sample`` and its kin: places where the gradients of samples, or of positions, arrive one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from graphopt.passes.truegrad.ops.registration import decomposition, differentiable, no_memory, nothing_to_save
from graphopt.passes.truegrad.ops.statistics import NORM, SQUARE, in_order, split, square_sum, squared_norms, wide


@torch.library.custom_op("graphopt::per_sample", mutates_args=())
def per_sample(param: Tensor, companions: Sequence[Tensor], wanted: str, num: int) -> Tensor:
    """(*shape) -> (N, *shape), without memory and without values: a place where per-sample gradients arrive.

    The backward receives them and returns their sum, the gradient, and their statistics.
    """
    return param.new_zeros(()).expand(num, *param.shape)


def _per_sample_fake(param: Tensor, companions: Sequence[Tensor], wanted: str, num: int) -> Tensor:
    return param.new_zeros(()).expand(num, *param.shape)


def _per_sample_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.wanted = inputs[2]


def _per_sample_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    found = {SQUARE: square_sum(grad)}
    if NORM in split(ctx.wanted):
        found[NORM] = squared_norms(grad)
    return grad.sum(0), in_order(ctx.wanted, found), None, None


differentiable(per_sample, _per_sample_fake, _per_sample_setup, _per_sample_backward)


@torch.library.custom_op("graphopt::per_position", mutates_args=())
def per_position(value: Tensor, companion: Tensor, shape: list[int]) -> Tensor:
    """Broadcast to ``shape``; the backward squares each position's gradient before it adds them up (``per="token"``)."""
    return value.expand(shape).clone()


def _shape_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _per_position_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return grad.sum_to_size(ctx.shape), wide(grad).square().sum_to_size(ctx.shape), None


differentiable(
    per_position, lambda value, companion, shape: value.new_empty(shape), _shape_setup, _per_position_backward
)


@torch.library.custom_op("graphopt::position_squares", mutates_args=())
def position_squares(companion: Tensor, like: Tensor, shape: list[int]) -> Tensor:
    """``shape``, without memory and without values; the backward sends the squares of what arrives to ``companion``."""
    return like.new_zeros(()).expand(shape)


def _position_squares_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return wide(grad).square().sum_to_size(ctx.shape), None, None


differentiable(
    position_squares,
    lambda companion, like, shape: like.new_zeros(()).expand(shape),
    _shape_setup,
    _position_squares_backward,
)


@torch.library.custom_op("graphopt::with_tangent", mutates_args=())
def with_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``tangent`` too. Both have one shape; what ``tangent`` holds is never read.

    So the operators that compute ``tangent`` are dead code in the forward, while their backward runs.
    """
    return value.clone()


differentiable(
    with_tangent, lambda value, tangent: torch.empty_like(value), nothing_to_save, lambda ctx, grad: (grad, grad)
)


@decomposition(per_sample)
def _plain_per_sample(param: Tensor, companions: Sequence[Tensor], wanted: str, num: int) -> Tensor:
    return no_memory(param, (num, *param.shape))


@decomposition(per_position)
def _plain_per_position(value: Tensor, companion: Tensor, shape: list[int]) -> Tensor:
    return cast(Tensor, torch.ops.aten.expand.default(value, shape))


@decomposition(position_squares)
def _plain_position_squares(companion: Tensor, like: Tensor, shape: list[int]) -> Tensor:
    return no_memory(like, tuple(shape))


@decomposition(with_tangent)
def _plain_with_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    return value
