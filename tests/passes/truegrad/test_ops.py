"""The registered operators: torch's own checks, and the two reductions against their definition."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from graphopt.passes.truegrad import ops
from tests import test_recurrent_ops, test_second_order

FEW = settings(max_examples=25, deadline=None, derandomize=True)


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def companion(*shape):
    return torch.zeros(()).expand(shape).requires_grad_()


def all_of(num, *shape):
    """The companions of all statistics."""
    return [companion(*shape), companion(num), companion(*shape)]


ALL = "square,norm,position"
PROGRAM = """
def forward(self, p0, o0):
    return [torch.ops.aten.linear.default(o0, p0)]
"""
COLLECTED = ([3, 4, 3, 2, 3, 4, 3, 5], "float32,float32", [0, 1, 1, 0, 1, 1], 1, 4, 100)
IDS = torch.tensor([[0, 1, 1], [2, 0, 3]])

SAMPLE_INPUTS = {
    "sums": [(torch.randn(4, 3, 2), torch.randn(4, 3, 5), norms) for norms in (False, True)],
    "transposed_product": [
        (leaf(4, 3), leaf(4, 5)),
        (leaf(3, 4).t(), leaf(4, 5)),
    ],
    "linear": [
        (leaf(4, 3, 5), leaf(2, 5), leaf(2), all_of(4, 2, 5), all_of(4, 2), ALL, 0, 1, 4, 1, False, None),
        (leaf(12, 5), leaf(2, 5), None, [companion(2, 5)], [], "square", 0, 3, 4, 1, False, None),
        (leaf(4, 5), leaf(2, 5), leaf(2), [companion(2, 5)], [], "square", 0, 1, 4, 1, False, torch.bfloat16),
        (leaf(4, 5), leaf(2, 5), leaf(2), all_of(4, 2, 5), all_of(4, 2), ALL, 0, 1, 4, 1, False, None),
        (leaf(4, 3, 5), leaf(2, 5), leaf(2), [], [companion(2)], "square", 0, 1, 4, 1, True, None),
    ],
    "embedding_sums": [
        (torch.randn(2, 3, 4), IDS, None, 5, -1, False),
        (torch.randn(2, 3, 4), IDS, torch.randn(2, 3, 4), 5, 1, True),
    ],
    "embedding": [
        (leaf(5, 4), all_of(2, 5, 4), ALL, IDS, -1, 0, 1, 2, 1, False),
        (leaf(5, 4), [companion(5, 4)], "square", IDS, 1, 1, 1, 3, 1, True),
    ],
    "tied_embedding": [(leaf(5, 4), all_of(2, 5, 4), ALL, IDS, -1, 0, 1, 2, 1, False)],
    "tied_linear": [
        (leaf(2, 3, 4), leaf(5, 4), leaf(5), all_of(2, 5, 4), all_of(2, 5), ALL, leaf(2, 3, 4), IDS, 0, 1, 2, 1),
        (leaf(2, 3, 4), leaf(5, 4), None, [companion(5, 4)], [], "square", leaf(2, 3, 4), IDS, 0, 1, 2, 1),
    ],
    "per_sample": [
        (leaf(3, 2), [companion(3, 2)], "square", 4),
        (leaf(3, 2), [companion(3, 2), companion(4)], "square,norm", 4),
    ],
    "per_position": [(leaf(3), companion(3), [4, 2, 3]), (leaf(2, 1), companion(2, 1), [4, 2, 3])],
    "position_squares": [(companion(3), torch.randn(3), [4, 2, 3])],
    "with_tangent": [(leaf(3, 2), leaf(3, 2))],
    "permutation": [(torch.tensor([2, 0, 1]), 3, "here")],
    "collect": [([leaf(2, 5)], [companion(2, 5), companion(4)], "square,norm", PROGRAM, *COLLECTED)],
    "deliver": [(leaf(4, 3, 2), [leaf(4, 3, 2), leaf(4, 3, 5)], [torch.randn(4, 3, 5)])],
    "collected_gradients": [
        ([torch.randn(4, 3, 2), torch.randn(4, 3, 5)], [leaf(2, 5)], "square,norm", PROGRAM, *COLLECTED[1:])
    ],
}
CASES = [
    pytest.param(name, args, id=f"{name}-{i}") for name, cases in SAMPLE_INPUTS.items() for i, args in enumerate(cases)
]
NOT_DIFFERENTIABLE = (
    "sums",
    "embedding_sums",
    "collected_gradients",
    "permutation",
)  # they run inside backward


def test_every_registered_operator_is_tested():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("graphopt::")
    }
    convolutions = {name for name in registered if name.startswith("convolution")}  # in test_convolution.py
    elsewhere = convolutions | {"boundary"}  # what marks layers has no rule, and is tested with them
    elsewhere |= set(test_second_order.OPERATORS)
    assert set(SAMPLE_INPUTS) | set(test_recurrent_ops.SAMPLE_INPUTS) | elsewhere == registered


# These checks cannot look into what torch.func wraps; that of the compiled `collect` covers its backward.
@pytest.mark.parametrize(("name", "args"), [case for case in CASES if case.values[0] != "collected_gradients"])
def test_opcheck(name, args):
    # test_aot_dispatch_dynamic compares gradients of operators with those of their decompositions: only where there are some.
    utils = ["test_schema", "test_faketensor"]
    if name not in NOT_DIFFERENTIABLE:
        utils += ["test_autograd_registration"]
    opcheck(getattr(torch.ops.graphopt, name).default, args, test_utils=utils)


@pytest.mark.parametrize(("name", "args"), [case for case in CASES if case.values[0] not in NOT_DIFFERENTIABLE])
def test_opcheck_compiled(name, args):
    opcheck(getattr(torch.ops.graphopt, name).default, args, test_utils=["test_aot_dispatch_dynamic"])


@FEW
@given(
    num=st.integers(1, 6),
    positions=st.integers(1, 5),
    outputs=st.integers(1, 4),
    inputs=st.integers(1, 4),
    budget=st.sampled_from([1, 40, 200, 1000, 1 << 20]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_sums(num, positions, outputs, inputs, budget, dtype):
    grad, value = torch.randn(num, positions, outputs).to(dtype), torch.randn(num, positions, inputs).to(dtype)
    with patch.dict(ops.sums._CHUNK_BYTES, cpu=budget):
        total, squares, norms = torch.ops.graphopt.sums(grad, value, True)
    each = torch.einsum("nso,nsi->noi", grad.double(), value.double())
    wide = torch.promote_types(dtype, torch.float32)
    assert total.dtype == squares.dtype == norms.dtype == wide
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    largest = each.abs().max().item() + 1e-6
    torch.testing.assert_close(total.double(), each.sum(0), rtol=tolerance, atol=num * tolerance * largest)
    torch.testing.assert_close(
        squares.double(), each.square().sum(0), rtol=tolerance, atol=num * tolerance * largest**2
    )
    entries = outputs * inputs
    torch.testing.assert_close(
        norms.double(), each.square().sum((1, 2)), rtol=tolerance, atol=entries * tolerance * largest**2
    )


@FEW
@given(
    num=st.integers(1, 4),
    positions=st.integers(1, 6),
    rows=st.integers(1, 4),
    width=st.integers(1, 3),
    padding=st.booleans(),
    owed=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_embedding_sums(num, positions, rows, width, padding, owed, dtype, data):
    numbers = data.draw(st.lists(st.integers(0, rows - 1), min_size=num * positions, max_size=num * positions))
    indices = torch.tensor(numbers).view(num, positions)
    grad = torch.randn(num, positions, width).to(dtype)
    debt = torch.randn(num, rows, width).to(dtype) if owed else None  # of one sample, to each row of the table
    looked_up = None if debt is None else debt.gather(1, indices.unsqueeze(-1).expand(-1, -1, width))
    padding_idx = 0 if padding else -1
    total, squares, norms = torch.ops.graphopt.embedding_sums(grad, indices, looked_up, rows, padding_idx, True)
    each = torch.zeros(num, rows, width, dtype=torch.float64)
    for n in range(num):
        for s in range(positions):
            if not (padding and indices[n, s] == 0):
                each[n, indices[n, s]] += grad[n, s].double()
    per_sample = each.square()
    if debt is not None:
        per_sample = per_sample + 2 * each * debt.double()
    expected = per_sample.sum(0)
    assert total.dtype == squares.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = {torch.float64: 1e-11, torch.bfloat16: 1e-4}[dtype]
    torch.testing.assert_close(total.double(), each.sum(0), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(squares.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(norms.double(), per_sample.sum((1, 2)), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("padding_idx", [-1, 1])
def test_tied_pair_squares_the_sum(padding_idx):
    torch.manual_seed(0)
    table, ids = torch.randn(5, 4, dtype=torch.float64), IDS

    def run(weight, square, norm, ids, num):
        companions, tail = [square, norm], (0, 1, num, 1)
        found, tie = torch.ops.graphopt.tied_embedding(
            weight, companions, "square,norm", ids, padding_idx, *tail, False
        )
        output = torch.ops.graphopt.tied_linear(
            found.tanh(), weight, None, companions, [], "square,norm", tie, ids, *tail
        )
        return output.sin().sum()

    square, norm = torch.zeros_like(table).requires_grad_(), torch.zeros(2, dtype=torch.float64, requires_grad=True)
    weight = table.clone().requires_grad_()
    run(weight, square, norm, ids, 2).backward()
    grads = []
    for n in range(2):
        weight_n = table.clone().requires_grad_()
        looked_up = torch.nn.functional.embedding(ids[n : n + 1], weight_n, padding_idx if padding_idx >= 0 else None)
        (looked_up.tanh() @ weight_n.t()).sin().sum().backward()
        grads.append(weight_n.grad)
    torch.testing.assert_close(weight.grad, sum(grads))
    torch.testing.assert_close(square.grad, sum(grad.square() for grad in grads))
    torch.testing.assert_close(norm.grad, torch.stack([grad.square().sum() for grad in grads]))


def test_placeholders_of_gradients_take_no_memory():
    param, square = leaf(300, 200), companion(300, 200)
    rows = torch.ops.graphopt.per_sample(param, [square], "square", 1000)
    assert rows.shape == (1000, 300, 200)
    assert rows.untyped_storage().nbytes() == param.element_size()
    table, square = leaf(50, 20), companion(50, 20)
    ids = torch.randint(0, 50, (40, 30))
    _, tie = torch.ops.graphopt.tied_embedding(table, [square], "square", ids, -1, 0, 1, 40, 1, False)
    assert tie.shape == (40, 30, 20)
    assert tie.untyped_storage().nbytes() == table.element_size()
