"""Modules that look at the loss."""

import pytest
import torch

from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, booth, in_plane, rosenbrock


def move(module, value=3.0, **options):
    """How far a step goes on x², and how the closure was called."""
    problem = Problem(lambda x: (x**2).sum(), [value])
    Modular(problem.params, module, **options).step(problem.closure)
    return value - problem.vector.item(), problem.calls


@accepts("X10")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: m.FillLoss(), 9),
        (lambda: m.FillLoss(-2.0), -18),
        (lambda: m.MulByLoss(), 54),
        (lambda: m.MulByLoss(0.5), 27),
        (lambda: m.MulByLoss(min_value=10.0), 60),
        (lambda: m.DivByLoss(), 6 / 9),
        (lambda: m.DivByLoss(2.0), 6 / 18),
        (lambda: m.DivByLoss(-1.0, min_value=3.0), 2),
    ],
)
def test_by_hand(make, expected):
    found, calls = move(make())
    assert found == pytest.approx(expected)
    assert calls == [True]  # once


def test_the_loss_alone():
    """No gradient, if nobody asks for one."""
    assert move(m.FillLoss(backward=False)) == (9, [False])


def test_at_a_loss_of_zero():
    """The least factor keeps it finite."""
    assert move(m.DivByLoss(), 0.0)[0] == 0
    assert move(m.MulByLoss(), 0.0)[0] == 0
    assert move(m.FillLoss(), 0.0)[0] == 0


def test_losses_that_are_python_numbers():
    problem = Problem(lambda x: (x**2).sum(), [3.0])
    Modular(problem.params, m.MulByLoss(), m.LR(0.01)).step(lambda backward=True: problem.closure(backward).item())
    assert problem.vector.item() == pytest.approx(3 - 0.54)


@accepts("X10")
@pytest.mark.parametrize("function", [rosenbrock, booth])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_step_raises_the_loss(function, dtype):
    """Without going back; with it, it may. Rates grow beyond what is stable."""
    problem = in_plane(function, dtype=dtype)
    optimizer = Modular(problem.params, m.LR(lambda step: 1e-4 * 1.2**step), m.NegateOnLossIncrease(backtrack=False))
    stayed = 0
    for _ in range(60):
        before, vector = problem.loss, problem.vector
        optimizer.step(problem.closure)
        assert problem.loss <= before
        stayed += torch.equal(problem.vector, vector)
    assert 0 < stayed < 60


@accepts("X10")
def test_negation():
    """Also where the loss behind the step is NaN."""
    assert move(m.NegateOnLossIncrease())[0] == 6  # from 3 to -3, where the loss is the same
    for loss_of in (lambda x: (x**2).sum(), lambda x: (x**2 + 0 * (x + 3.5).sqrt()).sum()):
        for backtrack, expected in ((True, 3 + 12), (False, 3)):
            problem = Problem(loss_of, [3.0])
            Modular(problem.params, m.LR(2.0), m.NegateOnLossIncrease(backtrack)).step(problem.closure)
            assert problem.vector.item() == pytest.approx(expected)
            assert problem.calls == [True, False]
