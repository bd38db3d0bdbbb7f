"""The GPU kernel behind ``graphopt::sums``; imported only where it runs, because it needs triton.

Legend: N samples, S positions of one sample, I in, O out.

    P_n = grad_n^T input_n        total = sum_n P_n        squares = sum_n P_n^2        norms_n = sum_oi (P_n)^2

A program owns a (BLOCK_O, BLOCK_I) tile of the results and a range of samples. It walks over all positions of all its samples
in one loop, so that the loads of a sample's first positions are under way while the products of the sample before are squared:
loops inside each other would drain the pipeline once for each sample. The three accumulators (this sample's product, the sum,
the squares) are float32 and stay in registers, so ``grad`` and ``input`` are all that is read, and the per-sample products are
never written. No atomics: every number has one writer, and the results are the same, bit by bit, from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl


# These change from batch to batch. No specialization on their values: a kernel is compiled for a layer, not for a batch.
@triton.jit(
    do_not_specialize=[
        "num",
        "positions",
        "samples_per_split",
        "grad_stride_n",
        "grad_stride_s",
        "input_stride_n",
        "input_stride_s",
    ]
)
def sums_kernel(
    grad,
    input,
    total,  # (splits, O, I), float32, contiguous
    squares,  # likewise
    norms,  # (tiles, N), float32, contiguous; not touched unless WANT_NORMS
    num,
    positions,
    outputs,
    inputs,
    grad_stride_n,
    grad_stride_s,
    grad_stride_o,
    input_stride_n,
    input_stride_s,
    input_stride_i,
    samples_per_split,
    WANT_NORMS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # bfloat16 to float32 before the product: Triton's interpreter multiplies its bits as integers
    VECTOR_O: tl.constexpr,  # sizes, strides and address of grad are multiples of so many elements
    VECTOR_I: tl.constexpr,  # likewise of input
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of the results, over one range of samples."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tile_o, tile_i = _grouped(tile, tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I), GROUP)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tile_i * BLOCK_I + tl.arange(0, BLOCK_I)
    s = tl.arange(0, BLOCK_S)
    # Masks that are equal over a vector, and strides seen to be multiples of it: only then does the compiler
    # load and store vectors. (tl.multiple_of has no effect on arguments.)
    inside_O = (o // VECTOR_O < outputs // VECTOR_O)[:, None]
    inside_I = (i // VECTOR_I < inputs // VECTOR_I)[None, :]
    grad_stride_n, grad_stride_s = grad_stride_n // VECTOR_O * VECTOR_O, grad_stride_s // VECTOR_O * VECTOR_O
    input_stride_n, input_stride_s = input_stride_n // VECTOR_I * VECTOR_I, input_stride_s // VECTOR_I * VECTOR_I
    inputs = inputs // VECTOR_I * VECTOR_I
    # 64-bit: a batch may well have more than 2^31 elements, and positions may be further apart than samples.
    grad_OS = grad + o[:, None].to(tl.int64) * grad_stride_o + s[None, :].to(tl.int64) * grad_stride_s
    input_SI = input + s[:, None].to(tl.int64) * input_stride_s + i[None, :].to(tl.int64) * input_stride_i

    product_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    total_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    first = split * samples_per_split
    num_samples = tl.minimum(samples_per_split, num - first)  # not positive if the splits before this one took them all
    steps_per_sample = tl.cdiv(positions, BLOCK_S)
    for step in range(num_samples * steps_per_sample):
        # Both follow from the number of the step alone: loads can then be issued steps ahead of the products.
        sample = first + step // steps_per_sample
        position = step % steps_per_sample * BLOCK_S
        inside_S = s < positions - position
        at_grad = sample.to(tl.int64) * grad_stride_n + position.to(tl.int64) * grad_stride_s
        at_input = sample.to(tl.int64) * input_stride_n + position.to(tl.int64) * input_stride_s
        block_OS = tl.load(grad_OS + at_grad, mask=inside_O & inside_S[None, :], other=0.0)
        block_SI = tl.load(input_SI + at_input, mask=inside_S[:, None] & inside_I, other=0.0)
        if WIDEN:
            block_OS, block_SI = block_OS.to(tl.float32), block_SI.to(tl.float32)
        product_OI = tl.dot(block_OS, block_SI, product_OI, input_precision=PRECISION)
        if position + BLOCK_S >= positions:  # the sample is complete
            total_OI += product_OI
            squares_OI = tl.fma(product_OI, product_OI, squares_OI)
            if WANT_NORMS:
                tl.store(norms + tile.to(tl.int64) * num + sample, tl.sum(product_OI * product_OI))
            product_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)

    inside_OI = inside_O & inside_I
    at_OI = (split.to(tl.int64) * outputs + o[:, None]) * inputs + i[None, :]
    tl.store(total + at_OI, total_OI, mask=inside_OI)
    tl.store(squares + at_OI, squares_OI, mask=inside_OI)


@triton.jit
def _grouped(tile, tiles_o, tiles_i, GROUP: tl.constexpr):
    """Tiles in bands of GROUP rows: those that run at one time form a square, and share most of what they read in the L2."""
    in_band = GROUP * tiles_i
    first = tile // in_band * GROUP
    height = tl.minimum(tiles_o - first, GROUP)
    return first + tile % in_band % height, tile % in_band // height


INTERPRETED = not isinstance(sums_kernel, triton.JITFunction)  # TRITON_INTERPRET=1 when triton was imported
