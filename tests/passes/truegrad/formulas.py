"""A module that is one formula, for tables of the ways in which an operator can be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Formula(nn.Module):
    """``function(*inputs, **parameters)``; keyword arguments are tensors, which become parameters, or modules."""

    def __init__(self, function: Callable[..., Tensor], **parts: Tensor | nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.names = tuple(parts)

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(*inputs, **{name: getattr(self, name) for name in self.names})


def formula(
    function: Callable[..., Tensor], *inputs: Tensor, **parts: Any
) -> Callable[[], tuple[nn.Module, tuple[Any, ...]]]:
    """A builder of a formula and its batch: tuples are shapes of parameters, callables make modules."""

    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        torch.manual_seed(5)
        made = {name: torch.randn(part) if isinstance(part, tuple) else part() for name, part in parts.items()}
        return Formula(function, **made), inputs

    return build
