"""The registered operators that rewritten graphs are made of.

Each stands for an ATen operator and gives the same values; what is added is in the backward, which hands the companions
(``*_sq``) the sum of squared per-sample gradients. All of them decompose to plain ATen in Inductor, so everything still fuses;
what stays opaque are the two reductions that would otherwise need memory for one gradient per sample (`sums`,
`embedding_sums`).

Legend: N samples, S positions of one sample, I in, O out, V rows of a table, D width of a row.

Rows are grouped as in `sample_axis`: along ``axis`` of the input lie ``outer * num * inner`` rows, and row ``i`` belongs to
sample ``(i // inner) % num``. With ``per_token`` every row counts by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt import _compat

# Bytes of per-sample gradients that exist at one time: small enough for the second-level cache of a CPU core, and on a GPU
# large enough to fill it.
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


def _register(
    op: _compat.CustomOpDef, fake: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> None:
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup)


def _by_sample(rows: Tensor, grouping: Sequence[int], trailing: int) -> Tensor:
    """(..., outer * N * inner, ..., *trailing) -> (N, S, *trailing); a view if the samples come first."""
    axis, outer, num, inner = grouping
    tail = rows.shape[rows.dim() - trailing :]
    if axis != 0 or not (isinstance(outer, int) and outer == 1):
        rows = rows.unflatten(axis, (outer, num, inner)).movedim(axis + 1, 0)
    return rows.reshape(num, -1, *tail)


def _square_sum(rows: Tensor) -> Tensor:
    """Sum over the first axis of the squares, in at least float32."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(0)


# --- linear -----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::sums", mutates_args=())
def sums(grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    """(N, S, O), (N, S, I) -> sum over n of ``grad_n^T input_n`` and sum of its squares, each (O, I), in at least float32.

    The per-sample products contain the gradient (their sum), so they replace its matmul; squares and sums are what is added.
    They are taken over a bounded slice of samples at a time, so that no more than that ever exists.
    """
    num, out_features, in_features = grad.shape[0], grad.shape[2], input.shape[2]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(out_features, in_features, dtype=dtype, device=grad.device)
    squares = torch.zeros_like(total)
    size = out_features * in_features
    chunk = max(
        1, min(num, _CHUNK_BYTES.get(grad.device.type, _CHUNK_BYTES["cuda"]) // max(1, size * grad.element_size()))
    )
    with _compat.disable_autocast():
        products = torch.empty(chunk, out_features, in_features, dtype=grad.dtype, device=grad.device)
        for grad_CSO, input_CSI in zip(grad.split(chunk), input.split(chunk), strict=True):
            products_COI = torch.bmm(grad_CSO.transpose(1, 2), input_CSI, out=products[: grad_CSO.shape[0]]).to(dtype)
            if grad.device.type == "cpu":  # one sample at a time is read from cache, and squared and added in one go
                for product_OI in products_COI:
                    total.add_(product_OI)
                    squares.addcmul_(product_OI, product_OI)
            else:
                total.add_(products_COI.sum(0))
                squares.add_(products_COI.square().sum(0))
    return total, squares


@sums.register_fake
def _(grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    shape = (grad.shape[2], input.shape[2])
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype)


@torch.library.custom_op("graphopt::linear", mutates_args=())
def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_sq: Tensor | None,
    bias_sq: Tensor | None,
    axis: int,
    outer: int,
    num: int,
    inner: int,
    per_token: bool,
    square_dtype: torch.dtype | None,
) -> Tensor:
    """``aten.linear``; ``weight_sq`` (O, I) and ``bias_sq`` (O,) are companions, ``None`` where no statistic is wanted."""
    with _compat.disable_autocast():
        return F.linear(input, weight, bias)


def _linear_fake(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, weight_sq, bias_sq, *ctx.rows, ctx.per_token, ctx.square_dtype = inputs
    ctx.save_for_backward(input, weight)
    ctx.square_weight, ctx.square_bias = weight_sq is not None, bias_sq is not None
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    grad_input = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight, weight_sq = _linear_weight(ctx, grad, input) if ctx.needs_input_grad[1] else (None, None)
    grad_bias, bias_sq = _linear_bias(ctx, grad) if ctx.needs_input_grad[2] else (None, None)
    return grad_input, grad_weight, grad_bias, weight_sq, bias_sq, None, None, None, None, None, None


def _linear_weight(ctx: Any, grad: Tensor, input: Tensor) -> tuple[Tensor, Tensor | None]:
    if not ctx.square_weight:
        return grad.flatten(0, -2).t() @ input.flatten(0, -2), None
    if ctx.per_token or _one_position(ctx, input):  # the closed form: the square of an outer product is one
        grad, input = grad.flatten(0, -2), input.flatten(0, -2)
        dtype = ctx.square_dtype or torch.promote_types(grad.dtype, torch.float32)
        squares = grad.square().to(dtype).t() @ input.square().to(dtype)
        return grad.t() @ input, squares.to(torch.promote_types(ctx.dtypes[0], torch.float32))
    total, squares = torch.ops.graphopt.sums(_by_sample(grad, ctx.rows, 1), _by_sample(input, ctx.rows, 1))
    return total.to(ctx.dtypes[0]), squares


def _linear_bias(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    if not ctx.square_bias:
        return grad.flatten(0, -2).sum(0), None
    rows = grad.flatten(0, -2) if ctx.per_token else _by_sample(grad, ctx.rows, 1).sum(1)
    return rows.sum(0), _square_sum(rows)


def _one_position(ctx: Any, input: Tensor) -> bool:
    axis, outer, _, inner = ctx.rows
    others = [size for position, size in enumerate(input.shape[:-1]) if position != axis]
    return all(isinstance(size, int) and size == 1 for size in (*others, outer, inner))


_register(linear, _linear_fake, _linear_setup, _linear_backward)


# --- embedding --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::embedding_sums", mutates_args=())
def embedding_sums(
    grad: Tensor, indices: Tensor, owed: Tensor | None, num_rows: int, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """(N, S, D), (N, S) -> gradient of the table and sum over samples of the squared per-sample gradients, each (V, D).

    Positions of one sample that look up the same row are added before squaring: they are sorted into segments of (sample, row),
    so memory is O(N S D) whatever V is. ``owed`` (N, S, D), if given, is what the sample's other uses of the table contribute
    to the row that the position looks up: it adds the cross term ``2 * grad * owed``.
    """
    num, positions, width = grad.shape
    dtype = torch.promote_types(grad.dtype, torch.float32)
    rows = grad.reshape(-1, width).to(dtype)
    flat = indices.reshape(-1)
    if padding_idx >= 0:
        rows = rows * (flat != padding_idx).unsqueeze(1)
    total = torch.zeros(num_rows, width, dtype=dtype, device=grad.device)
    squares = torch.zeros_like(total)
    sample = torch.arange(num, device=grad.device).repeat_interleave(positions)
    keys, order = torch.sort(sample * num_rows + flat)
    starts = torch.ones_like(keys)
    starts[1:] = keys[1:] != keys[:-1]
    segment = starts.cumsum(0) - 1
    per_segment = torch.zeros_like(rows).index_add_(0, segment, rows[order])
    looked_up = torch.zeros_like(keys).index_copy_(0, segment, keys % num_rows)
    total.index_add_(0, looked_up, per_segment)
    squares.index_add_(0, looked_up, per_segment.square())
    if owed is not None:
        squares.index_add_(0, flat, 2 * rows * owed.reshape(-1, width).to(dtype))
    return total, squares


@embedding_sums.register_fake
def _(grad: Tensor, indices: Tensor, owed: Tensor | None, num_rows: int, padding_idx: int) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    shape = (num_rows, grad.shape[2])
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype)


@torch.library.custom_op("graphopt::embedding", mutates_args=())
def embedding(
    weight: Tensor,
    weight_sq: Tensor,
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


def _embedding_fake(weight: Tensor, weight_sq: Tensor, indices: Tensor, *_: Any) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


def _embedding_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weight, _, indices, ctx.padding_idx, *ctx.rows, ctx.per_token = inputs
    ctx.save_for_backward(indices)
    ctx.num_rows, ctx.dtype = weight.shape[0], weight.dtype


def _embedding_backward(ctx: Any, grad: Tensor, owed: Tensor | None = None) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    if ctx.per_token:  # each look-up is a sample of one position
        indices, grad = indices.reshape(-1, 1), grad.reshape(-1, 1, grad.shape[-1])
    else:
        indices, grad = _by_sample(indices, ctx.rows, 0), _by_sample(grad, ctx.rows, 1)
    if owed is not None:
        owed = owed.reshape(grad.shape)
    total, squares = torch.ops.graphopt.embedding_sums(grad, indices, owed, ctx.num_rows, ctx.padding_idx)
    return total.to(ctx.dtype), squares, None, None, None, None, None, None, None


_register(embedding, _embedding_fake, _embedding_setup, _embedding_backward)


# --- a table that is also an output projection ------------------------------------------------------------------------------
#
# With E_n and P_n sample n's gradients from the embedding and from the projection,
#     sum_n (E_n + P_n)^2 = sum E_n^2 + sum P_n^2 + 2 sum E_n P_n,
# and E_n is zero outside the rows of the sample's own tokens. The projection's backward knows P_n; it computes just those rows
# and sends them as the gradient of ``tie``, a tensor without memory that runs from the embedding to the projection.


@torch.library.custom_op("graphopt::tied_embedding", mutates_args=())
def tied_embedding(
    weight: Tensor,
    weight_sq: Tensor,
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
    weight: Tensor, weight_sq: Tensor, indices: Tensor, padding_idx: int, axis: int, outer: int, num: int, *_: Any
) -> tuple[Tensor, Tensor]:
    found = weight.new_empty((*indices.shape, weight.shape[1]))
    return found, found.new_zeros(()).expand(num, indices.numel() // num, weight.shape[1])


_register(tied_embedding, _tied_embedding_fake, _embedding_setup, _embedding_backward)


@torch.library.custom_op("graphopt::tied_linear", mutates_args=())
def tied_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_sq: Tensor,
    bias_sq: Tensor | None,
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
    input, weight, bias, _, bias_sq, _, indices, *ctx.rows = inputs
    ctx.save_for_backward(input, weight, indices)
    ctx.square_weight, ctx.square_bias = True, bias_sq is not None
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
    ctx.per_token, ctx.square_dtype = False, None


def _tied_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, indices = ctx.saved_tensors
    grad_input = grad @ weight if ctx.needs_input_grad[0] else None
    grad_weight, weight_sq = _linear_weight(ctx, grad, input)
    grad_bias, bias_sq = _linear_bias(ctx, grad) if ctx.needs_input_grad[2] else (None, None)
    grad_NTV, input_NTI = _by_sample(grad, ctx.rows, 1), _by_sample(input, ctx.rows, 1)
    columns = indices.unsqueeze(1).expand(-1, grad_NTV.shape[1], -1)
    owed = torch.bmm(grad_NTV.gather(2, columns).transpose(1, 2), input_NTI)
    return grad_input, grad_weight, grad_bias, weight_sq, bias_sq, owed, None, None, None, None, None


_register(tied_linear, _linear_fake, _tied_linear_setup, _tied_linear_backward)


# --- per-sample gradients of anything ---------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::per_sample", mutates_args=())
def per_sample(param: Tensor, param_sq: Tensor, num: int) -> Tensor:
    """(*shape) -> (N, *shape), without memory and without values: a place where per-sample gradients arrive.

    The backward receives them and returns their sum, the gradient, and the sum of their squares, the statistic.
    """
    return param.new_zeros(()).expand(num, *param.shape)


def _per_sample_fake(param: Tensor, param_sq: Tensor, num: int) -> Tensor:
    return param.new_zeros(()).expand(num, *param.shape)


_register(
    per_sample,
    _per_sample_fake,
    lambda ctx, inputs, output: None,
    lambda ctx, grad: (grad.sum(0), _square_sum(grad), None),
)


@torch.library.custom_op("graphopt::per_position", mutates_args=())
def per_position(value: Tensor, value_sq: Tensor, shape: list[int]) -> Tensor:
    """Broadcast to ``shape``; the backward squares each position's gradient before it adds them up (``per="token"``)."""
    return value.expand(shape).clone()


def _per_position_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return grad.sum_to_size(ctx.shape), wide.square().sum_to_size(ctx.shape), None


def _per_position_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


_register(
    per_position,
    lambda value, value_sq, shape: value.new_empty(shape),
    _per_position_setup,
    _per_position_backward,
)


@torch.library.custom_op("graphopt::with_tangent", mutates_args=())
def with_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    """``value``, whose gradient goes to ``tangent`` too. Both have one shape; what ``tangent`` holds is never read.

    So the operators that compute ``tangent`` are dead code in the forward, while their backward runs.
    """
    return value.clone()


_register(
    with_tangent,
    lambda value, tangent: torch.empty_like(value),
    lambda ctx, inputs, output: None,
    lambda ctx, grad: (grad, grad),
)


# --- what Inductor sees ------------------------------------------------------------------------------------------------------


_decompositions: dict[Any, Callable[..., Any]] = {}


@functools.cache
def register_decompositions() -> None:
    """Tell Inductor what the operators are made of; idempotent.

    They go into Inductor's own table: one that is handed to ``compile_fx`` would bypass both compile caches.
    """
    _compat.register_inductor_decompositions(_decompositions)


def _decompose(op: _compat.CustomOpDef) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def collect(function: Callable[..., Any]) -> Callable[..., Any]:
        _decompositions[op._opoverload] = function
        return function

    return collect


@_decompose(linear)
@_decompose(tied_linear)
def _plain_linear(input: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
    return cast(Tensor, torch.ops.aten.linear.default(input, weight, bias))


@_decompose(embedding)
def _plain_embedding(weight: Tensor, weight_sq: Tensor, indices: Tensor, padding_idx: int, *_: Any) -> Tensor:
    return cast(Tensor, torch.ops.aten.embedding.default(weight, indices, padding_idx))


@_decompose(tied_embedding)
def _plain_tied_embedding(
    weight: Tensor, weight_sq: Tensor, indices: Tensor, padding_idx: int, axis: int, outer: int, num: int, *_: Any
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten.embedding.default(weight, indices, padding_idx)
    return found, _no_memory(found, (num, indices.numel() // num, weight.shape[1]))


@_decompose(per_sample)
def _plain_per_sample(param: Tensor, param_sq: Tensor, num: int) -> Tensor:
    return _no_memory(param, (num, *param.shape))


@_decompose(per_position)
def _plain_per_position(value: Tensor, value_sq: Tensor, shape: list[int]) -> Tensor:
    return cast(Tensor, torch.ops.aten.expand.default(value, shape))


@_decompose(with_tangent)
def _plain_with_tangent(value: Tensor, tangent: Tensor) -> Tensor:
    return value


def _no_memory(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    zero = torch.ops.aten.full.default([], 0.0, dtype=like.dtype, device=like.device)
    return cast(Tensor, torch.ops.aten.expand.default(zero, shape))
