"""Corrections for averages that start at zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import debias
from graphopt.optim.core.bounds import ANY, DECAY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class Debias(Rule):
    """Adam's correction of the quotient of two averages: multiply by ``alpha (1 - beta2^t)^(1/pow) / (1 - beta1^t)``.

    Args:
        beta1: of the average in the numerator; ``None`` if it needs no correction.
        beta2: of the average of powers in the denominator; ``None`` if it needs no correction.
        alpha: one more factor.
        pow: the power that is averaged in the denominator, above 0.

    Raises:
        OptionError: a number is out of range.

    Reference: Kingma, Ba, "Adam", arXiv:1412.6980, 2014, section 2.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY, alpha=ANY)

    def __init__(
        self, beta1: Number | None = None, beta2: Number | None = None, alpha: Number = 1.0, *, pow: float = 2.0
    ) -> None:
        super().__init__({"beta1": beta1, "beta2": beta2, "alpha": alpha, "pow": pow})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a power without a root."""
        _check_power(self, settings)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        factor: Number = settings.alpha
        if settings.beta2 is not None:
            factor = factor * debias(settings.beta2, context.count) ** (1 / settings.pow)
        if settings.beta1 is not None:
            factor = factor / debias(settings.beta1, context.count)
        return update * factor, state


class Debias2(Rule):
    """The correction of the root of an average of powers: divide by ``(1 - beta^t)^(1/pow)``.

    Args:
        beta: of the average.
        pow: the power that is averaged, above 0.

    Raises:
        OptionError: a number is out of range.
    """

    bounds = numbers(beta=DECAY)

    def __init__(self, beta: Number = 0.999, *, pow: float = 2.0) -> None:
        super().__init__({"beta": beta, "pow": pow})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a power without a root."""
        _check_power(self, settings)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update / debias(settings.beta, context.count) ** (1 / settings.pow), state


def _check_power(module: Rule, settings: Mapping[str, Any]) -> None:
    if not settings["pow"] > 0:
        raise OptionError(f"{module.place}: pow={settings['pow']!r}; expected a number above 0")
