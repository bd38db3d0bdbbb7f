"""Reductions over what any number of modules make of copies of the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.context import Context, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.ops.operands import Operand, is_modules
from graphopt.optim.ops.sources import Fill


class Reduction(Rule):
    """A reduction over inputs, each a module, a list of modules, a number, or a function of the number of steps made before."""

    def __init__(self, *inputs: Operand, **settings: Any) -> None:
        if not inputs:
            name = type(self).__name__
            raise OptionError(f"{name}() without inputs; write {name}(module, module, ...), some may be numbers")
        children = {f"input_{index}": entry if is_modules(entry) else Fill(entry) for index, entry in enumerate(inputs)}
        super().__init__(settings, **children)

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The new update."""
        raise NotImplementedError

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return self.reduce([context.operands[name] for name in self.children], settings), state


class Sum(Reduction):
    """The sum of inputs: modules, lists of them, or numbers."""

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The sum."""
        return add_up(inputs)


class Mean(Reduction):
    """The mean of inputs: modules, lists of them, or numbers."""

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The mean."""
        return add_up(inputs) / len(inputs)


class Prod(Reduction):
    """The product of inputs: modules, lists of them, or numbers."""

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The product."""
        return reduce(torch.mul, inputs)


class MaximumModules(Reduction):
    """The largest input, element by element: modules, lists of them, or numbers."""

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The largest."""
        return reduce(torch.maximum, inputs)


class MinimumModules(Reduction):
    """The smallest input, element by element: modules, lists of them, or numbers."""

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The smallest."""
        return reduce(torch.minimum, inputs)


class Median(Reduction):
    """The median of inputs, element by element; of an even number, the mean of the middle two."""

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The median."""
        # Neighbours are put in order as often as there are inputs: element-wise, where a sort would need one more axis.
        ordered, number = list(inputs), len(inputs)
        for turn in range(number):
            for left in range(turn % 2, number - 1, 2):
                low, high = ordered[left], ordered[left + 1]
                ordered[left], ordered[left + 1] = torch.minimum(low, high), torch.maximum(low, high)
        low, high = ordered[(number - 1) // 2], ordered[number // 2]
        return low if low is high else (low + high) / 2


class _Weighted(Reduction):
    def __init__(self, *inputs: Operand, weights: Sequence[float]) -> None:
        super().__init__(*inputs, weights=tuple(float(weight) for weight in weights))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse weights that belong to no input."""
        weights, number = settings["weights"], len(self.children)
        if len(weights) != number:
            raise OptionError(f"{self.place}: {len(weights)} weights for {number} inputs; pass one for each")

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The sum of inputs times weights."""
        return add_up([tensor * weight for tensor, weight in zip(inputs, settings.weights, strict=True)])


class WeightedSum(_Weighted):
    """``Σ w_i input_i``.

    Args:
        *inputs: modules, lists of them, or numbers.
        weights: one for each input.

    Raises:
        OptionError: there are no inputs, or not as many weights.
    """


class WeightedMean(_Weighted):
    """``Σ w_i input_i / Σ w_i``.

    Args:
        *inputs: modules, lists of them, or numbers.
        weights: one for each input; their sum is not 0.

    Raises:
        OptionError: there are no inputs, or not as many weights, or these sum up to 0.
    """

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse weights that belong to no input, or have no mean."""
        super().check_settings(settings)
        if sum(settings["weights"]) == 0:
            raise OptionError(f"{self.place}: weights={settings['weights']!r} sum up to 0; WeightedSum does not divide")

    def reduce(self, inputs: list[Tensor], settings: Settings) -> Tensor:
        """The mean with weights."""
        return super().reduce(inputs, settings) / float(sum(settings.weights))


def add_up(tensors: Sequence[Tensor]) -> Tensor:
    """The sum, in order."""
    return reduce(torch.add, tensors)
