"""Gradients with less variance."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import choose, norm, smaller, zeros
from graphopt.optim.core.bounds import ANY, DECAY, POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class MARSState(NamedTuple):
    """The update before, like the parameter, at least float32."""

    prev_update: Tensor


class MARSCorrection(Rule):
    """Add to the gradient a part of its change: ``c = u + scaling beta / (1 - beta) (u - u_before)``, then clip its norm.

    It stands in front of an optimizer whose average of gradients has the same ``beta``: ``[MARSCorrection(0.95),
    Adam(0.95, 0.99)]`` is MARS-AdamW with `WeightDecay`, ``[MARSCorrection(0.95), Lion(...)]`` MARS-Lion. The gradient before
    is that of the batch before, which the paper calls the approximate version; it needs no second evaluation.

    Args:
        beta: of the average that follows.
        scaling: how much of the correction is made; 0 for none, 1 for that of STORM.
        max_norm: the largest norm of ``c`` for each tensor, in units of the gradient; ``None`` for no limit.

    Raises:
        OptionError: a number is out of range.

    Reference: Yuan, Liu, Wu, Zhou, Gu, "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
    arXiv:2411.10438, 2024, equation 8 and algorithm 2.
    """

    bounds = numbers(beta=DECAY, scaling=ANY, max_norm=POSITIVE)
    State = MARSState

    def __init__(self, beta: Number = 0.9, scaling: Number = 0.025, max_norm: Number | None = 1.0) -> None:
        super().__init__({"beta": beta, "scaling": scaling, "max_norm": max_norm})

    def init(self, param: Tensor, settings: Settings) -> MARSState:
        """Zeros; the first step makes no correction."""
        return MARSState(zeros(param))

    def update(
        self, update: Tensor, state: MARSState, settings: Settings, context: Context
    ) -> tuple[Tensor, MARSState]:
        """One step."""
        difference = update - choose(context.count == 1, update, state.prev_update)
        new = update + difference * (settings.scaling * settings.beta / (1 - settings.beta))
        if settings.max_norm is not None:
            new = new * smaller(norm(new).reciprocal() * settings.max_norm, 1.0)  # of zeros it is min(1, infinity)
        return new, MARSState(update)
