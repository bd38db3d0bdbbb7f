"""The states of the generators that a device's operators draw from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the generators that operators on a device draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    """Set what `random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
