"""What an optimizer knows of each parameter: its group, its name, and how it is seen by modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphopt.optim.core.store import Store


class ParamTable:
    """The parameters of an optimizer.

    Args:
        optimizer: whose ``param_groups`` are read.
        store: where the state of parameters is.
        has_own_settings: whether settings were chosen for a parameter alone.
    """

    def __init__(self, optimizer: Optimizer, store: Store, has_own_settings: Callable[[Tensor], bool]) -> None:
        self.names: dict[Tensor, str] = {}  # of those that have one
        self.has_complex = False
        self._optimizer, self._store, self._has_own_settings = optimizer, store, has_own_settings
        self._groups: dict[Tensor, int] = {}
        self._layout: list[int] | None = None  # how many parameters each group has
        self._reals: dict[Tensor, Tensor] = {}

    def forget(self) -> None:
        """Read the groups anew."""
        self._layout = None

    def refresh(self) -> bool:
        """Read the groups if they are not as they were; returns whether they were not."""
        groups = self._optimizer.param_groups
        layout = [len(group["params"]) for group in groups]
        if layout == self._layout:
            return False
        self.names, self._groups, self._layout = {}, {}, layout
        for index, group in enumerate(groups):
            names = group.get("param_names") or [None] * len(group["params"])
            for param, name in zip(group["params"], names, strict=True):
                self._groups[param] = index
                if name is not None:
                    self.names[param] = name
        self.has_complex = any(param.is_complex() for param in self._groups)
        return True

    def owner(self, param: Tensor) -> Tensor:
        """The parameter itself, of a tensor that modules see in its place."""
        return self._store.owner(param)

    def group(self, param: Tensor) -> dict[str, Any]:
        """The group of a parameter."""
        if self._layout is None:
            self.refresh()
        return self._optimizer.param_groups[self._groups.get(self.owner(param), 0)]

    def source(self, param: Tensor) -> Any:
        """Parameters with equal results have the same settings."""
        owner = self.owner(param)
        return (id(owner) if self._has_own_settings(owner) else -1, self._groups.get(owner, 0))

    def describe(self, param: Tensor) -> str:
        """The parameter for an error: its name, else its place; and its shape."""
        owner = self.owner(param)
        for group_index, group in enumerate(self._optimizer.param_groups):
            for index, candidate in enumerate(group["params"]):
                if candidate is owner:
                    names = group.get("param_names")
                    place = f"parameter {names[index]!r}" if names else f"parameter {index} of group {group_index}"
                    return f"{place}, shape {tuple(owner.shape)}"
        return f"a parameter of shape {tuple(owner.shape)}"

    def real(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Complex parameters as real ones with one more axis, as torch's own optimizers take them."""
        return [self._real(param) if param.is_complex() else param for param in params]

    def _real(self, param: Tensor) -> Tensor:
        known = self._reals.get(param)
        if known is None or known.data_ptr() != param.data_ptr():
            known = torch.view_as_real(param.detach())
            self._reals[param] = known
            self._store.stand_in(known, param, "")
            self.names[known] = self.names.get(param, "")
        return known
