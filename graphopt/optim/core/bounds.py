"""Ranges of hyper-parameters, and their checks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from graphopt._compat import is_transformed


class Bounds(NamedTuple):
    """An interval of numbers that a hyper-parameter may take."""

    low: float = -math.inf
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: object) -> bool:
        if isinstance(value, Tensor):
            if value.numel() != 1:
                return False
            if is_transformed(value) or value.device.type != "cpu":
                return True  # nobody can look inside, or looking would wait for the device
            value = value.detach()
        number = float(value)  # type: ignore[arg-type]
        above = number >= self.low if self.includes_low else number > self.low
        below = number <= self.high if self.includes_high else number < self.high
        return above and below

    def __str__(self) -> str:
        left, right = "[" if self.includes_low else "(", "]" if self.includes_high else ")"
        return f"{left}{self.low:g}, {self.high:g}{right}"


ANY = Bounds(includes_low=False, includes_high=False)
NON_NEGATIVE = Bounds(0.0, includes_high=False)
POSITIVE = Bounds(0.0, includes_low=False, includes_high=False)
AT_LEAST_ONE = Bounds(1.0, includes_high=False)
DECAY = Bounds(0.0, 1.0, includes_high=False)  # of an exponential moving average
FRACTION = Bounds(0.0, 1.0)


def numbers(**bounds: Bounds) -> Mapping[str, Bounds]:
    """The numeric hyper-parameters of a module and the values that each may take."""
    return MappingProxyType(bounds)


def is_number(value: Any) -> bool:
    """Whether the value is what a numeric hyper-parameter may be: a number, or a tensor of one element."""
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
