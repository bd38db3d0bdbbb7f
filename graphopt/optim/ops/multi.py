"""Operations on what several modules make of copies of the update."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import mix
from graphopt.optim.core.bounds import ANY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.ops.binary import clip
from graphopt.optim.ops.operands import Operand, Operation


class SubModules(Operation):
    """``input - alpha other``.

    Args:
        input: a number, a function of the number of steps made before, a module, or a list of modules.
        other: the same.
        alpha: multiplies ``other``.
    """

    bounds = numbers(input=ANY, other=ANY, alpha=ANY)

    def __init__(self, input: Operand, other: Operand, alpha: Number = 1.0) -> None:
        super().__init__({"alpha": alpha}, input=input, other=other)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        left = self.tensor("input", update, settings, context)
        return left - self.operand("other", settings, context) * settings.alpha, state


class DivModules(Operation):
    """``input / other``; operands as of `SubModules`."""

    bounds = numbers(input=ANY, other=ANY)

    def __init__(self, input: Operand, other: Operand) -> None:
        super().__init__(input=input, other=other)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return self.tensor("input", update, settings, context) / self.operand("other", settings, context), state


class PowModules(Operation):
    """``input ^ exponent``; operands as of `SubModules`."""

    bounds = numbers(input=ANY, exponent=ANY)

    def __init__(self, input: Operand, exponent: Operand) -> None:
        super().__init__(input=input, exponent=exponent)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return self.tensor("input", update, settings, context) ** self.operand("exponent", settings, context), state


class LerpModules(Operation):
    """``input + weight (end - input)``; operands as of `SubModules`.

    Args:
        input: where ``weight`` is 0.
        end: where it is 1.
        weight: a number, or a function of the number of steps made before.
    """

    bounds = numbers(input=ANY, end=ANY, weight=ANY)

    def __init__(self, input: Operand, end: Operand, weight: Number) -> None:
        super().__init__({"weight": weight}, input=input, end=end)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        start = self.tensor("input", update, settings, context)
        return mix(start, self.tensor("end", update, settings, context), settings.weight), state


class ClipModules(Operation):
    """``input`` limited to ``[min, max]``; operands as of `SubModules`.

    Args:
        input: what is limited.
        min: the lower limit, or ``None``.
        max: the upper limit, or ``None``; where it is below ``min`` it holds.

    Raises:
        OptionError: there is no limit.
    """

    bounds = numbers(input=ANY, min=ANY, max=ANY)
    optional = ("min", "max")

    def __init__(self, input: Operand, min: Operand = None, max: Operand = None) -> None:
        if min is None and max is None:
            raise OptionError("ClipModules(input) without a limit; write ClipModules(input, min, max)")
        super().__init__(input=input, min=min, max=max)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        tensor = self.tensor("input", update, settings, context)
        return clip(tensor, self.operand("min", settings, context), self.operand("max", settings, context)), state


class Where(Operation):
    """``input`` where ``condition`` is not 0, else ``other``; operands as of `SubModules`."""

    bounds = numbers(condition=ANY, input=ANY, other=ANY)

    def __init__(self, condition: Operand, input: Operand, other: Operand) -> None:
        super().__init__(condition=condition, input=input, other=other)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        condition, yes, no = (self.tensor(name, update, settings, context) for name in ("condition", "input", "other"))
        return torch.where(condition != 0, yes, no), state
