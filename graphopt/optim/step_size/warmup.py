"""A learning rate that grows in the first steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.optim.core.arithmetic import smaller
from graphopt.optim.core.bounds import NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class Warmup(Rule):
    """Multiply the update by a factor that goes linearly from one value to another, and stays there.

    ``start_lr + (end_lr - start_lr) min((t - 1) / steps, 1)`` in step t; ``start_lr`` in the first. An `LR` behind it, and
    its scheduler, multiply further.

    Args:
        start_lr: the factor of the first step.
        end_lr: the factor from step ``steps + 1`` on.
        steps: how many steps it takes.

    Raises:
        OptionError: a number is out of range.

    Reference: Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv:1706.02677, 2017, section 2.2.
    """

    bounds = numbers(start_lr=NON_NEGATIVE, end_lr=NON_NEGATIVE, steps=POSITIVE)

    def __init__(self, start_lr: Number = 1e-5, end_lr: Number = 1.0, steps: Number = 100) -> None:
        super().__init__({"start_lr": start_lr, "end_lr": end_lr, "steps": steps})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        progress = smaller((context.count - 1) / settings.steps, 1.0)
        return update * (progress * (settings.end_lr - settings.start_lr) + settings.start_lr), state
