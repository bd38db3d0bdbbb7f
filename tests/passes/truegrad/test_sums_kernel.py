"""The GPU kernel of ``graphopt::sums``, in Triton's interpreter and, without a GPU, through its compiler."""

import importlib.util
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.truegrad.ops import sums_kernel
from graphopt.passes.truegrad.ops.sums_kernel import Card, choose
from tests.passes.truegrad import triton_process as other

FEW = settings(max_examples=25, deadline=None, derandomize=True)
H200 = Card((9, 0), 132)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SHAPES = {  # N, S, O, I
    "one of everything": (1, 1, 1, 1),
    "one position": (5, 1, 40, 24),
    "one sample": (1, 33, 20, 20),
    "odd sizes": (3, 5, 7, 9),
    "fewer outputs than a block": (4, 18, 3, 70),
    "fewer inputs than a block": (4, 18, 70, 3),
    "positions fill their blocks": (3, 128, 16, 32),
    "positions do not": (2, 130, 16, 17),
    "several tiles": (2, 6, 200, 136),
    "more tiles than a band": (2, 4, 1160, 8),
    "several tiles, not in vectors": (3, 6, 131, 70),
    "many samples": (37, 3, 16, 16),
    "no samples": (0, 4, 3, 5),
    "no positions": (3, 0, 4, 5),
    "no outputs": (3, 4, 0, 5),
    "no inputs": (3, 4, 5, 0),
}


@pytest.fixture(scope="module")
def interpreter():
    with other.triton_process(interpret=True) as process:
        yield process


@pytest.fixture(scope="module")
def compiler():
    with other.triton_process(interpret=False) as process:
        yield process


def expected(grad, input):
    """By definition, in float64, one sample at a time."""
    products = [g.t() @ x for g, x in zip(grad.double(), input.double(), strict=True)]
    zero = torch.zeros(grad.shape[2], input.shape[2], dtype=torch.float64)
    norms = torch.tensor([(product * product).sum() for product in products], dtype=torch.float64)
    return sum(products, zero), sum((product * product for product in products), zero), norms


def assert_close(found, grad, input, norms=True, tolerance=1e-5):
    references = expected(grad, input)
    for name, value, reference in zip(("total", "squares", "norms"), found, references, strict=True):
        assert value.dtype == torch.float32, name
        if name == "norms" and not norms:
            assert value.shape == (0,)
            continue
        scale = reference.abs().max().item() if reference.numel() else 0.0
        torch.testing.assert_close(
            value.double(), reference, rtol=tolerance, atol=tolerance * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


def tensors(num, positions, outputs, inputs, dtype=torch.float32):
    return torch.randn(num, positions, outputs).to(dtype), torch.randn(num, positions, inputs).to(dtype)


# --- numbers ------------------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_definition(interpreter, shape, dtype):
    grad, input = tensors(*shape, dtype)
    assert_close(interpreter(other.sums, grad, input, True), grad, input)


@needs_triton
@FEW
@given(
    num=st.integers(1, 9),
    positions=st.integers(1, 70),
    outputs=st.integers(1, 80),
    inputs=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    norms=st.booleans(),
    multiprocessors=st.sampled_from([1, 3, 16, 132]),
)
def test_any_shape(interpreter, num, positions, outputs, inputs, dtype, norms, multiprocessors):
    grad, input = tensors(num, positions, outputs, inputs, dtype)
    assert_close(interpreter(other.sums, grad, input, norms, multiprocessors), grad, input, norms)


STRIDED = {
    "samples second": lambda n, s, f: torch.randn(s, n, f).transpose(0, 1),
    "features first": lambda n, s, f: torch.randn(n, f, s).transpose(1, 2),
    "samples last": lambda n, s, f: torch.randn(f, s, n).permute(2, 1, 0),
    "every second of all": lambda n, s, f: torch.randn(2 * n, 2 * s, 2 * f)[::2, ::2, ::2],
    "a slice of features": lambda n, s, f: torch.randn(n, s, f + 3)[..., 3:],
    "one row for all positions": lambda n, s, f: torch.randn(n, 1, f).expand(n, s, f),
    "one number for all": lambda n, s, f: torch.randn(()).expand(n, s, f),
}


@needs_triton
@pytest.mark.parametrize("features", [(16, 32), (13, 21)], ids=["vectors", "odd"])
@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
def test_strides(interpreter, layout, features):
    outputs, inputs = features
    grad, input = layout(5, 19, outputs), torch.randn(5, 19, inputs)
    assert_close(interpreter(other.sums, grad, input, True), grad, input)
    grad, input = torch.randn(5, 19, outputs), layout(5, 19, inputs)
    assert_close(interpreter(other.sums, grad, input, True), grad, input)


@needs_triton
@pytest.mark.parametrize(("multiprocessors", "outputs", "split"), [(1, 200, False), (4, 40, True), (132, 40, True)])
def test_splits_of_the_samples_are_added_up(interpreter, multiprocessors, outputs, split):
    grad, input = tensors(50, 20, outputs, 24)
    plan = choose(Card((9, 0), multiprocessors), (50, 20, outputs, 24), torch.float32, tf32=False, vectors=True)
    assert (plan.splits > 1) == split
    assert_close(interpreter(other.sums, grad, input, True, multiprocessors), grad, input)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_the_chunked_bmm(interpreter, dtype):
    grad, input = tensors(12, 20, 36, 28, dtype)
    found = interpreter(other.sums, grad, input, True)
    # bmm rounds each product to the dtype of the inputs, the kernel does not
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    for value, reference in zip(found, torch.ops.graphopt.sums(grad, input, True), strict=True):
        scale = reference.abs().max().item()
        torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance * scale)


@needs_triton
def test_bitwise_the_same_at_each_call(interpreter):
    grad, input = tensors(40, 20, 70, 30, torch.bfloat16)
    first, second = (interpreter(other.sums, grad, input, True, 16) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@needs_triton
@pytest.mark.parametrize("norms", [False, True])
def test_as_an_operator(interpreter, norms):
    grad, input = tensors(4, 6, 8, 5)
    for found, part in zip(
        interpreter(other.check_as_operator, grad, input, norms), (slice(4), slice(1, 4)), strict=True
    ):
        reference = expected(2 * grad[part], input[part])[1] + 1
        torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-5)


@needs_triton
def test_other_dtypes_are_errors(interpreter):
    grad, input = tensors(2, 3, 4, 5)
    with pytest.raises(
        TypeError, match=r"a gradient of torch.float64 and an input of torch.float64; it takes .*bfloat16"
    ):
        interpreter(other.sums, grad.double(), input.double(), True)
    with pytest.raises(TypeError, match=r"a gradient of torch.float32 and an input of torch.bfloat16"):
        interpreter(other.sums, grad, input.bfloat16(), True)


# --- when it is used ----------------------------------------------------------------------------------------------------------


@needs_triton
def test_profitable_in_the_interpreter(interpreter):
    def profitable(*args, **kwargs):
        return interpreter(other.is_profitable, *args, **kwargs)

    assert profitable((4, 128, 64), 64, torch.bfloat16)
    assert profitable((4, 2, 64), 64, torch.float16)
    assert not profitable((4, 2, 64), 64, torch.float64)
    assert profitable((4, 64, 64), 64, torch.float32)
    assert not profitable((4, 65, 64), 64, torch.float32)  # products outside the matrix units
    assert profitable((4, 65, 64), 64, torch.float32, precision="tf32")
    assert not profitable((2, 5000, 64), 64, torch.bfloat16, multiprocessors=132)  # two programs on 132 multiprocessors
    assert profitable((2, 500, 64), 64, torch.bfloat16, multiprocessors=132)
    assert profitable((64, 5000, 64), 64, torch.bfloat16, multiprocessors=132)
    assert profitable((0, 5000, 64), 64, torch.bfloat16)


def test_not_profitable_off_the_gpu():
    grad, input = tensors(4, 8, 16, 16, torch.bfloat16)
    assert not sums_kernel.is_profitable(grad, input)


def test_not_profitable_without_triton():
    grad, input = tensors(4, 8, 16, 16, torch.bfloat16)
    sums_kernel._triton_kernel.cache_clear()
    with patch.dict(sys.modules, triton=None):
        assert sums_kernel._triton_kernel() is None
        assert not sums_kernel.is_profitable(grad, input)
    sums_kernel._triton_kernel.cache_clear()


# --- how it is cut up ---------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    num=st.integers(1, 3000),
    positions=st.integers(1, 5000),
    outputs=st.integers(1, 60000),
    inputs=st.integers(1, 5000),
    dtype=st.sampled_from(DTYPES),
    tf32=st.booleans(),
    vectors=st.booleans(),
    capability=st.sampled_from([(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]),
    multiprocessors=st.sampled_from([1, 40, 132]),
)
def test_plans_cover_everything_once(
    num, positions, outputs, inputs, dtype, tf32, vectors, capability, multiprocessors
):
    card = Card(capability, multiprocessors)
    plan = choose(card, (num, positions, outputs, inputs), dtype, tf32=tf32, vectors=vectors)
    tile = plan.tile
    assert (plan.splits - 1) * plan.samples_per_split < num <= plan.splits * plan.samples_per_split
    assert plan.num_tiles == -(-outputs // tile.outputs) * -(-inputs // tile.inputs)
    sizes = (tile.outputs, tile.inputs, tile.positions)
    assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
    # the buffers of the second reduction are bounded by the card, not by the model or the batch
    assert plan.splits == 1 or plan.splits * plan.num_tiles <= 4 * multiprocessors


def test_a_layer_needs_at_most_two_kernels_whatever_the_batch():
    for shape in ((128, 768, 768), (1, 256, 1024), (197, 1000, 64), (4096, 64, 64)):
        plans = [choose(H200, (num, *shape), torch.bfloat16, tf32=False, vectors=True) for num in range(1, 600)]
        assert len({plan.tile for plan in plans}) <= 2


def test_the_card_is_filled():
    for shape in ((16, 128, 256, 256), (8, 512, 768, 768), (64, 64, 64, 64), (512, 16, 10, 128)):
        plan = choose(H200, shape, torch.bfloat16, tf32=False, vectors=True)
        assert plan.num_tiles * plan.splits >= min(H200.multiprocessors, shape[0] * plan.num_tiles) // 2, shape
    large = choose(H200, (8, 2048, 16384, 4096), torch.bfloat16, tf32=False, vectors=True)
    assert large.splits == 1
    assert (large.tile.outputs, large.tile.inputs) == (128, 128)


# --- what the compiler makes of it ----------------------------------------------------------------------------------------------

SPILLED = 16  # bytes for each thread, at most: a few loop counters; one spilled accumulator has 64 or more
CARDS = {  # shared memory that a program can have, and the matrix instructions of bfloat16
    (8, 0): (163, "HMMA"),
    (8, 6): (99, "HMMA"),
    (9, 0): (227, "HGMMA"),
    (10, 0): (227, "UTC"),
    (12, 0): (99, "HMMA"),
}


@needs_triton
@pytest.mark.parametrize("capability", CARDS, ids=str)
def test_compiled_in_bfloat16(compiler, capability):
    kilobytes, instruction = CARDS[capability]
    for norms in (False, True):
        found = compiler(other.compile_tiles, capability, torch.bfloat16, False, True, norms)
        assert len(found) == 2
        for tile, kernel in found.items():
            assert kernel["stack"] <= SPILLED, tile  # the accumulators are in registers
            assert kernel["shared"] <= kilobytes << 10, tile
            assert kernel["in_flight"] >= 2, tile  # both inputs of the next step, across the ends of samples
            assert any(name.startswith(instruction) for name in kernel["matrix_instructions"]), tile


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", CARDS, ids=str)
def test_compiled_in_the_other_forms(compiler, capability):
    forms = [
        (torch.float32, False, False),
        (torch.float16, False, True),
        (torch.float32, True, True),
        (torch.float32, False, True),
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
    ]
    ends = capability in (min(CARDS), max(CARDS))  # the others: one form with their matrix instructions, one without
    for dtype, tf32, vectors in forms if ends else forms[:2]:
        for tile, kernel in compiler(other.compile_tiles, capability, dtype, tf32, vectors, True).items():
            assert kernel["stack"] <= SPILLED, (dtype, tf32, vectors, tile)
            assert kernel["shared"] <= CARDS[capability][0] << 10, (dtype, tf32, vectors, tile)
