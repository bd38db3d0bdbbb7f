"""Modules that print what arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var


class _Print(Module):
    """The update stays as it is."""

    def __init__(self, text: str, print_fn: Callable[[str], Any]) -> None:
        super().__init__()
        self.text, self.print_fn = text, print_fn

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"


class PrintUpdate(_Print):
    """Print the list of updates.

    Args:
        text: what is printed in front.
        print_fn: a function of the whole text, such as that of a logger.
    """

    def __init__(self, text: str = "update = ", print_fn: Callable[[str], Any] = print) -> None:
        super().__init__(text, print_fn)

    def step(self, var: Var) -> Var:
        """Print."""
        self.print_fn(f"{self.text}{var.get_update()}")
        return var


class PrintShape(_Print):
    """Print the shapes of updates.

    Args:
        text: what is printed in front.
        print_fn: a function of the whole text, such as that of a logger.
    """

    def __init__(self, text: str = "shapes = ", print_fn: Callable[[str], Any] = print) -> None:
        super().__init__(text, print_fn)

    def step(self, var: Var) -> Var:
        """Print."""
        self.print_fn(f"{self.text}{[tuple(update.shape) for update in var.get_update()]}")
        return var
