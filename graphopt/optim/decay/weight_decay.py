"""Weight decay as a term of the update."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class WeightDecay(Rule):
    """Add ``weight_decay`` times the derivative of ``|θ|^ord / ord`` to the update: ``sign(θ)``, ``θ``, ``|θ|^(p-1) sign(θ)``.

    In front of `Adam` it is an L2 penalty; between `Adam` and `LR` it is decoupled (AdamW); behind `LR` it does not follow
    the learning rate.

    Args:
        weight_decay: the factor.
        ord: order of the norm; 1, 2 or any larger number.

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, 2017, algorithm 2.
    """

    bounds = numbers(weight_decay=NON_NEGATIVE)

    def __init__(self, weight_decay: Number = 1e-2, ord: int = 2) -> None:
        super().__init__({"weight_decay": weight_decay, "ord": ord})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update + pull(context.param.to(update.dtype), settings.ord) * settings.weight_decay, state


def pull(param: Tensor, order: float) -> Tensor:
    """The derivative of ``|θ|^order / order``."""
    if order == 1:
        return param.sign()
    if order == 2:
        return param
    return param.abs() ** (order - 1) * param.sign()
