"""``graphopt::tied_embedding`` and ``graphopt::tied_linear``: a table that is also an output projection.

With E_n and P_n sample n's gradients from the embedding and from the projection,
    sum_n (E_n + P_n)^2 = sum E_n^2 + sum P_n^2 + 2 sum E_n P_n,
and E_n is zero outside the rows of the sample's own tokens. The projection's backward knows P_n; it computes just those rows
and sends them as the gradient of ``tie``, a tensor without memory that runs from the embedding to the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt import _compat
from graphopt.passes.truegrad.ops.embedding import embedding_backward, embedding_setup
from graphopt.passes.truegrad.ops.linear import bias_gradients, linear_fake, plain_linear, weight_gradients
from graphopt.passes.truegrad.ops.registration import decomposition, differentiable, no_memory
from graphopt.passes.truegrad.ops.statistics import by_sample


@torch.library.custom_op("graphopt::tied_embedding", mutates_args=())
def tied_embedding(
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
) -> tuple[Tensor, Tensor]:
    """``aten.embedding``, and the ``tie`` (N, S, D), whose gradient is what the projection owes to the rows looked up."""
    found = torch.ops.aten.embedding.default(weight, indices, padding_idx)
    return found, found.new_zeros(()).expand(num, indices.numel() // num, weight.shape[1])


def _tied_embedding_fake(
    weight: Tensor,
    companions: Sequence[Tensor],
    wanted: str,
    indices: Tensor,
    padding_idx: int,
    axis: int,
    outer: int,
    num: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    found = weight.new_empty((*indices.shape, weight.shape[1]))
    return found, found.new_zeros(()).expand(num, indices.numel() // num, weight.shape[1])


differentiable(tied_embedding, _tied_embedding_fake, embedding_setup, embedding_backward)


@torch.library.custom_op("graphopt::tied_linear", mutates_args=())
def tied_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_companions: Sequence[Tensor],
    bias_companions: Sequence[Tensor],
    wanted: str,
    tie: Tensor,
    indices: Tensor,
    axis: int,
    outer: int,
    num: int,
    inner: int,
) -> Tensor:
    """`linear` with the table as its weight; ``indices`` (N, S) are the rows that each sample looks up."""
    with _compat.disable_autocast():
        return F.linear(input, weight, bias)


def _tied_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, _, bias_companions, ctx.of_weight, _, indices, *ctx.rows = inputs
    ctx.save_for_backward(input, weight, indices)
    ctx.of_bias = ctx.of_weight if bias_companions else ""
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
    ctx.per_token, ctx.square_dtype = False, None


def _tied_linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight, indices = ctx.saved_tensors
    grad_input = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight, of_weight = weight_gradients(ctx, grad, input)
    grad_bias, of_bias = bias_gradients(ctx, grad) if ctx.needs_input_grad[2] else (None, [])
    grad_NTV, input_NTI = by_sample(grad, ctx.rows, 1), by_sample(input, ctx.rows, 1)
    columns = indices.unsqueeze(1).expand(-1, grad_NTV.shape[1], -1)
    owed = torch.bmm(grad_NTV.gather(2, columns).transpose(1, 2), input_NTI)
    return grad_input, grad_weight, grad_bias, of_weight, of_bias, None, owed, None, None, None, None, None


differentiable(tied_linear, linear_fake, _tied_linear_setup, _tied_linear_backward)

decomposition(tied_linear)(plain_linear)


@decomposition(tied_embedding)
def _plain_tied_embedding(
    weight: Tensor,
    companions: Sequence[Tensor],
    wanted: str,
    indices: Tensor,
    padding_idx: int,
    axis: int,
    outer: int,
    num: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.embedding.default(weight, indices, padding_idx)
    return found, no_memory(found, (num, indices.numel() // num, weight.shape[1]))
