"""The most memory that a training step of a streamed model takes at once, before it runs.

A step is walked through stage by stage, as the runtime does it: what is loaded, what is kept, what waits for the disk. The moment
at which the sum is largest counts. Within a stage, operators are taken to work as PyTorch runs them one by one; a compiler that
fuses them needs less. Not counted is what a process takes without a model (Python, torch, compiled code), and freed memory that
the C library keeps instead of giving it back to the system.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from graphopt.inspect.stage_costs import GraphCosts, StageCosts, Weight
from graphopt.inspect.traffic import OptimizerCosts, Sizes, on_disk, trained
from graphopt.runtime.stores import DiskStore
from graphopt.runtime.streaming.options import Streaming

# How much of what was passed to a disk store's `write` may wait for the disk.
MAX_WAITING = int(inspect.signature(DiskStore).parameters["max_pending_bytes"].default)
_OPTIMIZER_COPIES = 2  # tensors of a parameter's shape that an element-wise optimizer makes on its way
_EAGER_STAGES = (
    3  # stages whose gradients may wait for their update: one that is made, one behind it, one that is handed over
)

_LOADED = "layers that are loaded"
_BETWEEN = "values between layers"
_GRADS = "their gradients"
_LAYER_GRADS = "gradients of a layer"
_WITHIN = "within a layer"
_WAITING = "on its way to the disk"
_KEPT = "free buffers of the store"
_OPTIMIZER = "the optimizer at work"
_ON_THE_WAY = "parameters that are updated"
_UPDATES = "gradients that wait for their update"


@dataclass(frozen=True)
class Moment:
    """What is in memory at one moment of a step.

    Attributes:
        name: which.
        device: bytes on the device, by what they are.
        host: bytes in host memory; with a CPU as the device, what is in ``device`` comes on top.
        backlog: bytes of host memory on top, if the disk has not kept up with what was written so far.
    """

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int]
    backlog: int


@dataclass(frozen=True)
class Peak:
    """The most bytes in one place.

    Attributes:
        moment: when.
        parts: what they are.
        at_most: bytes if the disk does not keep up with what is written.
    """

    moment: str
    parts: Mapping[str, int]
    at_most: int

    @property
    def nbytes(self) -> int:
        """Their sum."""
        return sum(self.parts.values())


class StepMemory:
    """Where the bytes of one step are.

    Args:
        graphs: in the order of forward.
        weights: all parameters of the model, used or not.
        options: those of the pass.
        device: where layers compute.
        optimizer: what it keeps.
    """

    def __init__(
        self,
        graphs: Sequence[GraphCosts],
        weights: Sequence[Weight],
        options: Streaming,
        device: torch.device,
        optimizer: OptimizerCosts,
    ) -> None:
        self._graphs, self._weights, self._options, self._optimizer = graphs, weights, options, optimizer
        self._sizes = Sizes(options, device)
        self._trained = trained(graphs)
        self._written: list[int] = []  # bytes that were passed to the disk store, stage by stage

    @property
    def disk(self) -> dict[str, int]:
        """Bytes of a disk store by what they are: a durable record has two places, of which one is that of the last step."""
        if not self._sizes.is_disk:
            return {}
        stored, states = self._sizes.stored, self._optimizer.num_states
        durable = [stored(weight.nbytes) for weight in self._weights]
        of_optimizer = [states * stored(self._optimizer.state_bytes(found.weight)) for found in self._trained.values()]
        stash = sum(
            stored(part)
            for graph in self._graphs
            for name in {name for stage in graph.stages for name in stage.reads}
            if on_disk(graph.values[name], self._options)
            for part in graph.values[name].parts
        )
        return {
            "parameters, twice": 2 * sum(durable),
            "the optimizer's tensors, twice": 2 * sum(of_optimizer),
            "gradients": sum(stored(found.weight.nbytes) for found in self._trained.values()),
            "statistics": sum(stored(nbytes) for nbytes in self._statistics()),
            "values between layers": stash,
        }

    def device_peak(self) -> Peak:
        """On the device; if that is the CPU, in all of memory."""
        if self._sizes.on_cpu:
            return self.host_peak()
        peaks = [Peak(moment.name, _clean(moment.device), 0) for moment in self._moments()]
        largest = max(peaks, key=lambda peak: peak.nbytes)
        return replace(largest, at_most=largest.nbytes)

    def host_peak(self) -> Peak:
        """In host memory."""
        peaks = []
        passes, steps = list(self._passes()), list(self._step())
        for moment in (*passes, *steps):
            alike = (steps if moment in steps else passes) if self._sizes.on_cpu else (*passes, *steps)
            most = max(map(_buffers, alike))  # a store frees buffers before and after a step, if they are not pinned
            kept = {_KEPT: most - _buffers(moment)} if self._sizes.is_disk else {}
            own = _added(self._in_memory_store(), moment.device if self._sizes.on_cpu else {}, moment.host, kept)
            peaks.append(Peak(moment.name, _clean(own), sum(own.values()) + moment.backlog))
        return replace(max(peaks, key=lambda peak: peak.nbytes), at_most=max(peak.at_most for peak in peaks))

    def buffers(self) -> tuple[int, int]:
        """The most that the store's own buffers take (``Store.peak_resident_bytes``), and if the disk does not keep up."""
        found = [(_buffers(moment), _buffers(moment) + moment.backlog) for moment in self._moments()]
        return max(least for least, _ in found), max(most for _, most in found)

    # ------------------------------------------------------------------------------------------------------- moments

    def _moments(self) -> Iterator[Moment]:
        yield from self._passes()
        yield from self._step()

    def _passes(self) -> Iterator[Moment]:
        """Forward and backward."""
        self._written = []
        returned = 0
        for graph in self._graphs:
            yield from self._forward(graph, returned)
            returned += sum(graph.values[name].nbytes for name in graph.returned)
        for position in reversed(range(len(self._graphs))):
            kept = sum(self._on_device(graph, _all_reads(graph)) for graph in self._graphs[:position])
            yield from self._backward(self._graphs[position], kept, returned)

    def _forward(self, graph: GraphCosts, returned: int) -> Iterator[Moment]:
        """One moment for each stage."""
        groups = [self._group(stage, None) for stage in graph.stages]
        alive: set[str] = set()
        kept: set[str] = set()
        for position, stage in enumerate(graph.stages):
            alive |= set(stage.outputs)
            device = {
                _BETWEEN: self._on_device(graph, kept, alive) + returned,
                _WITHIN: stage.work.forward_bytes + _joined(graph, stage),
            }
            yield self._moment(
                f"forward of {stage.name}", groups[position : position + 1 + self._options.prefetch], device, kept
            )
            new = [name for name in stage.reads if name not in kept]
            self._written.append(
                sum(graph.values[name].nbytes for name in new if on_disk(graph.values[name], self._options))
            )
            kept |= set(new)
            alive -= set(stage.last_uses)

    def _backward(self, graph: GraphCosts, kept: int, returned: int) -> Iterator[Moment]:
        """One moment for each stage that is differentiated."""
        stages = [stage for stage in reversed(graph.stages) if stage.is_differentiated]
        groups = [self._group(stage, graph) for stage in stages]
        order = {id(stage): index for index, stage in enumerate(graph.stages)}
        grads = _cotangents(graph)
        handed_over: list[int] = []
        for position, stage in enumerate(stages):
            needed = {name for earlier in graph.stages[: order[id(stage)] + 1] for name in earlier.reads}
            grads |= {name for name in stage.reads if graph.values[name].is_differentiable}
            trained_here = [weight.nbytes for weight in stage.weights if weight.name in stage.reached]
            own = sum(trained_here) + sum(sum(records) for records in stage.statistics.values())
            if stage.num_parts > 1:
                own += max(trained_here, default=0)  # the gradient of a micro-batch, before it is added
            device = {
                _BETWEEN: self._on_device(graph, needed) + kept + returned,
                _GRADS: sum(graph.values[name].nbytes for name in grads),
                _LAYER_GRADS: own,
                _WITHIN: stage.work.backward_bytes + stage.statistics_bytes + _joined(graph, stage),
            }
            host = {}
            if self._options.eager:
                host = self._eager_step(handed_over[-_EAGER_STAGES:])
            window = groups[position : position + 1 + self._options.prefetch]
            yield self._moment(f"backward of {stage.name}", window, device, needed, host)
            handed_over.append(own)
            if not self._options.eager:
                self._written.append(own)
            grads -= set(stage.outputs)

    def _step(self) -> Iterator[Moment]:
        """The steps of the optimizer: the first, which makes its state, and the others."""
        largest = max((found.weight.nbytes for found in self._trained.values()), default=0)
        working = {_OPTIMIZER: _OPTIMIZER_COPIES * largest}
        stored, costs = self._sizes.stored, self._optimizer
        first, later = [], []
        for found in self._trained.values():
            own = [found.weight.nbytes, found.weight.nbytes, found.statistic or 0]
            first.append((sum(own), sum(map(stored, own))))
            states = [costs.state_bytes(found.weight)] * costs.num_states
            later.append((sum(own) + sum(states), sum(map(stored, own)) + sum(map(stored, states))))
        if self._options.eager or not self._trained:
            return
        if costs.num_states:
            new = sum(costs.num_states * costs.state_bytes(found.weight) for found in self._trained.values())
            made = max(costs.num_states * costs.state_bytes(found.weight) for found in self._trained.values())
            self._written = [new - made, made]
            host = {_OPTIMIZER: working[_OPTIMIZER] + made, _ON_THE_WAY: self._visited(first)}
            yield self._moment("the first step of the optimizer", [], {}, (), host)
        self._written = []
        yield self._moment("step of the optimizer", [], {}, (), {**working, _ON_THE_WAY: self._visited(later)})

    def _visited(self, sizes: Sequence[tuple[int, int]]) -> int:
        """Buffers of the groups that are visited: one being written back, one at work, and those that are loaded ahead."""
        if not self._sizes.is_disk:
            return 0
        limit = max(nbytes for nbytes, _ in sizes)
        groups: list[tuple[int, int]] = []
        for nbytes, whole in sizes:
            if not groups or groups[-1][0] + nbytes > limit:
                groups.append((0, 0))
            groups[-1] = (groups[-1][0] + nbytes, groups[-1][1] + whole)
        width = 2 + self._options.prefetch
        return max(sum(whole for _, whole in groups[at : at + width]) for at in range(max(1, len(groups) - width + 1)))

    def _eager_step(self, handed_over: Sequence[int]) -> dict[str, int]:
        """Updates that are made while backward runs, a parameter at a time."""
        stored, costs = self._sizes.stored, self._optimizer
        sizes = sorted(
            (
                stored(found.weight.nbytes) + costs.num_states * stored(costs.state_bytes(found.weight))
                for found in self._trained.values()
            ),
            reverse=True,
        )
        largest = max((found.weight.nbytes for found in self._trained.values()), default=0)
        visited = sum(sizes[:3]) if self._sizes.is_disk else 0  # written back, at work, loaded ahead
        return {_UPDATES: sum(handed_over), _OPTIMIZER: _OPTIMIZER_COPIES * largest, _ON_THE_WAY: visited}

    def _moment(
        self,
        name: str,
        window: Sequence[int],
        device: Mapping[str, int],
        kept: Sequence[str] | set[str],
        host: Mapping[str, int] | None = None,
    ) -> Moment:
        """Add what is loaded, and what waits."""
        loaded = sum(window)
        found = {**(host or {})}
        backlog = 0
        if self._sizes.is_disk:
            found[_WAITING] = min(self._written[-1] if self._written else 0, MAX_WAITING)
            backlog = min(sum(self._written), MAX_WAITING) - found[_WAITING]
        if self._sizes.is_disk and not self._sizes.on_cpu:
            found[_LOADED] = loaded  # on its way through the host
        if self._options.stash == "cpu" and not self._sizes.on_cpu:
            found[_BETWEEN] = sum(graph.values[k].nbytes for graph in self._graphs for k in kept if k in graph.values)
        return Moment(name, {_LOADED: loaded, **device}, found, backlog)

    # --------------------------------------------------------------------------------------------------------- sizes

    def _group(self, stage: StageCosts, stash_of: GraphCosts | None) -> int:
        """Bytes that are brought for one stage, with what it has in the stash if a graph is given."""
        records = [self._sizes.brought(weight.nbytes) for weight in stage.weights]
        values = [stash_of.values[name] for name in stage.reads] if stash_of is not None else []
        for value in values:
            if on_disk(value, self._options):
                records += [self._sizes.stored(part) for part in value.parts]
        return sum(records)

    def _on_device(self, graph: GraphCosts, kept: set[str], alive: set[str] | frozenset[str] = frozenset()) -> int:
        """Values between layers that are on the device: those in use, and of those that are kept what does not leave it."""
        stays = set(alive)
        for name in kept:
            leaves = on_disk(graph.values[name], self._options)
            if not leaves and (self._options.stash != "cpu" or self._sizes.on_cpu):
                stays.add(name)
        return sum(graph.values[name].nbytes for name in stays)

    def _in_memory_store(self) -> dict[str, int]:
        """What a store in memory holds."""
        if self._sizes.is_disk:
            return {}
        states = self._optimizer.num_states
        return {
            "parameters": sum(weight.nbytes for weight in self._weights),
            "gradients": sum(found.weight.nbytes for found in self._trained.values()),
            "statistics": sum(self._statistics()),
            "the optimizer's tensors": sum(
                states * self._optimizer.state_bytes(found.weight) for found in self._trained.values()
            ),
        }

    def _statistics(self) -> list[int]:
        """Bytes of each record of statistics."""
        records: dict[str, tuple[int, ...]] = {}
        for graph in self._graphs:
            for stage in graph.stages:
                records.update(stage.statistics)
        return [nbytes for sizes in records.values() for nbytes in sizes]


def _buffers(moment: Moment) -> int:
    """Bytes of the store's own buffers that are in use."""
    of_store = (_LOADED, _WAITING, _ON_THE_WAY)
    return sum(parts.get(name, 0) for parts in (moment.device, moment.host) for name in of_store)


def _all_reads(graph: GraphCosts) -> set[str]:
    return {name for stage in graph.stages for name in stage.reads}


def _cotangents(graph: GraphCosts) -> set[str]:
    """The returned values that backward starts from: losses, if there are any, else all."""
    found = {name for name in graph.returned if graph.values[name].is_differentiable}
    losses = {name for name in found if graph.values[name].is_scalar}
    return losses or found


def _added(*parts: Mapping[str, int]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for some in parts:
        total.update(some)
    return dict(total)


def _clean(parts: Mapping[str, int]) -> dict[str, int]:
    return {what: nbytes for what, nbytes in parts.items() if nbytes}


def _joined(graph: GraphCosts, stage: StageCosts) -> int:
    """Copies of values that were computed in parts and are read as a whole."""
    if stage.num_parts > 1:
        return 0
    return sum(value.nbytes for name in stage.reads if len((value := graph.values[name]).parts) > 1)
