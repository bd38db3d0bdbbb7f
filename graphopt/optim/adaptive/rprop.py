"""Resilient propagation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import choose, larger, smaller, zeros
from graphopt.optim.core.bounds import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, Bounds, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class RpropState(NamedTuple):
    """The update before, zero where its sign had flipped, and the step sizes, each like the parameter, at least float32."""

    prev: Tensor
    step_size: Tensor


class Rprop(Rule):
    """A step size for each element, which grows while the sign of its gradient stays and shrinks where it flips.

    ``s`` is multiplied by ``nplus`` where ``u`` has the sign of the update before, by ``nminus`` where it has the other, and
    clamped to ``[lb, ub]``; update ``sign(u) s``. Where the sign flipped, the step before is taken back (or nothing is done,
    without ``backtrack``), and the step size stays in the step that follows.

    Args:
        nplus: growth.
        nminus: shrinkage.
        lb: the least step size.
        ub: the largest step size.
        backtrack: whether to take a step back after a flip. ``False`` is `torch.optim.Rprop`.
        alpha: the first step size; ``lr`` of `torch.optim.Rprop`.

    Raises:
        OptionError: a number is out of range.

    Reference: Riedmiller, Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", 1993.
    Igel, Hüsken, "Improving the Rprop learning algorithm", 2000, for both answers to a flip.
    """

    bounds = numbers(
        nplus=AT_LEAST_ONE,
        nminus=Bounds(0.0, 1.0, includes_low=False),
        lb=NON_NEGATIVE,
        ub=POSITIVE,
        alpha=POSITIVE,
    )
    State = RpropState

    def __init__(
        self,
        nplus: Number = 1.2,
        nminus: Number = 0.5,
        lb: Number = 1e-6,
        ub: Number = 50.0,
        *,
        backtrack: bool = True,
        alpha: Number = 1.0,
    ) -> None:
        super().__init__({"nplus": nplus, "nminus": nminus, "lb": lb, "ub": ub, "backtrack": backtrack, "alpha": alpha})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """The least step size must not be above the largest."""
        low, high = settings["lb"], settings["ub"]
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise OptionError(f"{self.place}: lb={low!r} is above ub={high!r}; give the smaller one as lb")

    def init(self, param: Tensor, settings: Settings) -> RpropState:
        """Zeros; the first step fills in ``alpha``."""
        return RpropState(zeros(param), zeros(param))

    def update(
        self, update: Tensor, state: RpropState, settings: Settings, context: Context
    ) -> tuple[Tensor, RpropState]:
        """One step."""
        ones = torch.ones_like(update)
        before = choose(context.count == 1, ones * settings.alpha, state.step_size)
        sign = update.sign()
        agreement = sign * state.prev.sign()
        is_flip = agreement < 0
        factor = choose(is_flip, ones * settings.nminus, choose(agreement > 0, ones * settings.nplus, ones))
        step_size = smaller(larger(before * factor, settings.lb), settings.ub)
        nothing = torch.zeros_like(update)
        instead = -state.prev.sign() * before if settings.backtrack else nothing
        return choose(is_flip, instead, sign * step_size), RpropState(choose(is_flip, nothing, update), step_size)
