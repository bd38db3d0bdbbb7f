"""Cubic regularisation: its subproblem against a fine grid and scipy, its steps against the loss, and SciPy's trust region."""

import math

import pytest
import torch
from scipy import optimize

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from graphopt.optim.second_order.cubic_regularization import minimize_cubic
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, in_plane, quadratic, rosenbrock
from tests.optim.standard_functions import FUNCTIONS


def cubic(values, linear, sigma, step):
    return float(linear @ step + 0.5 * (values * step) @ step + sigma / 3 * step.norm() ** 3)


SUBPROBLEMS = {
    "convex": ([1.0, 5.0, 100.0], [1.0, -2.0, 3.0]),
    "indefinite": ([-3.0, 0.5, 2.0], [1.0, -2.0, 3.0]),
    "negative": ([-3.0, -2.0, -1.0], [0.1, -0.2, 0.3]),
    "hard": ([-3.0, 0.5, 2.0], [0.0, -0.2, 0.3]),
    "not quite hard": ([-3.0, 0.5, 2.0], [1e-9, -0.2, 0.3]),
    "hard and repeated": ([-3.0, -3.0, 2.0], [0.0, 0.0, 0.3]),
    "a saddle": ([-3.0, 0.5, 2.0], [0.0, 0.0, 0.0]),
    "a minimum": ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0]),
    "singular": ([0.0, 0.0, 1.0], [1.0, -1.0, 2.0]),
    "singular along the gradient": ([0.0, 1.0, 1.0], [0.0, -1.0, 2.0]),
    "no curvature": ([0.0, 0.0, 0.0], [1.0, 2.0, 2.0]),
    "scales": ([-1e-6, 1.0, 1e6], [1e3, 1e-3, -1e5]),
}


@accepts("N+cubic")
@pytest.mark.parametrize("sigma", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("values", "linear"), SUBPROBLEMS.values(), ids=SUBPROBLEMS)
def test_subproblem(values, linear, sigma):
    """The conditions that hold at the global minimum, and nowhere else; no other starts lead lower."""
    values, linear = torch.tensor(values, dtype=torch.float64), torch.tensor(linear, dtype=torch.float64)
    step = minimize_cubic(values, linear, sigma)
    weight = sigma * step.norm()
    size = linear.norm() + (values.abs() * step.abs()).norm() + 1e-30
    assert (linear + (values + weight) * step).norm() <= 1e-9 * size
    assert weight + values[0] >= -1e-9 * values.abs().max()
    found = cubic(values, linear, sigma, step)
    for start in torch.randn(2, 3, dtype=torch.float64) * max(float(step.norm()), 1e-3):
        other = optimize.minimize(lambda x: cubic(values, linear, sigma, torch.from_numpy(x)), start.numpy()).fun
        assert found <= other + 1e-7 * abs(other) + 1e-12


def test_one_step():
    """Of many units against a search of all angles and lengths in two dimensions."""
    problem = in_plane(rosenbrock)
    before = problem.vector
    Modular(problem.params, m.CubicRegularization(sigma=500.0)).step(problem.closure)
    step = problem.vector - before
    hessian = torch.autograd.functional.hessian(lambda x: rosenbrock(*x), before)
    grad = torch.autograd.functional.jacobian(lambda x: rosenbrock(*x), before)
    angles = torch.linspace(0, 2 * math.pi, 401, dtype=torch.float64)[:, None, None]
    lengths = torch.linspace(0, 3, 1001, dtype=torch.float64)[None, :, None]
    points = torch.cat([angles.cos() * lengths, angles.sin() * lengths], dim=2)

    def model(s):
        return s @ grad + 0.5 * ((s @ hessian) * s).sum(-1) + 500 / 3 * s.norm(dim=-1) ** 3

    assert float(model(step)) <= float(model(points).min()) + 1e-12
    assert float(model(step)) == pytest.approx(float(model(points).min()), rel=1e-3)


@accepts("N+cubic")
@pytest.mark.parametrize("hessian_method", ["autograd", "forward_over_reverse", "central"])
def test_rosenbrock(hessian_method):
    problem = in_plane(rosenbrock, 2)
    optimizer = Modular(problem.params, m.CubicRegularization(hessian_method=hessian_method, h=1e-5))
    losses = [optimizer.step(problem.closure).item() for _ in range(30)]
    assert losses == sorted(losses, reverse=True)
    assert problem.loss < 1e-12


@accepts("N+cubic")
def test_the_loss_never_rises_and_saddles_are_left():
    problem = Problem(lambda x: x[1] ** 2 - x[0] ** 2 + 0.05 * x[0] ** 4, [0.0, 0.0])
    optimizer = Modular(problem.params, m.CubicRegularization())
    losses = [float(optimizer.step(problem.closure)) for _ in range(20)]
    assert losses == sorted(losses, reverse=True)
    assert problem.loss == pytest.approx(-5.0)
    wild = Problem(lambda x: torch.exp(x[0] ** 2) + torch.sin(30 * x[1]) + x[1] ** 2, [3.0, 2.0])
    optimizer = Modular(wild.params, m.CubicRegularization(sigma=1e-6))
    losses = [float(optimizer.step(wild.closure)) for _ in range(40)]
    assert losses == sorted(losses, reverse=True)
    assert torch.autograd.grad(wild.loss_of(*wild.params), wild.params)[0].norm() < 1e-6


def test_quadratics_end_with_steps_of_newton():
    """Exact where σ has become small; in float32, too."""
    problem, matrix = quadratic(8, 100, cut=3)
    optimizer = Modular(problem.params, m.CubicRegularization())
    for _ in range(16):
        optimizer.step(problem.closure)
    grad = torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params))
    assert grad.norm() < 1e-9
    assert len(matrix) == 8
    state = {key for entry in optimizer.state.values() for key in entry}
    assert state == {"step", "cubicregularization/global.sigma"}


# It gets there, too, but the test would take long.
MANY_STEPS = {"brown_badly_scaled", "meyer", "powell_badly_scaled", "penalty_1", "penalty_2", "wood", "biggs_exp6"}


@accepts("N+cubic")
def test_standard_functions_as_by_a_trust_region():
    """As far as scipy's trust-exact, with at most 1.5 times its evaluations of losses and gradients, all but one."""
    slow = {}
    for function in FUNCTIONS.values():
        if function.name in MANY_STEPS:
            continue
        theirs = optimize.minimize(
            lambda x, f=function: f.value_and_grad(x)[0],
            function.start,
            jac=lambda x, f=function: f.value_and_grad(x)[1],
            hess=function.hessian,
            method="trust-exact",
            options={"gtol": 1e-8, "maxiter": 500},
        )
        problem = Problem(function, list(function.start))
        optimizer, target = Modular(problem.params, m.CubicRegularization()), theirs.fun * (1 + 1e-6) + 1e-10
        for _ in range(300):
            optimizer.step(problem.closure)
            if problem.loss <= target:
                break
        assert problem.loss <= target, function
        if len(problem.calls) > 1.5 * (theirs.nfev + theirs.njev):
            slow[function.name] = len(problem.calls)
    assert set(slow) <= {"helical_valley"}


def test_bad_options():
    with pytest.raises(OptionError, match="CubicRegularization: maxiter=0; expected an integer of at least 1"):
        m.CubicRegularization(maxiter=0)
    with pytest.raises(OptionError, match=r"module 2 of 2, CubicRegularization makes an update of its own, so that"):
        Modular([torch.nn.Parameter(torch.ones(1))], m.Adam(), m.CubicRegularization())
