"""A line search for the strong Wolfe conditions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import POSITIVE, Bounds, numbers
from graphopt.optim.core.closures import common, number
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import inner_product
from graphopt.optim.line_search.line_search import LineSearch

Guess = Literal["fixed", "previous", "first-order", "quadratic", "quadclip"]
"""How `StrongWolfe` chooses the first step size of a search."""

_INSIDE = Bounds(0.0, 1.0, includes_low=False, includes_high=False)
_GROWS = Bounds(1.0, includes_low=False, includes_high=False)


class _Point(NamedTuple):
    """A step size, the loss there and its derivative."""

    size: float
    loss: float
    slope: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.slope)


class StrongWolfe(LineSearch):
    """Find a step size with ``f(a) <= f(0) + c1 a f'(0)`` and ``|f'(a)| <= c2 |f'(0)|``; ``f(a)`` is the loss at ``θ - a u``.

    Step sizes grow by the factor ``expand`` until they bracket such a one, then cubic interpolation narrows the bracket.
    Where the update does not descend, ``f'(0) >= 0``, the step is 0, or goes backwards with ``plus_minus``.

    Args:
        init: the first step size, in units of the update.
        c1: the part of the decrease that a linear loss would show, that is enough.
        c2: the part of the derivative that may be left; more than ``c1``. 0.9 suits Newton and quasi-Newton directions, 0.1
            conjugate gradients.
        maxiter: how many step sizes are tried to find a bracket.
        maxzoom: how many are tried inside.
        expand: the ratio of a step size to the one before.
        adaptive: after a search that failed start the next one with half the step size, and with twice as much after each
            that succeeded, up to ``init``.
        fallback: if no step size satisfies both conditions take the best one that satisfies the first, instead of 0.
        plus_minus: if the update does not descend, search in the opposite direction.
        a_init: where the search starts. ``"fixed"``: with ``init``, which suits Newton and quasi-Newton directions. The others
            suit directions without a scale, as of conjugate gradients: ``"previous"``: with the last step size;
            ``"first-order"``: so that a linear loss would change as much as in the last step; ``"quadratic"``: at the minimum of
            a quadratic function whose decrease is that of the last step; ``"quadclip"``: the same, times 1.01 and at most
            ``init``. Where there is no last step they start with ``init``, but with a step no longer than 1.

    Raises:
        OptionError: an option is out of range.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, algorithms 3.5 and 3.6, equations 3.59 and 3.60.

    Cost: evaluations of the loss with gradients, one to three a step as a rule, and at most ``maxiter + 4 maxzoom``; the last one
    is at the new parameters, where ``Modular(..., deterministic=True)`` does not evaluate again.
    """

    uses_gradient = True
    bounds = numbers(init=POSITIVE, c1=_INSIDE, c2=_INSIDE, expand=_GROWS)

    def __init__(
        self,
        init: Number = 1.0,
        c1: Number = 1e-4,
        c2: Number = 0.9,
        maxiter: int = 25,
        maxzoom: int = 10,
        expand: Number = 2.0,
        adaptive: bool = True,
        fallback: bool = False,
        plus_minus: bool = False,
        a_init: Guess = "fixed",
    ) -> None:
        super().__init__(
            {
                "init": init,
                "c1": c1,
                "c2": c2,
                "maxiter": maxiter,
                "maxzoom": maxzoom,
                "expand": expand,
                "adaptive": adaptive,
                "fallback": fallback,
                "plus_minus": plus_minus,
                "a_init": a_init,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """``c1 < c2``, as otherwise no step size may satisfy both; counts must be positive."""
        if float(settings["c1"]) >= float(settings["c2"]):
            raise OptionError(f"{self.place}: c1={settings['c1']!r}, c2={settings['c2']!r}; expected c1 < c2")
        for name in ("maxiter", "maxzoom"):
            if not isinstance(settings[name], int) or settings[name] < 1:
                raise OptionError(f"{self.place}: {name}={settings[name]!r}; expected an integer of at least 1")
        if settings["a_init"] not in get_args(Guess):
            raise OptionError(
                f"{self.place}: a_init={settings['a_init']!r}; expected one of {', '.join(get_args(Guess))}"
            )

    def search(self, update: Sequence[Tensor], var: Var) -> float:
        """Bracket, then zoom."""
        start = _Point(0.0, number(var.get_loss()), self.slope(var))
        sign = 1.0
        if start.slope >= 0 or math.isnan(start.slope):
            if not common(self, var.params, "plus_minus") or not start.slope > 0:
                return 0.0
            sign, start = -1.0, start._replace(slope=-start.slope)
        search = _Search(self, var, start, sign)
        state = self.global_state
        scale = state.get("init_scale", 1.0)
        found = search.bracket(self._first_size(start, update, var) * scale)
        if common(self, var.params, "adaptive"):
            state["init_scale"] = scale / 2 if found is None else min(1.0, scale * 2)
        if found is None and common(self, var.params, "fallback"):
            found = search.best
        if common(self, var.params, "a_init") != "fixed":
            if found is None:
                state.pop("prev_size", None)
            else:
                state["prev_size"], state["prev_slope"], state["prev_loss"] = found.size, start.slope, start.loss
        return 0.0 if found is None else sign * found.size

    def _first_size(self, start: _Point, update: Sequence[Tensor], var: Var) -> float:
        """The first step size of a search."""
        init, guess = (common(self, var.params, name) for name in ("init", "a_init"))
        init, state = float(init), self.global_state
        if guess == "fixed":
            return init
        if "prev_size" not in state:
            length = math.sqrt(inner_product(update, update))
            return init / max(1.0, length) if math.isfinite(length) else init
        size: float = state["prev_size"]
        if guess == "first-order":
            size *= state["prev_slope"] / start.slope
        elif guess in ("quadratic", "quadclip"):
            size = 2 * (start.loss - state["prev_loss"]) / start.slope
            size = min(init, 1.01 * size) if guess == "quadclip" else size
        return size if math.isfinite(size) and size > 0 else init


class _Search:
    """One search, along the direction in which the loss falls."""

    def __init__(self, module: StrongWolfe, var: Var, start: _Point, sign: float) -> None:
        self.module, self.var, self.start, self.sign = module, var, start, sign
        self.c1, self.c2, self.expand = (float(common(module, var.params, name)) for name in ("c1", "c2", "expand"))
        self.best: _Point | None = None  # of those that satisfy the first condition

    def bracket(self, size: float) -> _Point | None:
        """Algorithm 3.5."""
        before = self.start
        for index in range(common(self.module, self.var.params, "maxiter")):
            point = self.evaluate(size)
            if not self.is_low(point) or (index > 0 and point.loss >= before.loss):
                return self.zoom(before, point)
            if self.is_flat(point):
                return point
            if point.slope >= 0:
                return self.zoom(point, before)
            before, size = point, size * self.expand
        return None

    def zoom(self, low: _Point, high: _Point) -> _Point | None:
        """Algorithm 3.6: ``low`` is the best point so far, and the derivative there points to ``high``."""
        left = common(self.module, self.var.params, "maxzoom")
        is_slow = False
        for _ in range(4 * left):  # a bracket that ends where the loss is not finite may be far too wide
            if left == 0 or low.size == high.size:
                break
            left -= high.is_finite
            width = abs(high.size - low.size)
            point = self.evaluate(_between(low, high, is_slow))
            if not self.is_low(point) or point.loss >= low.loss:
                high = point
            elif self.is_flat(point):
                return point
            else:
                if point.slope * (high.size - low.size) >= 0:
                    high = low
                low = point
            is_slow = abs(high.size - low.size) > 0.9 * width
        return None

    def evaluate(self, size: float) -> _Point:
        loss, slope = self.module.evaluate_with_slope(self.sign * size, self.var)
        point = _Point(size, loss, self.sign * slope)
        if self.is_low(point) and (self.best is None or loss < self.best.loss):
            self.best = point
        return point

    def is_low(self, point: _Point) -> bool:
        return point.is_finite and point.loss <= self.start.loss + self.c1 * point.size * self.start.slope

    def is_flat(self, point: _Point) -> bool:
        return abs(point.slope) <= -self.c2 * self.start.slope


def _between(low: _Point, high: _Point, is_slow: bool) -> float:
    """The minimum of the cubic through both (equation 3.59), where it is inside; else the middle.

    When the bracket has shrunk slowly, the minimum is kept away from its ends.
    """
    width = high.size - low.size
    if not high.is_finite:
        return low.size + width / 10
    part = 0.5
    mean = low.slope + high.slope - 3 * (low.loss - high.loss) / (low.size - high.size)
    square = mean * mean - low.slope * high.slope
    if square >= 0:
        root = math.copysign(math.sqrt(square), width)
        denominator = high.slope - low.slope + 2 * root
        if denominator != 0:
            part = 1 - (high.slope + root - mean) / denominator
    if not 0 < part < 1:
        part = 0.5
    if is_slow:
        part = min(max(part, 0.1), 0.9)
    return low.size + width * part
