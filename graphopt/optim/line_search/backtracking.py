"""Backtracking line searches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import AT_LEAST_ONE, FRACTION, NON_NEGATIVE, POSITIVE, Bounds, numbers
from graphopt.optim.core.closures import common, number
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.line_search.line_search import LineSearch

_SHRINKS = Bounds(0.0, 1.0, includes_low=False, includes_high=False)
_LARGEST_SCALE = 1e30  # of the first step size; growing on would end in an infinity


class _Backtracking(LineSearch):
    """What both have in common."""

    uses_gradient = True

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Counts must be positive."""
        for name in ("maxiter", "target_iters"):
            value = settings.get(name, 1)
            if not isinstance(value, int) or value < (1 if name == "maxiter" else 0):
                raise OptionError(f"{self.place}: {name}={value!r}; expected a positive integer")

    def _backtrack(self, var: Var, first: float, beta: float) -> float | None:
        """The first of the step sizes ``first beta^k`` that lowers the loss enough; ``None`` if none does."""
        c, min_alpha, max_tries, try_negative = (
            common(self, var.params, name) for name in ("c", "min_alpha", "maxiter", "try_negative")
        )
        start = number(var.get_loss())
        slope = self.slope(var)
        least = 0.0 if min_alpha is None else float(min_alpha)
        for sign in (1.0, -1.0) if try_negative else (1.0,):
            along = sign * slope
            step_size = first
            for _ in range(max_tries):
                if step_size < least:
                    break
                loss = self.evaluate(sign * step_size, var)
                limit = start + float(c) * step_size * min(along, 0.0)
                if loss < limit or (
                    loss == limit and along < 0
                ):  # a direction that does not descend must lower the loss
                    return sign * step_size
                step_size *= beta
        return None


class Backtracking(_Backtracking):
    """Make the step smaller until it lowers the loss enough (Armijo): ``f(θ - a u) <= f(θ) + c a min(d, 0)``, ``d = -⟨g, u⟩``.

    ``a = init beta^k``; the first that satisfies it is taken. If none does, which is so in general where the update does not
    descend, the step is 0, or goes backwards with ``try_negative``.

    Args:
        init: the first step size, in units of the update.
        beta: the ratio of a step size to the one before.
        c: the part of the decrease that a linear loss would show, that is enough.
        maxiter: how many step sizes are tried.
        min_alpha: no step size below is tried.
        adaptive: after a search that failed make ``beta`` smaller by a factor of 1.5 (so that the next one reaches further
            down), and less so after each that succeeded.
        try_negative: if no step size is good enough, try them with the opposite sign.

    Raises:
        OptionError: an option is out of range.

    Cost: an evaluation of the loss for each step size that is tried.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, algorithm 3.1.
    """

    bounds = numbers(init=POSITIVE, beta=_SHRINKS, c=NON_NEGATIVE, min_alpha=NON_NEGATIVE)

    def __init__(
        self,
        init: Number = 1.0,
        beta: Number = 0.5,
        c: Number = 1e-4,
        maxiter: int = 10,
        min_alpha: Number | None = None,
        adaptive: bool = True,
        try_negative: bool = False,
    ) -> None:
        super().__init__(
            {
                "init": init,
                "beta": beta,
                "c": c,
                "maxiter": maxiter,
                "min_alpha": min_alpha,
                "adaptive": adaptive,
                "try_negative": try_negative,
            }
        )

    def search(self, update: Sequence[Tensor], var: Var) -> float:
        """Try smaller and smaller steps."""
        state = self.global_state
        scale = state.get("beta_scale", 1.0)
        init, beta = (float(common(self, var.params, name)) for name in ("init", "beta"))
        found = self._backtrack(var, init, beta * scale)
        if common(self, var.params, "adaptive"):
            state["beta_scale"] = scale / 1.5 if found is None else min(1.0, scale * 1.5**0.5)
        return 0.0 if found is None else found


class AdaptiveBacktracking(_Backtracking):
    """`Backtracking` whose first step is such that ``target_iters`` reductions are expected.

    After a search that ends at the step size ``a`` the next one begins with ``a / beta^target_iters``; if the very first one
    was good enough, with ``nplus`` times that. After one that failed it begins with ``init`` again.

    Args:
        init: the first step size of the first search, in units of the update.
        beta: the ratio of a step size to the one before.
        c: the part of the decrease that a linear loss would show, that is enough.
        maxiter: how many step sizes are tried.
        min_alpha: no step size below is tried.
        target_iters: how many reductions there should be.
        nplus: how much larger the first step is after one that was good enough at once.
        scale_beta: after a search that failed ``beta`` is multiplied by it, and restored bit by bit by those that succeed; 0
            for never.
        try_negative: if no step size is good enough, try them with the opposite sign.

    Raises:
        OptionError: an option is out of range.

    Cost: an evaluation of the loss for each step size that is tried; ``target_iters`` and one more are expected.
    """

    bounds = numbers(
        init=POSITIVE, beta=_SHRINKS, c=NON_NEGATIVE, min_alpha=NON_NEGATIVE, nplus=AT_LEAST_ONE, scale_beta=FRACTION
    )

    def __init__(
        self,
        init: Number = 1.0,
        beta: Number = 0.5,
        c: Number = 1e-4,
        maxiter: int = 20,
        min_alpha: Number | None = None,
        target_iters: int = 1,
        nplus: Number = 2.0,
        scale_beta: Number = 0.0,
        try_negative: bool = False,
    ) -> None:
        super().__init__(
            {
                "init": init,
                "beta": beta,
                "c": c,
                "maxiter": maxiter,
                "min_alpha": min_alpha,
                "target_iters": target_iters,
                "nplus": nplus,
                "scale_beta": scale_beta,
                "try_negative": try_negative,
            }
        )

    def search(self, update: Sequence[Tensor], var: Var) -> float:
        """Try smaller and smaller steps."""
        state = self.global_state
        init, beta, nplus, scale_beta = (
            float(common(self, var.params, name)) for name in ("init", "beta", "nplus", "scale_beta")
        )
        beta_scale = state.get("beta_scale", 1.0)
        first = init * state.get("init_scale", 1.0)
        found = self._backtrack(var, first, beta * beta_scale)
        if found is None:
            state["init_scale"] = 1.0
            if scale_beta:
                state["beta_scale"] = beta_scale * scale_beta
            return 0.0
        if scale_beta:
            state["beta_scale"] = min(1.0, beta_scale / scale_beta**0.5)
        if abs(found) == first:
            scale = first * nplus / init
        else:
            scale = abs(found) / beta ** common(self, var.params, "target_iters") / init
        state["init_scale"] = min(scale, _LARGEST_SCALE)
        return found
