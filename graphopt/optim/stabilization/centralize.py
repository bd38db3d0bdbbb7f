"""Centralization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graphopt.optim.core.arithmetic import choose, total, total_of_all
from graphopt.optim.core.context import Context, Everything, Settings
from graphopt.optim.stabilization.slices import Dim, Sliced, as_option


class Centralize(Sliced):
    """Subtract from each tensor's update its mean.

    Args:
        dim: ``None`` for one mean for each tensor; an axis or several, along which slices have means of their own (axes that a
            tensor lacks are left out; one with none of them stays as it is); ``"global"`` for one mean for all tensors.
        inverse_dims: ``dim`` names the axes that means are not taken along.
        min_size: slices and tensors with fewer elements stay as they are.

    Raises:
        OptionError: an option is out of range.

    Reference: Yong et al., "Gradient Centralization", arXiv:2004.01461, 2020, equation 1.
    """

    def __init__(self, dim: Dim = None, inverse_dims: bool = False, min_size: int = 2) -> None:
        super().__init__({"dim": as_option(dim), "inverse_dims": inverse_dims, "min_size": min_size})

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """The mean of all updates."""
        number: Any = sum(context.numel for context in everything.contexts)
        return {"mean": total_of_all(everything.updates) / number}

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        if settings.dim is None or self.is_global:
            is_long = context.numel >= settings.min_size
            mean = context.measured["mean"].to(update.device) if self.is_global else total(update) / context.numel
            return choose(is_long, update - mean, update), state
        axes = self.axes(update)
        if not axes or not update.numel():
            return update, state
        return update - update.mean(axes, keepdim=True), state
