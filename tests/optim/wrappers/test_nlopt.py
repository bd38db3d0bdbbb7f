"""NLopt: the catalogue's table, and how its errors end."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim.wrappers.nlopt import NLOptOptimizer
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, in_plane, rosenbrock

nlopt = pytest.importorskip("nlopt")


@accepts("E2")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "algorithm", ["LD_LBFGS", "LD_SLSQP", "LN_NELDERMEAD", "LN_SBPLX", "LD_TNEWTON", nlopt.LD_VAR2]
)
def test_algorithms_minimise_in_one_step(algorithm, dtype):
    """By name or number; those that fail where rounding lets them make no more progress are at the best point then."""
    problem = in_plane(rosenbrock, 2, dtype)
    loss = NLOptOptimizer(problem.params, algorithm, maxeval=1000, lb=-5.0, ub=5.0).step(problem.closure)
    assert loss == problem.loss < 1e-8
    assert all(p.dtype == dtype for p in problem.params)
    if isinstance(algorithm, str):
        assert any(problem.calls) == algorithm.startswith("LD")


def test_criteria_and_seeds():
    problem = in_plane(rosenbrock)
    optimizer = NLOptOptimizer(problem.params, "ln_neldermead", maxeval=None, stopval=0.5)
    assert optimizer.step(problem.closure) <= 0.5
    assert optimizer.result == nlopt.STOPVAL_REACHED
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        problem = in_plane(rosenbrock)
        NLOptOptimizer(problem.params, "GN_CRS2_LM", maxeval=100, lb=-5.0, ub=5.0).step(problem.closure)
        assert len(problem.calls) <= 110
        ends.append(problem.vector)
    assert torch.equal(*ends)


class Broken(BaseException):
    pass


@pytest.mark.parametrize("algorithm", ["LD_LBFGS", "LN_SBPLX"])
def test_parameters_are_put_back(algorithm):
    """When the closure raises, and when NLopt refuses to work."""
    problem = in_plane(rosenbrock)
    before = problem.vector

    def closure(backward=True):
        if len(problem.calls) == 5:
            raise Broken
        return problem.closure(backward)

    with pytest.raises(Broken):
        NLOptOptimizer(problem.params, algorithm).step(closure)
    assert torch.equal(problem.vector, before)
    with pytest.raises(nlopt.invalid_argument) as caught:
        NLOptOptimizer(problem.params, "G_MLSL", lb=-5.0, ub=5.0).step(problem.closure)
    assert "NLopt's G_MLSL" in caught.value.__notes__[0]
    assert torch.equal(problem.vector, before)


def test_losses_that_are_not_finite_are_walked_around():
    problem = Problem(lambda p: (p - torch.log(p)).sum(), [0.01, 3.0])
    NLOptOptimizer(problem.params, "LN_NELDERMEAD", ftol_abs=1e-12).step(problem.closure)
    assert abs(problem.loss - 2) < 1e-8


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"algorithm": "LD_LBFG"}, "algorithm='LD_LBFG'; expected one of AUGLAG, .*LD_LBFGS"),
        ({"algorithm": 1000}, "algorithm=1000; expected one of"),
        ({"algorithm": "LD_LBFGS", "maxeval": None}, "nothing says when to end; pass maxeval=1000"),
        ({"algorithm": "LD_LBFGS", "xtol_rel": -1.0}, "xtol_rel=-1.0; expected a number above 0, or None"),
        ({"algorithm": "GN_DIRECT"}, "GN_DIRECT searches a box"),
    ],
)
def test_what_means_nothing_is_refused(arguments, text):
    problem = in_plane(rosenbrock)
    with pytest.raises(OptionError, match=f"NLOptOptimizer: {text}"):
        NLOptOptimizer(problem.params, **arguments).step(problem.closure)
