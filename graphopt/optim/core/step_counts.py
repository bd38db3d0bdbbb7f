"""How many steps each parameter has made: ``step`` in its state, one tensor for all that have made equally many."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor


class StepCounts:
    """The counts of the parameters that step together.

    Args:
        entry_of: a parameter's dictionary of state.
        on_device: whether counts live on the parameter's device rather than on the CPU.
    """

    def __init__(self, entry_of: Callable[[Tensor], dict[str, Any]], on_device: bool) -> None:
        self.params: list[Tensor] = []  # of the last step
        self.counts: list[Tensor] = []  # theirs, shape (), float64
        self._entry_of, self._on_device = entry_of, on_device
        self._entries: list[dict[str, Any]] = []
        self._distinct: list[Tensor] = []

    def knows(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the parameters of the last step."""
        return are(params, self.params)

    def advance(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Count a step of these parameters; returns the counts."""
        if not (self.knows(params) and are(map(dict.get, self._entries, repeat("step")), self.counts)):
            self.share(params)
        for count in self._distinct:
            count.add_(1)
        return self.counts

    def take_back(self) -> None:
        """Undo the last `advance`."""
        for count in self._distinct:
            count.sub_(1)

    def forget(self) -> None:
        """Read the counts anew at the next step."""
        self.params = []

    def share(self, params: Sequence[Tensor]) -> None:
        """Give the parameters counts: one tensor for all with equal values."""
        shared: dict[Any, Tensor] = {}
        self.params, self.counts, self._entries = list(params), [], []
        for param in params:
            entry = self._entry_of(param)
            step = entry.get("step")
            device = param.device if self._on_device else torch.device("cpu")
            value = 0.0 if step is None else float(step)
            if (value, device) not in shared:
                shared[value, device] = torch.full((), value, dtype=torch.float64, device=device)
            entry["step"] = shared[value, device]
            self._entries.append(entry)
            self.counts.append(entry["step"])
        self._distinct = list(shared.values())


def are(left: Iterable[Any], right: Sequence[Any]) -> bool:
    """Whether the objects are the same, one by one."""
    left = list(left)
    return len(left) == len(right) and all(map(operator.is_, left, right))
