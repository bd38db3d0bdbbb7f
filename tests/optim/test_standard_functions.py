"""Methods that evaluate the loss, on the standard functions: as low as scipy's own, in at most 1.5 times its evaluations.

What scipy reaches stands in a table, as its methods take longer than ours here. Evaluations are points at which the closure was
called; it is not called twice at one with ``deterministic=True``. Where the step solves with second derivatives, scipy is given
them, too, and neither's are counted.
"""

import warnings

import numpy as np
import pytest
import scipy.optimize
import torch

from graphopt.optim import Modular, m
from tests.optim.examples import PUBLIC, RESIDUALS
from tests.optim.problems import rosenbrock
from tests.optim.scipy_on_standard_functions import REACHED
from tests.optim.standard_functions import FUNCTIONS

# Cheap ones of every kind: curved valleys, small residuals and large ones, a singular Hessian, 2 to 10 variables.
SET = [
    "rosenbrock", "beale", "helical_valley", "gaussian", "powell_singular", "wood", "kowalik_osborne", "brown_dennis",
    "extended_rosenbrock", "variably_dimensioned", "trigonometric", "broyden_tridiagonal", "broyden_banded",
]  # fmt: skip


class Counted:
    """A function from its start, and the points where it was evaluated."""

    def __init__(self, function, start, residuals=False):
        self.x = torch.tensor(start, dtype=torch.float64).requires_grad_()
        self.function, self.residuals = function, residuals
        self.points, self.num_calls = set(), 0

    def closure(self, backward=True):
        self.num_calls += 1
        self.points.add(self.x.detach().numpy().tobytes())
        if self.residuals:
            return self.function.residuals(self.x)
        loss = self.function(self.x)
        if backward:
            self.x.grad = None
            loss.backward()
        return loss

    @property
    def loss(self):
        with torch.no_grad():
            return self.function(self.x).item()


def scipy_reaches(name, method):
    """The lowest value with the defaults of a method, and how often it evaluated the function."""
    function = FUNCTIONS[name]
    start = np.array(function.start)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if method == "lm":
            result = scipy.optimize.least_squares(function.residuals_of, start, function.jacobian_of, method="lm")
            return 2 * result.cost, result.nfev
        options = {"hess": function.hessian} if method in ("trust-exact", "Newton-CG") else {}
        result = scipy.optimize.minimize(function.value_and_grad, start, jac=True, method=method, **options)
        return result.fun, result.nfev


@pytest.mark.parametrize("method", ["BFGS", "L-BFGS-B", "CG", "Newton-CG", "trust-exact", "lm"])
def test_the_table_of_scipy(method):
    """Up to versions: counts are not promised."""
    for name in ("beale", "gaussian"):
        value, num = scipy_reaches(name, method)
        assert value == pytest.approx(REACHED[name][method][0], rel=1e-3, abs=1e-9)
        assert num == pytest.approx(REACHED[name][method][1], rel=0.2, abs=1)


def evaluations_until(modules, function, target, most, residuals=False):
    """How many evaluations it takes to reach a value; infinitely many if it takes more than ``most``."""
    counted = Counted(function, function.start, residuals)
    optimizer = Modular([counted.x], *modules, deterministic=True)
    for _ in range(most):
        if counted.loss <= target:
            break
        optimizer.step(counted.closure)
        if len(counted.points) > most:
            return np.inf
    return len(counted.points) if counted.loss <= target else np.inf


def conjugate(module):
    return lambda: [module(), m.StrongWolfe(c2=0.1, a_init="first-order")]


def quasi_newton(module, **options):
    return lambda: [module(), m.StrongWolfe(**options)]


# Scipy's method, ours, and the functions of the set where ours takes more than 1.5 times the evaluations (the report of issue 7
# has the numbers), or ends in another minimum that is higher.
METHODS = {
    "BFGS": ("BFGS", quasi_newton(m.BFGS), {"gaussian"}),
    "SR1": ("BFGS", quasi_newton(m.SR1, plus_minus=True), {"gaussian"}),
    "LBFGS": ("L-BFGS-B", quasi_newton(m.LBFGS), {"gaussian"}),
    "LSR1": (
        "L-BFGS-B", quasi_newton(m.LSR1, plus_minus=True),
        {"brown_dennis", "broyden_tridiagonal", "broyden_banded"},
    ),
    "PolakRibiere": ("CG", conjugate(m.PolakRibiere), {"wood", "kowalik_osborne"}),
    "FletcherReeves": ("CG", conjugate(m.FletcherReeves), {"powell_singular", "extended_rosenbrock"}),
    "NewtonCG": ("Newton-CG", lambda: [m.NewtonCG(hvp_method="autograd"), m.StrongWolfe()], {"trigonometric"}),
    "Newton": ("trust-exact", lambda: [m.Newton(eigval_tfm=torch.abs), m.StrongWolfe()], {"helical_valley", "kowalik_osborne"}),
    "CubicRegularization": ("trust-exact", lambda: [m.CubicRegularization()], {"helical_valley"}),
    # It holds on brown_dennis, too, but scipy needs 266 evaluations there, which take seconds.
    "LevenbergMarquardt": ("lm", lambda: [m.LevenbergMarquardt()], {"brown_dennis"}),
    "GaussNewton": ("lm", lambda: [m.GaussNewton(), m.StrongWolfe()], {"kowalik_osborne", "brown_dennis"}),
}  # fmt: skip
LEAST = 10  # functions on which each must hold


@pytest.mark.parametrize("method", METHODS)
def test_as_low_as_scipy_in_as_many_evaluations(method):
    reference, modules, others = METHODS[method]
    held, failed = [], {}
    for name in SET:
        if name in others:
            continue
        value, num = REACHED[name][reference]
        target = value + 1e-9 * abs(value) + 1e-14
        found = evaluations_until(modules(), FUNCTIONS[name], target, int(1.5 * num), method in RESIDUALS)
        if found <= 1.5 * num:
            held.append(name)
        else:
            failed[name] = found, num
    assert not failed
    assert len(held) >= LEAST


# ----------------------------------------------------------------------------------------------------------------------
# Rosenbrock's function from (-1.1, 2.5)

FAMILIES = ("line_search", "quasi_newton", "conjugate_gradient", "second_order")
NO_METHODS = {"GradientCorrection": "of use inside of others only"}
CHAINS = {
    "TrustRegion": lambda: [m.BFGS(tol_reset=False), m.TrustRegion()],
    "GridLineSearch": lambda: [m.Newton(), m.GridLineSearch(0.0, 1.0, 21)],
    "HigherOrderNewton": lambda: [m.HigherOrderNewton()],
    "CubicRegularization": lambda: [m.CubicRegularization()],
    "LevenbergMarquardt": lambda: [m.LevenbergMarquardt()],
    "NystromPCG": lambda: [m.NystromPCG(2), m.StrongWolfe()],
    "NystromSketchAndSolve": lambda: [m.NystromSketchAndSolve(2), m.StrongWolfe()],
}


def family_of(name):
    return PUBLIC[name].__module__.split(".")[2]


def usual_chain(name):
    """How a module is used."""
    module = PUBLIC[name]
    if name in CHAINS:
        return CHAINS[name]()
    if family_of(name) == "line_search":
        return [m.BFGS(), module()]
    if family_of(name) == "conjugate_gradient":
        return conjugate(module)()
    return quasi_newton(module)()


class _Rosenbrock:
    start = (-1.1, 2.5)

    def __call__(self, x):
        return rosenbrock(*x)

    def residuals(self, x):
        return FUNCTIONS["rosenbrock"].residuals(x)


@pytest.mark.parametrize("name", [n for n in PUBLIC if family_of(n) in FAMILIES and n not in NO_METHODS])
def test_every_method_minimises_rosenbrock(name):
    assert evaluations_until(usual_chain(name), _Rosenbrock(), 1e-8, 600, name in RESIDUALS) < np.inf


def estimated(module):
    """Directions are fixed within a step, so that the estimate is the gradient times a matrix, which Newton's method divides out."""
    return [module, m.NewtonCG(hvp_method="forward"), m.AdaptiveBacktracking()]


OF_OTHER_FAMILIES = {
    "ASAM": lambda: [m.ASAM(1e-4), m.BFGS(), m.StrongWolfe()],
    "FDM": lambda: [m.FDM(1e-4), m.BFGS(), m.StrongWolfe()],
    "ForwardGradient": lambda: estimated(m.ForwardGradient(5)),
    "GaussianHomotopy": lambda: [m.GaussianHomotopy(20, 0.5, tol=1e-2, decay=0.3), m.BFGS(), m.StrongWolfe()],
    "GaussianSmoothing": lambda: estimated(m.GaussianSmoothing(n_samples=8)),
    "MeZO": lambda: estimated(m.MeZO(n_samples=8, distribution="gaussian", perturb="params")),
    "Multistep": lambda: [m.Multistep([m.BFGS(), m.StrongWolfe()], 5)],
    "NegateOnLossIncrease": lambda: [m.BFGS(), m.NegateOnLossIncrease()],
    "PolyakStepSize": lambda: [m.PolyakStepSize()],
    "RDSA": lambda: estimated(m.RDSA(n_samples=8)),
    "RandomizedFDM": lambda: estimated(m.RandomizedFDM(n_samples=5)),
    "SAM": lambda: [m.SAM(1e-4), m.BFGS(), m.StrongWolfe()],
    "SPSA": lambda: estimated(m.SPSA(n_samples=5)),
    "Sequential": lambda: [m.Sequential([m.BFGS(), m.StrongWolfe()], m.LR(1e-4))],
}
NEED_A_RATE = {
    **dict.fromkeys(
        ["SophiaH", "MatrixMomentum", "AdaptiveMatrixMomentum"], "first-order steps; tested on other functions"
    ),
    **dict.fromkeys(["FillLoss", "MulByLoss", "DivByLoss", "WeightDropout"], "operations, no methods"),
}


@pytest.mark.parametrize("name", OF_OTHER_FAMILIES)
def test_methods_of_other_families_minimise_rosenbrock(name):
    torch.manual_seed(0)
    counted = Counted(_Rosenbrock(), _Rosenbrock.start)
    optimizer = Modular([counted.x], OF_OTHER_FAMILIES[name]())
    start = counted.loss
    for _ in range(250):
        if counted.loss < start * 1e-3:
            return
        optimizer.step(counted.closure)
    raise AssertionError(f"the loss is {counted.loss} after 250 steps")


def test_every_method_that_evaluates_the_loss_stands_in_a_table():
    needy = {name for name, kind in PUBLIC.items() if kind.needs_closure and kind.__name__ == name}
    tabled = {name for name in PUBLIC if family_of(name) in FAMILIES} | set(OF_OTHER_FAMILIES) | set(NEED_A_RATE)
    assert needy - tabled == set()
    assert (set(OF_OTHER_FAMILIES) | set(NEED_A_RATE)) - needy == set()


@pytest.mark.parametrize("modules", [quasi_newton(m.BFGS), conjugate(m.PolakRibiere)])
def test_a_deterministic_closure_is_called_once_at_every_point(modules):
    function = FUNCTIONS["helical_valley"]
    counted = Counted(function, function.start)
    optimizer = Modular([counted.x], *modules(), deterministic=True)
    for _ in range(10):
        optimizer.step(counted.closure)
    assert counted.num_calls == len(counted.points)
