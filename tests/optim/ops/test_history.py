"""Operations on the updates of earlier steps, on sequences of numbers, and against torchzero."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import m
from tests.optim.catalogue import accepts
from tests.optim.outputs import make_tensors, on_numbers, outputs

SEQUENCE = [4, -2, 1, 8, -4]


@accepts("X9")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: m.Previous(), [4, 4, -2, 1, 8]),
        (lambda: m.Previous(2), [4, 4, 4, -2, 1]),
        (lambda: m.Previous(3), [4, 4, 4, 4, -2]),
        (lambda: m.Previous(9), [4, 4, 4, 4, 4]),
        (lambda: m.LastDifference(), [4, -6, 3, 7, -12]),
        (lambda: m.LastGradDifference(), [4, -6, 3, 7, -12]),
        (lambda: m.LastProduct(), [4, -8, -2, 8, -32]),
        (lambda: m.LastRatio(), [4, -0.5, -0.5, 8, -0.5]),
        (lambda: m.LastRatio("prev"), [0.25, -2, -2, 0.125, -2]),
        (lambda: m.LastAbsoluteRatio(), [4, 0.5, 0.5, 8, 0.5]),
        (lambda: m.LastAbsoluteRatio("prev"), [0.25, 2, 2, 0.125, 2]),
        (lambda: m.LastAbsoluteRatio(eps=2.0), [2, 0.5, 0.5, 4, 0.5]),
        (lambda: m.LastAbsoluteRatio("prev", eps=3.0), [0.25, 4 / 3, 2 / 3, 0.125, 2]),
    ],
)
def test_sequences(make, expected):
    assert on_numbers(lambda: [make()], SEQUENCE) == pytest.approx(expected)


@accepts("X9")
def test_the_constant_of_the_catalogue():
    """What follows does not write to the history."""
    assert on_numbers(lambda: [m.Previous(10), m.LR(0.5)], [1] * 12) == [0.5] * 12


def test_gradients_whatever_the_update_is():
    assert on_numbers(lambda: [m.Zeros(), m.LastGradDifference()], SEQUENCE) == [4, -6, 3, 7, -12]


def test_a_zero_in_front_of_a_ratio():
    assert on_numbers(lambda: [m.LastAbsoluteRatio()], [0, 1, 0, 0]) == pytest.approx([0, 1e8, 0, 0])
    assert on_numbers(lambda: [m.LastRatio()], [0, 1]) == [0, float("inf")]


def test_an_infinite_update_is_gone_when_it_is_gone():
    assert on_numbers(lambda: [m.Mul(1e300), m.Mul(1e300), m.Previous(1)], [1, 0, 0, 0])[2:] == [0, 0]


@pytest.mark.parametrize("name", ["LastDifference", "LastGradDifference", "LastProduct", "LastRatio"])
def test_equal_to_torchzero(name):
    torchzero = pytest.importorskip("torchzero")
    grads = [make_tensors(seed, [(3, 2), (4,)]) for seed in range(4)]
    ours = outputs(lambda: [getattr(m, name)()], grads)
    params = [torch.zeros_like(g).requires_grad_() for g in grads[0]]
    optimizer = torchzero.Optimizer(params, getattr(torchzero.m, name)())
    for step, expected in zip(grads, ours, strict=True):
        for p, g in zip(params, step, strict=True):
            p.data.zero_()
            p.grad = g.clone()
        optimizer.step()
        for p, update in zip(params, expected, strict=True):
            torch.testing.assert_close(-p.detach(), update)


def test_bad_input():
    with pytest.raises(OptionError, match="Previous: n=0; expected a whole number of at least 1"):
        m.Previous(0)
    with pytest.raises(OptionError, match="LastRatio: numerator='last'; expected 'cur' or 'prev'"):
        m.LastRatio("last")
