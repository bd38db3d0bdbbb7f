"""Operands of operations: numbers, schedules or modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Module, Rule

Operand = Any
"""A number, a function of the number of steps made before, a module, or a list of modules."""


def is_modules(value: Any) -> bool:
    """Whether an operand is made of modules, rather than a number or a schedule."""
    return isinstance(value, (Module, list, tuple)) or (isinstance(value, type) and issubclass(value, Module))


class Operation(Rule):
    """A rule whose operands are numbers (hyper-parameters, by name) or modules (children, which get a copy of the update).

    Args:
        settings: hyper-parameters that are no operands.
        **operands: the operands.

    Attributes:
        optional: the operands that may be ``None``.
    """

    optional: tuple[str, ...] = ()

    def __init__(self, settings: dict[str, Any] | None = None, **operands: Operand) -> None:
        for name, value in operands.items():
            if value is None and name not in self.optional:
                raise OptionError(
                    f"{type(self).__name__}: {name}=None; expected a number, a module or a list of modules"
                )
        children = {name: value for name, value in operands.items() if is_modules(value)}
        rest = {name: value for name, value in operands.items() if name not in children}
        super().__init__({**rest, **(settings or {})}, **children)

    def operand(self, name: str, settings: Settings, context: Context) -> Tensor | Number:
        """The value of an operand."""
        return context.operands[name] if name in self.children else settings[name]

    def tensor(self, name: str, update: Tensor, settings: Settings, context: Context) -> Tensor:
        """The value of an operand, like the update."""
        return like(self.operand(name, settings, context), update)


def like(value: Tensor | Number, update: Tensor) -> Tensor:
    """A number as a tensor like the update; a tensor as it is."""
    if isinstance(value, Tensor) and value.dim() == update.dim() and value.dtype == update.dtype:
        return value
    return torch.zeros_like(update) + value
