"""Run the regions of a graph one after the other: equal regions are one function that is called with different weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from graphopt.capture import CapturedGraph
from graphopt.regions import Region, held, origins


@dataclass(frozen=True)
class _Step:
    """One call: where its arguments lie, where its results go, and what nobody needs afterwards."""

    function: Callable[..., Sequence[Any]]
    arguments: tuple[int, ...]
    results: tuple[int, ...]
    done: tuple[int, ...]


class RegionProgram:
    """A function of the graph's flat inputs, made of the functions of its regions.

    Autograd connects the regions, each of which has a backward of its own; a value is let go after the last region that uses it.
    """

    def __init__(
        self, graph: CapturedGraph, regions: Sequence[Region], compiled: Mapping[str, Callable[..., Any]]
    ) -> None:
        self.num_compiled = len(compiled)
        slots: dict[Any, int] = {node: position for position, node in enumerate(graph.placeholders)}
        self._constants: list[Any] = []

        def slot(node: Node) -> int:
            if node not in slots:
                slots[node] = len(slots)
                self._constants.append(held(graph.graph_module, node) if node.op == "get_attr" else None)
            return slots[node]

        calls = [
            (compiled[region.structure], tuple(map(slot, region.inputs)), tuple(map(slot, region.outputs)))
            for region in regions
        ]
        origin = origins(graph.graph_module.graph)
        self._outputs = [
            (True, slot(origin[value])) if isinstance(value, Node) else (False, value) for value in graph.output_nodes
        ]
        kept = {position for is_slot, position in self._outputs if is_slot}
        self._steps: list[_Step] = []
        for function, arguments, results in reversed(calls):
            done = tuple(dict.fromkeys(position for position in (*arguments, *results) if position not in kept))
            kept.update(done)
            self._steps.insert(0, _Step(function, arguments, results, done))

    def __call__(self, *args: Any) -> list[Any]:
        """Run all regions."""
        values = [*args, *self._constants]
        del args
        for step in self._steps:
            results = step.function(*[values[position] for position in step.arguments])
            for position, result in zip(step.results, results, strict=True):
                values[position] = result
            for position in step.done:
                values[position] = None
            del results
        return [values[position] if is_slot else position for is_slot, position in self._outputs]
