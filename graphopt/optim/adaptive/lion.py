"""Lion."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, zeros
from graphopt.optim.core.bounds import DECAY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class LionState(NamedTuple):
    """The average of updates, like the parameter, at least float32."""

    exp_avg: Tensor


class Lion(Rule):
    """The sign of an average that weighs the present gradient more than the one that is kept.

    Update ``sign(beta1 m + (1 - beta1) u)``, then ``m = beta2 m + (1 - beta2) u``.

    Args:
        beta1: of the average whose sign is taken.
        beta2: of the average that is kept.

    Raises:
        OptionError: a number is out of range.

    Reference: Chen et al., "Symbolic discovery of optimization algorithms", arXiv:2302.06675, 2023, algorithm 2.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY)
    State = LionState

    def __init__(self, beta1: Number = 0.9, beta2: Number = 0.99) -> None:
        super().__init__({"beta1": beta1, "beta2": beta2})

    def init(self, param: Tensor, settings: Settings) -> LionState:
        """Zeros."""
        return LionState(zeros(param))

    def update(
        self, update: Tensor, state: LionState, settings: Settings, context: Context
    ) -> tuple[Tensor, LionState]:
        """One step."""
        new = average(state.exp_avg, update, settings.beta1).sign()
        return new, LionState(average(state.exp_avg, update, settings.beta2))
