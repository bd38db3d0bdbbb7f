"""Projections that put the same elements into other tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.closures import common
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.projections.projection import Projection, What


class VectorProjection(Projection):
    """All parameters as one vector, with the settings of the first.

    Args:
        modules: what runs inside.
        project_update: pass the incoming update; otherwise the modules start from the gradient.
        project_params: let the modules inside evaluate the closure.
        project_grad: pass the gradient, if the update is another.
    """

    def project(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """One after another."""
        return [flatten(tensors)]

    def unproject(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Cut apart."""
        return unflatten(tensors[0], var.params)


class BlockPartition(Projection):
    """Parameters in blocks of at most ``max_size`` elements, such as for a quasi-Newton method with a matrix for each.

    Args:
        modules: what runs inside.
        max_size: the most elements of a block.
        batched: all blocks of all parameters as the rows of one matrix instead, the last one filled with zeros.
        project_update: pass the incoming update; otherwise the modules start from the gradient.
        project_params: let the modules inside evaluate the closure.
        project_grad: pass the gradient, if the update is another.

    Raises:
        OptionError: ``max_size`` is not positive.
    """

    def __init__(
        self,
        modules: Any,
        max_size: int,
        batched: bool = False,
        project_update: bool = True,
        project_params: bool = False,
        project_grad: bool = False,
    ) -> None:
        super().__init__(
            modules, project_update, project_params, project_grad, {"max_size": max_size, "batched": batched}
        )
        if not isinstance(max_size, int) or max_size < 1:
            raise OptionError(f"BlockPartition: max_size={max_size!r}; expected an integer of at least 1")

    def project(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Cut into blocks."""
        max_size = common(self, var.params, "max_size")
        if not common(self, var.params, "batched"):
            return [block.clone() for tensor in tensors for block in flatten([tensor]).split(max_size)]
        vector = flatten(tensors)
        return [torch.nn.functional.pad(vector, (0, -vector.numel() % max_size)).reshape(-1, max_size)]

    def unproject(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Put together."""
        if common(self, var.params, "batched"):
            return unflatten(tensors[0].reshape(-1)[: sum(param.numel() for param in var.params)], var.params)
        return [
            unflatten(torch.cat([tensors[index] for index in self._blocks_of(number, var.params)]), [param])[0]
            for number, param in enumerate(var.params)
        ]

    def owner_of(self, index: int, num_tensors: int, params: Sequence[Tensor]) -> int:
        """The parameter that a block is of."""
        if common(self, params, "batched"):
            return 0
        return next(number for number in range(len(params)) if index in self._blocks_of(number, params))

    def _blocks_of(self, number: int, params: Sequence[Tensor]) -> range:
        max_size = common(self, params, "max_size")
        counts = [max(1, -(-param.numel() // max_size)) for param in params[: number + 1]]
        return range(sum(counts[:-1]), sum(counts))
