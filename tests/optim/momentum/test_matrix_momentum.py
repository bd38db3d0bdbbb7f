"""`MatrixMomentum` and its adaptive form against dense matrices."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.problems import booth, in_plane, quadratic

METHODS = {"autograd": 1e-8, "forward": 1e-3, "central": 1e-3}
LR = 0.02


def gradients(problem, matrix):
    x = problem.vector
    linear = matrix @ x - torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params))
    return x, lambda point: matrix @ point - linear


@accepts("M9")
@pytest.mark.parametrize("cut", [None, 1])
@pytest.mark.parametrize("method", METHODS)
def test_fixed(method, cut):
    problem, matrix = quadratic(4, 10.0, cut=cut)
    optimizer = Modular(problem.params, m.MatrixMomentum(0.08, 0.9, method), m.LR(LR))
    x, grad = gradients(problem, matrix)
    update = torch.zeros_like(x)
    for _ in range(20):
        update = grad(x) + 0.9 * (update - 0.08 * matrix @ update)
        x = x - LR * update
        optimizer.step(problem.closure)
        torch.testing.assert_close(problem.vector, x, rtol=METHODS[method], atol=METHODS[method])


@accepts("M10")
@pytest.mark.parametrize("method", METHODS)
def test_adaptive(method):
    problem, matrix = quadratic(4, 10.0, cut=1)
    optimizer = Modular(problem.params, m.AdaptiveMatrixMomentum(0.7, 0.9, 1e-3, method), m.LR(LR))
    x, grad = gradients(problem, matrix)
    update, before = torch.zeros_like(x), x
    for step in range(20):
        mu = 0.0
        if step:
            mu = 0.7 * (x - before).norm() / ((grad(x) - grad(before)).norm() + 1e-3)
        update = grad(x) + 0.9 * (update - mu * matrix @ update)
        before, x = x, x - LR * update
        optimizer.step(problem.closure)
        torch.testing.assert_close(problem.vector, x, rtol=METHODS[method], atol=METHODS[method])


@accepts("M9", "M10")
@pytest.mark.parametrize("num_tensors", [1, 2])
@pytest.mark.parametrize(
    ("make", "lr", "limit"),
    [(m.MatrixMomentum, 0.01, 0.05), (m.AdaptiveMatrixMomentum, 0.05, 0.002)],
    ids=["M9", "M10"],
)
def test_booth(make, lr, limit, num_tensors):
    problem = in_plane(booth, num_tensors)
    optimizer = Modular(problem.params, make(), m.LR(lr))
    for _ in range(50):
        optimizer.step(problem.closure)
    assert min(problem.losses) <= limit


def test_options_of_single_tensors():
    """``mu`` and ``beta`` of each parameter; what it multiplies by the Hessian is of all."""
    problem, matrix = quadratic(4, 10.0, cut=1)
    first, second = problem.params
    groups = [{"params": [first], "mu": 0.0}, {"params": [second], "beta": 0.5}]
    optimizer = Modular(groups, m.MatrixMomentum(0.1, 1.0, "autograd"), m.LR(LR))
    x, grad = gradients(problem, matrix)
    mu, beta = torch.tensor([[0.0, 0.1, 0.1, 0.1], [1.0, 0.5, 0.5, 0.5]], dtype=torch.float64)
    update = torch.zeros_like(x)
    for _ in range(5):
        momentum = beta * update
        update = grad(x) + momentum - mu * (matrix @ momentum)
        x = x - LR * update
        optimizer.step(problem.closure)
    torch.testing.assert_close(problem.vector, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [m.MatrixMomentum, m.AdaptiveMatrixMomentum])
def test_unknown_method(make):
    with pytest.raises(OptionError, match=f"{make.__name__}: hvp_method='exact'; expected one of"):
        make(hvp_method="exact")
