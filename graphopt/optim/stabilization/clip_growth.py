"""Limits on how fast norms and magnitudes grow from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import choose, full, larger, norm, norm_of_all, scalar
from graphopt.optim.core.bounds import AT_LEAST_ONE, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.stabilization.slices import check_fixed, check_ord

_NONE_YET = -1.0  # in place of a norm or magnitude


class NormState(NamedTuple):
    """The norm that the next one is measured against, shape (); negative before the first step."""

    norm: Tensor


class ValueState(NamedTuple):
    """The magnitudes that the next ones are measured against, like the parameter; negative before the first step."""

    magnitude: Tensor


class _Growth(Rule):
    bounds = numbers(add=NON_NEGATIVE, mul=NON_NEGATIVE, min_value=NON_NEGATIVE, max_decay=AT_LEAST_ONE)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse no limit at all."""
        if settings["add"] is None and settings["mul"] is None:
            raise OptionError(f"{self.place}: add=None and mul=None limit nothing; give one of them a number")


class ClipNormGrowth(_Growth):
    """Limit how fast the norm of each tensor's update grows; the first is not limited.

    ``‖u‖ <= mul max(n, min_value) + add``, where ``n`` is the norm of the last update, limited, or ``n / max_decay`` of the
    step before if that is larger.

    Args:
        add: what may be added in a step, in units of the update; ``None`` for nothing.
        mul: what the norm may be multiplied by in a step; ``None`` for 1.
        min_value: the least norm that growth is reckoned from.
        max_decay: how fast ``n`` may fall; ``None`` for no limit.
        ord: order of the norm, above 0.
        parameterwise: norms of each tensor; ``False``: of all tensors together.

    Raises:
        OptionError: an option is out of range, or there is no limit.
    """

    State = NormState

    def __init__(
        self,
        add: Number | None = None,
        mul: Number | None = 1.5,
        min_value: Number | None = 1e-4,
        max_decay: Number | None = 2.0,
        ord: float = 2.0,
        parameterwise: bool = True,
    ) -> None:
        super().__init__(
            {
                "add": add,
                "mul": mul,
                "min_value": min_value,
                "max_decay": max_decay,
                "ord": ord,
                "parameterwise": parameterwise,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what means nothing, or must be the same for all tensors."""
        super().check_settings(settings)
        check_ord(self, settings)
        check_fixed(self, settings, ("parameterwise",))

    @property
    def measures(self) -> bool:
        """Whether there is one norm for all tensors."""
        return not self.defaults["parameterwise"]

    def init(self, param: Tensor, settings: Settings) -> NormState:
        """None yet."""
        return NormState(scalar(param, _NONE_YET))

    def measure(self, updates: Sequence[Tensor], settings: Settings) -> Mapping[str, Tensor]:
        """The norm of all updates."""
        return {"norm": norm_of_all(updates, settings.ord)}

    def update(
        self, update: Tensor, state: NormState, settings: Settings, context: Context
    ) -> tuple[Tensor, NormState]:
        """One step."""
        if self.measures:
            length = context.measured["norm"].to(update.device, state.norm.dtype)
        else:
            length = norm(update, settings.ord)
        allowed = length.minimum(_limit(length, state.norm, settings))
        factor = choose(allowed < length, allowed / length, torch.ones_like(length))
        return update * factor, NormState(_tracked(allowed, state.norm, settings))


class ClipValueGrowth(_Growth):
    """Limit how fast each element of the update grows; the first is not limited.

    ``|u| <= mul max(n, min_value) + add``, where ``n`` is the magnitude of the last update, limited, or ``n / max_decay`` of
    the step before if that is larger.

    Args:
        add: what may be added in a step, in units of the update; ``None`` for nothing.
        mul: what the magnitude may be multiplied by in a step; ``None`` for 1.
        min_value: the least magnitude that growth is reckoned from.
        max_decay: how fast ``n`` may fall; ``None`` for no limit.

    Raises:
        OptionError: an option is out of range, or there is no limit.
    """

    State = ValueState

    def __init__(
        self,
        add: Number | None = None,
        mul: Number | None = 1.5,
        min_value: Number | None = 1e-4,
        max_decay: Number | None = 2.0,
    ) -> None:
        super().__init__({"add": add, "mul": mul, "min_value": min_value, "max_decay": max_decay})

    def init(self, param: Tensor, settings: Settings) -> ValueState:
        """None yet."""
        return ValueState(full(param, _NONE_YET))

    def update(
        self, update: Tensor, state: ValueState, settings: Settings, context: Context
    ) -> tuple[Tensor, ValueState]:
        """One step."""
        magnitude = update.abs()
        allowed = magnitude.minimum(_limit(magnitude, state.magnitude, settings))
        return torch.copysign(allowed, update), ValueState(_tracked(allowed, state.magnitude, settings))


def _limit(value: Tensor, before: Tensor, settings: Settings) -> Tensor:
    """How large a value may become; the first as large as it is."""
    limit = before if settings.min_value is None else larger(before, settings.min_value)
    if settings.mul is not None:
        limit = limit * settings.mul
    if settings.add is not None:
        limit = limit + settings.add
    return choose(before < 0, value, limit)


def _tracked(allowed: Tensor, before: Tensor, settings: Settings) -> Tensor:
    """What the next value is measured against."""
    return allowed if settings.max_decay is None else allowed.maximum(before / settings.max_decay)
