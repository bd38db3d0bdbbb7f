"""The base of modules that send parameters to different chains, and how they name parameters."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError
from graphopt.optim.core.flat.segment import FlatSegment, Mode
from graphopt.optim.core.gradients import check_sharding
from graphopt.optim.core.module import Module, Rule, updates_for
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


class _SharedCounts(NamedTuple):
    """Counts in the state of parameters: one tensor for all that are equal.

    Attributes:
        params: the parameters.
        entries: the dictionary of each.
        keys: the name of the count there.
        counts: the count of each.
        distinct: all of them, each once.
    """

    params: list[Tensor]
    entries: list[dict[str, Any]]
    keys: list[str]
    counts: list[Tensor]
    distinct: list[Tensor]

    def are_those_of(self, params: Sequence[Tensor]) -> bool:
        """Whether the parameters are these, and still have these counts."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, map(dict.get, self.entries, self.keys), self.counts))
        )


class Router(Module):
    """A module that gives some parameters to one chain, and others to another.

    Args:
        defaults: hyper-parameters.
        **chains: by name the chains.
    """

    selects_params = True
    counts_apart = False  # whether each chain counts only the steps that it makes

    def __init__(self, defaults: Mapping[str, Any] | None = None, **chains: Any) -> None:
        super().__init__(defaults, **chains)
        # By the name of the chain, and the parameter if it steps alone.
        self._segments: dict[tuple[str, Tensor | None], list[FlatSegment | Module]] = {}
        self._counts: dict[tuple[str, Tensor | None], _SharedCounts] = {}

    def route(self, var: Var) -> Sequence[str | None]:
        """For each parameter the name of its chain; ``None`` if its update passes unchanged."""
        raise NotImplementedError

    def step(self, var: Var) -> Var:
        """Run each chain on its parameters."""
        updates = list(var.get_update())
        routes = self.route(var)
        for name in self.children:
            indices = [index for index, route in enumerate(routes) if route == name]
            if not indices:
                continue
            part = var.part(indices)
            for index, update in zip(indices, self.run_chain(name, part), strict=True):
                updates[index] = update
        var.update = updates
        return var

    def run_chain(self, name: str, part: Var) -> list[Tensor]:
        """Run one chain.

        Args:
            name: of the chain.
            part: the parameters that it gets to see.

        Returns:
            The update of each.
        """
        params = list(part.params)
        check_sharding(self.children[name], params, lambda param: f"a parameter of shape {tuple(param.shape)}")
        if self.counts_apart:
            part.counts = self.count(part, f"{name}_step")
        result = part
        for segment in self._cut(name, part):
            result = segment.run(result) if isinstance(segment, FlatSegment) else segment.step(result)
            if result.stop:
                break
        return updates_for(params, result)

    def count(self, var: Var, name: str) -> list[Tensor]:
        """Count a step for each parameter, in its state under ``name``; equal counts are one tensor, as in the optimizer."""
        key = (name, var.params[0] if len(var.params) == 1 else None)
        shared = self._counts.get(key)
        if shared is None or not shared.are_those_of(var.params):
            shared = self._counts[key] = self._share_counts(var, name)
        for count in shared.distinct:
            count.add_(1)
        return list(shared.counts)

    def _share_counts(self, var: Var, name: str) -> _SharedCounts:
        assert var.counts is not None
        binding = self._bound
        entries, keys, counts = [], [], []
        known: dict[tuple[float, torch.device], Tensor] = {}
        for param, like in zip(var.params, var.counts, strict=True):
            entry, prefix = binding.store.entry(param)
            key = f"{prefix}{binding.path}.{name}"
            value = float(entry[key]) if key in entry else 0.0
            place = (value, like.device)
            if place not in known:
                known[place] = torch.full_like(like, value)
            entry[key] = known[place]
            entries.append(entry)
            keys.append(key)
            counts.append(known[place])
        return _SharedCounts(list(var.params), entries, keys, counts, list(known.values()))

    def forget(self) -> None:
        """Drop what was planned for tensors that have been replaced."""
        self._segments.clear()
        self._counts.clear()

    def _cut(self, name: str, part: Var) -> Sequence[FlatSegment | Module]:
        """The chain, with runs of element-wise rules to be run as the optimizer runs its own."""
        modules, first = self.children[name], part.params[0]
        if part.settings is None or self._bound.store.owner(first) is not first:
            return modules
        mode = mode_of(part.settings[first])
        if mode == "loop":
            return modules
        key = (name, first if len(part.params) == 1 else None)
        if key not in self._segments:
            segments: list[FlatSegment | Module] = []
            for is_flat, group in groupby(modules, _is_flat):
                run = list(group)
                rules = [module for module in run if isinstance(module, Rule)]
                capturable = part.settings[first]["capturable"]
                segments += [FlatSegment(rules, mode, False, capturable)] if is_flat else run
            self._segments[key] = segments
        return self._segments[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_segments": {}, "_counts": {}}


def mode_of(flags: Mapping[str, Any]) -> Mode:
    """How an optimizer with these flags runs element-wise rules."""
    if flags["differentiable"] or flags["foreach"] is False:
        return "loop"
    return "fused" if flags["fused"] else "foreach" if flags["foreach"] else "auto"


def _is_flat(module: Module) -> bool:
    return isinstance(module, Rule) and module.is_elementwise and not module.measures


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
