"""Difference quotients along one direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from graphopt.errors import OptionError

FORMULAS: Mapping[str, Sequence[tuple[int, float]]] = MappingProxyType(
    {
        "forward2": ((0, -1.0), (1, 1.0)),
        "backward2": ((-1, -1.0), (0, 1.0)),
        "central2": ((-1, -0.5), (1, 0.5)),
        "forward3": ((0, -1.5), (1, 2.0), (2, -0.5)),
        "backward3": ((-2, 0.5), (-1, -2.0), (0, 1.5)),
        "central4": ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)),
    }
)
"""For each formula the places, in units of the step, and the weights of the values of the function there.

They are exact for polynomials of degree 1, 1, 2, 2, 2 and 4. Reference: Fornberg, "Generation of Finite Difference Formulas
on Arbitrarily Spaced Grids", Mathematics of Computation 51, 1988.
"""


def check_formula(place: str, formula: Any) -> None:
    """Raise `OptionError` if there is no such formula."""
    if formula not in FORMULAS:
        raise OptionError(f"{place}: formula={formula!r}; expected one of {', '.join(FORMULAS)}")


def uses_centre(formula: str) -> bool:
    """Whether the value at the point itself is one of those that the formula weighs."""
    return any(offset == 0 for offset, _ in FORMULAS[formula])


def difference(formula: str, centre: float | None, value_at: Callable[[int], float]) -> tuple[float, float]:
    """The derivative, times the step.

    Args:
        formula: a name in `FORMULAS`.
        centre: the value at the point, if the formula weighs it.
        value_at: the value at so many steps from the point.

    Returns:
        The derivative times the step, and the mean of the values.
    """
    total, values = 0.0, []
    for offset, weight in FORMULAS[formula]:
        value = centre if offset == 0 and centre is not None else value_at(offset)
        values.append(value)
        total += weight * value
    return total, sum(values) / len(values)
