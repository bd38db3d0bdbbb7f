"""A step size that grows where steps are good, and shrinks where they are not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphopt.optim.core.bounds import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, Bounds, numbers
from graphopt.optim.core.closures import common, number
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.line_search.line_search import LineSearch

_SHRINKS = Bounds(0.0, 1.0, includes_low=False, includes_high=False)
_MOST_IN_A_ROW = 10  # steps that make the next change larger still
_LARGEST = 1e30  # step size, and the inverse of the smallest: growing on would end in an infinity


class TrustRegion(LineSearch):
    """Try one step size; make it ``nplus`` times larger where the step is good, ``nminus`` times where the loss does not fall.

    A step is good if ``f(θ - a u) <= f(θ) + c a min(d, 0)``, ``d = -⟨g, u⟩`` (Armijo), and the loss is lower if u does not
    descend. A step that is not good but lowers the loss is made, and leaves the step size as it is; one that does not lower it is
    rejected. One evaluation of the loss a step, as opposed to `Backtracking`.

    Args:
        nplus: what the step size is multiplied with after a good step.
        nminus: and after one that did not lower the loss.
        c: the part of the decrease that a linear loss would show, that is enough.
        init: the first step size, in units of the update.
        backtrack: whether steps that do not lower the loss are rejected. Otherwise they are made, unless the loss is not finite.
        adaptive: the k-th change in a row in the same direction is k changes at once (at most 10), so that the right size is
            found soon from far away.

    Raises:
        OptionError: an option is out of range.

    Reference: Conn, Gould, Toint, "Trust-region methods", 2000, algorithm 6.1.1, with a model of first order and a direction
    that is given.

    Cost: one evaluation of the loss, and one gradient.
    """

    uses_gradient = True
    bounds = numbers(nplus=AT_LEAST_ONE, nminus=_SHRINKS, c=NON_NEGATIVE, init=POSITIVE)

    def __init__(
        self,
        nplus: Number = 1.5,
        nminus: Number = 0.75,
        c: Number = 1e-4,
        init: Number = 1.0,
        backtrack: bool = True,
        adaptive: bool = True,
    ) -> None:
        super().__init__(
            {"nplus": nplus, "nminus": nminus, "c": c, "init": init, "backtrack": backtrack, "adaptive": adaptive}
        )

    def search(self, update: Sequence[Tensor], var: Var) -> float:
        """Try it."""
        nplus, nminus, c, init = (float(common(self, var.params, name)) for name in ("nplus", "nminus", "c", "init"))
        state = self.global_state
        step_size = state.get("step_size", init)
        start, slope = number(var.get_loss()), self.slope(var)
        loss = self.evaluate(step_size, var)
        limit = start + c * step_size * min(slope, 0.0)
        # As in Backtracking: where the decrease is lost in rounding a direction that descends is trusted.
        is_good = loss < limit or (loss == limit and slope < 0)
        is_lower = is_good or loss < start
        change = 1 if is_good else 0 if is_lower else -1
        in_a_row = state.get("num_in_a_row", 0)
        in_a_row = in_a_row + change if change * in_a_row > 0 else change
        state["num_in_a_row"] = in_a_row
        times = min(abs(in_a_row), _MOST_IN_A_ROW) if common(self, var.params, "adaptive") else abs(change)
        new = step_size * (nplus if change > 0 else nminus) ** times
        state["step_size"] = min(max(new, 1 / _LARGEST), _LARGEST)
        if is_lower or (not common(self, var.params, "backtrack") and loss < float("inf")):
            return float(step_size)
        return 0.0
