"""Adam with Nesterov's momentum."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, debias, root, scalar, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule

# Dozat's schedule of the momentum: it starts at half of beta1 and approaches it.
_START, _RATE = 0.5, 0.96


class NAdamState(NamedTuple):
    """Averages, each like the parameter, at least float32, and the product of all momenta so far, shape ()."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    mu_product: Tensor


class NAdam(Rule):
    """`Adam` that looks one step ahead.

    ``m`` and ``v`` as in Adam, ``μ_t = beta1 (1 - 0.5 · 0.96^(t momentum_decay))``, ``π_t = μ_1 … μ_t``, update
    ``(u (1 - μ_t) / (1 - π_t) + m μ_(t+1) / (1 - π_(t+1))) / (√v̂ + eps)`` with ``v̂ = v / (1 - beta2^t)``.

    Args:
        beta1: of the average.
        beta2: of the average of squares.
        eps: added to the denominator; in units of the gradient.
        momentum_decay: how fast the momentum approaches ``beta1``.

    Raises:
        OptionError: a number is out of range.

    Reference: Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop, 2016, algorithm 2.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY, eps=NON_NEGATIVE, momentum_decay=NON_NEGATIVE)
    State = NAdamState

    def __init__(
        self, beta1: Number = 0.9, beta2: Number = 0.999, eps: Number = 1e-8, *, momentum_decay: Number = 4e-3
    ) -> None:
        super().__init__({"beta1": beta1, "beta2": beta2, "eps": eps, "momentum_decay": momentum_decay})

    def init(self, param: Tensor, settings: Settings) -> NAdamState:
        """Zeros, and an empty product."""
        return NAdamState(zeros(param), zeros(param), scalar(param, 1.0))

    def update(
        self, update: Tensor, state: NAdamState, settings: Settings, context: Context
    ) -> tuple[Tensor, NAdamState]:
        """One step."""
        momentum, next_momentum = (
            settings.beta1 * (1 - _START * _RATE ** (count * settings.momentum_decay))
            for count in (context.count, context.count + 1)
        )
        product = (state.mu_product * momentum).to(state.mu_product.dtype)
        exp_avg = average(state.exp_avg, update, settings.beta1)
        exp_avg_sq = average(state.exp_avg_sq, update * update, settings.beta2)
        ahead = update * ((1 - momentum) / (1 - product)) + exp_avg * (next_momentum / (1 - product * next_momentum))
        scale = root(debias(settings.beta2, context.count))
        return ahead / (exp_avg_sq.sqrt() / scale + settings.eps), NAdamState(exp_avg, exp_avg_sq, product)
