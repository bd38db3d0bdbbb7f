"""The base of modules that send parameters to different chains, and how they name parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError
from graphopt.optim.core.module import Module, run_modules, updates_for
from graphopt.optim.core.var import Var

Filter = Callable[..., bool] | Tensor | nn.Module | Iterable[Any]
"""Which parameters: a function of the parameter, or of its name and the parameter if it takes two arguments without defaults; a
parameter, a module (all of its parameters), or several of these (any of them)."""


class Selection:
    """Says which parameters a filter means.

    Args:
        filter: see `Filter`.
        owner: the class of the module that was given it, for errors.

    Raises:
        OptionError: it is no filter.
    """

    def __init__(self, filter: Filter, owner: str) -> None:
        self._owner = owner
        self._params: list[Tensor] = []
        self._predicates: list[tuple[Callable[..., Any], bool]] = []
        self._add(filter)
        self._filter = filter

    def _add(self, filter: Any) -> None:
        if isinstance(filter, Tensor):
            self._params.append(filter)
        elif isinstance(filter, nn.Module):
            self._params += filter.parameters()
        elif isinstance(filter, (list, tuple, set, frozenset)) or (
            isinstance(filter, Iterable) and not callable(filter) and not isinstance(filter, (str, dict))
        ):
            for entry in filter:
                self._add(entry)
        elif callable(filter):
            self._predicates.append((filter, _takes_name(filter)))
        else:
            raise OptionError(
                f"{self._owner}: filter={filter!r}; expected a function such as lambda p: p.ndim >= 2 or "
                "lambda name, p: 'bias' in name, parameters, or a module"
            )

    def mask(self, module: Module, var: Var) -> list[bool]:
        """For each parameter of a step whether it is meant; predicates are called anew at each step."""
        assert module.binding is not None
        owners = [module.binding.store.owner(param) for param in var.params]
        meant = {id(param) for param in self._params}
        return [id(owner) in meant or self._is_meant(module, var, owner) for owner in owners]

    def _is_meant(self, module: Module, var: Var, param: Tensor) -> bool:
        for predicate, takes_name in self._predicates:
            if takes_name:
                name = var.names.get(param)
                if name is None:
                    raise OptionError(
                        f"{module.place}: the filter takes the name of the parameter, but a parameter of shape "
                        f"{tuple(param.shape)} has none; pass model.named_parameters() or the model itself to the optimizer"
                    )
                if predicate(name, param):
                    return True
            elif predicate(param):
                return True
        return False

    def __repr__(self) -> str:
        return getattr(self._filter, "__name__", type(self._filter).__name__)


class Router(Module):
    """A module that gives some parameters to one chain, and others to another.

    Args:
        defaults: hyper-parameters.
        **chains: by name the chains.
    """

    counts_apart = False  # whether each chain counts only the steps that it makes

    def route(self, var: Var) -> Sequence[str | None]:
        """For each parameter the name of its chain; ``None`` if its update passes unchanged."""
        raise NotImplementedError

    def step(self, var: Var) -> Var:
        """Run each chain on its parameters."""
        updates = list(var.get_update())
        routes = self.route(var)
        for name, modules in self.children.items():
            indices = [index for index, route in enumerate(routes) if route == name]
            if not indices:
                continue
            part = self.part(var, indices, name)
            params = list(part.params)
            part = run_modules(modules, part)
            for index, update in zip(indices, updates_for(params, part), strict=True):
                updates[index] = update
            var.update_attrs_from_clone_(part)
        var.update = updates
        return var

    def part(self, var: Var, indices: Sequence[int], name: str) -> Var:
        """What a chain gets to see."""
        part = var.part(indices)
        if self.counts_apart:
            part.counts = self.count(part, f"{name}_step")
        return part

    def count(self, var: Var, name: str) -> list[Tensor]:
        """Count a step for each parameter, in its state under ``name``."""
        assert var.counts is not None
        counts = []
        for param, like in zip(var.params, var.counts, strict=True):
            state = self.state[param]
            if name not in state:
                state[name] = torch.zeros_like(like)
            state[name] = state[name] + 1
            counts.append(state[name])
        return counts


def values_of(counts: Sequence[Tensor]) -> list[int]:
    """Counts as numbers; one that many parameters share is read once, for reading may wait for the device."""
    known: dict[int, int] = {}
    for count in counts:
        if id(count) not in known:
            known[id(count)] = int(count)
    return [known[id(count)] for count in counts]


def _takes_name(predicate: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(predicate).parameters.values()
    except ValueError:  # some built-in functions have none
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(entry.kind in positional and entry.default is entry.empty for entry in parameters) == 2
