"""Weight decay where the update agrees with it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class CautiousWeightDecay(Rule):
    """Add ``weight_decay θ`` to the update where the update shrinks the parameter, too: where ``u θ >= 0``.

    It stands between an optimizer and `LR`, as decoupled `WeightDecay` does. Unlike that, it does not change the loss whose
    minima are found.

    Args:
        weight_decay: the factor.

    Raises:
        OptionError: the factor is negative.

    Reference: Chen et al., "Cautious Weight Decay", arXiv:2510.12402, 2025, algorithm 1.
    """

    bounds = numbers(weight_decay=NON_NEGATIVE)

    def __init__(self, weight_decay: Number = 1e-2) -> None:
        super().__init__({"weight_decay": weight_decay})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        param = context.param.to(update.dtype)
        agrees = (update.sign() * param.sign() >= 0).to(update.dtype)  # (products of values may underflow)
        return update + param * agrees * settings.weight_decay, state
