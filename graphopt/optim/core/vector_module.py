"""The base class of modules that look at all parameters as one vector, or at each as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.context import Settings
from graphopt.optim.core.module import Module, run_modules
from graphopt.optim.core.store import StateView
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten


class VectorModule(Module):
    """A module that makes of a vector of updates another one.

    A subclass overrides `direct`. With the setting ``concat_params`` (or without one of that name) all parameters are one
    vector, whose state stands in that of the first parameter; otherwise each parameter is one. When the number of elements
    changes, as when parameters are added, everything learned is forgotten.

    Args:
        defaults: hyper-parameters and their values.
        inner: modules that make of the incoming update what is to be multiplied; what is learned is learned from the update as
            it comes in.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None, *, inner: Any = None) -> None:
        super().__init__(defaults, **({} if inner is None else {"inner": inner}))

    def direct(self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings) -> Tensor:
        """Make of a vector another one.

        Args:
            update: the incoming update, of whose changes curvature is learned.
            inner: what ``inner`` makes of it; the update itself without it.
            param: the parameters.
            state: what is remembered.
            settings: hyper-parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} has no direct(self, update, inner, param, state, settings)")

    def step(self, var: Var) -> Var:
        """Make the step, vector by vector."""
        updates = var.read_update()
        if not updates:
            return var
        inner = updates
        if self.children:
            branch = run_modules(self.children["inner"], var.clone())
            inner = branch.get_update()
            var.update_attrs_from_clone_(branch)
        num = len(updates)
        if self.get_settings(var.params[0]).get("concat_params", True):
            groups = [range(num)]
        else:
            groups = [range(index, index + 1) for index in range(num)]
        news: list[Tensor] = []
        for group in groups:
            params = [var.params[index] for index in group]
            state, settings = self.state[params[0]], self.get_settings(params[0])
            vector = flatten([updates[index] for index in group])
            if state.get("num_elements", vector.numel()) != vector.numel():
                state.clear()
            operand = vector if inner is updates else flatten([inner[index] for index in group])
            if not state and not bool(vector.any()):
                direction = operand  # nothing to learn from; it is also what torch.distributed.checkpoint asks for
            else:
                state["num_elements"] = vector.numel()
                direction = self.direct(vector, operand, flatten(params), state, settings)
            is_own = direction is not operand and not direction._is_view()
            is_own = is_own and not any(direction is value for value in state.values())
            news += unflatten(direction, [updates[index] for index in group], is_own)
        var.update = news
        return var


def check_interval(place: str, name: str, value: Any) -> None:
    """Raise `OptionError` unless it is ``None``, ``"auto"`` or a positive integer."""
    if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return
    raise OptionError(
        f"{place}: {name}={value!r}; expected a positive integer, None, or 'auto' (one more than elements)"
    )


def is_due(interval: int | str | None, count: int, num_elements: int) -> bool:
    """Whether ``count`` steps are an interval."""
    if interval is None:
        return False
    return count >= (num_elements + 1 if isinstance(interval, str) else interval)


def shorten_first(update: Tensor) -> Tensor:
    """Divide by the sum of absolute values if that is above 1: the first step, of which nothing tells the scale."""
    return update / torch.clamp(update.abs().sum(), min=1.0)
