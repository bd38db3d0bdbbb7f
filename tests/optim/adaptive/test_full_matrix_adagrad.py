"""`FullMatrixAdagrad` against its definition with numpy."""

import numpy as np
import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import m
from tests.optim.catalogue import accepts
from tests.optim.outputs import make_tensors, outputs

SHAPES = [(3,), (), (2, 2)]


def power(matrix, exponent):
    """By singular values."""
    left, values, right = np.linalg.svd(matrix)
    return left @ np.diag(values**exponent) @ right


def reference(vectors, *, beta=None, decay=1.0, exponent=-0.5, freq=1, inner=lambda v: v):
    matrix, results = np.eye(len(vectors[0])), []
    for step, v in enumerate(vectors):
        matrix = matrix * decay
        matrix = matrix + np.outer(v, v) if beta is None else beta * matrix + (1 - beta) * np.outer(v, v)
        if step % freq == 0:
            root = power(matrix, exponent)
        results.append(root @ inner(v))
    return results


def check(make, tolerance=1e-12, concat=False, num_steps=6, **options):
    steps = [make_tensors(seed, SHAPES) for seed in range(num_steps)]
    results = outputs(lambda: [make()], steps)
    if concat:
        steps, results = ([[torch.cat([t.reshape(-1) for t in step])] for step in them] for them in (steps, results))
    for index in range(len(steps[0])):
        expected = reference([step[index].reshape(-1).numpy() for step in steps], **options)
        for result, vector in zip(results, expected, strict=True):
            np.testing.assert_allclose(result[index].reshape(-1).numpy(), vector, rtol=tolerance, atol=tolerance)


def averaging(decay):
    """An average that starts at zero."""
    buffer = None

    def average(v):
        nonlocal buffer
        buffer = (np.zeros_like(v) if buffer is None or len(buffer) != len(v) else buffer) * decay + (1 - decay) * v
        return buffer

    return average


@accepts("O7")
@pytest.mark.parametrize("concat", [False, True])
def test_the_inverse_root_of_the_sum_of_outer_products(concat):
    check(lambda: m.FullMatrixAdagrad(concat_params=concat), concat=concat)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"beta": 0.7}, {"beta": 0.7}),
        ({"decay": 0.5}, {"decay": 0.5}),
        ({"sqrt": False}, {"exponent": -1.0}),
        ({"update_freq": 3}, {"freq": 3}),
    ],
    ids=str,
)
def test_options(options, expected):
    check(lambda: m.FullMatrixAdagrad(**options), **expected)


@accepts("K4")
def test_adam_with_a_full_matrix():
    """And ``inner`` makes a difference."""
    make = lambda: m.FullMatrixAdagrad(beta=0.999, inner=m.EMA(0.9), concat_params=True)  # noqa: E731
    check(make, 1e-10, concat=True, num_steps=10, beta=0.999, inner=averaging(0.9))
    steps = [make_tensors(seed, SHAPES) for seed in range(2)]
    plain = outputs(lambda: [m.FullMatrixAdagrad(beta=0.999, concat_params=True)], steps)
    assert not torch.allclose(outputs(lambda: [make()], steps)[1][0], plain[1][0], rtol=0.1)


@accepts("O7")
def test_singular_matrices():
    """An average that forgets at once has rank one: what is left of a vector is its direction."""
    for dtype in (torch.float32, torch.float64):
        steps = [make_tensors(seed, [(4,), (1,)], dtype) for seed in range(3)]
        results = outputs(lambda: [m.FullMatrixAdagrad(beta=0.0)], steps)
        for step, result in zip(steps, results, strict=True):
            torch.testing.assert_close(result[0], step[0] / step[0].norm())
            torch.testing.assert_close(result[1], step[1].sign())
    zeros = [[torch.zeros(4)], [torch.zeros(4)], [torch.ones(4)], [torch.zeros(4)]]
    assert all(u.isfinite().all() for (u,) in outputs(lambda: [m.FullMatrixAdagrad(beta=0.0)], zeros))
    last = outputs(lambda: [m.FullMatrixAdagrad()], [*zeros, [torch.full((4,), torch.inf)]], error_if_nonfinite=False)
    assert len(last) == 5


@pytest.mark.parametrize("value", [0, 1.5, True, None])
def test_bad_options(value):
    with pytest.raises(OptionError, match=f"update_freq={value!r}; expected a positive whole number"):
        m.FullMatrixAdagrad(update_freq=value)


@accepts("O7")
def test_equal_to_torchzero():
    tz = pytest.importorskip("torchzero")
    grads = [make_tensors(seed, [(5,)])[0] for seed in range(6)]
    param = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    theirs = tz.Optimizer([param], tz.m.FullMatrixAdagrad(beta=None, reg=0.0, concat_params=False))
    ours = outputs(lambda: [m.FullMatrixAdagrad()], [[g] for g in grads])
    for g, (update,) in zip(grads, ours, strict=True):
        before, param.grad = param.detach().clone(), g.clone()
        theirs.step()
        torch.testing.assert_close(before - param.detach(), update, rtol=1e-10, atol=1e-10)
