"""The exponential moving average of updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import average, choose, debias, zeros
from graphopt.optim.core.bounds import ANY, DECAY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.core.renamed import renamed


class EMAState(NamedTuple):
    """The average, like the parameter, at least float32."""

    exp_avg: Tensor


@renamed(debias="debiased")
class EMA(Rule):
    """Replace the update by its exponential moving average.

    ``e = momentum e + (1 - momentum) u``; update ``e``.

    Args:
        momentum: what is left of the average after a step.
        dampening: how much of each update is left out.
        debiased: divide by ``1 - momentum^t``, which corrects for starting at zero.
        lerp: average; ``False`` sums up, ``e = momentum e + u``.
        ema_init: what the average is before the first step, ``"zeros"``, or after it, the first ``"update"``.

    Raises:
        OptionError: a number is out of range; ``debiased`` without an average that starts at zero.
    """

    bounds = numbers(momentum=DECAY, dampening=ANY)
    State = EMAState

    def __init__(
        self,
        momentum: Number = 0.9,
        dampening: Number = 0.0,
        *,
        debiased: bool = False,
        lerp: bool = True,
        ema_init: Literal["zeros", "update"] = "zeros",
    ) -> None:
        super().__init__(
            {"momentum": momentum, "dampening": dampening, "debiased": debiased, "lerp": lerp, "ema_init": ema_init}
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a start that is unknown, or that is corrected for though it is not zero."""
        check_ema_init(self, settings["ema_init"])
        if settings["debiased"] and settings["ema_init"] != "zeros":
            raise OptionError(
                f"{self.place}: debiased=True corrects for starting at zero, but ema_init={settings['ema_init']!r}; "
                "leave one of them out"
            )

    def init(self, param: Tensor, settings: Settings) -> EMAState:
        """Zeros."""
        return EMAState(zeros(param))

    def update(self, update: Tensor, state: EMAState, settings: Settings, context: Context) -> tuple[Tensor, EMAState]:
        """One step."""
        fresh = update * (1 - settings.dampening)
        if settings.lerp:
            exp_avg = average(state.exp_avg, fresh, settings.momentum)
        else:
            exp_avg = state.exp_avg * settings.momentum + fresh
        if settings.ema_init == "update":
            exp_avg = choose(context.count == 1, update, exp_avg)
        new = exp_avg / debias(settings.momentum, context.count) if settings.debiased else exp_avg
        return new, EMAState(exp_avg)


def check_ema_init(module: Rule, ema_init: object) -> None:
    """Raise `OptionError` if an average cannot start so."""
    if ema_init not in ("zeros", "update"):
        raise OptionError(f"{module.place}: ema_init={ema_init!r}; expected 'zeros' or 'update'")
