"""Exponential moving averages of squares, and their roots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import average, debias, larger, zeros
from graphopt.optim.core.bounds import DECAY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class SquareState(NamedTuple):
    """The average of powers, like the parameter, at least float32."""

    exp_avg_sq: Tensor


class AMSGradSquareState(NamedTuple):
    """The average of powers, and the largest that was used so far."""

    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor


class CenteredState(NamedTuple):
    """The averages of powers and of updates, each like the parameter."""

    exp_avg_sq: Tensor
    exp_avg: Tensor


class AMSGradCenteredState(NamedTuple):
    """The averages of powers and of updates, and the largest result so far."""

    exp_avg_sq: Tensor
    exp_avg: Tensor
    max_exp_avg_sq: Tensor


class _Squares(Rule):
    """What the four have in common; subclasses say whether they subtract the mean's square and whether they take the root."""

    bounds = numbers(beta=DECAY)
    is_centered = False
    takes_root = False

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a power without a root."""
        power = settings["pow"]
        if not power > 0:
            raise OptionError(f"{self.place}: pow={power!r}; expected a number above 0")

    def state_type(self, settings: Settings) -> type[tuple[Any, ...]]:
        """With ``amsgrad`` there is one more tensor."""
        if self.is_centered:
            return AMSGradCenteredState if settings.amsgrad else CenteredState
        return AMSGradSquareState if settings.amsgrad else SquareState

    def init(self, param: Tensor, settings: Settings) -> Any:
        """Zeros."""
        kind: Any = self.state_type(settings)
        return kind(*[zeros(param) for _ in kind._fields])

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        power = update * update if settings.pow == 2 else update.abs() ** settings.pow
        new = exp_avg_sq = average(state.exp_avg_sq, power, settings.beta)
        correction: Number = debias(settings.beta, context.count) if settings.get("debiased", False) else 1.0
        state = state._replace(exp_avg_sq=exp_avg_sq)
        if self.is_centered:
            exp_avg = average(state.exp_avg, update, settings.beta)
            mean = exp_avg / correction
            mean_power = mean * mean if settings.pow == 2 else mean.abs() ** settings.pow
            # Both correspond to one distribution only up to rounding, which must not become a negative square.
            new = larger(new / correction - mean_power, 0.0)
            correction = 1.0
            state = state._replace(exp_avg=exp_avg)
        if settings.amsgrad:
            new = new.maximum(state.max_exp_avg_sq)
            state = state._replace(max_exp_avg_sq=new)
        new = new / correction
        if self.takes_root:
            new = new.sqrt() if settings.pow == 2 else new ** (1 / settings.pow)
        return new, state


class EMASquared(_Squares):
    """Replace the update by the exponential moving average of its square: ``v = beta v + (1 - beta) |u|^pow``.

    Args:
        beta: what is left of the average after a step.
        amsgrad: the largest ``v`` so far.
        pow: the power, above 0.

    Raises:
        OptionError: a number is out of range.
    """

    def __init__(self, beta: Number = 0.999, *, amsgrad: bool = False, pow: float = 2.0) -> None:
        super().__init__({"beta": beta, "amsgrad": amsgrad, "pow": pow})


class SqrtEMASquared(_Squares):
    """The root of `EMASquared`: ``v^(1/pow)``.

    Args:
        beta: what is left of the average after a step.
        amsgrad: the root of the largest ``v`` so far.
        debiased: divide ``v`` by ``1 - beta^t``, which corrects for starting at zero.
        pow: the power, above 0.

    Raises:
        OptionError: a number is out of range.
    """

    takes_root = True

    def __init__(
        self, beta: Number = 0.999, *, amsgrad: bool = False, debiased: bool = False, pow: float = 2.0
    ) -> None:
        super().__init__({"beta": beta, "amsgrad": amsgrad, "debiased": debiased, "pow": pow})


class CenteredEMASquared(_Squares):
    """The variance of updates: the exponential moving average of squares less the square of that of updates, at least 0.

    Args:
        beta: what is left of both averages after a step.
        amsgrad: the largest so far.
        pow: the power in both places, above 0.

    Raises:
        OptionError: a number is out of range.
    """

    is_centered = True

    def __init__(self, beta: Number = 0.99, *, amsgrad: bool = False, pow: float = 2.0) -> None:
        super().__init__({"beta": beta, "amsgrad": amsgrad, "pow": pow})


class CenteredSqrtEMASquared(_Squares):
    """The root of `CenteredEMASquared`, the standard deviation of updates.

    Args:
        beta: what is left of both averages after a step.
        amsgrad: the largest so far.
        debiased: divide both averages by ``1 - beta^t`` before they are subtracted.
        pow: the power, above 0.

    Raises:
        OptionError: a number is out of range.
    """

    is_centered = True
    takes_root = True

    def __init__(self, beta: Number = 0.99, *, amsgrad: bool = False, debiased: bool = False, pow: float = 2.0) -> None:
        super().__init__({"beta": beta, "amsgrad": amsgrad, "debiased": debiased, "pow": pow})
