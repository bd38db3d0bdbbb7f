"""Gauss and Newton's, and Levenberg and Marquardt's, methods against linear algebra and scipy's ``least_squares``."""

import math
import warnings

import pytest
import torch
from scipy import optimize
from torch import nn

from graphopt.errors import ClosureError, ModuleError, NonFiniteError, OptionError
from graphopt.optim import Modular, m
from graphopt.optim.second_order.levenberg_marquardt import _in_region
from tests.optim.catalogue import accepts
from tests.optim.second_order.test_derivatives import OnlyLoops, unchanged
from tests.optim.standard_functions import FUNCTIONS

MODULES = {"GaussNewton": m.GaussNewton, "LevenbergMarquardt": m.LevenbergMarquardt}
every_module = pytest.mark.parametrize("name", MODULES)


class Residuals:
    """Parameters, and a closure of residuals that counts its calls."""

    def __init__(self, residuals_of, *values, dtype=torch.float64):
        self.params = [torch.tensor(value, dtype=dtype).requires_grad_() for value in values]
        self.residuals_of, self.calls = residuals_of, []

    def closure(self, backward=True):
        self.calls.append(backward)
        return self.residuals_of(*self.params)

    @property
    def vector(self):
        return torch.cat([param.detach().reshape(-1) for param in self.params])

    @property
    def loss(self):
        with torch.no_grad():
            return 0.5 * float(self.residuals_of(*self.params).square().sum())


def linear(num, size, rank=None, seed=0, scales=1.0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(num, rank or size, generator=generator, dtype=torch.float64)
    if rank is not None:
        matrix = matrix @ torch.randn(rank, size, generator=generator, dtype=torch.float64)
    matrix = matrix * scales
    target = torch.randn(num, generator=generator, dtype=torch.float64)

    def residuals_of(a, b):
        return matrix @ torch.cat([a, b.reshape(-1)]) - target

    return Residuals(residuals_of, [0.3] * (size - 2), [[0.1], [0.2]]), matrix, target


@accepts("N+GaussNewton")
@every_module
@pytest.mark.parametrize(("num", "size", "rank"), [(9, 4, None), (4, 4, None), (3, 5, None), (9, 5, 3)])
def test_linear_residuals_need_one_step(name, num, size, rank):
    """Of least norm where there are many."""
    problem, matrix, target = linear(num, size, rank)
    before = problem.vector
    loss = Modular(problem.params, MODULES[name]()).step(problem.closure)
    assert float(loss) == pytest.approx(0.5 * float((matrix @ before - target).square().sum()), rel=1e-12)
    step = torch.linalg.lstsq(matrix, target - matrix @ before, driver="gelsd").solution
    assert (matrix.T @ (matrix @ problem.vector - target)).norm() < 1e-9
    if name == "GaussNewton":
        torch.testing.assert_close(problem.vector - before, step, rtol=0, atol=1e-9)
    assert not any(problem.calls)


def test_damping():
    problem, matrix, target = linear(3, 5)
    before = problem.vector
    Modular(problem.params, m.GaussNewton(reg=0.7)).step(problem.closure)
    expected = torch.linalg.solve(
        matrix.T @ matrix + 0.7 * torch.eye(5).double(), matrix.T @ (target - matrix @ before)
    )
    torch.testing.assert_close(problem.vector - before, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("region", [1e-3, 0.1, 1.0, 10.0])
def test_a_step_within_a_region(region):
    """The condition of the minimum on the sphere, and its length."""
    singular, inside = torch.tensor([10.0, 1.0, 0.01]).double(), torch.tensor([1.0, -2.0, 0.3]).double()
    step, damping = _in_region(singular, inside, region)
    torch.testing.assert_close(step, singular * inside / (singular**2 + damping), rtol=1e-12, atol=0)
    whole = (inside / singular).norm()
    assert damping > 0 or whole <= 1.01 * region
    assert damping == 0 or abs(float(step.norm()) - region) <= 0.01 * region


@accepts("N+GaussNewton")
def test_standard_functions_as_by_scipy():
    """As far as scipy's ``lm``, with at most 1.5 times its evaluations of residuals and derivatives."""
    for function in FUNCTIONS.values():
        if function.name in ("meyer", "brown_dennis", "penalty_1", "penalty_2", "wood"):
            continue  # hundreds of steps
        options = {"method": "lm", "xtol": 1e-10, "ftol": 1e-10, "gtol": 1e-10, "max_nfev": 500}
        theirs = optimize.least_squares(function.residuals_of, function.start, jac=function.jacobian_of, **options)
        problem = Residuals(function.residuals, list(function.start))
        optimizer, target = Modular(problem.params, m.LevenbergMarquardt()), theirs.cost * (1 + 1e-6) + 1e-12
        losses = []
        for _ in range(150):
            losses.append(float(optimizer.step(problem.closure)))
            if problem.loss <= target:
                break
        assert problem.loss <= target, function
        assert losses == sorted(losses, reverse=True)
        assert len(problem.calls) <= 1.5 * (theirs.nfev + theirs.njev) + 2, function


@accepts("N+GaussNewton")
def test_a_line_search_behind_gauss_and_newton():
    """It sees the loss and its gradient."""
    for name in ("beale", "helical_valley", "bard", "watson"):
        function = FUNCTIONS[name]
        problem = Residuals(function.residuals, list(function.start))
        optimizer = Modular(problem.params, m.GaussNewton(), m.StrongWolfe())
        for _ in range(40):
            optimizer.step(problem.closure)
        assert 2 * problem.loss <= function.minima[0] * (1 + 1e-5) + 1e-10, name
        assert not any(problem.calls)


@accepts("N+GaussNewton")
def test_fitting_a_model_is_what_scipy_finds():
    """Another start than the functions above, a model with modules, and units that differ by 10⁴."""
    t = torch.linspace(0, 4, 20, dtype=torch.float64)
    y = 3e3 * torch.exp(-1.3 * t) + 2e-1 + 1e-2 * torch.sin(9 * t)

    def residuals_of(height, rate, offset):
        return (height * torch.exp(-rate * t) + offset - y)[:, None]

    problem = Residuals(residuals_of, 1e3, 0.5, [0.0])
    optimizer = Modular(problem.params, m.LevenbergMarquardt())
    for _ in range(30):
        optimizer.step(problem.closure)
    theirs = optimize.least_squares(
        lambda x: residuals_of(*torch.tensor(x)).numpy()[:, 0], [1e3, 0.5, 0.0], method="lm", xtol=1e-14, ftol=1e-14
    )
    torch.testing.assert_close(problem.vector, torch.from_numpy(theirs.x), rtol=1e-6, atol=1e-8)


def test_units_do_not_matter():
    runs = []
    for scale in (1.0, 2.0**10):
        problem = Residuals(
            lambda x, k=scale: FUNCTIONS["wood"].residuals(x * k), [v / scale for v in (-3.0, -1.0, -3.0, -1.0)]
        )
        optimizer = Modular(problem.params, m.LevenbergMarquardt())
        for _ in range(10):
            optimizer.step(problem.closure)
        runs.append(problem.vector * scale)
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


@every_module
def test_a_network_in_float32(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(12, 2)

    def closure(backward=True):
        return model(inputs) - inputs.flip(1).sin()

    chain = [m.GaussNewton(reg=1e-3), m.Backtracking()] if name == "GaussNewton" else [m.LevenbergMarquardt()]
    optimizer = Modular(model, chain)
    losses = [float(optimizer.step(closure)) for _ in range(25)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-2 * losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_second_derivatives_of_the_loss_behind_it():
    """The loss that follows has a graph."""
    problem = Residuals(FUNCTIONS["rosenbrock"].residuals, [-1.2, 1.0])
    optimizer = Modular(problem.params, m.GaussNewton(), m.NewtonCG(hvp_method="autograd"), m.Backtracking())
    losses = [float(optimizer.step(problem.closure)) for _ in range(3)]
    assert math.isfinite(losses[-1])


@every_module
def test_operators_without_a_rule_of_vmap(name):
    for vectorize in (True, False):
        problem = Residuals(lambda x: OnlyLoops.apply(x) - 8.0, [3.0, 1.0])
        optimizer = Modular(problem.params, MODULES[name](vectorize=vectorize))
        for _ in range(12):
            optimizer.step(problem.closure)
        torch.testing.assert_close(problem.vector, torch.tensor([2.0, 2.0]).double(), rtol=0, atol=1e-9)


WRONG = {
    "the loss": (
        lambda x: x.square().sum(),
        ClosureError,
        r"closure returned one number, as if it were the loss; expected",
    ),
    "a number": (lambda x: 3.0, ClosureError, "returned one number"),
    "nothing": (lambda x: None, ClosureError, "the closure returned None; expected the residuals"),
    "complex": (lambda x: x.to(torch.complex128), ClosureError, r"returned a tensor of torch\.complex128; expected"),
    "no graph": (
        lambda x: x.detach(),
        ModuleError,
        r"the residuals of closure\(False\) do not require gradients; nothing",
    ),
    "constants": (
        lambda x: x * 0 + 1,
        ModuleError,
        "the derivatives of all residuals are zero, .* nothing was changed",
    ),
    "a cusp": (lambda x: (x - 3).abs().sqrt(), NonFiniteError, "holds NaN or infinities"),
    "NaN": (
        lambda x: x * math.nan,
        NonFiniteError,
        "the loss is nan at the parameters before the step; nothing was changed",
    ),
}


@every_module
@pytest.mark.parametrize(("residuals_of", "error", "text"), WRONG.values(), ids=WRONG)
def test_wrong_closures(name, residuals_of, error, text):
    problem = Residuals(residuals_of, [3.0, 1.0])
    optimizer = Modular(problem.params, MODULES[name]())
    with unchanged(optimizer), pytest.raises(error, match=rf"module 1 of 1, {name}.*{text}"):
        optimizer.step(problem.closure)


@every_module
def test_places_in_a_chain(name):
    problem = Residuals(lambda x: x - 1, [3.0, 1.0])
    optimizer = Modular(problem.params, m.FDM(), MODULES[name]())
    with (
        unchanged(optimizer),
        pytest.raises(ModuleError, match=rf"{name} differentiates residuals, but a module before it"),
    ):
        optimizer.step(problem.closure)
    with pytest.raises(OptionError, match=rf"module 2 of 2, {name} makes an update of its own, so that"):
        Modular(problem.params, m.Adam(), MODULES[name]())
    optimizer = Modular(problem.params, m.Backtracking(), MODULES[name]())
    with (
        unchanged(optimizer),
        pytest.raises(ClosureError, match=r"Backtracking: the closure returned a tensor of shape \(2,\)"),
    ):
        optimizer.step(problem.closure)


@every_module
def test_residuals_that_are_zero(name):
    problem = Residuals(lambda x: x - 1, [1.0, 1.0])
    Modular(problem.params, MODULES[name]()).step(problem.closure)
    assert problem.vector.tolist() == [1.0, 1.0]


def test_bad_options():
    with pytest.raises(OptionError, match="LevenbergMarquardt: maxiter=0; expected an integer of at least 1"):
        m.LevenbergMarquardt(maxiter=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        m.LevenbergMarquardt(init=1)
