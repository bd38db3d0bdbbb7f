"""``graphopt::sums`` on a GPU: when the Triton kernel is the better way, and how it is cut up.

Legend: N samples, S positions of one sample, I in, O out.

What it replaces, the chunked ``bmm``, writes the (N, O, I) per-sample products and reads them several times; the kernel keeps
them in registers (`graphopt.passes.truegrad.ops.sums_triton`). Per element of a product, with bfloat16 inputs on an H200, these
should take (from its data sheet, not measured), at 600 TFLOP/s in matrix units, 33 T instructions/s outside and 4.8 TB/s:

    the product itself                                 S * 3.3e-15 s
    adding it, squaring and adding that                  6.0e-14 s     as 18 positions
    writing, widening, reading it for two sums (bmm)     5.0e-12 s     as 1500 positions

So the kernel wins wherever its products run nearly as fast as those of cuBLAS. They do not in float32 without tf32, where
Triton leaves the products to ordinary instructions, nor where there are too few tiles and samples to fill the card.

The block sizes follow from the shape by a small model of these costs, not by trying: a trial compiles and times every
candidate in the first step of every layer, and its outcome, which fixes the order of summation, changes from run to run.
``python -m benchmarks.run sums`` shows on a GPU how good the choice is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_OLDEST_CARD = (8, 0)  # the first whose matrix units take bfloat16
# In float32 without tf32: beyond so many positions the products, at a third of cuBLAS's rate or so, cost more than is saved.
_MOST_POSITIONS_IEEE = 64
# Where less than this part of the card would be filled, and samples are this long: bmm can cut a sample's positions into pieces.
_LEAST_FILLED, _LONG = 0.25, 1024

# In positions of one sample; see the module's docstring.
_COST_OF_SQUARING = 16
_COST_OF_WRITING = 500  # 8 bytes for each element of a tile, once for each split
_GROUP = 8  # tiles in a band
_VECTOR_BYTES = 16


@dataclass(frozen=True)
class Card:
    """What the choice of tiles depends on.

    Attributes:
        capability: CUDA compute capability.
        multiprocessors: how many programs of the largest tile run at one time.
    """

    capability: tuple[int, int]
    multiprocessors: int


@dataclass(frozen=True)
class Tile:
    """What one program computes at a time.

    Attributes:
        outputs: BLOCK_O.
        inputs: BLOCK_I.
        positions: BLOCK_S.
        warps: of 32 threads; three float32 accumulators of the tile must fit their registers.
        stages: blocks of positions that are being loaded ahead.
        residents: programs that share a multiprocessor.
        efficiency: rate of its products against the largest tile's; smaller ones read more for each.
    """

    outputs: int
    inputs: int
    positions: int
    warps: int
    stages: int
    residents: int
    efficiency: float


@dataclass(frozen=True)
class Plan:
    """A tile, and how the samples are distributed.

    Attributes:
        tile: of the results.
        num_tiles: that cover the results.
        splits: ranges of samples, each with results of its own, which a second reduction adds up.
        samples_per_split: in all ranges but the last, which may have fewer.
    """

    tile: Tile
    num_tiles: int
    splits: int
    samples_per_split: int


def triton_sums(grad: Tensor, input: Tensor, want_norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, sum of squares and squared norms of the per-sample products ``grad_n^T input_n``.

    Args:
        grad: (N, S, O), bfloat16, float16 or float32; any strides.
        input: (N, S, I), of the same dtype; any strides.
        want_norms: whether the norms are wanted.

    Returns:
        In float32: the sum over n of the products (O, I), the sum of their squares (O, I), and for each sample the sum of the
        squares of its product (N,), or (0,) if not wanted. Bitwise the same at each call with the same shapes and card.
    """
    if grad.dtype != input.dtype or grad.dtype not in DTYPES:
        raise TypeError(
            f"graphopt::sums: the Triton kernel was given a gradient of {grad.dtype} and an input of {input.dtype}; "
            f"it takes two of the same dtype, one of {', '.join(map(str, DTYPES))}. Ask is_profitable() first"
        )
    (num, positions, outputs), inputs = grad.shape, input.shape[2]
    num_norms = num if want_norms else 0
    if grad.numel() == 0 or input.numel() == 0:
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=grad.device)
        return zeros(outputs, inputs), zeros(outputs, inputs), zeros(num_norms)
    cut = plan(grad, input)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=grad.device)
    total, squares = empty(cut.splits, outputs, inputs), empty(cut.splits, outputs, inputs)
    norms = empty(cut.num_tiles if want_norms else 0, num)
    triton_kernel = _triton_kernel()
    assert triton_kernel is not None, "is_profitable() says whether triton is there"
    with _on(grad.device):
        triton_kernel.sums_kernel[(cut.num_tiles, cut.splits)](
            grad,
            input,
            total,
            squares,
            norms,
            num,
            positions,
            outputs,
            inputs,
            *grad.stride(),
            *input.stride(),
            cut.samples_per_split,
            WANT_NORMS=want_norms,
            PRECISION="tf32" if _tf32() else "ieee",
            WIDEN=triton_kernel.INTERPRETED and grad.dtype == torch.bfloat16,
            VECTOR_O=_vector(grad),
            VECTOR_I=_vector(input),
            BLOCK_O=cut.tile.outputs,
            BLOCK_I=cut.tile.inputs,
            BLOCK_S=cut.tile.positions,
            GROUP=_GROUP,
            num_warps=cut.tile.warps,
            num_stages=cut.tile.stages,
            enable_fp_fusion=True,  # the default, but triton 3.9 warns that the next one's will differ
        )
    if cut.splits > 1:
        total, squares = total.sum(0), squares.sum(0)
    return total.view(outputs, inputs), squares.view(outputs, inputs), norms.sum(0) if want_norms else norms.view(0)


def is_profitable(grad: Tensor, input: Tensor) -> bool:
    """Whether `triton_sums` is there, takes such tensors, and is expected to be faster than ``bmm`` on them.

    Args:
        grad: (N, S, O).
        input: (N, S, I).
    """
    if grad.dtype != input.dtype or grad.dtype not in DTYPES or grad.device != input.device:
        return False
    if not _is_available(grad.device):
        return False
    if grad.dtype == torch.float32 and not _tf32() and grad.shape[1] > _MOST_POSITIONS_IEEE:
        return False
    if grad.numel() == 0 or input.numel() == 0 or grad.shape[1] <= _LONG:
        return True
    cut = plan(grad, input)
    return cut.num_tiles * cut.splits >= _LEAST_FILLED * _card(grad.device).multiprocessors


# --- how it is cut up ---------------------------------------------------------------------------------------------------------


def plan(grad: Tensor, input: Tensor) -> Plan:
    """How `triton_sums` cuts up the work on a gradient (N, S, O) and an input (N, S, I), neither of them empty."""
    num, positions, outputs = grad.shape
    return choose(
        _card(grad.device),
        (num, positions, outputs, input.shape[2]),
        grad.dtype,
        tf32=_tf32(),
        vectors=min(_vector(grad), _vector(input)) > 1,
    )


@functools.lru_cache(maxsize=4096)
def choose(card: Card, shape: tuple[int, int, int, int], dtype: torch.dtype, *, tf32: bool, vectors: bool) -> Plan:
    """The cheapest plan by the model of the module's docstring.

    Args:
        card: that it runs on.
        shape: N, S, O, I.
        dtype: of the inputs.
        tf32: whether float32 may be rounded to tf32 for the products.
        vectors: whether both inputs can be loaded 16 bytes at a time.
    """
    num, positions, outputs, inputs = shape
    best, least = None, float("inf")
    for tile in candidates(card, (positions, outputs, inputs), dtype, tf32=tf32, vectors=vectors):
        num_tiles = _blocks(outputs, tile.outputs) * _blocks(inputs, tile.inputs)
        places = card.multiprocessors * tile.residents
        samples_positions = _blocks(positions, tile.positions) * tile.positions + _COST_OF_SQUARING
        for splits in range(1, min(num, max(1, 2 * places // num_tiles)) + 1):
            samples = _blocks(num, splits)
            if _blocks(num, samples) < splits:
                continue  # the last ranges would be empty
            work = samples * samples_positions + _COST_OF_WRITING * (1 if splits == 1 else 2)
            turns = _blocks(num_tiles * splits, places) * tile.residents
            cost = turns * work * tile.outputs * tile.inputs / tile.efficiency
            if cost < least:
                best, least = Plan(tile, num_tiles, splits, samples), cost
    assert best is not None, "there is always a split of one"
    return best


def candidates(
    card: Card, shape: tuple[int, int, int], dtype: torch.dtype, *, tf32: bool, vectors: bool
) -> Iterator[Tile]:
    """Tiles that compile without spilling registers (``tests/passes/truegrad/test_sums_kernel.py`` compiles them), largest first.

    Args:
        card: that they run on.
        shape: S, O, I.
        dtype: of the inputs.
        tf32: whether float32 may be rounded to tf32 for the products.
        vectors: whether both inputs can be loaded 16 bytes at a time.
    """
    positions, outputs, inputs = shape
    in_registers = dtype == torch.float32 and not tf32  # operands too, of products that no matrix unit computes
    depth = 64 // dtype.itemsize if in_registers or not vectors else 128 // dtype.itemsize

    def tile(block_o: int, block_i: int, warps: int, residents: int, efficiency: float) -> Tile:
        block_o, block_i = min(block_o, _power_of_two(outputs)), min(block_i, _power_of_two(inputs))
        return Tile(block_o, block_i, min(depth, _power_of_two(positions)), warps, 3, residents, efficiency)

    reads_shared = card.capability[0] in (9, 10)  # its matrix units do: registers are left for the accumulators
    if vectors and not in_registers:
        yield tile(128, 128 if reads_shared else 64, 8, 1, 1.0)
    yield tile(64, 64, 4 if vectors and not in_registers and reads_shared else 8, 2, 0.6)


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _power_of_two(size: int) -> int:
    """Not below `size`, nor below 16, the least that a product of blocks takes."""
    return max(16, 1 << (size - 1).bit_length())


def _vector(tensor: Tensor) -> int:
    """Elements of a 16-byte load if every load of so many features can be one, else 1."""
    width = _VECTOR_BYTES // tensor.element_size()
    sizes = (*tensor.stride()[:2], tensor.shape[2])
    if tensor.stride(2) != 1 or tensor.data_ptr() % _VECTOR_BYTES:
        return 1
    return width if all(size % width == 0 for size in sizes) else 1


# --- what it runs on ------------------------------------------------------------------------------------------------------------


def _is_available(device: torch.device) -> bool:
    kernel = _triton_kernel()
    if kernel is None:
        return False
    if kernel.INTERPRETED:
        return True
    return device.type == "cuda" and torch.version.hip is None and _card(device).capability >= _OLDEST_CARD


@functools.cache
def _triton_kernel() -> ModuleType | None:
    """The module with the kernel, or None where triton is not installed."""
    try:
        import triton  # noqa: F401  # an ImportError of our own module would be a bug
    except ImportError:
        return None
    from graphopt.passes.truegrad.ops import sums_triton

    return sums_triton


@functools.cache
def _card(device: torch.device) -> Card:
    if device.type != "cuda":  # the interpreter; few, so that samples are split
        return Card((9, 0), 4)
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


def _tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
