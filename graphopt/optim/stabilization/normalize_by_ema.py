"""Norms that follow those of an average of earlier updates."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import average, choose, larger, norm, scalar, zeros
from graphopt.optim.core.bounds import AT_LEAST_ONE, DECAY, POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


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
        max_ema_growth: limit of the growth; ``None`` for none.
        ema_init: what the average is in the first step, ``"zeros"`` or the first ``"update"``.
    """

    bounds = numbers(beta=DECAY, eps=POSITIVE, max_ema_growth=AT_LEAST_ONE)
    State = EMAState

    def __init__(
        self,
        beta: Number = 0.99,
        ord: float = 2.0,
        eps: Number = 1e-6,
        *,
        max_ema_growth: Number | None = 1.5,
        ema_init: Literal["zeros", "update"] = "zeros",
    ) -> None:
        super().__init__({"beta": beta, "ord": ord, "eps": eps, "max_ema_growth": max_ema_growth, "ema_init": ema_init})

    def init(self, param: Tensor, settings: Settings) -> EMAState:
        """Zeros."""
        return EMAState(zeros(param), scalar(param))

    def update(self, update: Tensor, state: EMAState, settings: Settings, context: Context) -> tuple[Tensor, EMAState]:
        """One step."""
        exp_avg, length = _follow(update, state, settings, context)
        update_length = larger(norm(update, settings.ord), settings.eps)
        return update * (length / update_length), EMAState(exp_avg, length)


def _follow(update: Tensor, state: EMAState, settings: Settings, context: Context) -> tuple[Tensor, Tensor]:
    """The average and its norm after this step."""
    is_first = context.count == 1
    if settings.ema_init == "update":
        exp_avg = choose(is_first, update, average(state.exp_avg, update, settings.beta))
    else:
        exp_avg = average(state.exp_avg, update, settings.beta)
    length = norm(exp_avg, settings.ord)
    if settings.max_ema_growth is not None:
        limit = larger(state.norm * settings.max_ema_growth, settings.eps)
        shrink = choose(is_first | (length <= limit), torch.ones_like(length), limit / length)
        exp_avg, length = exp_avg * shrink, length * shrink
    return exp_avg, length
