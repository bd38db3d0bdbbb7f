"""LARS's trust ratio."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import choose, norm
from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class LARS(Rule):
    """Scale each tensor's update to a fraction of the parameter's norm: ``u trust_coefficient ‖θ‖ / (‖u‖ + eps)``.

    Where ``‖θ‖`` or ``‖u‖`` is zero the update stays as it is. The optimizer of the paper is ``m.WeightDecay(weight_decay),
    m.LARS(), m.LR(lr), m.HeavyBall(momentum)``: the learning rate is inside of the momentum.

    Args:
        trust_coefficient: the fraction.
        eps: added to the norm of the update; in units of the update.

    Raises:
        OptionError: a number is out of range.

    Reference: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", arXiv:1708.03888, 2017, equation 6.
    """

    bounds = numbers(trust_coefficient=NON_NEGATIVE, eps=NON_NEGATIVE)

    def __init__(self, trust_coefficient: Number = 1e-3, eps: Number = 1e-8) -> None:
        super().__init__({"trust_coefficient": trust_coefficient, "eps": eps})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        param = context.param.to(update.dtype)
        has_ratio = (norm(param) > 0) & (norm(update) > 0)
        # Norms of what is not zero: the derivative of a root is infinite at zero, and stays so behind torch.where.
        size = norm(choose(has_ratio, param, torch.ones_like(param)))
        length = norm(choose(has_ratio, update, torch.ones_like(update)))
        ratio = settings.trust_coefficient * size / (length + settings.eps)
        return update * choose(has_ratio, ratio, torch.ones_like(ratio)), state
