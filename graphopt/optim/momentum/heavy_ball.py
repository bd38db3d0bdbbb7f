"""Heavy-ball momentum."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, debias, zeros
from graphopt.optim.core.bounds import ANY, DECAY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class HeavyBallState(NamedTuple):
    """The sum of updates, like the parameter, at least float32."""

    momentum_buffer: Tensor


class HeavyBall(Rule):
    """Sum up updates, older ones with less and less weight, as the momentum of `torch.optim.SGD`.

    ``b = momentum b + (1 - dampening) u``, in the first step ``b = u``; update ``b``.

    Args:
        momentum: what is left of the sum after a step.
        dampening: how much of an update is left out, from the second step on.
        debiased: divide by ``1 - momentum^t``: a constant update then comes out at its full length from the first step on.
        lerp: average instead of summing, ``b = momentum b + (1 - momentum) (1 - dampening) u``, from zero.

    Raises:
        OptionError: a number is out of range.

    Reference: Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """

    bounds = numbers(momentum=DECAY, dampening=ANY)
    State = HeavyBallState

    def __init__(
        self, momentum: Number = 0.9, dampening: Number = 0.0, *, debiased: bool = False, lerp: bool = False
    ) -> None:
        super().__init__({"momentum": momentum, "dampening": dampening, "debiased": debiased, "lerp": lerp})

    def init(self, param: Tensor, settings: Settings) -> HeavyBallState:
        """Zeros."""
        return HeavyBallState(zeros(param))

    def update(
        self, update: Tensor, state: HeavyBallState, settings: Settings, context: Context
    ) -> tuple[Tensor, HeavyBallState]:
        """One step."""
        if settings.lerp:
            buffer = average(state.momentum_buffer, update * (1 - settings.dampening), settings.momentum)
        else:
            is_later = (context.count > 1).to(context.count.dtype)
            buffer = state.momentum_buffer * settings.momentum + update * (1 - settings.dampening * is_later)
        new = buffer / debias(settings.momentum, context.count) if settings.debiased else buffer
        return new, HeavyBallState(buffer)
