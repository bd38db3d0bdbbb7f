"""Random directions with a covariance of one, so that ``E[z ⟨g, z⟩] = g``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import state_dtype

DISTRIBUTIONS = ("gaussian", "uniform", "sphere", "rademacher")
"""``uniform`` is in [-√3, √3], ``sphere`` of length √n over all n elements of all tensors."""


def check_distribution(place: str, distribution: object) -> None:
    """Raise `OptionError` if there is no such distribution."""
    if distribution not in DISTRIBUTIONS:
        raise OptionError(f"{place}: distribution={distribution!r}; expected one of {', '.join(DISTRIBUTIONS)}")


def generators(params: Sequence[Tensor], seed: int | None, *path: int) -> dict[torch.device, torch.Generator | None]:
    """One generator for each device, or torch's own without a seed.

    Args:
        params: whose devices.
        seed: the user's.
        path: numbers, such as that of the step, that make another sequence of each. Nothing needs to be saved so that a run
            that is resumed draws what an uninterrupted one would.
    """
    devices = {param.device for param in params}
    if seed is None:
        return dict.fromkeys(devices)
    mixed = random.Random(f"{seed}/{'/'.join(map(str, path))}").getrandbits(63)
    return {device: torch.Generator(device).manual_seed(mixed) for device in devices}


def draw(
    params: Sequence[Tensor], distribution: str, generator_of: dict[torch.device, torch.Generator | None]
) -> list[Tensor]:
    """One direction, as tensors like the parameters."""
    drawn = []
    for param in params:
        options: dict[str, Any] = {
            "dtype": state_dtype(param),
            "device": param.device,
            "generator": generator_of[param.device],
        }
        if distribution == "uniform":
            drawn.append(torch.rand(param.shape, **options).mul_(2).sub_(1).mul_(3**0.5))
        elif distribution == "rademacher":
            drawn.append(torch.randint(0, 2, param.shape, **options).mul_(2).sub_(1))
        else:
            drawn.append(torch.randn(param.shape, **options))
    if distribution == "sphere":
        square = sum(float((z * z).sum()) for z in drawn)
        factor = (sum(z.numel() for z in drawn) / square) ** 0.5 if square > 0 else 1.0
        drawn = [z * factor for z in drawn]
    return drawn
