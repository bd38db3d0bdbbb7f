"""What a rule may know about the tensor that it updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from graphopt.annotations import Key

Number = float | Tensor
"""A Python number, or a tensor of shape () inside compiled kernels and under ``torch.func``."""


class Settings(dict[str, Any]):
    """Hyper-parameters of a module for one parameter, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting {name!r}; there are {sorted(self)}") from None


@dataclass
class Context:
    """One tensor in one step. In compiled kernels every tensor here is one-dimensional.

    Attributes:
        param: the parameter before the step; not to be written to.
        grad: its gradient, in the dtype of the state; not to be written to.
        count: how many steps the parameter has made with this one: 1 in the first. Shape (), float64.
        numel: the number of elements of the parameter.
        operands: for each child of the rule what it made of the incoming update.
        measured: what `Rule.measure` returned.
        annotations: what the rule's ``reads`` name.
        loss: the loss before the step, if a closure computed it.
    """

    param: Tensor
    grad: Tensor
    count: Tensor
    numel: Number
    operands: Mapping[str, Tensor] = field(default_factory=dict)
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    annotations: Mapping[str, Any] = field(default_factory=dict)
    loss: Tensor | None = None

    def read(self, key: Key[Any]) -> Any:
        """An annotation of the parameter; the rule must declare the key in ``reads``."""
        return self.annotations[key.name]


@dataclass(frozen=True)
class Everything:
    """All tensors in one step, in the order of the parameters.

    Attributes:
        contexts: one for each tensor.
        updates: what arrives from the module before.
        operands: for each child of the rule what it made of the incoming updates.
        states: the rule's `State` of each.
    """

    contexts: Sequence[Context]
    updates: Sequence[Tensor]
    operands: Mapping[str, Sequence[Tensor]]
    states: Sequence[Any]
