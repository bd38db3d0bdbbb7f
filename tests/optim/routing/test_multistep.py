"""Several steps in one, and closures that are not evaluated twice at one point."""

import pytest
import torch
from torch import nn

from graphopt.errors import ClosureError, NonFiniteError, OptionError
from graphopt.optim import Modular, m
from graphopt.optim.core.memo import Memo
from tests.optim.catalogue import accepts


class Problem:
    """A quartic of two tensors, and how often it was evaluated with and without gradients."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(n, generator=generator, dtype=torch.float64)) for n in (3, 2)]
        self.calls = []
        self.points = []

    def loss(self):
        return sum(((p - 1) ** 2 * (1 + i)).sum() + (p**4).sum() for i, p in enumerate(self.params))

    def closure(self, backward=True):
        self.calls.append(backward)
        self.points.append(tuple(torch.cat([p.detach() for p in self.params]).tolist()))
        loss = self.loss()
        if backward:
            for p in self.params:
                p.grad = None
            loss.backward()
        return loss

    def values(self):
        return torch.cat([p.detach() for p in self.params])


def run(*modules, steps=1, **options):
    problem = Problem()
    optimizer = Modular(problem.params, *modules, **options)
    losses = [float(torch.as_tensor(optimizer.step(problem.closure)).detach()) for _ in range(steps)]
    return problem, losses


STEPPERS = {
    "gradient descent": lambda: [m.LR(0.01)],
    "Adam": lambda: [m.Adam(), m.LR(0.1)],
    "BFGS": lambda: [m.BFGS(), m.StrongWolfe()],
    "Newton": lambda: [m.NewtonCG(hvp_method="forward"), m.StrongWolfe()],
    "zeroth order": lambda: [m.FDM(), m.HeavyBall(0.5), m.LR(0.01)],
}


@accepts("X12")
@pytest.mark.parametrize("name", STEPPERS)
def test_multistep_is_as_many_steps(name):
    expected, _ = run(*STEPPERS[name](), steps=6)
    for inner, outer in ((6, 1), (3, 2)):
        problem, losses = run(m.Multistep(STEPPERS[name](), inner), steps=outer)
        assert (problem.values() - expected.values()).abs().max() < 1e-10
        assert losses[0] == pytest.approx(float(Problem().loss().detach()))


@accepts("X12")
def test_sequential_lets_each_chain_step_where_the_one_before_has_got():
    problem, _ = run(m.Sequential(m.LR(0.01), [m.HeavyBall(), m.LR(0.02)], steps=2))
    expected = Problem()
    chains = [Modular(expected.params, m.LR(0.01)), Modular(expected.params, m.HeavyBall(), m.LR(0.02))]
    for optimizer in chains * 2:
        optimizer.step(expected.closure)
    assert (problem.values() - expected.values()).abs().max() < 1e-12


def test_what_stands_behind_scales_the_whole_way():
    start = Problem().values()
    whole, _ = run(m.Multistep([m.Adam(), m.LR(0.1)], 5))
    half, _ = run(m.Multistep([m.Adam(), m.LR(0.1)], 5), m.LR(0.5))
    assert (half.values() - (start + whole.values()) / 2).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["BFGS", "Newton"])
def test_no_point_is_evaluated_twice(name):
    forgetful, expected_losses = run(*STEPPERS[name](), steps=6)
    problem, losses = run(*STEPPERS[name](), steps=6, deterministic=True)
    assert (problem.values() == forgetful.values()).all()
    assert losses == expected_losses
    assert len(problem.calls) < len(forgetful.calls)
    assert len(set(zip(problem.points, problem.calls, strict=True))) == len(problem.calls)
    inside, _ = run(m.Multistep(STEPPERS[name](), 6))
    assert len(inside.calls) == len(problem.calls)


@pytest.mark.parametrize("shapes", [[(2, 3)], [(2, 3), ()], [(2, 2), (0, 2), (3,)]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_are_remembered_in_their_shapes(shapes, dtype):
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]
    memo, calls = Memo(), []

    def closure(backward=True):
        calls.append(backward)
        loss = sum((p.double() ** 3).sum() for p in params)
        if backward:
            for p in params:
                p.grad = None
            loss.backward()
        return loss

    remembering = memo.remember(closure, params)
    remembering()
    expected = [p.grad.clone() for p in params]
    for p in params:
        p.grad.zero_()
    remembering()
    assert len(calls) == 1
    for p, grad in zip(params, expected, strict=True):
        assert p.grad.dtype == dtype
        assert torch.equal(p.grad, grad)
    memo.remember(closure, [nn.Parameter(p.detach().clone()) for p in params])()
    assert len(calls) == 2  # of other parameters nothing is known


def test_parameters_that_something_else_has_moved_are_evaluated_anew():
    problem = Problem()
    optimizer = Modular(problem.params, m.BFGS(), m.StrongWolfe(), deterministic=True)
    optimizer.step(problem.closure)
    with torch.no_grad():
        problem.params[0][0] += 1e-9
    expected = float(problem.loss().detach())
    assert float(optimizer.step(problem.closure).detach()) == expected


def test_bad_input():
    for steps in (0, 1.5, True):
        with pytest.raises(OptionError, match="steps="):
            m.Multistep(m.LR(0.1), steps)
    with pytest.raises(OptionError, match=r"Sequential\(first, second"):
        m.Sequential()
    params = Problem().params
    before = [p.detach().clone() for p in params]
    with pytest.raises(ClosureError, match=r"Multistep.*needs a closure"):
        Modular(params, m.Multistep(m.LR(0.1), 2)).step()
    with pytest.raises(ClosureError, match="takes no argument"):
        Modular(params, m.FDM(), m.LR(0.1), deterministic=True).step(lambda: params[0].sum())

    def diverges(backward=True):
        loss = sum((p**2).sum() for p in params) * (1.0 if torch.equal(params[0], before[0]) else float("nan"))
        if backward:
            loss.backward()
        return loss

    with pytest.raises(NonFiniteError, match="the loss is nan"):
        Modular(params, m.Multistep(m.LR(0.1), 2)).step(diverges)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
