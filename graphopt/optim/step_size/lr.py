"""The learning rate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class LR(Rule):
    """Multiply the update by the learning rate.

    The last one of a chain reads ``lr`` of the parameter's group, so that ``torch.optim.lr_scheduler`` works on it.

    Args:
        lr: a number, a tensor of shape (), or a function of the number of steps made before.
    """

    bounds = numbers(lr=NON_NEGATIVE)
    is_learning_rate = True

    def __init__(self, lr: Number = 1.0) -> None:
        super().__init__({"lr": lr})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update * settings.lr, state
