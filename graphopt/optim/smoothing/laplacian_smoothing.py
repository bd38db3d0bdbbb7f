"""Smoothing of updates by an implicit step of diffusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten


class LaplacianSmoothing(Rule):
    """Solve ``(I - sigma Δ) x = u``, Δ the periodic second difference along the flattened tensor; x is the new update.

    ``x_i + sigma (2 x_i - x_(i-1) - x_(i+1)) = u_i``, in Fourier space ``x̂_k = û_k / (1 + 4 sigma sin²(π k / n))``. The mean
    stays, for every number of elements.

    Cost: O(n log n) for n elements, two Fourier transforms.

    Args:
        sigma: how much neighbours are drawn together, without unit; 0 changes nothing.
        layerwise: smooth each tensor by itself; otherwise all of them as one vector (with the settings of the first).
        min_numel: tensors with fewer elements stay as they are (with ``layerwise=False``: the whole vector).

    Raises:
        OptionError: ``sigma`` is negative.

    Reference: Osher et al., "Laplacian Smoothing Gradient Descent", arXiv:1806.06317, 2018.
    """

    takes_sharded = False
    elementwise = False
    bounds = numbers(sigma=NON_NEGATIVE)

    def __init__(self, sigma: Number = 1.0, layerwise: bool = True, min_numel: int = 4) -> None:
        super().__init__({"sigma": sigma, "min_numel": min_numel})
        self.layerwise = layerwise
        self.treats_each_alone = layerwise  # type: ignore[misc]

    def step(self, var: Var) -> Var:
        """Smooth each tensor, or all of them together."""
        if self.layerwise:
            return super().step(var)
        updates = var.get_update()
        settings = self.plain_settings(var.params[0])
        vector = flatten(updates)
        if vector.numel() and vector.numel() >= settings.min_numel:
            var.update = unflatten(smooth(vector, settings.sigma), updates)
        return var

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        if update.numel() < settings.min_numel:
            return update, state
        return smooth(update.reshape(-1), settings.sigma).reshape(update.shape), state


def smooth(vector: Tensor, sigma: Number) -> Tensor:
    """Solve the system for a vector of at least one element."""
    size = vector.numel()
    frequencies = torch.arange(size // 2 + 1, dtype=vector.dtype, device=vector.device)
    factors = 1 + 4 * sigma * torch.sin(frequencies * (torch.pi / size)) ** 2
    smoothed: Tensor = torch.fft.irfft(torch.fft.rfft(vector) / factors, n=size)
    return smoothed
