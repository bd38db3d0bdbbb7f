"""Norms that follow those of an average of earlier updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import average, choose, larger, norm, norm_of_all, scalar, zeros
from graphopt.optim.core.bounds import AT_LEAST_ONE, DECAY, POSITIVE, numbers
from graphopt.optim.core.context import Context, Everything, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.momentum.ema import check_ema_init
from graphopt.optim.stabilization.slices import check_fixed, check_ord


class EMAState(NamedTuple):
    """The average of updates, like the parameter, and its norm, shape ()."""

    exp_avg: Tensor
    norm: Tensor


class NormalizeByEMA(Rule):
    """Scale each tensor's update to the norm of the average of its updates.

    ``e = beta e + (1 - beta) u``, whose norm may grow by at most ``max_ema_growth`` a step; update ``u ‖e‖ / ‖u‖``.

    Args:
        beta: of the average.
        ord: order of the norms.
        eps: the least norm that is divided by.
        tensorwise: norms of each tensor; ``False``: of all tensors together.
        max_ema_growth: limit of the growth; ``None`` for none.
        ema_init: what the average is in the first step, ``"zeros"`` or the first ``"update"``.

    Raises:
        OptionError: an option is out of range, or ``tensorwise`` differs between parameters.
    """

    bounds = numbers(beta=DECAY, eps=POSITIVE, max_ema_growth=AT_LEAST_ONE)
    State = EMAState

    def __init__(
        self,
        beta: Number = 0.99,
        ord: float = 2.0,
        eps: Number = 1e-6,
        *,
        tensorwise: bool = True,
        max_ema_growth: Number | None = 1.5,
        ema_init: Literal["zeros", "update"] = "zeros",
    ) -> None:
        super().__init__(
            {
                "beta": beta,
                "ord": ord,
                "eps": eps,
                "tensorwise": tensorwise,
                "max_ema_growth": max_ema_growth,
                "ema_init": ema_init,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what means nothing, or must be the same for all tensors."""
        check_ord(self, settings)
        check_ema_init(self, settings["ema_init"])
        check_fixed(self, settings, ("tensorwise",))

    @property
    def measures(self) -> bool:
        """Whether there is one norm for all tensors."""
        return not self.defaults["tensorwise"]

    def init(self, param: Tensor, settings: Settings) -> EMAState:
        """Zeros."""
        return EMAState(zeros(param), scalar(param))

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """The norms of all updates and of all averages."""
        averages = [
            _average(update, state, settings, context)
            for update, state, context in zip(everything.updates, everything.states, everything.contexts, strict=True)
        ]
        return {
            "update": norm_of_all(everything.updates, settings.ord),
            "average": norm_of_all(averages, settings.ord),
        }

    def update(self, update: Tensor, state: EMAState, settings: Settings, context: Context) -> tuple[Tensor, EMAState]:
        """One step."""
        exp_avg = _average(update, state, settings, context)
        if self.measures:
            update_length = context.measured["update"].to(update.device, state.norm.dtype)
            length = context.measured["average"].to(update.device, state.norm.dtype)
        else:
            update_length, length = norm(update, settings.ord), norm(exp_avg, settings.ord)
        if settings.max_ema_growth is not None:
            limit = larger(state.norm * settings.max_ema_growth, settings.eps)
            shrink = choose((context.count == 1) | (length <= limit), torch.ones_like(length), limit / length)
            exp_avg, length = exp_avg * shrink, length * shrink
        return update * self.factor(update_length, length, settings), EMAState(exp_avg, length)

    def factor(self, update_length: Tensor, length: Tensor, settings: Settings) -> Tensor:
        """What the update is multiplied by.

        Args:
            update_length: its norm.
            length: the norm of the average.
            settings: of the parameter.
        """
        return length / larger(update_length, settings.eps)


class ClipNormByEMA(NormalizeByEMA):
    """Limit the norm of each tensor's update to the norm of the average of its updates.

    ``e = beta e + (1 - beta) u``, whose norm may grow by at most ``max_ema_growth`` a step; update
    ``u / max(1, ‖u‖ / max(‖e‖, eps))``.

    Args:
        beta: of the average.
        ord: order of the norms.
        eps: the least limit.
        tensorwise: norms of each tensor; ``False``: of all tensors together.
        max_ema_growth: limit of the growth; ``None`` for none.
        ema_init: what the average is in the first step, ``"zeros"`` or the first ``"update"``.

    Raises:
        OptionError: an option is out of range, or ``tensorwise`` differs between parameters.
    """

    def factor(self, update_length: Tensor, length: Tensor, settings: Settings) -> Tensor:
        """At most 1."""
        return larger(update_length / larger(length, settings.eps), 1.0).reciprocal()


def _average(update: Tensor, state: EMAState, settings: Settings, context: Context) -> Tensor:
    exp_avg = average(state.exp_avg, update, settings.beta)
    return choose(context.count == 1, update, exp_avg) if settings.ema_init == "update" else exp_avg
