"""A line search by SciPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.libraries import library
from graphopt.optim.core.var import Var
from graphopt.optim.line_search.line_search import LineSearch

_METHODS = ("brent", "golden", "bounded")


class ScipyMinimizeScalar(LineSearch):
    """Find the step size with the lowest loss along the update, by `scipy.optimize.minimize_scalar`.

    Of all step sizes that it tries the best one is taken, also where the search ends early; 0 if none lowers the loss.

    Args:
        method: ``"brent"``, ``"golden"`` or ``"bounded"``; ``None`` for brent, or bounded if there are bounds.
        maxiter: how often the loss may be evaluated in one search.
        bracket: two or three step sizes to start from, in units of the update.
        bounds: the least and the largest step size.
        tol: when to end.
        options: others of the method, such as ``{"xtol": 1e-6}``.

    Raises:
        OptionError: an option is not valid.
        UnsupportedError: SciPy is not installed.

    Reference: Brent, "Algorithms for minimization without derivatives", 1973, chapter 5.

    Cost: evaluations of the loss, without gradients: 10 to 40 without ``maxiter``.
    """

    bounds = numbers(tol=POSITIVE)

    def __init__(
        self,
        method: str | None = None,
        maxiter: int | None = None,
        bracket: Sequence[float] | None = None,
        bounds: Sequence[float] | None = None,
        tol: Number | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            {"method": method, "bracket": bracket, "interval": bounds, "tol": tol, "options": options}, maxiter=maxiter
        )
        self._minimize = library("scipy.optimize", type(self).__name__).minimize_scalar

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """What SciPy would say in the middle of a step."""
        method, bracket, interval = (settings[name] for name in ("method", "bracket", "interval"))
        if method is not None and method not in _METHODS:
            raise OptionError(f"{self.place}: method={method!r}; expected one of {', '.join(_METHODS)}, or None")
        if interval is not None and not (_are_numbers(interval, (2,)) and interval[0] < interval[1]):
            raise OptionError(f"{self.place}: bounds={interval!r}; expected (low, high) with low < high")
        if bracket is not None and not (_are_numbers(bracket, (2, 3)) and len(set(bracket)) == len(bracket)):
            raise OptionError(f"{self.place}: bracket={bracket!r}; expected two or three different step sizes")
        if (method == "bounded") != (interval is not None) and method is not None:
            raise OptionError(
                f"{self.place}: method={method!r}, bounds={interval!r}; expected bounds with 'bounded', and only with it"
            )
        if interval is not None and bracket is not None:
            raise OptionError(f"{self.place}: both bracket and bounds; expected one of them")

    def search(self, update: Sequence[Tensor], var: Var) -> float:
        """Let SciPy search."""
        import numpy as np  # which SciPy brings along

        method, bracket, interval, tol, options = (
            common(self, var.params, name) for name in ("method", "bracket", "interval", "tol", "options")
        )

        def loss_at(step_size: float) -> float:
            loss = self.evaluate(step_size, var)
            return loss if math.isfinite(loss) else math.inf

        given = dict(options or {})
        extra: dict[str, Any] = {"options": given}
        if method is not None:
            extra["method"] = method
        if interval is not None:
            extra["bounds"] = tuple(map(float, interval))
            if tol is not None:
                given.setdefault("xatol", float(tol))  # as ``tol`` SciPy would warn that it is not relative
        else:
            extra |= {"bracket": bracket and tuple(map(float, bracket)), "tol": None if tol is None else float(tol)}
        try:
            with np.errstate(all="ignore"):  # steps that grow until the loss overflows are no mistake of the user's
                self._minimize(loss_at, **extra)
        except RuntimeError as error:
            if type(error).__name__ != "BracketError":  # the loss has no minimum along the update, or is flat
                raise
        return self.best_step_size()


def _are_numbers(values: Any, lengths: tuple[int, ...]) -> bool:
    return (
        isinstance(values, (tuple, list))
        and len(values) in lengths
        and all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
    )
