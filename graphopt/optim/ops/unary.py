"""Functions of each element of the update, one of them of the parameter's, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import larger
from graphopt.optim.core.bounds import ANY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class Abs(Rule):
    """``|u|``."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update.abs(), state


class Sign(Rule):
    """The sign of ``u``: -1, 0 or 1."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update.sign(), state


class Exp(Rule):
    """``exp(u)``."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update.exp(), state


class Sqrt(Rule):
    """``√u``; NaN where ``u`` is negative."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update.sqrt(), state


class Reciprocal(Rule):
    """``1 / (u + eps)``.

    Args:
        eps: added to ``u``.
    """

    bounds = numbers(eps=ANY)

    def __init__(self, eps: Number = 0.0) -> None:
        super().__init__({"eps": eps})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return (update + settings.eps).reciprocal(), state


class Negate(Rule):
    """``-u``."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return -update, state


class NanToNum(Rule):
    """Replace NaN and infinities. Gradients that have some reach it in a ``Modular(..., error_if_nonfinite=False)``.

    Args:
        nan: in place of NaN.
        posinf: in place of infinity; ``None`` is the largest number of the dtype.
        neginf: in place of minus infinity; ``None`` is the least number of the dtype.
    """

    def __init__(self, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> None:
        super().__init__({"nan": nan, "posinf": posinf, "neginf": neginf})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return torch.nan_to_num(update, settings.nan, settings.posinf, settings.neginf), state


class Relative(Rule):
    """The update in units of the parameter, ``u max(|θ|, min_value)``.

    Args:
        min_value: the least unit, so that parameters can leave 0.
    """

    bounds = numbers(min_value=NON_NEGATIVE)

    def __init__(self, min_value: Number = 1e-4) -> None:
        super().__init__({"min_value": min_value})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update * larger(context.param.to(update.dtype).abs(), settings.min_value), state
