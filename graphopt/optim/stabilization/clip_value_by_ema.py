"""Clipping by an average of earlier magnitudes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, choose, zeros
from graphopt.optim.core.bounds import DECAY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.momentum.ema import check_ema_init


class MagnitudeState(NamedTuple):
    """The average of magnitudes, like the parameter, at least float32."""

    exp_avg_abs: Tensor


class ClipValueByEMA(Rule):
    """Limit every element of the update to the average of its magnitudes.

    ``e = beta e + (1 - beta) |u|``; update ``u`` limited to ``[-e, e]``. Any other function of the average is a chain, such as
    ``ClipModules(Identity(), [Abs(), EMA(0.99), Mul(-2)], [Abs(), EMA(0.99), Mul(2)])``.

    Args:
        beta: of the average.
        ema_init: what the average is in the first step, ``"zeros"`` (that is, ``(1 - beta) |u|``) or the first ``"update"``.

    Raises:
        OptionError: an option is out of range.
    """

    bounds = numbers(beta=DECAY)
    State = MagnitudeState

    def __init__(self, beta: Number = 0.99, *, ema_init: Literal["zeros", "update"] = "zeros") -> None:
        super().__init__({"beta": beta, "ema_init": ema_init})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse an unknown start."""
        check_ema_init(self, settings["ema_init"])

    def init(self, param: Tensor, settings: Settings) -> MagnitudeState:
        """Zeros."""
        return MagnitudeState(zeros(param))

    def update(
        self, update: Tensor, state: MagnitudeState, settings: Settings, context: Context
    ) -> tuple[Tensor, MagnitudeState]:
        """One step."""
        limit = average(state.exp_avg_abs, update.abs(), settings.beta)
        if settings.ema_init == "update":
            limit = choose(context.count == 1, update.abs(), limit)
        return update.maximum(-limit).minimum(limit), MagnitudeState(limit)
