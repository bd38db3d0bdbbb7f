"""Running reductions of all updates so far."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import full
from graphopt.optim.core.bounds import DECAY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class SumState(NamedTuple):
    """The sum so far, like the parameter, at least float32."""

    sum: Tensor


class ProductState(NamedTuple):
    """The product so far, like the parameter."""

    product: Tensor


class MaximumState(NamedTuple):
    """The largest so far, like the parameter."""

    maximum: Tensor


class MinimumState(NamedTuple):
    """The smallest so far, like the parameter."""

    minimum: Tensor


class _Accumulate(Rule):
    """Keeps one tensor, which starts where the first update comes out as it is."""

    bounds = numbers(decay=DECAY)
    start = 0.0

    def __init__(self, decay: Number = 0.0) -> None:
        super().__init__({"decay": decay})

    def init(self, param: Tensor, settings: Settings) -> Any:
        """The neutral element."""
        kind: Any = self.State
        return kind(full(param, self.start))


class AccumulateSum(_Accumulate):
    """The sum of all updates: ``s = (1 - decay) s + u``.

    Args:
        decay: how much is forgotten at each step.
    """

    State = SumState

    def update(self, update: Tensor, state: SumState, settings: Settings, context: Context) -> tuple[Tensor, SumState]:
        """One step."""
        new = state.sum * (1 - settings.decay) + update
        return new, SumState(new)


class AccumulateMean(_Accumulate):
    """The mean of all updates: ``s = (1 - decay) s + u``, update ``s / t``.

    Args:
        decay: how much of the sum is forgotten at each step.
    """

    State = SumState

    def update(self, update: Tensor, state: SumState, settings: Settings, context: Context) -> tuple[Tensor, SumState]:
        """One step."""
        new = state.sum * (1 - settings.decay) + update
        return new / context.count, SumState(new)


class AccumulateProduct(_Accumulate):
    """The product of all updates: ``s = (1 - decay) s u``, the first as it is.

    Args:
        decay: how much is forgotten at each step.
    """

    State = ProductState
    start = 1.0

    def update(
        self, update: Tensor, state: ProductState, settings: Settings, context: Context
    ) -> tuple[Tensor, ProductState]:
        """One step."""
        is_later = (context.count > 1).to(context.count.dtype)
        new = state.product * (1 - settings.decay * is_later) * update
        return new, ProductState(new)


class AccumulateMaximum(_Accumulate):
    """The largest of all updates: ``s = max((1 - decay) s, u)``. Behind an average of squares it is AMSGrad.

    Args:
        decay: how much is forgotten at each step.
    """

    State = MaximumState
    start = float("-inf")

    def update(
        self, update: Tensor, state: MaximumState, settings: Settings, context: Context
    ) -> tuple[Tensor, MaximumState]:
        """One step."""
        new = update.maximum(state.maximum * (1 - settings.decay))
        return new, MaximumState(new)


class AccumulateMinimum(_Accumulate):
    """The smallest of all updates: ``s = min((1 - decay) s, u)``.

    Args:
        decay: how much is forgotten at each step.
    """

    State = MinimumState
    start = float("inf")

    def update(
        self, update: Tensor, state: MinimumState, settings: Settings, context: Context
    ) -> tuple[Tensor, MinimumState]:
        """One step."""
        new = update.minimum(state.minimum * (1 - settings.decay))
        return new, MinimumState(new)
