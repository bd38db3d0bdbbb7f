"""Adafactor."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import larger, mix, norm, root, smaller, state_dtype, zeros
from graphopt.optim.core.bounds import AT_LEAST_ONE, NON_NEGATIVE, Bounds, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class AdafactorState(NamedTuple):
    """Averages of squares, at least float32.

    Of a parameter with at least two axes the means over the last, (..., n, 1), and over the one before, (..., 1, m), and an
    empty tensor; of others two empty tensors, and one like the parameter.
    """

    row_var: Tensor
    col_var: Tensor
    variance: Tensor


class Adafactor(Rule):
    """The update, divided by the root of an average of squares that is kept by rows and columns, relative to the parameter.

    With ``b = t^beta2_decay``: ``R = (1 - b) R + b mean_columns(u²)``, ``C = (1 - b) C + b mean_rows(u²)``,
    ``v = R C / max(mean(R), eps1)`` (of vectors ``v = (1 - b) v + b u²``), ``d̂ = u / max(√v, eps1)``, update
    ``max(eps2, rms(θ)) min(lr, 1/√t) d̂ / max(1, rms(d̂) / d) + lr weight_decay θ``, as `torch.optim.Adafactor`.

    It is the learning rate of its chain.

    Args:
        lr: the largest step, relative to the parameter.
        beta2_decay: the power of the number of steps that weighs a new square.
        eps1: the least root of a mean square; ``None``: the parameter's dtype's ``eps``.
        eps2: the least root mean square of the parameter.
        d: the largest root mean square of an update.
        weight_decay: times ``lr``, the factor of the decay.

    Raises:
        OptionError: a number is out of range.

    Cost: two passes over the elements; no product of matrices.

    Reference: Shazeer, Stern, "Adafactor", arXiv:1804.04235, 2018, algorithms 4 and 5.
    """

    bounds = numbers(
        lr=NON_NEGATIVE,
        beta2_decay=Bounds(high=0.0, includes_low=False),
        eps1=NON_NEGATIVE,
        eps2=NON_NEGATIVE,
        d=AT_LEAST_ONE,
        weight_decay=NON_NEGATIVE,
    )
    State = AdafactorState
    elementwise = False
    is_learning_rate = True

    def __init__(
        self,
        lr: Number = 1e-2,
        beta2_decay: Number = -0.8,
        *,
        eps1: Number | None = None,
        eps2: Number = 1e-3,
        d: Number = 1.0,
        weight_decay: Number = 0.0,
    ) -> None:
        super().__init__(
            {"lr": lr, "beta2_decay": beta2_decay, "eps1": eps1, "eps2": eps2, "d": d, "weight_decay": weight_decay}
        )

    def init(self, param: Tensor, settings: Settings) -> AdafactorState:
        """Zeros."""
        empty = torch.zeros(0, dtype=state_dtype(param), device=param.device)
        if param.dim() < 2:
            return AdafactorState(empty, empty.clone(), zeros(param))
        return AdafactorState(zeros(param[..., :1]), zeros(param[..., :1, :]), empty)

    def update(
        self, update: Tensor, state: AdafactorState, settings: Settings, context: Context
    ) -> tuple[Tensor, AdafactorState]:
        """One step."""
        weight = context.count**settings.beta2_decay
        floor = torch.finfo(context.param.dtype).eps if settings.eps1 is None else settings.eps1
        square = update * update
        if update.dim() < 2:
            variance = mix(state.variance, square, weight)
            estimate, state = variance, state._replace(variance=variance)
        else:
            row_var = mix(state.row_var, _mean(square, -1), weight)
            col_var = mix(state.col_var, _mean(square, -2), weight)
            estimate = row_var * col_var / larger(_mean(row_var, -2), floor)
            state = state._replace(row_var=row_var, col_var=col_var)
        direction = update * larger(estimate, floor * floor).rsqrt()
        length = root(context.numel)
        param = context.param.to(update.dtype)
        size = larger(norm(param) / length, settings.eps2) * smaller(context.count.rsqrt(), settings.lr)
        excess = larger(norm(direction) / length / settings.d, 1.0)
        new = direction * (size / excess)
        return new + param * (settings.lr * settings.weight_decay), state


def _mean(tensor: Tensor, dim: int) -> Tensor:
    """The mean over one axis; zeros if that is empty."""
    return tensor.sum(dim, keepdim=True) / max(1, tensor.shape[dim])
