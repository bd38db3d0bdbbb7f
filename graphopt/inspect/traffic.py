"""Bytes that one training step moves between a store and the device, before it runs: what the store's counters will show.

The steps are those of `graphopt.runtime.streaming`: forward reads every layer, backward reads it again and writes its
gradients, ``optimizer.step()`` reads all of that and writes parameters and the optimizer's tensors. Counted is a step behind the
first, which has no optimizer state to read, with gradients that were cleared before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from graphopt.errors import OptionError
from graphopt.inspect.stage_costs import Between, GraphCosts, StageCosts, Weight
from graphopt.runtime.stores.buffers import padded
from graphopt.runtime.streaming.options import Streaming

Phase = Literal["forward", "backward", "optimizer"]
Kind = Literal["weights", "stash", "gradients", "statistics", "optimizer"]
Direction = Literal["read", "written"]


@dataclass(frozen=True)
class OptimizerCosts:
    """What an optimizer keeps for each parameter.

    Attributes:
        num_states: tensors of the parameter's shape.
        is_wide: whether they are float32 where the parameter has fewer bits.
        reads_statistics: whether it needs the sum of squared per-sample gradients.
    """

    num_states: int
    is_wide: bool = False
    reads_statistics: bool = False

    def state_bytes(self, weight: Weight) -> int:
        """Bytes of each of its tensors for a parameter; those of one element stay in memory."""
        dtype = torch.promote_types(weight.dtype, torch.float32) if self.is_wide else weight.dtype
        return weight.numel * dtype.itemsize if weight.numel > 1 else 0


OPTIMIZERS: Mapping[str, OptimizerCosts] = {
    "sgd": OptimizerCosts(0),
    "sgd_momentum": OptimizerCosts(1),
    "adam": OptimizerCosts(2),
    "adamw": OptimizerCosts(2),
    "nadam": OptimizerCosts(2),
    "radam": OptimizerCosts(2),
    "adamax": OptimizerCosts(2),
    "adadelta": OptimizerCosts(2),
    "rmsprop": OptimizerCosts(1),
    "tgadamw": OptimizerCosts(3, is_wide=True, reads_statistics=True),
    "tglaprop": OptimizerCosts(4, is_wide=True, reads_statistics=True),
    "tgrmsprop": OptimizerCosts(2, is_wide=True, reads_statistics=True),
}
"""With the defaults of each, but for ``sgd_momentum``, which is SGD with a momentum."""


def optimizer_costs(name: str) -> OptimizerCosts:
    """The optimizer of a name.

    Raises:
        OptionError: there is none.
    """
    if name not in OPTIMIZERS:
        raise OptionError(
            f"optimizer={name!r}: what it keeps for each parameter is not known; known are {sorted(OPTIMIZERS)}. Take one that "
            "keeps as many tensors of a parameter's shape"
        )
    return OPTIMIZERS[name]


@dataclass(frozen=True)
class Move:
    """Bytes that go one way for one reason."""

    phase: Phase
    kind: Kind
    direction: Direction
    nbytes: int


@dataclass(frozen=True)
class Traffic:
    """The bytes that one step moves."""

    moves: tuple[Move, ...]

    def total(
        self,
        *,
        phases: Iterable[Phase] | None = None,
        kind: Kind | None = None,
        direction: Direction | None = None,
    ) -> int:
        """Bytes of some of the moves."""
        wanted = None if phases is None else set(phases)
        return sum(
            move.nbytes
            for move in self.moves
            if (wanted is None or move.phase in wanted)
            and kind in (None, move.kind)
            and direction in (None, move.direction)
        )

    @property
    def read(self) -> int:
        """Bytes from the store."""
        return self.total(direction="read")

    @property
    def written(self) -> int:
        """Bytes to the store."""
        return self.total(direction="written")


@dataclass(frozen=True)
class Trained:
    """A parameter that gets a gradient, with the statistic that the optimizer finds beside it in the store, if any."""

    weight: Weight
    statistic: int | None


def trained(graphs: Sequence[GraphCosts]) -> dict[str, Trained]:
    """The parameters that get gradients, by name."""
    found: dict[str, Trained] = {}
    for stage in (stage for graph in graphs for stage in graph.stages):
        for weight in stage.weights:
            if weight.name in stage.reached:
                records = stage.statistics.get(weight.name, ())
                before = found.get(weight.name)
                known = records[0] if records else before.statistic if before is not None else None
                found[weight.name] = Trained(weight, known)
    return found


def on_disk(value: Between, options: Streaming) -> bool:
    """Whether a value between layers is a record of the store: what holds samples, and memory."""
    return options.stash == "disk" and value.has_samples and value.takes_memory


class Sizes:
    """How many bytes count where: a disk moves whole pages, and a store in memory moves nothing to the CPU."""

    def __init__(self, options: Streaming, device: torch.device) -> None:
        self.is_disk = options.store == "disk"
        self.on_cpu = device.type == "cpu"

    def stored(self, nbytes: int) -> int:
        """Of a record."""
        return padded(nbytes) if self.is_disk else nbytes

    def brought(self, nbytes: int) -> int:
        """That move when a record is brought to the device."""
        return self.stored(nbytes) if self.is_disk or not self.on_cpu else 0

    def updated(self, nbytes: int) -> int:
        """That move when a record is brought to the optimizer, which runs on the CPU."""
        return self.stored(nbytes) if self.is_disk else 0


def traffic_of(
    graphs: Sequence[GraphCosts], options: Streaming, device: torch.device, optimizer: OptimizerCosts, *, eager: bool
) -> Traffic:
    """What a step of a model with these graphs moves.

    Args:
        graphs: in the order of forward.
        options: those of the pass; ``eager`` is given separately, so that both can be compared.
        device: where layers compute.
        optimizer: what it keeps.
        eager: whether the optimizer works while backward runs.
    """
    sizes = Sizes(options, device)
    moves = [move for graph in graphs for move in _forward(graph, options, sizes)]
    in_store: set[str] = set()  # eager: gradients of tied parameters, which wait for those of earlier layers
    written: set[str] = set()
    for graph in reversed(graphs):
        moves += _backward(graph, options, sizes, written, in_store if eager else None)
    moves += _optimizer(graphs, sizes, optimizer, in_store if eager else None)
    totals: dict[tuple[Phase, Kind, Direction], int] = {}
    for move in moves:
        key = (move.phase, move.kind, move.direction)
        totals[key] = totals.get(key, 0) + move.nbytes
    return Traffic(tuple(Move(*key, nbytes) for key, nbytes in totals.items() if nbytes))


def _forward(graph: GraphCosts, options: Streaming, sizes: Sizes) -> Iterator[Move]:
    kept: set[str] = set()
    for stage in graph.stages:
        yield Move("forward", "weights", "read", sum(sizes.brought(weight.nbytes) for weight in stage.weights))
        for name in stage.reads:
            if name not in kept:
                kept.add(name)
                yield Move("forward", "stash", "written", _stashed(graph.values[name], options, sizes))


def _stashed(value: Between, options: Streaming, sizes: Sizes) -> int:
    if on_disk(value, options):
        return sum(sizes.stored(part) for part in value.parts)
    return value.nbytes if options.stash == "cpu" and not sizes.on_cpu else 0


def _backward(
    graph: GraphCosts, options: Streaming, sizes: Sizes, written: set[str], in_store: set[str] | None
) -> Iterator[Move]:
    """The moves of one graph's backward.

    Args:
        graph: the graph.
        options: those of the pass.
        sizes: what counts.
        written: the records of gradients and statistics that exist; is added to.
        in_store: with ``eager``, the gradients that wait in the store; is added to.
    """
    stages = [stage for stage in reversed(graph.stages) if stage.is_differentiated]
    last = {weight.name: stage for stage in stages for weight in stage.weights}
    for stage in stages:
        yield Move("backward", "weights", "read", sum(sizes.brought(weight.nbytes) for weight in stage.weights))
        stashed = sum(_stashed(graph.values[name], options, sizes) for name in stage.reads)
        yield Move("backward", "stash", "read", stashed)
        for weight in stage.weights:
            if weight.name not in stage.reached:
                continue
            stays = in_store is not None and last[weight.name] is stage  # its update takes it from memory
            statistic, *others = stage.statistics.get(weight.name, (0,))
            for key, kind, nbytes in _records(weight, statistic, others):
                if stays and not key.startswith("other"):
                    crosses = nbytes if not sizes.is_disk and not sizes.on_cpu else 0
                    yield Move("backward", kind, "written", crosses)
                    continue
                yield Move("backward", kind, "written", sizes.stored(nbytes))
                if key in written:
                    yield Move("backward", kind, "read", sizes.updated(nbytes))
                written.add(key)
                if in_store is not None and kind == "gradients":
                    in_store.add(weight.name)


def _records(weight: Weight, statistic: int, others: Sequence[int]) -> Iterator[tuple[str, Kind, int]]:
    yield f"grad/{weight.name}", "gradients", weight.nbytes
    if statistic:
        yield f"statistic/{weight.name}", "statistics", statistic
    for number, nbytes in enumerate(others):
        yield f"other {number}/{weight.name}", "statistics", nbytes


def _optimizer(
    graphs: Sequence[GraphCosts], sizes: Sizes, optimizer: OptimizerCosts, in_store: set[str] | None
) -> Iterator[Move]:
    for name, found in trained(graphs).items():
        state = sizes.updated(optimizer.state_bytes(found.weight)) * optimizer.num_states
        nbytes = sizes.updated(found.weight.nbytes) + state
        yield Move("optimizer", "optimizer", "read", nbytes)
        yield Move("optimizer", "optimizer", "written", nbytes)
        if in_store is None or name in in_store:  # eager reads these by themselves, which counts in every store
            size = sizes.updated if in_store is None else sizes.stored
            yield Move("optimizer", "gradients", "read", size(found.weight.nbytes))
            if found.statistic is not None:
                yield Move("optimizer", "statistics", "read", size(found.statistic))


def stages_of(graphs: Sequence[GraphCosts]) -> list[StageCosts]:
    """All stages, in the order of forward."""
    return [stage for graph in graphs for stage in graph.stages]
