"""Adam without adaptive step sizes as long as the squares are uncertain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import average, choose, debias, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule

# The paper rectifies from a length of 4 on; torch.optim.RAdam, and the authors' code, from 5 on.
_MIN_LENGTH = 5.0


class RAdamState(NamedTuple):
    """Averages, each like the parameter, at least float32."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class RAdam(Rule):
    """`Adam` whose step is rectified for the variance of the average of squares.

    ``m`` and ``v`` as in Adam, ``ρ∞ = 2 / (1 - beta2) - 1``, ``ρ = ρ∞ - 2 t beta2^t / (1 - beta2^t)``. The update is
    ``m̂ r √(1 - beta2^t) / (√v + eps)`` with ``r² = (ρ - 4)(ρ - 2) ρ∞ / ((ρ∞ - 4)(ρ∞ - 2) ρ)`` where ``ρ > 5``, and ``m̂`` before.

    Args:
        beta1: of the average.
        beta2: of the average of squares.
        eps: added to ``√v``; in units of the gradient.

    Raises:
        OptionError: a number is out of range.

    Reference: Liu et al., "On the variance of the adaptive learning rate and beyond", arXiv:1908.03265, 2019, algorithm 2.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY, eps=NON_NEGATIVE)
    State = RAdamState

    def __init__(self, beta1: Number = 0.9, beta2: Number = 0.999, eps: Number = 1e-8) -> None:
        super().__init__({"beta1": beta1, "beta2": beta2, "eps": eps})

    def init(self, param: Tensor, settings: Settings) -> RAdamState:
        """Zeros."""
        return RAdamState(zeros(param), zeros(param))

    def update(
        self, update: Tensor, state: RAdamState, settings: Settings, context: Context
    ) -> tuple[Tensor, RAdamState]:
        """One step."""
        count, beta2 = context.count, settings.beta2
        exp_avg = average(state.exp_avg, update, settings.beta1)
        exp_avg_sq = average(state.exp_avg_sq, update * update, beta2)
        correction = debias(beta2, count)
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * count * beta2**count / correction
        is_certain = length > _MIN_LENGTH
        # Below, the formula has roots of negative numbers, whose derivative would be NaN although nobody takes them.
        safe = choose(is_certain, length, torch.full_like(length, _MIN_LENGTH + 1))
        safe_limit = choose(is_certain, torch.ones_like(length) * limit, torch.full_like(length, _MIN_LENGTH + 1))
        square = (safe - 4) * (safe - 2) * safe_limit / ((safe_limit - 4) * (safe_limit - 2) * safe)
        average_now = exp_avg / debias(settings.beta1, count)
        rectified = average_now * (square * correction).sqrt() / (exp_avg_sq.sqrt() + settings.eps)
        return choose(is_certain, rectified, average_now), RAdamState(exp_avg, exp_avg_sq)
