"""A body with reductions, cut into passes over memory.

What follows a reduction cannot start before it has ended, so each level of reductions is one more pass. A pass may read again
what an earlier one has written (new state), and recomputes everything else from that: nothing but numbers of shape () is handed
from pass to pass, no temporary tensor is made.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from graphopt.optim.core.flat.program import REDUCTIONS, Program


class Phase(NamedTuple):
    """One pass.

    Attributes:
        graph_module: of ``row``, the numbers of earlier passes, and all elements that it reads or writes; returns what is
            written, then the numbers for later passes.
        numbers: which of the numbers of earlier passes it reads.
        number_dtypes: theirs.
        elements: which elements it reads or writes, in order.
        targets: for each tensor that it returns first, its place in ``elements``.
    """

    graph_module: GraphModule
    numbers: tuple[int, ...]
    number_dtypes: tuple[torch.dtype, ...]
    elements: tuple[int, ...]
    targets: tuple[int, ...]


def cut(program: Program) -> list[Phase]:
    """The passes of a program, in order; the numbers that they return count up through all of them."""
    body = program.body
    nodes = list(body.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    row, elements = placeholders[0], placeholders[1:]
    outputs: list[Node] = list(next(node for node in nodes if node.op == "output").args[0])
    levels = _levels(nodes)
    written = dict(zip(program.targets, outputs, strict=True))  # element -> node
    write_phase = {target: levels[node] for target, node in written.items()}
    while True:
        phases, late = _build(body, row, elements, levels, written, write_phase)
        if not late:
            return phases
        write_phase.update(late)


def _levels(nodes: list[Node]) -> dict[Node, int]:
    """How many reductions, one behind the other, a value depends on."""
    levels: dict[Node, int] = {}
    for node in nodes:
        level = max([levels[item] for item in node.all_input_nodes], default=0)
        levels[node] = level + (node.target in REDUCTIONS)
    return levels


def _build(
    body: GraphModule,
    row: Node,
    elements: list[Node],
    levels: dict[Node, int],
    written: dict[int, Node],
    write_phase: dict[int, int],
) -> tuple[list[Phase], dict[int, int]]:
    """The passes, and the elements that are written before their old value is read for the last time."""
    numbers: list[Node] = []  # what the passes return, in order
    phases: list[Phase] = []
    late: dict[int, int] = {}
    for phase in range(max([*levels.values(), 0]) + 1):
        builder = _Builder(body, row, elements, numbers, levels, written, write_phase, phase)
        phases.append(builder.build())
        late.update(builder.late)
        numbers += builder.returned
    return phases, late


class _Builder:
    """Builds one pass; arguments as in `_build`."""

    def __init__(
        self,
        body: GraphModule,
        row: Node,
        elements: list[Node],
        numbers: list[Node],
        levels: dict[Node, int],
        written: dict[int, Node],
        write_phase: dict[int, int],
        phase: int,
    ) -> None:
        self.late: dict[int, int] = {}
        self.returned = _numbers(levels, phase + 1)
        self._body, self._phase = body, phase
        self._written, self._write_phase = written, write_phase
        self._index_of = {node: index for index, node in enumerate(elements)}
        self._number_of = {node: index for index, node in enumerate(numbers)}
        self._number_nodes = numbers
        self._graph = Graph(body)
        self._copies = {row: self._graph.placeholder("row")}
        self._elements: dict[int, Node] = {}
        self._numbers: dict[int, Node] = {}

    def build(self) -> Phase:
        """The pass."""
        targets = [target for target in self._written if self._write_phase[target] == self._phase]
        results = [self._copy(self._written[target]) for target in targets]
        results += [self._copy(node) for node in self.returned]
        for target in targets:
            self._element(target)
        self._graph.output(results)
        self._sort_inputs()
        order = list(self._elements)
        return Phase(
            GraphModule(self._body, self._graph),
            tuple(self._numbers),
            tuple(self._number_nodes[index].meta["val"].dtype for index in self._numbers),
            tuple(order),
            tuple(order.index(target) for target in targets),
        )

    def _copy(self, node: Node) -> Node:
        if node not in self._copies:
            self._copies[node] = self._make(node)
        return self._copies[node]

    def _make(self, node: Node) -> Node:
        if node in self._number_of:
            number = self._number_of[node]
            if number not in self._numbers:
                self._numbers[number] = self._graph.placeholder(f"number_{number}")
            return self._numbers[number]
        if node in self._index_of:
            index = self._index_of[node]
            if self._write_phase.get(index, self._phase) < self._phase:
                self.late[index] = self._phase
            return self._element(index)
        for target, new in self._written.items():
            if new is node and self._write_phase[target] < self._phase:
                return self._element(target)  # it is there by now
        return self._graph.node_copy(node, self._copy)

    def _element(self, index: int) -> Node:
        if index not in self._elements:
            self._elements[index] = self._graph.placeholder(f"element_{index}")
        return self._elements[index]

    def _sort_inputs(self) -> None:
        """Inputs come first: the row, numbers, elements."""
        first = next(iter(self._graph.nodes))
        for node in reversed([*self._numbers.values(), *self._elements.values()]):
            first.append(node)


def _numbers(levels: dict[Node, int], level: int) -> list[Node]:
    """The numbers of a level that something else than numbers of this level reads."""
    mine = {node for node, at in levels.items() if at == level and _is_number(node)}
    return [node for node in mine if any(user not in mine for user in node.users)]


def _is_number(node: Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and value is not None and value.dim() == 0
