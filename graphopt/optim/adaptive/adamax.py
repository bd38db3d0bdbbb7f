"""Adam with the largest instead of the mean square."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, debias, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class AdamaxState(NamedTuple):
    """The average and the decaying maximum, each like the parameter, at least float32."""

    exp_avg: Tensor
    exp_inf: Tensor


class Adamax(Rule):
    """The gradient's average, divided by the largest recent gradient.

    ``m = beta1 m + (1 - beta1) u``, ``w = max(beta2 w, |u| + eps)``, update ``m / ((1 - beta1^t) w)``.

    Args:
        beta1: of the average.
        beta2: how fast the maximum decays.
        eps: added to the gradient's size; in units of the gradient.

    Raises:
        OptionError: a number is out of range.

    Reference: Kingma, Ba, "Adam", arXiv:1412.6980, 2014, algorithm 2.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY, eps=NON_NEGATIVE)
    State = AdamaxState

    def __init__(self, beta1: Number = 0.9, beta2: Number = 0.999, eps: Number = 1e-8) -> None:
        super().__init__({"beta1": beta1, "beta2": beta2, "eps": eps})

    def init(self, param: Tensor, settings: Settings) -> AdamaxState:
        """Zeros."""
        return AdamaxState(zeros(param), zeros(param))

    def update(
        self, update: Tensor, state: AdamaxState, settings: Settings, context: Context
    ) -> tuple[Tensor, AdamaxState]:
        """One step."""
        exp_avg = average(state.exp_avg, update, settings.beta1)
        exp_inf = (state.exp_inf * settings.beta2).maximum(update.abs() + settings.eps)
        return exp_avg / debias(settings.beta1, context.count) / exp_inf, AdamaxState(exp_avg, exp_inf)
