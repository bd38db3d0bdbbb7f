"""Clipping by value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.optim.core.arithmetic import larger, smaller
from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class ClipValue(Rule):
    """Limit every element of the update to ``[-value, value]``.

    Args:
        value: the limit, in units of the update.
    """

    bounds = numbers(value=NON_NEGATIVE)

    def __init__(self, value: Number = 1.0) -> None:
        super().__init__({"value": value})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return smaller(larger(update, -settings.value), settings.value), state
