"""Conjugate gradients end on quadratics, and hand their base class what it says."""

from itertools import pairwise

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import ConjugateGradientBase, Modular, m
from tests.optim.catalogue import accepts
from tests.optim.problems import Exact, Problem, booth, in_plane, least_squares, quadratic, rosenbrock, steps_until

# The most steps on the Rosenbrock function.
EVERY = {
    "PolakRibiere": 50,
    "FletcherReeves": 60,
    "HestenesStiefel": 50,
    "DaiYuan": 170,
    "LiuStorey": 45,
    "ConjugateDescent": 60,
    "HagerZhang": 40,
    "HybridHS_DY": 60,
    "ProjectedGradientMethod": 60,
}


@accepts("J1", "J2", "J3", "J4", "J5", "J6", "J7", "J8", "J9")
@pytest.mark.parametrize(("size", "condition"), [(4, 10), (4, 100), (8, 10), (8, 100)])
def test_quadratics_end_and_all_methods_agree(size, condition):
    ends = []
    for name in EVERY:
        problem, matrix = quadratic(size, condition, cut=3)
        optimizer = Modular(problem.params, getattr(m, name)(), Exact(matrix))
        start = torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params)).norm()
        path = []
        for _ in range(size):
            optimizer.step(problem.closure)
            path.append(problem.vector)
        end = torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params)).norm()
        assert end <= 1e-8 * start, name
        ends.append(torch.stack(path))
    for end in ends[1:]:
        torch.testing.assert_close(ends[0], end, rtol=0, atol=1e-6)


@accepts("J1", "J2", "J3", "J4", "J5", "J6", "J7", "J8", "J9")
@pytest.mark.parametrize("name", EVERY)
def test_functions_in_the_plane(name):
    module = getattr(m, name)
    problem = in_plane(rosenbrock, 2)
    optimizer = Modular(problem.params, module(), m.StrongWolfe(c2=0.1))
    assert steps_until(problem, optimizer, 1e-6, EVERY[name]) <= EVERY[name]
    problem = in_plane(least_squares)
    optimizer = Modular(problem.params, module(), m.StrongWolfe(c2=0.1))
    assert steps_until(problem, optimizer, 1e-10, 3) <= 3


@accepts("J1", "J2", "J3", "J4", "J5", "J6", "J7", "J8", "J9")
@pytest.mark.parametrize("name", EVERY)
def test_spheres(name):
    shapes = [(), (1,), (1, 1), (10,), (1, 10), (10, 1), (10, 10), (2, 2)]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).tolist() for shape in shapes] + [[[0.0] * 2] * 2]
    problem = Problem(lambda *ps: sum((p**2).sum() for p in ps), *values, dtype=torch.float32)
    optimizer = Modular(problem.params, getattr(m, name)(), m.StrongWolfe(c2=0.1))
    for _ in range(10):
        optimizer.step(problem.closure)
    assert problem.loss < 1e-10


def directions_of(module, num=5, lr=0.01, size=2):
    problem = in_plane(booth, 2) if size == 2 else quadratic(size, 10)[0]
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


def dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


def minus(left, right):
    return [a - b for a, b in zip(left, right, strict=True)]


def hestenes_stiefel(g, h, d):
    return dot(g, minus(g, h)) / dot(d, minus(g, h))


def dai_yuan(g, h, d):
    return dot(g, g) / dot(d, minus(g, h))


def hager_zhang(g, h, d):
    y = minus(g, h)
    bent = [a - 2 * b * dot(y, y) / dot(d, y) for a, b in zip(y, d, strict=True)]
    return max(dot(bent, g) / dot(d, y), -1 / (dot(d, d) ** 0.5 * min(0.01, dot(h, h) ** 0.5)))


# Of g, that before, and the direction before in which the parameters went.
BETAS = {
    "PolakRibiere": lambda g, h, d: max(0.0, dot(g, minus(g, h)) / dot(h, h)),
    "FletcherReeves": lambda g, h, d: dot(g, g) / dot(h, h),
    "HestenesStiefel": hestenes_stiefel,
    "DaiYuan": dai_yuan,
    "LiuStorey": lambda g, h, d: -dot(g, minus(g, h)) / dot(d, h),
    "ConjugateDescent": lambda g, h, d: -dot(g, g) / dot(d, h),
    "HagerZhang": hager_zhang,
    "HybridHS_DY": lambda g, h, d: max(0.0, min(hestenes_stiefel(g, h, d), dai_yuan(g, h, d))),
}
assert set(BETAS) == set(EVERY) - {"ProjectedGradientMethod"}


@accepts("J1", "J2", "J3", "J4", "J5", "J6", "J7", "J8")
@pytest.mark.parametrize("name", BETAS)
def test_formulas(name):
    moves, grads = directions_of(getattr(m, name)(), 3)
    for index in (1, 2):
        beta = BETAS[name](grads[index].tolist(), grads[index - 1].tolist(), (-moves[index - 1]).tolist())
        torch.testing.assert_close(moves[index], grads[index] + beta * moves[index - 1])
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-4, 1.0, 1.0, 1.0):  # curvature of either sign
        g, h, d = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
        g, h = g * scale, h * scale
        beta = float(getattr(m, name)().get_beta(g, g, h, -d))
        beta = max(0.0, beta) if name == "PolakRibiere" else beta
        assert beta == pytest.approx(BETAS[name](g.tolist(), h.tolist(), d.tolist()), rel=1e-9)


@accepts("J7")
def test_directions_of_hager_and_zhang_descend():
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        g, h, d = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
        direction = g + m.HagerZhang().get_beta(g, g, h, d) * d
        assert direction.dot(g) >= 7 / 8 * g.dot(g) * (1 - 1e-9)


@accepts("J9")
def test_projected_gradients():
    """Each is what is left of the gradient outside of the changes since the last beginning, by least squares."""
    moves, grads = directions_of(m.ProjectedGradientMethod(reset_interval=None), 3, size=4)
    for index in range(3):
        changes = [after - before for before, after in pairwise(grads[: index + 1])]
        expected = grads[index]
        if changes:
            columns = torch.stack(changes, 1)
            expected = expected - columns @ torch.linalg.lstsq(columns, expected[:, None]).solution[:, 0]
        torch.testing.assert_close(moves[index], expected, rtol=1e-9, atol=1e-9)
    moves, grads = directions_of(m.ProjectedGradientMethod(), 5)
    assert not torch.allclose(moves[1], grads[1])
    for index in (0, 2, 4):  # nothing is left of the plane after two
        torch.testing.assert_close(moves[index], grads[index])
    moves, grads = directions_of(m.ProjectedGradientMethod(reset_interval=1), 3)
    torch.testing.assert_close(torch.stack(moves), torch.stack(grads))
    moves, grads = directions_of(m.ProjectedGradientMethod(scale_first=True, inner=m.LR(0.5)), 2)
    torch.testing.assert_close(moves[0], grads[0] / 2 / (grads[0] / 2).abs().sum().clamp(min=1))


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
