"""Cut the nodes of a graph into consecutive segments, one for each layer, and put boundaries between them.

A graph's order of nodes is not its order of layers: what depends on parameters alone (casts, products of low rank, tables) may
stand anywhere. `arrange` moves such nodes to the one segment that uses them, keeps all others in their order, and makes
``torch.no_grad()`` regions end and begin again at each boundary, so that every segment is a graph of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphopt import _compat
from graphopt.aliasing import written_arguments
from graphopt.capture import CapturedGraph, InputKind
from graphopt.regions import BOUNDARY


@dataclass
class Segment:
    """Consecutive nodes that become one region.

    Attributes:
        name: the layer's module path, or a word for what lies between layers.
        nodes: its operators, in order.
        layer: identity of the layer that it is; ``None`` for what lies between layers.
        container: path of the module that holds the layer and its equals.
    """

    name: str
    nodes: list[Node] = field(default_factory=list)
    layer: Hashable | None = None
    container: str = ""

    def __repr__(self) -> str:
        return f"Segment({self.name}, {len(self.nodes)} nodes)"


@dataclass(frozen=True)
class Layer:
    """What tells the nodes of one layer from those of others: its path, the call of it, and what holds it."""

    path: str
    call: str = ""
    container: str = ""


def segments_of(graph: CapturedGraph, layer_of: Callable[[Node], Layer | None]) -> list[Segment]:
    """The graph's operators by layer, in an order in which they can run.

    Args:
        graph: stays as it is.
        layer_of: the layer that a node belongs to, or ``None``.
    """
    operators = [node for node in graph.graph_module.graph.nodes if is_operator(node)]
    free = _free_of_data(graph, operators)
    found = _runs([node for node in operators if node not in free], layer_of)
    home = {node: position for position, segment in enumerate(found) for node in segment.nodes}
    _settle(operators, free, home, layer_of, found)
    arranged = [Segment(s.name, [], s.layer, s.container) for s in found]
    for node in operators:
        arranged[home[node]].nodes.append(node)
    for segment in arranged:
        segment.nodes = _late(segment.nodes, free)
    return [segment for segment in arranged if segment.nodes]


def is_operator(node: Node) -> bool:
    """Whether a node computes something: not an input, a constant, the output, or a switch of grad mode."""
    return node.op not in ("placeholder", "get_attr", "output") and node.target is not _compat.set_grad_enabled_op


def merged(first: Segment, second: Segment) -> Segment:
    """Both as one, named after whichever is a layer."""
    main = second if first.layer is None and second.layer is not None else first
    return Segment(main.name, [*first.nodes, *second.nodes], main.layer, main.container)


def arrange(graph: CapturedGraph, segments: Sequence[Segment]) -> None:
    """Bring the graph's nodes into the order of the segments, with a boundary in front of each."""
    fx_graph = graph.graph_module.graph
    modes = _grad_modes(fx_graph, graph.grad_enabled)
    for node in fx_graph.find_nodes(op="call_function", target=_compat.set_grad_enabled_op):
        fx_graph.erase_node(node)
    order = [node for segment in segments for node in segment.nodes]
    output = next(iter(fx_graph.find_nodes(op="output")))
    for node in order:
        output.prepend(node)
    home = {node: stage for stage, segment in enumerate(segments) for node in segment.nodes}
    for stage, segment in enumerate(segments):
        _insert_boundary(fx_graph, stage, segment, home)
    for segment in segments:
        _switch_grad_mode(fx_graph, segment.nodes, modes, graph.grad_enabled)


def _free_of_data(graph: CapturedGraph, operators: Iterable[Node]) -> set[Node]:
    """Operators that read nothing but the model's own tensors and sizes, and whose place in the order does not matter."""
    found: set[Node] = set()
    given = {
        node
        for node, described in zip(graph.placeholders, graph.inputs, strict=True)
        if described.kind in (InputKind.SAMPLES, InputKind.BETWEEN, InputKind.CONSTANT)
    }
    written = {argument for node in operators for argument in written_arguments(node)}
    for node in operators:
        reads = node.all_input_nodes
        ordered = _is_ordered(node) or node in written or any(argument in written for argument in reads)
        if not ordered and all(
            argument not in given and (argument.op in ("placeholder", "get_attr") or argument in found)
            for argument in reads
        ):
            found.add(node)
    return found


def _is_ordered(node: Node) -> bool:
    """Whether an operator writes to something or draws random numbers."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _runs(operators: Sequence[Node], layer_of: Callable[[Node], Layer | None]) -> list[Segment]:
    """Consecutive nodes of one layer; what lies between two layers of one container goes with the first of them."""
    found: list[Segment] = []
    for node in operators:
        layer = layer_of(node)
        if not found or found[-1].layer != layer:
            found.append(
                Segment("" if layer is None else layer.path, [], layer, "" if layer is None else layer.container)
            )
        found[-1].nodes.append(node)
    joined: list[Segment] = []
    for position, segment in enumerate(found):
        behind = found[position + 1] if position + 1 < len(found) else None
        in_loop = joined and behind is not None and joined[-1].layer is not None
        if segment.layer is None and in_loop and joined[-1].container == cast(Segment, behind).container:
            joined[-1] = merged(joined[-1], segment)
        elif joined and segment.layer is not None and joined[-1].layer == segment.layer:
            joined[-1] = merged(joined[-1], segment)
        else:
            joined.append(segment)
    _name_gaps(joined)
    return joined


def _name_gaps(found: Sequence[Segment]) -> None:
    for position, segment in enumerate(found):
        if segment.layer is None:
            before = next((s.name for s in reversed(found[:position]) if s.layer is not None), None)
            behind = next((s.name for s in found[position + 1 :] if s.layer is not None), None)
            segment.name = f"after {before}" if before is not None else f"before {behind}" if behind else "all"


def _settle(
    operators: Sequence[Node],
    free: set[Node],
    home: dict[Node, int],
    layer_of: Callable[[Node], Layer | None],
    found: Sequence[Segment],
) -> None:
    """Find a segment for the nodes that are free of data, and let every node stand behind what it uses."""
    layers = {segment.layer: position for position, segment in reversed(list(enumerate(found))) if segment.layer}
    position = {node: index for index, node in enumerate(operators)}
    last = max(len(found) - 1, 0)
    if not found:
        found = cast(list[Segment], found)
        found.append(Segment("all"))
    current = 0
    natural: dict[Node, int] = {}
    for node in operators:
        if node in free:
            natural[node] = layers.get(layer_of(node), current)
        else:
            current = max(current, home[node])
    for node in reversed(operators):
        if node in free:
            users = {home[user] for user in node.users if user in position}
            home[node] = users.pop() if len(users) == 1 else min([natural[node], *users], default=last)
    for node in operators:
        sources = [home[argument] for argument in node.all_input_nodes if argument in home]
        home[node] = sources[0] if node.target is operator.getitem else max([home[node], *sources])


def _late(nodes: Sequence[Node], free: set[Node]) -> list[Node]:
    """The nodes with those that are free of data right before their first user: one order for equal layers."""
    waiting = dict.fromkeys(node for node in nodes if node in free)
    ordered: list[Node] = []

    def place(node: Node) -> None:
        if node in waiting:
            del waiting[node]
            for argument in node.all_input_nodes:
                place(argument)
            ordered.append(node)

    for node in nodes:
        if node not in free:
            for argument in node.all_input_nodes:
                place(argument)
            ordered.append(node)
    for node in list(waiting):
        place(node)
    return ordered


def _grad_modes(graph: Graph, enabled: bool) -> dict[Node, bool]:
    modes: dict[Node, bool] = {}
    for node in graph.nodes:
        if node.target is _compat.set_grad_enabled_op:
            enabled = bool(node.args[0])
        modes[node] = enabled
    return modes


def _switch_grad_mode(graph: Graph, nodes: Sequence[Node], modes: Mapping[Node, bool], enabled: bool) -> None:
    """Insert the switches of grad mode that a segment needs; it begins and ends in the mode of the whole graph."""
    current = enabled
    for node in nodes:
        if modes[node] != current:
            current = modes[node]
            with graph.inserting_before(node):
                graph.call_function(_compat.set_grad_enabled_op, (current,)).meta["val"] = None
    if current != enabled:
        with graph.inserting_after(nodes[-1]):
            graph.call_function(_compat.set_grad_enabled_op, (enabled,)).meta["val"] = None


def _insert_boundary(graph: Graph, stage: int, segment: Segment, home: Mapping[Node, int]) -> None:
    entering = list(
        dict.fromkeys(
            argument
            for node in segment.nodes
            for argument in node.all_input_nodes
            if home.get(argument, stage) != stage and isinstance(argument.meta.get("val"), Tensor)
        )
    )
    first = segment.nodes[0]
    with graph.inserting_before(first):
        boundary = graph.call_function(BOUNDARY, (entering, stage, segment.name))
        boundary.meta = {k: v for k, v in first.meta.items() if k in ("nn_module_stack", "stack_trace")}
        boundary.meta["val"] = [node.meta["val"] for node in entering]
        through: dict[Node, Node] = {}
        for position, node in enumerate(entering):
            through[node] = graph.call_function(operator.getitem, (boundary, position))
            through[node].meta = {**boundary.meta, "val": node.meta["val"]}
    for node in segment.nodes:
        node.args = torch.fx.map_arg(node.args, lambda argument: through.get(argument, argument))
        node.kwargs = torch.fx.map_arg(node.kwargs, lambda argument: through.get(argument, argument))
