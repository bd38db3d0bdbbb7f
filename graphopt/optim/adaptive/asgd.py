"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import choose, larger, scalar, zeros
from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class ASGDState(NamedTuple):
    """The average of parameters, like the parameter, at least float32, and the next step size, shape ()."""

    ax: Tensor
    eta: Tensor


class ASGD(Rule):
    """Gradient descent with a decaying step size, beside which the parameters are averaged.

    Update ``η (u + lambd θ)``; ``a = a + (θ' - a) / max(1, t - 1 - t0)`` with θ' the parameter after the step; then
    ``η = lr / (1 + lambd lr t)^alpha`` for the next step, ``lr`` in the first. The average a is ``state[p]["asgd.ax"]``.

    It is the learning rate of its chain, and must be last in it, or the average is of other parameters.

    Args:
        lr: the step size. A change takes effect one step later, as in `torch.optim.ASGD`.
        lambd: the decay of step size and parameters.
        alpha: the power by which the step size decays.
        t0: number of steps after which averaging starts.

    Raises:
        OptionError: a number is out of range.

    Reference: Polyak, Juditsky, "Acceleration of stochastic approximation by averaging", 1992. Bottou, "Stochastic gradient
    tricks", 2012, for the step sizes.
    """

    bounds = numbers(lr=NON_NEGATIVE, lambd=NON_NEGATIVE, alpha=NON_NEGATIVE, t0=NON_NEGATIVE)
    State = ASGDState
    is_learning_rate = True
    must_be_last = True

    def __init__(self, lr: Number = 1e-2, lambd: Number = 1e-4, *, alpha: Number = 0.75, t0: Number = 1e6) -> None:
        super().__init__({"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0})

    def init(self, param: Tensor, settings: Settings) -> ASGDState:
        """Zeros: what they are in the first step does not matter."""
        return ASGDState(zeros(param), scalar(param))

    def update(
        self, update: Tensor, state: ASGDState, settings: Settings, context: Context
    ) -> tuple[Tensor, ASGDState]:
        """One step."""
        count, lambd = context.count, settings.lambd
        lr = torch.ones_like(count) * settings.lr
        eta = choose(count == 1, lr, state.eta.to(count.dtype))
        param = context.param.to(update.dtype)
        new = update * eta + param * (eta * lambd)
        num_averaged = larger(count - 1 - settings.t0, 1.0)
        after = param - new
        ax = choose(num_averaged == 1, after, state.ax + (after - state.ax) / num_averaged)
        next_eta = lr / (1 + count * (lambd * settings.lr)) ** settings.alpha
        return new, ASGDState(ax, next_eta.to(state.eta.dtype))
