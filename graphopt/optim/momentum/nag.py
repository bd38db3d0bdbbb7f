"""Nesterov's accelerated gradient."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, mix, zeros
from graphopt.optim.core.bounds import ANY, DECAY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class NAGState(NamedTuple):
    """The sum of updates, like the parameter, at least float32."""

    momentum_buffer: Tensor


class NAG(Rule):
    """Momentum that looks one step ahead, as `torch.optim.SGD` with ``nesterov=True``.

    ``b = momentum b + u``, update ``u + (1 - dampening) momentum b``.

    Args:
        momentum: what is left of the sum after a step.
        dampening: how much of the momentum is left out of the update.
        lerp: everything times ``1 - momentum``: ``b`` is the average of updates, and the update lies between ``u`` and it,
            as in `torch.optim.Muon`.

    Raises:
        OptionError: a number is out of range.

    Reference: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013, equations 3, 4.
    """

    bounds = numbers(momentum=DECAY, dampening=ANY)
    State = NAGState

    def __init__(self, momentum: Number = 0.9, dampening: Number = 0.0, *, lerp: bool = False) -> None:
        super().__init__({"momentum": momentum, "dampening": dampening, "lerp": lerp})

    def init(self, param: Tensor, settings: Settings) -> NAGState:
        """Zeros."""
        return NAGState(zeros(param))

    def update(self, update: Tensor, state: NAGState, settings: Settings, context: Context) -> tuple[Tensor, NAGState]:
        """One step."""
        momentum = settings.momentum
        if settings.lerp:
            buffer = average(state.momentum_buffer, update, momentum)
            return mix(update, buffer * (1 - settings.dampening), momentum), NAGState(buffer)
        buffer = state.momentum_buffer * momentum + update
        return update + buffer * (momentum * (1 - settings.dampening)), NAGState(buffer)
