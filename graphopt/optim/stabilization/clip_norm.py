"""Clipping by norm, and normalization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import choose, norm, norm_of_all, smaller
from graphopt.optim.core.bounds import ANY, POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.stabilization.slices import Dim, Sliced, as_option, check_ord


class _ByNorm(Sliced):
    """Multiplies by a factor that follows from a norm."""

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse orders that are none."""
        check_ord(self, settings)
        super().check_settings(settings)

    def measure(self, updates: Sequence[Tensor], settings: Settings) -> Mapping[str, Tensor]:
        """The norm of all updates."""
        return {"norm": norm_of_all(updates, settings.ord)}

    def factor(self, length: Tensor, settings: Settings) -> Tensor:
        """What is multiplied by, for a norm."""
        raise NotImplementedError

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        if self.is_global:
            return update * self.factor(context.measured["norm"].to(update.device), settings), state
        if settings.dim is None:
            factor = self.factor(norm(update, settings.ord), settings)
            if settings.min_size > 1:
                factor = choose(context.numel >= settings.min_size, factor, torch.ones_like(factor))
            return update * factor, state
        axes = self.axes(update)
        if not axes or not update.numel():
            return update, state
        lengths = torch.linalg.vector_norm(update, settings.ord, axes, keepdim=True)
        return update * self.factor(lengths, settings), state


class ClipNorm(_ByNorm):
    """Limit the norm of each tensor's update: ``u min(1, max_norm / ‖u‖)``.

    Args:
        max_norm: the limit, in units of the update.
        ord: order of the norm, above 0; ``float("inf")`` for the largest magnitude.
        dim: ``None`` for one norm for each tensor; an axis or several, along which slices have norms of their own (axes that a
            tensor lacks are left out; one with none of them stays as it is); ``"global"`` for one norm for all tensors.
        inverse_dims: ``dim`` names the axes that norms are not taken along.
        min_size: slices and tensors with fewer elements stay as they are; no matter with ``"global"``.

    Raises:
        OptionError: an option is out of range.
    """

    bounds = numbers(max_norm=POSITIVE)

    def __init__(
        self,
        max_norm: Number,
        ord: float = 2.0,
        dim: Dim = None,
        inverse_dims: bool = False,
        min_size: int = 1,
    ) -> None:
        super().__init__(
            {
                "max_norm": max_norm,
                "ord": ord,
                "dim": as_option(dim),
                "inverse_dims": inverse_dims,
                "min_size": min_size,
            }
        )

    def factor(self, length: Tensor, settings: Settings) -> Tensor:
        """At most 1."""
        return smaller(length.reciprocal() * settings.max_norm, 1.0)  # of zeros it is min(1, infinity)


class Normalize(_ByNorm):
    """Scale each tensor's update to a norm: ``u norm_value / ‖u‖``; zeros stay zeros.

    Args:
        norm_value: the norm that it gets, in units of the update.
        ord: as of `ClipNorm`.
        dim: as of `ClipNorm`.
        inverse_dims: as of `ClipNorm`.
        min_size: as of `ClipNorm`.

    Raises:
        OptionError: an option is out of range.
    """

    bounds = numbers(norm_value=ANY)

    def __init__(
        self,
        norm_value: Number = 1.0,
        ord: float = 2.0,
        dim: Dim = None,
        inverse_dims: bool = False,
        min_size: int = 1,
    ) -> None:
        super().__init__(
            {
                "norm_value": norm_value,
                "ord": ord,
                "dim": as_option(dim),
                "inverse_dims": inverse_dims,
                "min_size": min_size,
            }
        )

    def factor(self, length: Tensor, settings: Settings) -> Tensor:
        """The quotient of norms."""
        norm_value: Number = settings.norm_value
        return choose(length > 0, length, torch.ones_like(length)).reciprocal() * norm_value
