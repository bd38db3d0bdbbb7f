"""Adan."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, choose, debias, root, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class AdanState(NamedTuple):
    """Averages and the update before, each like the parameter, at least float32."""

    exp_avg: Tensor
    exp_avg_diff: Tensor
    exp_avg_sq: Tensor
    prev_update: Tensor


class Adan(Rule):
    """`Adam` with an average of the changes of the gradient, Nesterov's momentum without looking ahead.

    With ``d = u - u_before`` (0 in the first step): ``m = beta1 m + (1 - beta1) u``, ``v = beta2 v + (1 - beta2) d``,
    ``n = beta3 n + (1 - beta3) (u + beta2 d)²``; update ``(m̂ + beta2 v̂) / (√n̂ + eps)``, each average divided by
    ``1 - beta^t``.

    The decay of the paper, ``θ / (1 + lr λ)``, is to first order that of a `WeightDecay` in front of `LR`.

    Args:
        beta1: of the average of updates; the paper's ``1 - β1``.
        beta2: of the average of differences; the paper's ``1 - β2``.
        beta3: of the average of squares; the paper's ``1 - β3``.
        eps: added to the denominator; in units of the gradient.

    Raises:
        OptionError: a number is out of range.

    Reference: Xie, Zhou, Li, Lin, Yan, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing Deep Models",
    arXiv:2208.06677, 2022, algorithm 1; the correction of averages that start at zero is that of the authors' program.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY, beta3=DECAY, eps=NON_NEGATIVE)
    State = AdanState

    def __init__(self, beta1: Number = 0.98, beta2: Number = 0.92, beta3: Number = 0.99, eps: Number = 1e-8) -> None:
        super().__init__({"beta1": beta1, "beta2": beta2, "beta3": beta3, "eps": eps})

    def init(self, param: Tensor, settings: Settings) -> AdanState:
        """Zeros."""
        return AdanState(zeros(param), zeros(param), zeros(param), zeros(param))

    def update(
        self, update: Tensor, state: AdanState, settings: Settings, context: Context
    ) -> tuple[Tensor, AdanState]:
        """One step."""
        count, beta2 = context.count, settings.beta2
        difference = update - choose(count == 1, update, state.prev_update)
        exp_avg = average(state.exp_avg, update, settings.beta1)
        exp_avg_diff = average(state.exp_avg_diff, difference, beta2)
        ahead = update + difference * beta2
        exp_avg_sq = average(state.exp_avg_sq, ahead * ahead, settings.beta3)
        direction = exp_avg / debias(settings.beta1, count) + exp_avg_diff * (beta2 / debias(beta2, count))
        divisor = exp_avg_sq.sqrt() / root(debias(settings.beta3, count)) + settings.eps
        return direction / divisor, AdanState(exp_avg, exp_avg_diff, exp_avg_sq, update)
