"""LSUV: bring the variance of what each layer computes to 1, one layer after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import InitError
from graphopt.initialization.batches import Draws
from graphopt.initialization.init_result import InitStep
from graphopt.initialization.searching import Search


class _Reached(Exception):
    """The layer has computed; what follows is of no interest."""


class LSUVSearch:
    """Layer-sequential unit variance, by scales alone.

    Every module that owns a trainable weight of at least two axes, other than an embedding, is scaled by the inverse of the
    standard deviation of its output over the batch, until its variance is within ``tolerance`` of 1, in the order in which
    modules compute. The paper starts from orthonormal weights; that is what ``torch.nn.init.orthogonal_`` is for.

    Args:
        search: the model with scales.
        scales: (n,), the start.
        tolerance: of the variance.
        most: times that a layer is scaled.

    Reference: Mishkin, Matas, "All you need is a good init", arXiv:1511.06422, 2015, algorithm 1.
    """

    def __init__(self, search: Search, scales: Tensor, *, tolerance: float = 0.1, most: int = 10) -> None:
        self._search, self._scales = search, scales.clone()
        self._tolerance, self._most = tolerance, most

    def run(self, draws: Draws) -> Iterator[InitStep]:
        """One step for each layer."""
        self._search.set_scales(self._scales)
        batch = draws.take()
        number = 0
        for module, position in self._in_order(batch):
            variance = math.nan
            for _ in range(self._most):
                variance = self._variance(module, batch)
                if not math.isfinite(variance) or variance == 0:
                    raise InitError(
                        f"LSUV: the output of the layer with {self._search.names[position]} has the variance {variance}, and no "
                        "scale makes that 1. The model was not changed. Start with start='he'"
                    )
                if abs(variance - 1) < self._tolerance:
                    break
                self._scales[position] /= math.sqrt(variance)
                self._search.set_scales(self._scales)
            yield InitStep(number, objective=variance)
            number += 1

    def _in_order(self, batch: Any) -> list[tuple[nn.Module, int]]:
        """The layers in the order in which they first compute, with the place of their weight."""
        position_of = {id(scale): position for position, scale in enumerate(self._search.scaled.scales.scales)}
        found: dict[int, tuple[nn.Module, int]] = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            for scale in module.parameters(recurse=False):
                position = position_of.get(id(scale))
                if (
                    position is not None
                    and self._search.weights[position].ndim > 1
                    and not self._search.is_zero[position]
                ):
                    found.setdefault(position, (module, position))
                    return

        layers = [m for m in self._search.scaled.model.modules() if not isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        hooks = [module.register_forward_hook(note) for module in layers]
        try:
            with torch.no_grad():
                self._search.call(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return list(found.values())

    def _variance(self, module: nn.Module, batch: Any) -> float:
        """Of the layer's output, over samples, positions and channels, and over all processes."""
        seen: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            seen.append(first.detach().to(torch.float64).var())
            raise _Reached

        hook = module.register_forward_hook(note)
        try:
            with torch.no_grad():
                self._search.call(batch)
        except _Reached:
            pass
        finally:
            hook.remove()
        return float(self._search.scaled.average(seen[0]))
