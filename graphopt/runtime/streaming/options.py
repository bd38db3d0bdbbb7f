"""How a model is streamed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass(frozen=True)
class Streaming:
    """The options of `graphopt.passes.LayerToLayer` that the runtime needs; it says what they mean."""

    store: Literal["cpu", "disk"]
    path: Path | None = None
    device: torch.device | None = None
    microbatch_size: int | None = None
    prefetch: int = 1
    eager: bool = False
    stash: Literal["device", "cpu", "disk"] = "device"
    resume: bool = False
