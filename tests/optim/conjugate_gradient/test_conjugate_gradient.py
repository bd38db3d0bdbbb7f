"""Conjugate gradients end on quadratics, and hand their base class what it says."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import ConjugateGradientBase, Modular, m
from tests.optim.problems import Exact, Problem, booth, in_plane, least_squares, quadratic, rosenbrock, steps_until

EVERY = {m.PolakRibiere: 50, m.FletcherReeves: 60}


@pytest.mark.parametrize(("size", "condition"), [(4, 10), (4, 100), (8, 10), (8, 100)])
def test_quadratics_end_and_all_methods_agree(size, condition):
    ends = []
    for module in EVERY:
        problem, matrix = quadratic(size, condition, cut=3)
        optimizer = Modular(problem.params, module(), Exact(matrix))
        start = torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params)).norm()
        path = []
        for _ in range(size):
            optimizer.step(problem.closure)
            path.append(problem.vector)
        end = torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params)).norm()
        assert end <= 1e-8 * start
        ends.append(torch.stack(path))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("module", EVERY)
@pytest.mark.parametrize("num_tensors", [1, 2])
def test_functions_in_the_plane(module, num_tensors):
    problem = in_plane(rosenbrock, num_tensors)
    optimizer = Modular(problem.params, module(), m.StrongWolfe(c2=0.1))
    assert steps_until(problem, optimizer, 1e-6, EVERY[module]) <= EVERY[module]
    problem = in_plane(least_squares, num_tensors)
    optimizer = Modular(problem.params, module(), m.StrongWolfe(c2=0.001))
    assert steps_until(problem, optimizer, 1e-10, 12) <= 12


@pytest.mark.parametrize("module", EVERY)
def test_spheres(module):
    problem = Problem(lambda *ps: sum((p**2).sum() for p in ps), 1.0, [[2.0, 3.0]], [[0.0]], dtype=torch.float32)
    optimizer = Modular(problem.params, module(), m.StrongWolfe(c2=0.1))
    for _ in range(10):
        optimizer.step(problem.closure)
    assert problem.loss < 1e-10


def directions_of(module, num=5, lr=0.01):
    problem = in_plane(booth, 2)
    optimizer = Modular(problem.params, module, m.LR(lr))
    moves, grads = [], []
    for _ in range(num):
        before = problem.vector
        problem.closure()
        grads.append(torch.cat([p.grad.reshape(-1) for p in problem.params]).clone())
        optimizer.step()
        moves.append((before - problem.vector) / lr)
    return moves, grads


def test_the_base_hands_over_what_it_says():
    seen = []

    class Third(ConjugateGradientBase):
        def get_beta(self, p, g, prev_g, prev_d):
            seen.append((g.clone(), prev_g.clone(), prev_d.clone()))
            return -1 / 3

    moves, grads = directions_of(Third())
    assert len(seen) == 4
    for index, (g, prev_g, prev_d) in enumerate(seen):
        torch.testing.assert_close(g, grads[index + 1])
        torch.testing.assert_close(prev_g, grads[index])
        torch.testing.assert_close(prev_d, moves[index])
        torch.testing.assert_close(moves[index + 1], grads[index + 1] - moves[index] / 3)
    moves, grads = directions_of(Third(clip_beta=True))
    torch.testing.assert_close(torch.stack(moves), torch.stack(grads))
    moves, grads = directions_of(Third(reset_interval="auto"), 5)  # after three steps
    torch.testing.assert_close(moves[3], grads[3])
    torch.testing.assert_close(moves[4], grads[4] - moves[3] / 3)
    moves, grads = directions_of(Third(inner=m.LR(0.5)))
    torch.testing.assert_close(moves[1], grads[1] / 2 - moves[0] / 3)


@pytest.mark.parametrize(
    ("module", "beta"),
    [
        (
            m.PolakRibiere,
            lambda g, h: max(0.0, sum(a * (a - b) for a, b in zip(g, h, strict=True)) / sum(b * b for b in h)),
        ),
        (m.FletcherReeves, lambda g, h: sum(a * a for a in g) / sum(b * b for b in h)),
    ],
)
def test_formulas(module, beta):
    moves, grads = directions_of(module(), 3)
    for index in (1, 2):
        expected = grads[index] + beta(grads[index].tolist(), grads[index - 1].tolist()) * moves[index - 1]
        torch.testing.assert_close(moves[index], expected)


def test_parameters_apart():
    problem = Problem(lambda a, b: (a**2).sum() + 3 * b**2, [1.0, 2.0], 1.0)
    optimizer = Modular(problem.params, m.FletcherReeves(concat_params=False), m.LR(0.05))
    alone = Problem(lambda b: 3 * b**2, 1.0)
    other = Modular(alone.params, m.FletcherReeves(), m.LR(0.05))
    for _ in range(3):
        optimizer.step(problem.closure)
        other.step(alone.closure)
    assert torch.equal(problem.params[1], alone.params[0])


def test_bad_options():
    with pytest.raises(
        OptionError, match="PolakRibiere: reset_interval=0; expected a positive integer, None, or 'auto'"
    ):
        m.PolakRibiere(reset_interval=0)
