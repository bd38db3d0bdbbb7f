"""NLopt's algorithms as an optimizer of torch's interface. One step is a whole run."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from graphopt.errors import OptionError
from graphopt.optim.core.libraries import library
from graphopt.optim.wrappers.external import Bound, ExternalOptimizer, Problem, Vector, numpy_seed


class NLOptOptimizer(ExternalOptimizer):
    """Minimise by an algorithm of NLopt. One step is a whole run.

    Some algorithms end with an error when rounding lets them make no more progress; the best point that they have evaluated is
    the result then. ``optimizer.result`` is NLopt's code of why it ended (positive), or that error.

    Args:
        params: parameters, or groups of them; groups may have ``lb`` and ``ub``.
        algorithm: its name, such as ``"LD_LBFGS"`` (L: local, G: global; D: with gradients, N: without), or NLopt's number.
        maxeval: most evaluations of the loss, or ``None``.
        lb: lower bound of every element: a number, a tensor that can be expanded to the parameter's shape, or ``None``. Global
            algorithms need both bounds.
        ub: upper bound.
        stopval: end when the loss is at most this.
        ftol_rel: end when the loss changes by less, relative to it.
        ftol_abs: the same, absolute.
        xtol_rel: end when the parameters change by less, relative to them.
        xtol_abs: the same, absolute.
        maxtime: most seconds.
        seed: of the random numbers of global algorithms; ``None`` draws one from torch's generator.

    Raises:
        OptionError: there is no such algorithm; nothing says when to end; a global algorithm has no bounds.
        UnsupportedError: NLopt is not installed.

    Cost: as often as the algorithm asks, the loss, for algorithms with a D in their names with the gradient.

    Reference: Johnson, "The NLopt nonlinear-optimization package", https://github.com/stevengj/nlopt, 2007.

    Example:
        >>> import torch
        >>> point = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = NLOptOptimizer([point], "LN_SBPLX", maxeval=1000, ftol_abs=1e-12, lb=-5, ub=5)
        >>> optimizer.step(lambda backward: (point**2).sum()) < 1e-8
        True
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        algorithm: str | int,
        maxeval: int | None = 10_000,
        lb: Bound = None,
        ub: Bound = None,
        stopval: float | None = None,
        ftol_rel: float | None = None,
        ftol_abs: float | None = None,
        xtol_rel: float | None = None,
        xtol_abs: float | None = None,
        maxtime: float | None = None,
        seed: int | None = None,
    ) -> None:
        place = type(self).__name__
        self.algorithm, self.seed = algorithm, seed
        given: dict[str, Any] = {
            "maxeval": maxeval,
            "stopval": stopval,
            "ftol_rel": ftol_rel,
            "ftol_abs": ftol_abs,
            "xtol_rel": xtol_rel,
            "xtol_abs": xtol_abs,
            "maxtime": maxtime,
        }
        self.criteria = {name: value for name, value in given.items() if value is not None}
        if not self.criteria:
            raise OptionError(f"{place}: nothing says when to end; pass maxeval=1000, or one of {', '.join(given)}")
        for name, value in self.criteria.items():
            if math.isnan(value) or (value <= 0 and name != "stopval"):
                raise OptionError(f"{place}: {name}={value!r}; expected a number above 0, or None")
        if isinstance(algorithm, str) and not algorithm.isupper():
            self.algorithm = algorithm.upper()
        super().__init__(params, lb, ub)

    def run(self, problem: Problem) -> Vector:
        """One run of the algorithm."""
        nlopt = library("nlopt", self.place)
        name, code = self._find(nlopt)
        if name.startswith("G"):
            if not (math.isfinite(problem.low.min()) and math.isfinite(problem.high.max())):
                raise OptionError(
                    f"{self.place}: {name} searches a box, and a parameter has no finite lb or no finite ub; write "
                    "lb=-5.0, ub=5.0 in the call, or in each group"
                )
            nlopt.srand(numpy_seed(self.seed))
        optimizer = nlopt.opt(code, len(problem.start))
        first = problem.loss(problem.start)
        raised: list[BaseException] = []

        def evaluate(vector: Vector, grad: Vector) -> float:
            try:
                if grad.size:
                    grad[:] = problem.gradient(vector)
                return problem.loss(vector)
            except BaseException as error:  # NLopt would lose what it is
                raised.append(error)
                optimizer.force_stop()
                return math.inf

        optimizer.set_min_objective(evaluate)
        optimizer.set_lower_bounds(problem.low)
        optimizer.set_upper_bounds(problem.high)
        for criterion, value in self.criteria.items():
            getattr(optimizer, f"set_{criterion}")(value)
        try:
            final: Vector = optimizer.optimize(problem.start.copy())
            self.result = optimizer.last_optimize_result()
        except Exception as error:
            if raised:
                raise raised[0] from None
            if not self._is_rounding(nlopt, error, problem, first):
                error.add_note(f"NLopt's {name}: {_text(error)}")  # its exceptions do not show their texts
                raise
            self.result, final = error, problem.best[0]
        if raised:
            raise raised[0]
        return final

    def _is_rounding(self, nlopt: Any, error: Exception, problem: Problem, first: float) -> bool:
        """Whether an error only says that there is no more progress: many algorithms call that just a failure."""
        if isinstance(error, nlopt.RoundoffLimited):
            return True
        is_failure = isinstance(error, (RuntimeError, nlopt.runtime_error)) and "failure" in _text(error)
        return is_failure and problem.best[1] < first

    def _find(self, nlopt: Any) -> tuple[str, int]:
        """The name of the algorithm, and NLopt's number."""
        known = {
            name: value
            for name, value in vars(nlopt).items()
            if isinstance(value, int) and name.partition("_")[0] in _KINDS
        }
        for name, value in known.items():
            if self.algorithm in (name, value) and not isinstance(self.algorithm, bool):
                return name, value
        raise OptionError(f"{self.place}: algorithm={self.algorithm!r}; expected one of {', '.join(sorted(known))}")

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, algorithm={self.algorithm!r})"


def _text(error: Exception) -> str:
    what = getattr(error, "what", None)
    return str(error) if what is None else str(what())


_KINDS = ("LN", "LD", "GN", "GD", "G", "AUGLAG")
