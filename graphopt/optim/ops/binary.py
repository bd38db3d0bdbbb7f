"""Operations on the update and a number, or on the update and what modules make of a copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import choose, larger, mix, smaller
from graphopt.optim.core.bounds import ANY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.ops.operands import Operand, Operation


class _Binary(Operation):
    """An operation on the update ``u`` and ``other``."""

    bounds = numbers(other=ANY)

    def __init__(self, other: Operand) -> None:
        super().__init__(other=other)


class _Scaled(Operation):
    """An operation on the update ``u`` and ``alpha other``."""

    bounds = numbers(other=ANY, alpha=ANY)

    def __init__(self, other: Operand, alpha: Number = 1.0) -> None:
        super().__init__({"alpha": alpha}, other=other)


class Add(_Scaled):
    """``u + alpha other``.

    Args:
        other: a number, a function of the number of steps made before, a module, or a list of modules.
        alpha: multiplies ``other``.
    """

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update + self.operand("other", settings, context) * settings.alpha, state


class Sub(_Scaled):
    """``u - alpha other``; arguments as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update - self.operand("other", settings, context) * settings.alpha, state


class RSub(_Binary):
    """``other - u``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return self.operand("other", settings, context) - update, state


class Mul(_Binary):
    """``u other``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update * self.operand("other", settings, context), state


class Div(_Binary):
    """``u / other``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update / self.operand("other", settings, context), state


class RDiv(_Binary):
    """``other / u``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return self.operand("other", settings, context) / update, state


class Pow(_Binary):
    """``u ^ other``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update ** self.operand("other", settings, context), state


class RPow(_Binary):
    """``other ^ u``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return self.operand("other", settings, context) ** update, state


class Lerp(Operation):
    """``u + weight (end - u)``.

    Args:
        end: a number, a function of the number of steps made before, a module, or a list of modules.
        weight: 0 leaves the update as it is.
    """

    bounds = numbers(end=ANY, weight=ANY)

    def __init__(self, end: Operand, weight: Number) -> None:
        super().__init__({"weight": weight}, end=end)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return mix(update, self.tensor("end", update, settings, context), settings.weight), state


class Maximum(_Binary):
    """The larger of ``u`` and ``other``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return larger(update, self.operand("other", settings, context)), state


class Minimum(_Binary):
    """The smaller of ``u`` and ``other``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return smaller(update, self.operand("other", settings, context)), state


class CopySign(_Binary):
    """The magnitude of ``u`` with the sign of ``other``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return torch.copysign(update, self.tensor("other", update, settings, context)), state


class RCopySign(_Binary):
    """The magnitude of ``other`` with the sign of ``u``; argument as of `Add`."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return torch.copysign(self.tensor("other", update, settings, context), update), state


CopyMagnitude = RCopySign


class Clip(Operation):
    """``u`` limited to ``[min, max]``.

    Args:
        min: a number, a function of the number of steps made before, a module, a list of modules, or ``None`` for no limit.
        max: the same.

    Raises:
        OptionError: there is no limit, or ``min`` is above ``max``.
    """

    bounds = numbers(min=ANY, max=ANY)
    optional = ("min", "max")

    def __init__(self, min: Operand = None, max: Operand = None) -> None:
        if min is None and max is None:
            raise OptionError("Clip() without a limit; write Clip(min, max), one of which may be None")
        super().__init__(min=min, max=max)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse an empty interval."""
        low, high = settings.get("min"), settings.get("max")
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise OptionError(f"{self.place}: min={low!r} is above max={high!r}; exchange them")

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return clip(update, self.operand("min", settings, context), self.operand("max", settings, context)), state


class MirroredClip(Operation):
    """``u`` limited to ``[-value, value]``.

    Args:
        value: a number of at least 0, a function of the number of steps made before, a module, or a list of modules.
    """

    bounds = numbers(value=NON_NEGATIVE)

    def __init__(self, value: Operand) -> None:
        super().__init__(value=value)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        value = self.operand("value", settings, context)
        return clip(update, -value, value), state


class Threshold(Operation):
    """Keep ``u`` on one side of a threshold, and put ``value`` in place of the rest.

    With ``update_above`` it is ``u`` where ``u > threshold``, otherwise ``u`` where ``u < threshold``; at the threshold it is
    ``value`` either way.

    Args:
        threshold: a number, a function of the number of steps made before, a module, or a list of modules.
        value: the same.
        update_above: which side is kept.

    Raises:
        OptionError: an option is not valid.
    """

    bounds = numbers(threshold=ANY, value=ANY)

    def __init__(self, threshold: Operand, value: Operand, update_above: bool) -> None:
        super().__init__({"update_above": update_above}, threshold=threshold, value=value)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what is no answer."""
        if not isinstance(settings["update_above"], bool):
            raise OptionError(f"{self.place}: update_above={settings['update_above']!r}; expected True or False")

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        threshold = self.tensor("threshold", update, settings, context)
        is_kept = update > threshold if settings.update_above else update < threshold
        return choose(is_kept, update, self.tensor("value", update, settings, context)), state


def clip(tensor: Tensor, low: Tensor | Number | None, high: Tensor | Number | None) -> Tensor:
    """Limit elements; where the limits cross, the upper one holds."""
    if low is not None:
        tensor = larger(tensor, low)
    return tensor if high is None else smaller(tensor, high)
