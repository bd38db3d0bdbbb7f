"""``graphopt::convolution``: ``aten.convolution``, transposed or not, with the statistics of weight and bias.

A convolution is a product with patches: with X the input, G the gradient at the output and P(.) the patches that the kernel
sees, sample n's gradient of the weight is ``G_n^T P(X_n)``, and ``X_n^T P(G_n)`` for a transposed one. Three ways to it:

* a convolution's own weight gradient, with every sample's groups as groups of their own (`_by_groups`): for groups of few
  channels (depthwise), and for float32 on the CPU, where oneDNN's kernels take many groups as fast as one;
* patches of a few samples at a time, and a product for each sample (`_by_patches`);
* one position for each sample, and squares of single positions: the weight gradient of squared factors.

Only the first two need memory: for the patches of a slice of samples, and for a slice of per-sample gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.passes.truegrad.ops.registration import decomposition, differentiable, no_memory
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

aten = torch.ops.aten

# Bytes of patches, and of per-sample gradients, that exist at one time: they fit the cache of a CPU core, or fill a GPU.
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Groups of at most so many channels always go to the convolution's own kernels.
_NARROW = 32
# Of float32 on the CPU those with at least so many channels do (fewer leave oneDNN's vectors empty) if images, gradients and
# per-sample gradients of so many samples fit the memory that a core has nearby (ResNet, two threads: 1.40x plain training, and
# 1.74x by patches).
_LEAST_CHANNELS, _LEAST_SAMPLES, _NEAR_BYTES = 16, 4, 3 << 20


class Geometry(NamedTuple):
    """What a convolution does beside its tensors; a list has one entry for each spatial axis."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int


# --- the reductions --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::convolution_sums", mutates_args=())
def convolution_sums(
    grad: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    norms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the weight, sum over samples of its squared per-sample gradients, and their squared norms (N,).

    Args:
        grad: (N, M, O, *positions), gradient at the output; M images for each sample.
        input: (N, M, C, *positions).
        kernel: spatial sizes of the weight.
        stride: as in `Geometry`, with what follows.
        padding: zeros on both sides.
        dilation: gaps.
        transposed: whether the weight is (C, O / groups, *kernel).
        output_padding: of a transposed one.
        groups: of channels.
        norms: whether norms are asked for; they are empty otherwise.

    Returns:
        All in at least float32.
    """
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    shape = _weight_shape(grad, input, kernel, geometry)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    per_sample = torch.zeros(grad.shape[0] if norms else 0, dtype=dtype, device=grad.device)
    samples = _samples_as_groups(grad, input, shape, geometry)
    order = shape if samples else _order_of_patches(shape, geometry)
    total, squares = (torch.zeros(order, dtype=dtype, device=grad.device) for _ in range(2))
    for start, group, products in _products(grad, input, shape, geometry, samples):
        own, own_squares = (whole if group is None else whole[group] for whole in (total, squares))
        if grad.device.type == "cpu":  # one sample at a time is read from cache, and squared and added in one go
            for product in products.to(dtype):
                own.add_(product)
                own_squares.addcmul_(product, product)
        else:
            own.add_(products.sum(0, dtype=dtype))
            own_squares.add_(square_sum(products))
        if norms:
            per_sample[start : start + len(products)] += squared_norms(products)
    if not samples:
        total, squares = _in_weight_order(total, shape), _in_weight_order(squares, shape)
    return total, squares, per_sample


@convolution_sums.register_fake
def _(grad: Tensor, input: Tensor, kernel: Sequence[int], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    shape = _weight_shape(grad, input, kernel, Geometry(*rest[:6]))
    per_sample = grad.new_empty((grad.shape[0] if rest[6] else 0,), dtype=dtype)
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype), per_sample


@torch.library.custom_op("graphopt::convolution_products", mutates_args=())
def convolution_products(
    grad: Tensor,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The per-sample gradients themselves, (N, *weight.shape); arguments as in `convolution_sums`."""
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    shape = _weight_shape(grad, input, kernel, geometry)
    samples = _samples_as_groups(grad, input, shape, geometry)
    order = shape if samples else _order_of_patches(shape, geometry)
    found = grad.new_empty((grad.shape[0], *order))
    for start, group, products in _products(grad, input, shape, geometry, samples):
        own = found if group is None else found[:, group]
        own[start : start + len(products)] = products
    return found if samples else _in_weight_order(found, shape)


@convolution_products.register_fake
def _(grad: Tensor, input: Tensor, kernel: Sequence[int], *rest: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], *_weight_shape(grad, input, kernel, Geometry(*rest))))


def _weight_shape(grad: Tensor, input: Tensor, kernel: Sequence[int], geometry: Geometry) -> list[Any]:
    outer, inner = (input, grad) if geometry.transposed else (grad, input)
    return [outer.shape[2], inner.shape[2] // geometry.groups, *kernel]


def _samples_as_groups(grad: Tensor, input: Tensor, shape: Sequence[int], geometry: Geometry) -> int:
    """How many samples at a time are to be groups of one convolution; 0 if patches are the better way."""
    widths = (shape[0] // geometry.groups, shape[1])
    if geometry.groups > 1 and max(widths) <= _NARROW:
        return _chunk(grad, math.prod(shape))
    if grad.device.type != "cpu" or grad.dtype != torch.float32 or not _compat.uses_onednn():
        return 0
    if min(widths) < _LEAST_CHANNELS or not len(grad):
        return 0
    num = len(grad)
    size = (grad.numel() + input.numel()) // num + math.prod(shape)
    samples = min(num, _NEAR_BYTES // (size * grad.element_size()))
    return samples if samples >= min(num, _LEAST_SAMPLES) else 0


def _order_of_patches(shape: Sequence[int], geometry: Geometry) -> list[int]:
    """(groups, rows, kernel * columns): how products of patches come."""
    return [geometry.groups, shape[0] // geometry.groups, math.prod(shape[1:])]


def _in_weight_order(result: Tensor, shape: Sequence[int]) -> Tensor:
    """(..., groups, rows, kernel * columns) -> (..., *shape), contiguous."""
    rows, columns, *kernel = shape
    leading = result.shape[: result.dim() - 3]
    return result.reshape(*leading, rows, *kernel, columns).movedim(-1, len(leading) + 1).contiguous()


def _products(
    grad: Tensor, input: Tensor, shape: Sequence[int], geometry: Geometry, samples: int
) -> Iterator[tuple[int, int | None, Tensor]]:
    """First sample, group (``None`` for all at once), and the gradients of a few samples.

    Args:
        grad: as in `convolution_sums`.
        input: likewise.
        shape: of the weight.
        geometry: of the convolution.
        samples: from `_samples_as_groups`.
    """
    with _compat.disable_autocast():
        if samples:
            yield from _by_groups(grad, input, shape, geometry, samples)
            return
        rows, image = (input, grad) if geometry.transposed else (grad, input)
        parts = zip(rows.chunk(geometry.groups, 2), image.chunk(geometry.groups, 2), strict=True)
        for group, (own_rows, own_image) in enumerate(parts):
            for start, products in _by_patches(own_rows, own_image, shape[2:], geometry):
                yield start, group, products


def _by_groups(
    grad: Tensor, input: Tensor, shape: Sequence[int], geometry: Geometry, chunk: int
) -> Iterator[tuple[int, None, Tensor]]:
    """Each sample's groups are groups of one convolution over (M, chunk * channels, *positions)."""
    *middle, groups = geometry
    for start in range(0, grad.shape[0], chunk):
        sides = (side[start : start + chunk].transpose(0, 1).flatten(1, 2) for side in (grad, input))
        num = min(chunk, grad.shape[0] - start)
        weight = grad.new_empty((num * shape[0], *shape[1:]))
        _, found, _ = aten.convolution_backward(*sides, weight, None, *middle, num * groups, [False, True, False])
        yield start, None, found.unflatten(0, (num, shape[0]))


def _by_patches(rows: Tensor, image: Tensor, kernel: Sequence[int], geometry: Geometry) -> Iterator[tuple[int, Tensor]]:
    """(N, M, O, *positions) and (N, M, C, *places) -> ``rows_n^T P(image_n)`` of a few samples, (n, O, kernel * C)."""
    num, images, outputs, *positions = rows.shape
    width = math.prod(kernel) * image.shape[2]
    per_sample = images * math.prod(positions) * width
    chunk = _chunk(rows, max(per_sample, outputs * width))
    step = positions[0]
    if chunk == 1:  # patches of even one sample may be too many: a few lines of positions at a time
        step = max(1, min(step, _budget(rows) * step // max(1, per_sample)))
    windows = _Windows(image, kernel, positions, geometry, chunk, step)
    for start in range(0, num, chunk):
        some = rows[start : start + chunk].movedim(2, -1)
        some = some.reshape(len(some), images, *positions, outputs)
        windows.load(image[start : start + chunk].flatten(0, 1))
        total: list[Tensor] = []
        for line in range(0, positions[0], step):
            patches = windows.patches(line).reshape(len(some), -1, width)
            parts = _multiply(some[:, :, line : line + step].reshape(len(some), -1, outputs), patches)
            total = [a.add_(b) for a, b in zip(total, parts, strict=True)] if total else list(parts)
        for products in total:
            yield start, products
            start += len(products)


class _Windows:
    """Patches of a few images at a time, in memory that all of them share: fresh memory would cost more than the copies."""

    def __init__(
        self,
        image: Tensor,
        kernel: Sequence[int],
        positions: Sequence[int],
        geometry: Geometry,
        chunk: int,
        step: int,
    ) -> None:
        channels, places = image.shape[2], image.shape[3:]
        self.shape, self.geometry, self.step = (*positions, *kernel, channels), geometry, step
        self.copied = math.prod(kernel) > 1 or any(geometry.padding)
        if self.copied:
            images, wide = chunk * image.shape[1], [p + 2 * q for p, q in zip(places, geometry.padding, strict=True)]
            self.padded = image.new_zeros((images, *wide, channels))
            self.inside = self.padded
            for axis, (size, padding) in enumerate(zip(places, geometry.padding, strict=True)):
                self.inside = self.inside.narrow(1 + axis, padding, size)
            self.memory = image.new_empty(images * step * math.prod(self.shape[1:]))

    def load(self, images: Tensor) -> None:
        """Take the next images, (B, C, *places)."""
        places = images.movedim(1, -1)
        if self.copied:
            self.inside[: len(images)].copy_(places)
            places = self.padded[: len(images)]
        first, *steps, last = places.stride()
        strides = [
            first,
            *(step * s for step, s in zip(steps, self.geometry.stride, strict=True)),
            *(step * d for step, d in zip(steps, self.geometry.dilation, strict=True)),
            last,
        ]
        self.windows = places.as_strided((len(images), *self.shape), strides)

    def patches(self, line: int) -> Tensor:
        """(B, lines, *positions, *kernel, C), from that line of positions on."""
        found = self.windows[:, line : line + self.step]
        if not self.copied:  # a kernel of one place: no two windows overlap, and products accept them as they are
            return found
        return self.memory[: found.numel()].view(found.shape).copy_(found)


def _multiply(rows: Tensor, patches: Tensor) -> Iterator[Tensor]:
    """(n, S, O), (n, S, I) -> (n, O, I), in as many pieces as is fast."""
    if rows.device.type == "cpu" and rows.dtype == torch.float32:
        for own, patch in zip(rows, patches, strict=True):
            yield _compat.onednn_linear(own.t(), patch.t(), None).unsqueeze(0)
    else:
        yield torch.bmm(rows.transpose(1, 2), patches)


def _budget(like: Tensor) -> int:
    """Elements that may exist at one time."""
    return _CHUNK_BYTES.get(like.device.type, _CHUNK_BYTES["cuda"]) // like.element_size()


def _chunk(like: Tensor, size: int) -> int:
    return max(1, min(like.shape[0], _budget(like) // max(1, size)))


# --- the operator ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::convolution", mutates_args=())
def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_companions: Sequence[Tensor],
    bias_companions: Sequence[Tensor],
    wanted: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    outer: int,
    num: int,
    inner: int,
    per_token: bool,
    square_dtype: torch.dtype | None,
) -> Tensor:
    """``aten.convolution``; the samples' images lie along the first axis, which has ``outer * num * inner``."""
    with _compat.disable_autocast():
        return cast(
            Tensor,
            aten.convolution.default(
                input, weight, bias, stride, padding, dilation, transposed, output_padding, groups
            ),
        )


@decomposition(convolution)
def _plain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_companions: Sequence[Tensor],
    bias_companions: Sequence[Tensor],
    wanted: str,
    *rest: Any,
) -> Tensor:
    return cast(Tensor, aten.convolution.default(input, weight, bias, *rest[:6]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, weight_companions, bias_companions, wanted, *rest = inputs
    ctx.save_for_backward(input, weight)
    ctx.of_weight, ctx.of_bias = wanted if weight_companions else "", wanted if bias_companions else ""
    ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
    ctx.geometry, (outer, num, inner, ctx.per_token, ctx.square_dtype) = Geometry(*rest[:6]), rest[6:]
    ctx.rows = 0, outer, num, inner


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    input, weight = ctx.saved_tensors
    grad_input = grad_weight = grad_bias = None
    of_weight: list[Tensor] = []
    of_bias: list[Tensor] = []
    if ctx.needs_input_grad[0]:
        mask = [True, False, False]
        grad_input = aten.convolution_backward.default(grad, input, weight, None, *ctx.geometry, mask)[0]
    if ctx.needs_input_grad[1]:
        grad_weight, of_weight = _weight_gradients(ctx, grad, input, weight)
    if ctx.needs_input_grad[2]:
        grad_bias, of_bias = _bias_gradients(ctx, grad)
    return grad_input, grad_weight, grad_bias, of_weight, of_bias, *[None] * 12


def _weight_gradients(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    wanted = split(ctx.of_weight)
    if not wanted:
        return _contracted(ctx, grad, input, weight), []
    found: dict[str, Tensor] = {}
    if POSITION in wanted or ctx.per_token or _one_position(ctx, grad, input):
        found[POSITION] = _squares_of_positions(ctx, grad, input, weight)
    if ctx.per_token or (POSITION in found and NORM not in wanted and _one_position(ctx, grad, input)):
        found[SQUARE] = found[POSITION]
        return _contracted(ctx, grad, input, weight), in_order(ctx.of_weight, found)
    sides = (by_sample(side, ctx.rows, side.dim() - 1) for side in (grad, input))
    total, found[SQUARE], found[NORM] = torch.ops.graphopt.convolution_sums(
        *sides, weight.shape[2:], *ctx.geometry, NORM in wanted
    )
    return total.to(ctx.dtypes[0]), in_order(ctx.of_weight, found)


def _contracted(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the weight as the convolution itself has it."""
    mask = [False, True, False]
    return cast(Tensor, aten.convolution_backward.default(grad, input, weight, None, *ctx.geometry, mask)[1])


def _squares_of_positions(ctx: Any, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """The square of an outer product is the outer product of squares."""
    dtype = ctx.square_dtype or torch.promote_types(grad.dtype, torch.float32)
    return wide(_contracted(ctx, grad.square().to(dtype), input.square().to(dtype), weight.to(dtype)))


def _one_position(ctx: Any, grad: Tensor, input: Tensor) -> bool:
    _, outer, _, inner = ctx.rows
    positions = (input if ctx.geometry.transposed else grad).shape[2:]
    return all(isinstance(size, int) and size == 1 for size in (*positions, outer, inner))


def _bias_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    wanted, others = split(ctx.of_bias), [0, *range(2, grad.dim())]
    if not wanted:
        return grad.sum(others), []
    found: dict[str, Tensor] = {}
    if POSITION in wanted or ctx.per_token:
        found[POSITION] = wide(grad).square().sum(others)
    if ctx.per_token:
        found[SQUARE] = found[POSITION]
        return grad.sum(others), in_order(ctx.of_bias, found)
    images = by_sample(grad, ctx.rows, grad.dim() - 1)
    rows = images.sum([1, *range(3, images.dim())])
    found[SQUARE] = square_sum(rows)
    if NORM in wanted:
        found[NORM] = squared_norms(rows)
    return rows.sum(0), in_order(ctx.of_bias, found)


def _fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_companions: Sequence[Tensor],
    bias_companions: Sequence[Tensor],
    wanted: str,
    *rest: Any,
) -> Tensor:
    return cast(Tensor, aten.convolution.default(input, weight, bias, *rest[:6]))


differentiable(convolution, _fake, _setup, _backward)


# --- a weight that is computed, or used twice ---------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::convolution_tangent", mutates_args=())
def convolution_tangent(
    tangent: Tensor,
    input: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    outer: int,
    num: int,
    inner: int,
) -> Tensor:
    """The convolution's derivative in the direction of (N, *weight.shape), one for each sample: without memory or values.

    What matters is the backward, which sends each sample's gradient of the weight to ``tangent``.
    """
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    return input.new_zeros(()).expand(_output_shape(tangent, input, geometry))


def _tangent_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tangent, input, *rest = inputs
    ctx.save_for_backward(input)
    ctx.kernel, ctx.dtype = tangent.shape[3:], tangent.dtype
    ctx.geometry, ctx.rows = Geometry(*rest[:6]), (0, *rest[6:])


def _tangent_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (input,) = ctx.saved_tensors
    sides = (by_sample(side, ctx.rows, side.dim() - 1) for side in (grad, input))
    found = torch.ops.graphopt.convolution_products(*sides, ctx.kernel, *ctx.geometry)
    return found.to(ctx.dtype), *[None] * 10


def _tangent_fake(tangent: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return input.new_zeros(()).expand(_output_shape(tangent, input, Geometry(*rest[:6])))


differentiable(convolution_tangent, _tangent_fake, _tangent_setup, _tangent_backward)


@decomposition(convolution_tangent)
def _plain_tangent(tangent: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return no_memory(input, _output_shape(tangent, input, Geometry(*rest[:6])))


def _output_shape(tangent: Tensor, input: Tensor, geometry: Geometry) -> tuple[int, ...]:
    spatial = []
    sizes = zip(input.shape[2:], tangent.shape[3:], *geometry[:3], geometry.output_padding, strict=True)
    for size, kernel, stride, padding, dilation, more in sizes:
        reach = dilation * (kernel - 1) + 1
        if geometry.transposed:
            spatial.append((size - 1) * stride - 2 * padding + reach + more)
        else:
            spatial.append((size + 2 * padding - reach) // stride + 1)
    channels = tangent.shape[2] * geometry.groups if geometry.transposed else tangent.shape[1]
    return (input.shape[0], channels, *spatial)
