"""Orthogonalization against what modules make of the update."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.optim.core.arithmetic import choose, dot
from graphopt.optim.core.context import Context, Settings
from graphopt.optim.core.module import Rule


class GramSchimdt(Rule):
    """Take away from each tensor's update its part along ``o``: ``u - o ⟨o, u⟩ / ⟨o, o⟩``.

    Args:
        other: a module, or list of modules, that makes ``o`` of a copy of the update; where it is zero nothing is taken away.
    """

    def __init__(self, other: Any) -> None:
        super().__init__(other=other)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        other = context.operands["other"]
        square = dot(other, other)
        share = dot(other, update) / choose(square > 0, square, square + 1)
        return update - other * share, state
