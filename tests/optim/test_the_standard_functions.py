"""The standard functions are what the paper says: values at minimizers, and what scipy reaches from the standard starts."""

import numpy as np
import pytest
import scipy.optimize
import torch

from tests.optim.standard_functions import FUNCTIONS

# By the formulas of the paper, by hand.
AT_START = {
    "rosenbrock": 24.2,
    "freudenstein_roth": 400.5,
    "brown_badly_scaled": 999998000003.0,
    "beale": 14.203125,
    "helical_valley": 2500.0,
    "powell_singular": 215.0,
    "wood": 19192.0,
    "extended_rosenbrock": 5 * 24.2,
    "penalty_1": 385.0**2 - 0.5 * 385 + 0.0625 + 285e-5,
    "watson": 30.0,
    "brown_almost_linear": 9 * 5.5**2 + (0.5**10 - 1) ** 2,
}


def test_there_are_enough():
    assert len(FUNCTIONS) >= 24
    assert len({function.number for function in FUNCTIONS.values()}) == len(FUNCTIONS)


@pytest.mark.parametrize("name", AT_START)
def test_value_at_the_start(name):
    function = FUNCTIONS[name]
    assert function(torch.tensor(function.start, dtype=torch.float64)).item() == pytest.approx(
        AT_START[name], rel=1e-12
    )


@pytest.mark.parametrize("name", [name for name, function in FUNCTIONS.items() if function.minimizers])
def test_known_minimizers(name):
    function = FUNCTIONS[name]
    for point in function.minimizers:
        value, grad = function.value_and_grad(np.array(point))
        assert value == pytest.approx(function.minima[0], abs=1e-18)
        assert abs(grad).max() < 1e-8


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scipy_reaches_a_stated_minimum(name):
    function = FUNCTIONS[name]
    start = np.array(function.start)
    if name == "brown_dennis":  # of large residuals, where least_squares takes hundreds of derivatives
        value = scipy.optimize.minimize(function.value_and_grad, start, jac=True, method="L-BFGS-B", tol=1e-12).fun
    else:
        tight = {"xtol": 1e-15, "ftol": 1e-15, "gtol": 1e-15}
        value = (
            2
            * scipy.optimize.least_squares(
                function.residuals_of, start, function.jacobian_of, method="lm", **tight
            ).cost
        )
    closest = min(function.minima, key=lambda minimum: abs(minimum - value))
    assert value == pytest.approx(closest, rel=1e-5, abs=1e-12)
