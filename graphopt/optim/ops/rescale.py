"""Updates brought to a range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import larger, largest
from graphopt.optim.core.bounds import ANY, POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class Rescale(Rule):
    """Scale and shift the update so that its least element is ``min`` and its largest is ``max``.

    ``min + (u - low) (max - min) / max(high - low, eps)``, with ``low`` and ``high`` over all elements of all tensors. Where all
    are equal the result is ``min``.

    Args:
        min: the lower end.
        max: the upper end.
        tensorwise: each tensor for itself.
        eps: the least range that is divided by, in units of the update.

    Raises:
        OptionError: ``min`` is above ``max``, or a number is out of range.
    """

    bounds = numbers(min=ANY, max=ANY, eps=POSITIVE)

    def __init__(self, min: Number, max: Number, tensorwise: bool = False, eps: Number = 1e-8) -> None:
        super().__init__({"min": min, "max": max, "tensorwise": tensorwise, "eps": eps})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse an empty range, and what must be the same for all tensors."""
        low, high = settings["min"], settings["max"]
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise OptionError(f"{self.place}: min={low!r} is above max={high!r}; exchange them")
        if settings["tensorwise"] != self.defaults["tensorwise"]:
            raise OptionError(f"{self.place}: tensorwise cannot differ between parameters; set it in the module")

    @property
    def measures(self) -> bool:
        """Whether there is one range for all tensors."""
        return not self.defaults["tensorwise"]

    def measure(self, updates: Sequence[Tensor], settings: Settings) -> Mapping[str, Tensor]:
        """The least and the largest element of all."""
        ends = [_ends(update) for update in updates if update.numel()]
        if not ends:
            return {}
        device = ends[0][0].device
        lows, highs = (torch.stack([end.to(device) for end in some]) for some in zip(*ends, strict=True))
        return {"low": -largest(-lows), "high": largest(highs)}

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        if settings.tensorwise:
            low, high = _ends(update)
        else:
            low, high = (context.measured[name].to(update.device, update.dtype) for name in ("low", "high"))
        width = settings.max - settings.min
        return (update - low) * (width / larger(high - low, settings.eps)) + settings.min, state


def _ends(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return -largest(-tensor), largest(tensor)
