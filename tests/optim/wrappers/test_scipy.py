"""Wrappers of SciPy: the catalogue's table, derivatives that SciPy is given, bounds, and what is put back."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy import optimize

from graphopt.errors import ClosureError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim import wrappers
from graphopt.optim.wrappers.scipy import ScipyDE, ScipyDualAnnealing, ScipyMinimize, ScipyRootOptimization
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, in_plane, quadratic, rosenbrock

METHODS = {  # what each reaches from the Rosenbrock function's start in one step
    "bfgs": (1e-8, {}),
    "cg": (1e-8, {}),
    "newton-cg": (1e-8, {}),
    "l-bfgs-b": (1e-8, {}),
    "trust-ncg": (1e-8, {}),
    "trust-exact": (1e-8, {}),
    "trust-krylov": (1e-8, {}),
    "trust-constr": (1e-8, {}),
    "powell": (1e-8, {}),
    "nelder-mead": (1e-6, {}),
    "slsqp": (1e-8, {"tol": 1e-12}),  # ends at 2e-8 by its own tolerance
    "tnc": (1e-8, {"options": {"maxfun": 300}}),  # in float32 the 100 evaluations of its default do not suffice
    "dogleg": (1e-8, {"min_eigval": 1e-3}),
}
BOX = {"lb": -5.0, "ub": 5.0}


@accepts("E1")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_methods_minimise_in_one_step(method, dtype):
    below, options = METHODS[method]
    problem = in_plane(rosenbrock, 2, dtype)
    loss = ScipyMinimize(problem.params, method, **options).step(problem.closure)
    assert loss == problem.loss < below
    assert all(p.dtype == dtype and p.shape == () for p in problem.params)
    # Where the method needs no gradient none is computed.
    assert any(problem.calls) == (method not in ("powell", "nelder-mead"))


def test_it_is_scipy_evaluation_by_evaluation():
    problem = in_plane(rosenbrock)
    ours = ScipyMinimize(problem.params, "trust-exact")
    ours.step(problem.closure)
    theirs = optimize.minimize(
        optimize.rosen, [-1.1, 2.5], jac=optimize.rosen_der, hess=optimize.rosen_hess, method="trust-exact"
    )
    assert ours.result.nfev == theirs.nfev
    assert ours.result.nit == theirs.nit
    np.testing.assert_allclose(problem.vector.numpy(), theirs.x, rtol=1e-9)


@pytest.mark.parametrize("use_hessp", [True, False])
@pytest.mark.parametrize("options", [{}, {"tikhonov": 0.5}, {"min_eigval": 3.0}], ids=str)
def test_second_derivatives(options, use_hessp, monkeypatch):
    """Of a quadratic, against its matrix: what SciPy is given."""
    problem, matrix = quadratic(4, 10, cut=1)
    given = {}

    def minimize(function, start, **arguments):
        given.update(arguments)
        return optimize.OptimizeResult(x=start)

    monkeypatch.setattr(optimize, "minimize", minimize)
    optimizer = ScipyMinimize(problem.params, "trust-ncg", use_hessp=use_hessp, **options)
    optimizer.step(problem.closure)
    expected = matrix.numpy() + options.get("tikhonov", 0) * np.eye(4)
    if "min_eigval" in options:
        values, vectors = np.linalg.eigh(expected)
        expected = vectors @ np.diag(np.maximum(values, 3.0)) @ vectors.T
    point, direction = np.arange(4.0), np.array([1.0, -2.0, 0.5, 3.0])
    if use_hessp and "min_eigval" not in options:
        assert "hess" not in given
        for _ in range(2):
            np.testing.assert_allclose(given["hessp"](point, direction), expected @ direction, rtol=1e-10)
        assert problem.calls[-1] is False
        assert len(problem.calls) == 2  # the start, and one graph for both products
    else:
        np.testing.assert_allclose(given["hess"](point), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("jac", "hess"), [("2-point", "autograd"), ("autograd", "2-point"), ("autograd", optimize.BFGS())]
)
def test_derivatives_by_other_means(jac, hess):
    problem = in_plane(rosenbrock)
    ScipyMinimize(problem.params, "trust-constr", jac=jac, hess=hess).step(problem.closure)
    assert problem.loss < 1e-6
    assert any(problem.calls) == (jac == "autograd")


def test_bounds_and_constraints():
    """Bounds of single groups, also a tensor; a constraint on the vector of all elements."""
    first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))
    groups = [{"params": [first], "lb": 0.5 - torch.ones(2), "ub": torch.tensor([0.1, 9.0])}, {"params": [second]}]

    def closure(backward=True):
        loss = ((first - 1) ** 2).sum() + ((second - 2) ** 2).sum()
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    optimizer = ScipyMinimize(groups, "l-bfgs-b")
    optimizer.step(closure)
    torch.testing.assert_close(first.detach(), torch.tensor([0.1, 1.0]))
    torch.testing.assert_close(second.detach(), torch.tensor([2.0, 2.0]))
    optimizer.step(closure)  # from the bound, which float32 rounds to a value above it
    with torch.no_grad():
        first.zero_()
        second.zero_()
    sum_is_one = {"type": "eq", "fun": lambda x: x.sum() - 1}
    optimizer = ScipyMinimize(groups, "slsqp", constraints=sum_is_one)
    optimizer.step(closure)
    assert abs(float((first.sum() + second.sum()).detach()) - 1) < 1e-5


def test_some_parameters_only():
    """One that is frozen, one without elements, and one that the loss does not know."""
    moved, frozen, empty, unused = torch.ones(3), torch.ones(2), torch.ones(0, 4), torch.ones(())
    for p in (moved, empty, unused):
        p.requires_grad_()

    def closure(backward=True):
        loss = ((moved - frozen.sum()) ** 2).sum()
        if backward:
            loss.backward()
        return loss

    for method in ("l-bfgs-b", "trust-ncg", "trust-exact"):
        with torch.no_grad():
            moved.fill_(1)
        optimizer = ScipyMinimize([moved, frozen, empty, unused], method)
        assert optimizer.step(closure) < 1e-10
        assert frozen.tolist() == [1, 1]
        # (trust-exact moves it, for no curvature holds it)
        assert method == "trust-exact" or unused.tolist() == 1


def on_rastrigin(cls, random=0, **options):
    torch.manual_seed(random)
    problem = Problem(lambda p: (p**2 - 10 * torch.cos(2 * math.pi * p) + 10).sum(), [3.2, -2.1], dtype=torch.float32)
    loss = cls(problem.params, -5.0, 5.0, **options).step(problem.closure)
    assert loss == problem.loss
    assert problem.params[0].dtype == torch.float32
    return loss, problem.vector


@accepts("E4")
@pytest.mark.parametrize("cls", [ScipyDE, ScipyDualAnnealing])
def test_global_searches(cls):
    assert on_rastrigin(cls, seed=0, **({"maxiter": 200} if cls is ScipyDualAnnealing else {"popsize": 10}))[0] < 1e-4
    short = {"maxiter": 3, "no_local_search": True} if cls is ScipyDualAnnealing else {"maxiter": 3, "polish": False}
    seeded, others = ([on_rastrigin(cls, n, seed=seed, **short)[1] for n in range(2)] for seed in (0, None))
    assert torch.equal(*seeded)
    assert not torch.equal(*others)  # torch's generator decides
    assert torch.equal(on_rastrigin(cls, 1, **short)[1], others[1])


@accepts("E4")
@pytest.mark.parametrize("method", ["hybr", "lm", "anderson"])
def test_roots_of_the_gradient(method):
    problem = in_plane(rosenbrock, 2)
    with torch.no_grad():
        for p, value in zip(problem.params, (0.8, 0.6), strict=True):
            p.fill_(value)
    ScipyRootOptimization(problem.params, method).step(problem.closure)
    assert problem.loss < 1e-12


def test_a_search_for_a_root_that_gets_nowhere_changes_nothing():
    problem = Problem(lambda p: p.sum(), [1.0, 2.0])
    before = problem.vector
    ScipyRootOptimization(problem.params, "lm").step(problem.closure)
    assert torch.equal(problem.vector, before)


# ----------------------------------------------------------------------------------------------------------------------
# What goes wrong


class Broken(Exception):
    pass


def fail(*_, **__):
    raise Broken("no")


def raising_after(count):
    problem = in_plane(rosenbrock, 2, torch.float32)

    def closure(backward=True):
        if len(problem.calls) == count:
            fail()
        return problem.closure(backward)

    return problem, closure


@pytest.mark.parametrize("method", ["bfgs", "trust-exact", "nelder-mead"])
@pytest.mark.parametrize("count", [0, 7])
def test_parameters_are_put_back_when_the_closure_raises(count, method):
    problem, closure = raising_after(count)
    before = problem.vector
    with pytest.raises(Broken) as caught:
        ScipyMinimize(problem.params, method).step(closure)
    assert "are those from before the step" in caught.value.__notes__[0]
    assert torch.equal(problem.vector, before)


def test_parameters_are_put_back_when_the_library_raises(monkeypatch):
    problem = in_plane(rosenbrock)
    before = problem.vector
    with pytest.raises(Broken):
        ScipyMinimize(problem.params, "bfgs", callback=fail).step(problem.closure)
    assert torch.equal(problem.vector, before)


def test_losses_that_are_not_finite():
    """At the start nothing is done; on the way it is walked around; at the end the parameters are put back."""
    problem = Problem(lambda p: torch.log(p).sum(), [-1.0, 2.0])
    before = problem.vector
    with pytest.raises(
        NonFiniteError, match=r"ScipyMinimize: the loss is NaN or infinite at the parameters before the step"
    ):
        ScipyMinimize(problem.params).step(problem.closure)
    assert torch.equal(problem.vector, before)
    problem = Problem(lambda p: (p - torch.log(p)).sum(), [0.01, 3.0])
    ScipyMinimize(problem.params, "nelder-mead").step(problem.closure)
    assert abs(problem.loss - 2) < 1e-6
    assert any(map(math.isnan, problem.losses))
    problem = Problem(lambda p: torch.where(p > 0, p, math.nan).sum(), [1.0])
    before = problem.vector
    optimizer = ScipyMinimize(problem.params, lambda function, start, *_, **__: optimize.OptimizeResult(x=start - 5))
    with pytest.raises(NonFiniteError, match="it ended where the loss is NaN or infinite, after 2 evaluations"):
        optimizer.step(problem.closure)
    assert torch.equal(problem.vector, before)


def steps(cls, params, *args, **options):
    return lambda: cls(params, *args, **options).step(lambda backward=True: sum((p**2).sum() for p in params))


def param(*values, **options):
    return [torch.tensor(values or (1.0,), **options).requires_grad_()]


REFUSED = {
    "a method": (
        steps(ScipyMinimize, param(), "bsfg"),
        OptionError,
        "ScipyMinimize: method='bsfg'; expected one of 'nelder",
    ),
    "jac": (
        steps(ScipyMinimize, param(), jac="cs"),
        OptionError,
        "jac='cs'; expected one of 'autograd', '2-point', '3-point'",
    ),
    "hess": (steps(ScipyMinimize, param(), hess="no"), OptionError, "hess='no'; expected"),
    "tikhonov": (
        steps(ScipyMinimize, param(), tikhonov=-1.0),
        OptionError,
        r"tikhonov=-1.0; expected a number in \[0, inf\)",
    ),
    "min_eigval": (steps(ScipyMinimize, param(), min_eigval=math.nan), OptionError, "min_eigval=nan"),
    "no bounds": (
        steps(ScipyMinimize, param(), "bfgs", **BOX),
        OptionError,
        "'bfgs' takes no bounds .*; choose one of 'nelder",
    ),
    "no constraints": (
        steps(ScipyMinimize, param(), "cg", constraints={"type": "eq", "fun": lambda x: x[0]}),
        OptionError,
        "'cg' takes no constraints; choose one of 'slsqp'",
    ),
    "outside": (
        steps(ScipyMinimize, param(7.0, 1.0), **BOX),
        OptionError,
        r"parameter number 0 of its group of shape \(2,\) has values from 1.0 to 7.0, outside of lb=-5.0, ub=5.0; nothing was",
    ),
    "outside, named": (
        lambda: ScipyMinimize([("bias", param(7.0)[0])], **BOX).step(lambda backward=True: torch.zeros(())),
        OptionError,
        "parameter 'bias' of shape",
    ),
    "crossed": (steps(ScipyMinimize, param(), lb=1.0, ub=0.0), OptionError, "lb=1.0 is above ub=0.0"),
    "a bound of another shape": (
        steps(ScipyMinimize, param(), lb=torch.zeros(3)),
        OptionError,
        r"for a parameter of shape \(1,\); expected a number",
    ),
    "a bound that is NaN": (steps(ScipyMinimize, param(), lb=math.nan), OptionError, "lb=nan; expected a number"),
    "no box": (
        steps(ScipyDE, param(), lb=0.0),
        OptionError,
        "ScipyDE searches a box, and a parameter has no finite lb or no",
    ),
    "nothing to do": (steps(ScipyMinimize, [torch.ones(2)]), OptionError, "no parameter requires gradients"),
    "complex": (steps(ScipyMinimize, param(1j)), UnsupportedError, "make torch.view_as_real"),
    "no closure": (
        lambda: ScipyMinimize(param()).step(),
        ClosureError,
        r"write optimizer.step\(closure\) with\ndef",
    ),
    "a closure without an argument": (
        lambda: ScipyMinimize(param(), "powell").step(lambda: torch.zeros(())),
        ClosureError,
        "ScipyMinimize calls closure",
    ),
    "no number": (
        lambda: ScipyMinimize(param()).step(lambda backward=True: torch.zeros(2)),
        ClosureError,
        "the closure returned a tensor",
    ),
    "no graph": (
        lambda: ScipyMinimize(param(), "trust-exact").step(lambda backward=True: 0.0),
        ClosureError,
        "second derivatives, but the loss of closure\\(False\\) does not require gradients",
    ),
    "a root's method": (
        steps(ScipyRootOptimization, param(), "bfgs"),
        OptionError,
        "method='bfgs'; expected one of 'hybr'",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_means_nothing_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("scipy", lambda p: ScipyMinimize(p, "bfgs")),
        ("scipy", lambda p: ScipyDE(p, -5.0, 5.0)),
        ("nlopt", lambda p: wrappers.NLOptOptimizer(p, "LD_LBFGS")),
        ("nevergrad", lambda p: wrappers.NevergradOptimizer(p, "OnePlusOne")),
    ],
)
def test_a_library_that_is_not_installed(library, make, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    problem = in_plane(rosenbrock)
    before = problem.vector
    with pytest.raises(
        UnsupportedError, match=rf"needs {library}, which is not installed .*Type: pip install graphopt\[wrappers\]"
    ):
        make(problem.params).step(problem.closure)
    assert torch.equal(problem.vector, before)


def test_states_and_copies():
    problem = in_plane(rosenbrock)
    optimizer = ScipyMinimize(problem.params, "l-bfgs-b", **BOX)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["lb"] == -5.0
    other = ScipyMinimize(problem.params, "l-bfgs-b", lb=-1.0)
    other.load_state_dict(state)
    assert other.param_groups[0]["lb"] == -5.0
    assert repr(other) == "ScipyMinimize(1 parameters, method='l-bfgs-b')"
