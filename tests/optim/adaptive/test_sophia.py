"""`SophiaH` against dense matrices."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from graphopt.optim.grad_approximation.random_directions import draw, generators
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, quadratic

A = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64)


@accepts("O5")
@pytest.mark.parametrize("method", ["autograd", "forward", "central"])
def test_equals_the_algorithm(method):
    """With two tensors, products by a matrix, and the vectors that it draws."""
    problem, matrix = quadratic(5, 10.0, cut=2)
    options = {"beta1": 0.7, "beta2": 0.6, "update_freq": 2, "precond_scale": 0.5, "clip": 0.4, "eps": 0.1}
    optimizer = Modular(problem.params, m.SophiaH(**options, hvp_method=method, n_samples=2, seed=3), m.LR(0.1))
    x = problem.vector
    linear = matrix @ x - gradient(problem)
    mean = diagonal = torch.zeros(5, dtype=torch.float64)
    for t in range(1, 6):
        mean = 0.7 * mean + 0.3 * (matrix @ x - linear)
        if t % 2 == 1:
            zs = [torch.cat(draw(problem.params, "gaussian", generators(problem.params, 3, t, i))) for i in range(2)]
            diagonal = 0.6 * diagonal + 0.4 * sum(z * (matrix @ z) for z in zs) / 2
        x = x - 0.1 * (mean / (0.5 * diagonal).clamp(min=0.1)).clamp(-0.4, 0.4)
        optimizer.step(problem.closure)
        torch.testing.assert_close(problem.vector, x, rtol=1e-9, atol=1e-9)


def gradient(problem):
    loss = problem.loss_of(*problem.params)
    return torch.cat(torch.autograd.grad(loss, problem.params))


@accepts("O5")
@pytest.mark.parametrize(("distribution", "n_samples"), [("gaussian", 2000), ("rademacher", 1500)])
def test_the_diagonal_is_found(distribution, n_samples):
    """Within 3 %, which is luck with so few vectors of Gauss (the seed is chosen): 20000 take too long for a test."""
    problem = Problem(lambda p: 0.5 * p @ A @ p, (1.0, 2.0))
    module = m.SophiaH(beta2=0.0, n_samples=n_samples, distribution=distribution, seed=2)
    Modular(problem.params, module, m.LR(0.0)).step(problem.closure)
    found = module.state[problem.params[0]]["hessian"]
    torch.testing.assert_close(found, torch.tensor([3.0, 2.0], dtype=torch.float64), rtol=0.03, atol=0)


@accepts("O5")
def test_an_ill_conditioned_quadratic():
    problem = Problem(lambda p: p[0] ** 2 + p[1] ** 2 + 1.99999 * p[0] * p[1], (-9.0, 2.5))
    optimizer = Modular(problem.params, m.SophiaH(seed=0), m.LR(0.1))
    for _ in range(50):
        optimizer.step(problem.closure)
    assert min(problem.losses) <= 0.02


@accepts("O5")
def test_evaluations():
    """One with a graph where the diagonal is estimated, one gradient otherwise."""
    problem = Problem(lambda p: 0.5 * p @ A @ p, (1.0, 2.0))
    optimizer = Modular(problem.params, m.SophiaH(update_freq=3), m.LR(0.1))
    for _ in range(4):
        optimizer.step(problem.closure)
    assert problem.calls == [False, True, True, False]


def test_negative_curvature_is_left():
    problem = Problem(lambda p: p[0] ** 2 - p[1] ** 2, (1.0, 0.1))
    Modular(problem.params, m.SophiaH(beta1=0.0, beta2=0.0, distribution="rademacher"), m.LR(0.5)).step(problem.closure)
    assert problem.vector.tolist() == pytest.approx([0.5, 0.6])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"update_freq": 0}, "update_freq=0; expected an integer of at least 1"),
        ({"n_samples": True}, "n_samples=True; expected an integer of at least 1"),
        ({"hvp_method": "exact"}, "hvp_method='exact'; expected one of"),
        ({"distribution": "cauchy"}, "distribution='cauchy'; expected one of"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(OptionError, match=f"SophiaH: {text}"):
        m.SophiaH(**options)
