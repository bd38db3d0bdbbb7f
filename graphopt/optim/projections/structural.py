"""Projections that put the same elements into other tensors."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
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
        blocks = iter(tensors)
        return [
            unflatten(torch.cat([next(blocks) for _ in range(count)]), [param])[0]
            for count, param in zip(self._num_blocks(var.params), var.params, strict=True)
        ]

    def owner_of(self, index: int, num_tensors: int, params: Sequence[Tensor]) -> int:
        """The parameter that a block is of."""
        if common(self, params, "batched"):
            return 0
        return bisect_right(list(accumulate(self._num_blocks(params))), index)

    def _num_blocks(self, params: Sequence[Tensor]) -> list[int]:
        max_size = common(self, params, "max_size")
        return [max(1, -(-param.numel() // max_size)) for param in params]


class TensorizeProjection(Projection):
    """All parameters as one tensor of equal sides, filled up with zeros, such as for methods with a matrix for each axis.

    For n elements it has the fewest axes k with ``max_side ** k >= n``, and of these the shortest with ``side ** k >= n``. At
    most ``max_side`` elements are one vector.

    Args:
        modules: what runs inside, with the settings of the first parameter.
        max_side: the longest side, at least 2.
        project_update: pass the incoming update; otherwise the modules start from the gradient.
        project_params: let the modules inside evaluate the closure.
        project_grad: pass the gradient, if the update is another.

    Raises:
        OptionError: ``max_side`` is no whole number of at least 2.
    """

    def __init__(
        self,
        modules: Any,
        max_side: int,
        project_update: bool = True,
        project_params: bool = False,
        project_grad: bool = False,
    ) -> None:
        super().__init__(modules, project_update, project_params, project_grad, {"max_side": max_side})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse sides of nothing."""
        side = settings["max_side"]
        if isinstance(side, bool) or not isinstance(side, int) or side < 2:
            raise OptionError(f"{self.place}: max_side={side!r}; expected a whole number of at least 2")

    def project(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """One after another, in rows."""
        vector = flatten(tensors)
        sides = _sides(vector.numel(), common(self, var.params, "max_side"))
        return [torch.nn.functional.pad(vector, (0, math.prod(sides) - vector.numel())).reshape(sides)]

    def unproject(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Cut apart."""
        return unflatten(tensors[0].reshape(-1)[: sum(param.numel() for param in var.params)], var.params)


def _sides(num: int, max_side: int) -> list[int]:
    if num <= max_side:
        return [num]
    axes = 2
    while max_side**axes < num:
        axes += 1
    side = int(num ** (1 / axes))  # rounded either way
    while side**axes < num:
        side += 1
    while (side - 1) ** axes >= num:
        side -= 1
    return [side] * axes
