"""SciPy's optimizers as optimizers of torch's interface. One step is a whole run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim.optimizer import ParamsT

from graphopt.errors import NonFiniteError, OptionError
from graphopt.optim.core.libraries import library
from graphopt.optim.wrappers.external import (
    Bound,
    ExternalOptimizer,
    Problem,
    Vector,
    check_choice,
    numpy_seed,
)

_DIFFERENCES = ("2-point", "3-point")
_WITHOUT_GRADIENT = ("nelder-mead", "powell", "cobyla", "cobyqa")
_WITH_HESSIAN = ("newton-cg", "dogleg", "trust-ncg", "trust-exact", "trust-krylov", "trust-constr")
_WITH_PRODUCTS = ("newton-cg", "trust-ncg", "trust-krylov", "trust-constr")
_WITH_BOUNDS = ("nelder-mead", "powell", "l-bfgs-b", "tnc", "slsqp", "cobyla", "cobyqa", "trust-constr")
_WITH_CONSTRAINTS = ("slsqp", "cobyla", "cobyqa", "trust-constr")
_METHODS = (*_WITHOUT_GRADIENT, *_WITH_HESSIAN, "cg", "bfgs", "l-bfgs-b", "tnc", "slsqp")
_ROOT_METHODS = (
    *("hybr", "lm", "broyden1", "broyden2", "anderson", "linearmixing", "diagbroyden", "excitingmixing", "krylov"),
    "df-sane",
)


class ScipyMinimize(ExternalOptimizer):
    """Minimise by `scipy.optimize.minimize`. One step is a whole run.

    ``θ ← argmin f`` as far as the method gets. What SciPy says of it, as whether it converged, is ``optimizer.result``.

    Args:
        params: parameters, or groups of them; groups may have ``lb`` and ``ub``.
        method: of SciPy, such as ``"l-bfgs-b"``; ``None`` lets SciPy choose BFGS, L-BFGS-B with bounds, SLSQP with constraints.
        lb: lower bound of every element: a number, a tensor that can be expanded to the parameter's shape, or ``None``.
        ub: upper bound.
        constraints: as SciPy takes them, of the vector of all elements of all parameters (in order, row by row).
        tol: tolerance, in the method's own sense.
        callback: called by SciPy after each iteration.
        options: of the method, such as ``{"maxiter": 100}``.
        jac: gradients: ``"autograd"`` by the closure, ``"2-point"`` or ``"3-point"`` by differences of losses.
        hess: second derivatives, for methods that use them: ``"autograd"``, ``"2-point"`` or ``"3-point"`` by differences of
            gradients, or an object such as ``scipy.optimize.BFGS()``, for those methods that take one.
        use_hessp: whether the methods that do with products of the Hessian and vectors get these instead of the matrix.
        tikhonov: added to the diagonal of the Hessian.
        min_eigval: eigenvalues of the Hessian below it are raised to it; ``"dogleg"`` needs it to be positive where the loss is
            not convex. The matrix is computed then, and decomposed.

    Raises:
        OptionError: a name means nothing, or the method takes no bounds, or no constraints.
        UnsupportedError: SciPy is not installed.

    Cost: as often as the method asks, the loss, its gradient, and with ``hess="autograd"`` a backward for each product, or for
    each of n rows of the matrix; n² numbers of memory for ``bfgs``, ``slsqp`` and those with the matrix.

    Reference: Virtanen et al., "SciPy 1.0", Nature Methods 17, 2020.

    Example:
        >>> import torch
        >>> point = torch.nn.Parameter(torch.tensor([-1.1, 2.5]))
        >>> optimizer = ScipyMinimize([point], "trust-exact")
        >>> def closure(backward=True):
        ...     loss = (1 - point[0]) ** 2 + 100 * (point[1] - point[0] ** 2) ** 2
        ...     if backward:
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...     return loss
        >>> optimizer.step(closure) < 1e-6
        True
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        method: str | None = None,
        lb: Bound = None,
        ub: Bound = None,
        constraints: Any = (),
        tol: float | None = None,
        callback: Callable[..., Any] | None = None,
        options: Mapping[str, Any] | None = None,
        jac: Literal["autograd", "2-point", "3-point"] = "autograd",
        hess: Any = "autograd",
        use_hessp: bool = True,
        tikhonov: float = 0.0,
        min_eigval: float | None = None,
    ) -> None:
        place = type(self).__name__
        self.method = method.lower() if isinstance(method, str) else method
        check_choice(place, "method", self.method, _METHODS, lambda value: value is None or callable(value))
        check_choice(place, "jac", jac, ("autograd", *_DIFFERENCES), lambda value: False)
        check_choice(place, "hess", hess, ("autograd", *_DIFFERENCES), lambda value: hasattr(value, "get_matrix"))
        if not (math.isfinite(tikhonov) and tikhonov >= 0):
            raise OptionError(f"{place}: tikhonov={tikhonov!r}; expected a number in [0, inf)")
        if min_eigval is not None and not math.isfinite(min_eigval):
            raise OptionError(f"{place}: min_eigval={min_eigval!r}; expected a number, or None")
        self._accepts(_WITH_CONSTRAINTS, "constraints", bool(_listed(constraints)))
        self.constraints, self.tol, self.callback = constraints, tol, callback
        self.options = dict(options or {})
        self.jac, self.hess, self.use_hessp = jac, hess, use_hessp
        self.tikhonov, self.min_eigval = float(tikhonov), min_eigval
        super().__init__(params, lb, ub)

    def run(self, problem: Problem) -> Vector:
        """One run of ``scipy.optimize.minimize``."""
        optimize = library("scipy.optimize", self.place)
        self._accepts(_WITH_BOUNDS, "bounds (lb=, ub=)", problem.has_bounds)
        arguments: dict[str, Any] = {}
        if self.method in _WITHOUT_GRADIENT:
            function: Callable[..., Any] = problem.loss
        elif self.jac == "autograd":
            function, arguments["jac"] = problem.loss_and_gradient, True
        else:
            function, arguments["jac"] = problem.loss, self.jac
        if self.method in _WITH_HESSIAN:
            arguments.update(self._second_derivatives(problem))
        self.result = optimize.minimize(
            function,
            problem.start.copy(),
            method=self.method,
            bounds=optimize.Bounds(problem.low, problem.high) if problem.has_bounds else None,
            constraints=self.constraints,
            tol=self.tol,
            callback=self.callback,
            options=dict(self.options),
            **arguments,
        )
        return self.result.x  # type: ignore[no-any-return]

    def _second_derivatives(self, problem: Problem) -> dict[str, Any]:
        if self.hess != "autograd":
            return {"hess": self.hess}
        if self.use_hessp and self.method in _WITH_PRODUCTS and self.min_eigval is None:
            return {"hessp": lambda x, p: problem.hessian_product(x, p) + self.tikhonov * p}
        return {"hess": lambda x: self._shift(problem.hessian(x))}

    def _shift(self, matrix: Vector) -> Vector:
        import numpy as np

        matrix = (matrix + matrix.T) / 2
        if self.tikhonov:
            matrix = matrix + self.tikhonov * np.eye(len(matrix))
        if self.min_eigval is not None and np.isfinite(matrix).all():
            values, vectors = np.linalg.eigh(matrix)
            if values[0] < self.min_eigval:
                matrix = (vectors * np.maximum(values, self.min_eigval)) @ vectors.T
        return matrix

    def _accepts(self, methods: Sequence[str], what: str, is_given: bool) -> None:
        if is_given and isinstance(self.method, str) and self.method not in methods:
            raise OptionError(
                f"{type(self).__name__}: {self.method!r} takes no {what}; choose one of {', '.join(map(repr, methods))}"
            )

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, method={self.method!r})"


class ScipyRootOptimization(ExternalOptimizer):
    """Find a root of the gradient by `scipy.optimize.root`. One step is a whole run.

    ``∇f(θ) = 0``: any stationary point, also a maximum or a saddle. If SciPy ends at a gradient that is no smaller than that at
    the start, the parameters stay as they were. What SciPy says is ``optimizer.result``.

    Args:
        params: parameters, or groups of them.
        method: of SciPy: ``"hybr"``, ``"lm"``, ``"broyden1"``, ``"krylov"``, ...
        tol: tolerance, in the method's own sense.
        callback: called by SciPy after each iteration, by the methods that do so.
        options: of the method.
        jac: second derivatives, for ``"hybr"`` and ``"lm"``: ``"autograd"``, or ``"2-point"`` by differences of gradients.

    Raises:
        OptionError: a name means nothing.
        UnsupportedError: SciPy is not installed.

    Cost: the gradient as often as the method asks; ``hybr`` and ``lm`` keep n² numbers and decompose the matrix.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        method: str = "hybr",
        tol: float | None = None,
        callback: Callable[..., Any] | None = None,
        options: Mapping[str, Any] | None = None,
        jac: Literal["autograd", "2-point"] = "autograd",
    ) -> None:
        place = type(self).__name__
        check_choice(place, "method", method, _ROOT_METHODS, lambda value: False)
        check_choice(place, "jac", jac, ("autograd", "2-point"), lambda value: False)
        self.method, self.tol, self.callback, self.jac = method, tol, callback, jac
        self.options = dict(options or {})
        super().__init__(params)

    def run(self, problem: Problem) -> Vector:
        """One run of ``scipy.optimize.root``."""
        import numpy as np

        optimize = library("scipy.optimize", self.place)
        exact = self.jac == "autograd" and self.method in ("hybr", "lm")
        first = float(np.abs(problem.gradient(problem.start)).max())
        self.result = optimize.root(
            problem.gradient,
            problem.start.copy(),
            method=self.method,
            jac=problem.hessian if exact else None,
            tol=self.tol,
            callback=self.callback if self.method not in ("hybr", "lm") else None,
            options=dict(self.options),
        )
        last = float(np.abs(problem.gradient(self.result.x)).max())
        if not math.isfinite(last):
            raise NonFiniteError(
                f"{self.place}: {self.method} ended at gradients that hold NaN or infinities; the parameters are those from "
                "before the step. Another method, such as 'lm', or a start nearer to the minimum may help"
            )
        return self.result.x if last < first else problem.start


class _Global(ExternalOptimizer):
    """A search of the whole box."""

    is_global = True

    def _problem(self, closure: Any) -> Problem:
        problem = super()._problem(closure)
        if not (math.isfinite(problem.low.min()) and math.isfinite(problem.high.max())):
            raise OptionError(
                f"{self.place} searches a box, and a parameter has no finite lb or no finite ub; write lb=-5.0, ub=5.0 in the "
                "call, or in each group"
            )
        return problem

    def start(self, problem: Problem) -> Vector | None:
        """The present parameters, if their loss is finite."""
        return problem.start.copy() if math.isfinite(problem.loss(problem.start)) else None


class ScipyDE(_Global):
    """Minimise in a box by differential evolution, `scipy.optimize.differential_evolution`. One step is a whole run.

    The present parameters are one of the first population, so that the loss does not rise.

    Args:
        params: parameters, or groups of them; each needs finite bounds.
        lb: lower bound of every element: a number, or a tensor that can be expanded to the parameter's shape.
        ub: upper bound.
        strategy: how a trial is made of the population.
        maxiter: most generations.
        popsize: members of the population for each of the n elements.
        tol: relative tolerance: it ends when the losses of the population differ by less.
        mutation: weight of differences, a number in [0, 2), or a range from which it is drawn in each generation.
        recombination: probability with which an element is taken from the mutant.
        seed: of the random numbers; ``None`` draws one from torch's generator.
        callback: called by SciPy after each generation.
        polish: whether L-BFGS-B refines the best, by differences of losses.
        init: how the population is made at first.
        atol: absolute tolerance, as ``tol``.
        updating: ``"immediate"`` or ``"deferred"``.
        constraints: as SciPy takes them.
        integrality: which elements are whole numbers.

    Raises:
        OptionError: bounds are missing.
        UnsupportedError: SciPy is not installed.

    Cost: ``popsize · n`` losses a generation, no gradients.

    Reference: Storn, Price, "Differential Evolution", Journal of Global Optimization 11, 1997.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lb: Bound = None,
        ub: Bound = None,
        strategy: str = "best1bin",
        maxiter: int = 1000,
        popsize: int = 15,
        tol: float = 0.01,
        mutation: float | tuple[float, float] = (0.5, 1.0),
        recombination: float = 0.7,
        seed: int | None = None,
        callback: Callable[..., Any] | None = None,
        polish: bool = True,
        init: str = "latinhypercube",
        atol: float = 0.0,
        updating: Literal["immediate", "deferred"] = "immediate",
        constraints: Any = (),
        integrality: Any = None,
    ) -> None:
        self.seed = seed
        self.arguments: dict[str, Any] = {
            "strategy": strategy,
            "maxiter": maxiter,
            "popsize": popsize,
            "tol": tol,
            "mutation": mutation,
            "recombination": recombination,
            "callback": callback,
            "polish": polish,
            "init": init,
            "atol": atol,
            "updating": updating,
            "constraints": constraints,
            "integrality": integrality,
        }
        super().__init__(params, lb, ub)

    def run(self, problem: Problem) -> Vector:
        """One run of ``scipy.optimize.differential_evolution``."""
        optimize = library("scipy.optimize", self.place)
        function = optimize.differential_evolution
        arguments = {**self.arguments, _seed_name(function): numpy_seed(self.seed), "x0": self.start(problem)}
        self.result = function(problem.loss, optimize.Bounds(problem.low, problem.high), **arguments)
        return self.result.x  # type: ignore[no-any-return]


class ScipyDualAnnealing(_Global):
    """Minimise in a box by simulated annealing and local searches, `scipy.optimize.dual_annealing`. One step is a whole run.

    It starts at the present parameters.

    Args:
        params: parameters, or groups of them; each needs finite bounds.
        lb: lower bound of every element: a number, or a tensor that can be expanded to the parameter's shape.
        ub: upper bound.
        maxiter: most iterations of the annealing.
        method: of the local searches, one of ``scipy.optimize.minimize`` that takes bounds.
        initial_temp: temperature at the start: the higher, the further it jumps; in (0.01, 5e4].
        restart_temp_ratio: part of it at which the annealing starts anew.
        visit: shape of the distribution of jumps, in (1, 3].
        accept: shape of the probability to accept a rise of the loss, in (-1e4, -5].
        maxfun: most evaluations of the loss.
        seed: of the random numbers; ``None`` draws one from torch's generator.
        no_local_search: anneal only.
        callback: called by SciPy for each minimum that it finds.
        jac: gradients of the local searches: ``"autograd"`` by the closure, or ``"2-point"``, ``"3-point"`` by differences.

    Raises:
        OptionError: bounds are missing, or a name means nothing.
        UnsupportedError: SciPy is not installed.

    Cost: at most about ``2 n · maxiter`` losses for the annealing, and the local searches.

    Reference: Xiang, Sun, Fan, Gong, "Generalized simulated annealing algorithm and its application to the Thomson model",
    Physics Letters A 233, 1997.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lb: Bound = None,
        ub: Bound = None,
        maxiter: int = 1000,
        method: str = "l-bfgs-b",
        initial_temp: float = 5230.0,
        restart_temp_ratio: float = 2e-5,
        visit: float = 2.62,
        accept: float = -5.0,
        maxfun: float = 1e7,
        seed: int | None = None,
        no_local_search: bool = False,
        callback: Callable[..., Any] | None = None,
        jac: Literal["autograd", "2-point", "3-point"] = "autograd",
    ) -> None:
        place = type(self).__name__
        self.method, self.jac, self.seed = method.lower(), jac, seed
        check_choice(place, "method", self.method, _WITH_BOUNDS, lambda value: False)
        check_choice(place, "jac", jac, ("autograd", *_DIFFERENCES), lambda value: False)
        self.arguments: dict[str, Any] = {
            "maxiter": maxiter,
            "initial_temp": initial_temp,
            "restart_temp_ratio": restart_temp_ratio,
            "visit": visit,
            "accept": accept,
            "maxfun": maxfun,
            "no_local_search": no_local_search,
            "callback": callback,
        }
        super().__init__(params, lb, ub)

    def run(self, problem: Problem) -> Vector:
        """One run of ``scipy.optimize.dual_annealing``."""
        optimize = library("scipy.optimize", self.place)
        bounds = optimize.Bounds(problem.low, problem.high)
        local: dict[str, Any] = {"method": self.method, "bounds": bounds}
        if self.method not in _WITHOUT_GRADIENT:
            local["jac"] = problem.gradient if self.jac == "autograd" else self.jac
        function = optimize.dual_annealing
        self.result = function(
            problem.loss,
            bounds,
            x0=self.start(problem),
            minimizer_kwargs=local,
            **{**self.arguments, _seed_name(function): numpy_seed(self.seed)},
        )
        return self.result.x  # type: ignore[no-any-return]


def _seed_name(function: Callable[..., Any]) -> str:
    """The argument for a seed: SciPy has renamed it in 1.15."""
    return "rng" if "rng" in inspect.signature(function).parameters else "seed"


def _listed(constraints: Any) -> Sequence[Any]:
    return constraints if isinstance(constraints, (list, tuple)) else [constraints]
