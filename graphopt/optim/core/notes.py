"""How modules read annotations."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt import annotations as noted
from graphopt.annotations import (
    GRAD_SNR,
    GRAD_VARIANCE,
    NUM_SAMPLES,
    SUM_GRAD_SQUARED,
    SUM_POSITION_GRAD_SQUARED,
    Key,
)
from graphopt.optim.core.arithmetic import zeros

_ZERO_WITH_GRADIENT = {key.name for key in (SUM_GRAD_SQUARED, SUM_POSITION_GRAD_SQUARED, GRAD_VARIANCE, GRAD_SNR)}


def read_note(param: Tensor, key: Key[Any]) -> Any:
    """The annotation of a parameter; where the gradient is zero everywhere and nothing is published, zero, as it must be.

    (``torch.distributed.checkpoint`` makes a step with zero gradients before there is any statistic, and so does
    ``zero_grad(set_to_none=False)`` for a parameter that a batch does not reach.)

    Raises:
        MissingAnnotation: there is none, and the gradient is not zero.
        StaleAnnotation: it no longer belongs to the gradient.
    """
    value = noted.find(param, key)
    if value is None and param.grad is not None:
        if key.name in _ZERO_WITH_GRADIENT and not param.grad.any():
            return zeros(param)
        if key.name == NUM_SAMPLES.name and not param.grad.any():
            return 0
    return noted.get(param, key) if value is None else value
