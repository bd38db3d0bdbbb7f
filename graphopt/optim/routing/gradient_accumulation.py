"""Steps on the gradients of several batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import zeros
from graphopt.optim.core.var import Var
from graphopt.optim.routing.router import Router, values_of

_SUMS = ("sum", "grad_sum")


class GradientAccumulation(Router):
    """Gather updates, and run modules on their mean at every n-th step; parameters do not move in between.

    In front, and with the rest of the chain inside, it does what one batch of n times the size would have done.

    Args:
        modules: a module, or list of modules. They count the steps that they make, and see mean gradients.
        n: how many steps are gathered.
        mean: divide by ``n``; ``False`` for the sum.

    Raises:
        OptionError: ``n`` is no whole number of at least 1.
    """

    counts_apart = True
    treats_each_alone = True

    def __init__(self, modules: Any, n: int, mean: bool = True) -> None:
        super().__init__({"n": n, "mean": mean}, modules=modules)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse numbers that mean nothing."""
        n = settings["n"]
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise OptionError(f"{self.place}: n={n!r}; expected a whole number of at least 1")

    def step(self, var: Var) -> Var:
        """Gather, and run the modules if it is time."""
        is_gradient = var.update is None  # one sum serves for both
        updates = var.get_update()
        sums = self._gather(var, _SUMS[0], updates)
        grads = sums if is_gradient else self._gather(var, _SUMS[1], var.grads)
        indices = [index for index, route in enumerate(self.route(var)) if route is not None]
        var.update = [torch.zeros_like(update) for update in updates]
        if not indices:
            var.stop = var.skip_update = True
            return var
        part = var.part(indices)
        factors = [self._factor(param) for param in part.params]
        part.update = list(torch._foreach_mul([sums[index] for index in indices], factors))
        part.grads = list(torch._foreach_mul([grads[index] for index in indices], factors))
        for param in part.params:
            for name in _SUMS:
                self.state[param].pop(name, None)
        for index, update in zip(indices, self.run_chain("modules", part), strict=True):
            var.update[index] = update
        return var

    def route(self, var: Var) -> list[str | None]:
        """By the number of steps that each parameter has made."""
        counts = values_of(self.count(var, "own_step"))
        return [
            "modules" if count % self.settings[param]["n"] == 0 else None
            for param, count in zip(var.params, counts, strict=True)
        ]

    def _factor(self, param: Tensor) -> float:
        settings = self.settings[param]
        return 1 / settings["n"] if settings["mean"] else 1.0

    def _gather(self, var: Var, name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        states = [self.state[param] for param in var.params]
        olds = [s[name] if name in s else zeros(p) for s, p in zip(states, var.params, strict=True)]
        news = list(torch._foreach_add(olds, list(tensors)))
        for state, new in zip(states, news, strict=True):
            state[name] = new
        return news
