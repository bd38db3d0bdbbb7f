"""Adadelta."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class AdadeltaState(NamedTuple):
    """Averages of the squares of what came in and what went out, each like the parameter, at least float32."""

    square_avg: Tensor
    acc_delta: Tensor


class Adadelta(Rule):
    """The update, in units of the parameter: divided by the root of its mean square, times that of earlier results.

    ``v = rho v + (1 - rho) u²``, update ``d = u √(a + eps) / √(v + eps)``, ``a = rho a + (1 - rho) d²``.

    Args:
        rho: of the averages.
        eps: added to both squares.

    Raises:
        OptionError: a number is out of range.

    Reference: Zeiler, "ADADELTA", arXiv:1212.5701, 2012, algorithm 1.
    """

    bounds = numbers(rho=DECAY, eps=NON_NEGATIVE)
    State = AdadeltaState

    def __init__(self, rho: Number = 0.9, eps: Number = 1e-6) -> None:
        super().__init__({"rho": rho, "eps": eps})

    def init(self, param: Tensor, settings: Settings) -> AdadeltaState:
        """Zeros."""
        return AdadeltaState(zeros(param), zeros(param))

    def update(
        self, update: Tensor, state: AdadeltaState, settings: Settings, context: Context
    ) -> tuple[Tensor, AdadeltaState]:
        """One step."""
        square_avg = average(state.square_avg, update * update, settings.rho)
        new = update * ((state.acc_delta + settings.eps).sqrt() / (square_avg + settings.eps).sqrt())
        return new, AdadeltaState(square_avg, average(state.acc_delta, new * new, settings.rho))
