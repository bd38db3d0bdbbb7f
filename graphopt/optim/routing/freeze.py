"""Parameters that stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.routing.router import Filter, Selection

_FROZEN = "frozen_step"  # how many steps a parameter was left out of


class Freeze(Module):
    """Leave the parameters that a filter means as they are: the modules behind it do not see them, and keep no state of them.

    Put it first, or modules in front of it keep state of frozen parameters. A filter that means other parameters later
    thaws and freezes them; the modules behind it count the steps that they see.

    Args:
        filter: as of `Split`.

    Raises:
        OptionError: the filter is none, or asks for names that the optimizer was not given.
    """

    treats_each_alone = True

    def __init__(self, filter: Filter) -> None:
        super().__init__()
        self.selection = Selection(filter, "Freeze")
        self._shifted: dict[tuple[int, float], tuple[Tensor, Tensor]] = {}

    def step(self, var: Var) -> Var:
        """Go on with the other parameters."""
        var.get_grad()  # of all, for whoever shares this step
        is_frozen = self.selection.mask(self, var)
        for param, frozen in zip(var.params, is_frozen, strict=True):
            if frozen:
                state = self.state[param]
                state[_FROZEN] = state.get(_FROZEN, torch.zeros((), dtype=torch.float64)) + 1
        part = var.part([index for index, frozen in enumerate(is_frozen) if not frozen])
        if not part.params:
            part.update, part.stop, part.skip_update = [], True, True
        elif part.counts is not None:
            part.counts = [self._count(*entry) for entry in zip(part.params, part.counts, strict=True)]
        return part

    def _count(self, param: Tensor, count: Tensor) -> Tensor:
        """How many steps the parameter has made that was left out of some; one tensor for all that have made equally many."""
        state = self.state[param]
        if _FROZEN not in state:
            return count
        number = float(state[_FROZEN])
        known, shifted = self._shifted.get((id(count), number), (None, count))
        if known is not count:
            known, shifted = self._shifted[id(count), number] = count, torch.empty_like(count)
        shifted.copy_(count - number)  # in place: plans of compiled steps know this tensor
        return shifted

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_shifted": {}}

    def __repr__(self) -> str:
        return f"Freeze({self.selection!r})"
