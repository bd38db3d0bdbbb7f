"""Regions: the parts of a graph between its layer boundaries, and which of them are the same.

A boundary stands in the graph as a node, ``graphopt.boundary(values, stage, layer)``, which hands the values that one layer
takes from earlier ones through as they are (`graphopt.passes.LayerToLayer` puts it there). Everything from it to the next
boundary is one **region**: a graph of its own, whose inputs are parameters, companions, sizes, and values of earlier regions.

Two regions are **equal** if they hold the same operators with the same arguments in the same order, on inputs of the same
shapes, dtypes, strides, devices and need for gradients, and return the same. They are compiled once, and called with different
weights (`graphopt.compilation`).
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.annotations import Stage
from graphopt.capture import CapturedGraph, InputKind

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("boundary(Tensor[] values, int stage, str layer) -> Tensor[]")
_library.impl("boundary", lambda values, stage, layer: list(values), "CompositeImplicitAutograd")
BOUNDARY = torch.ops.graphopt.boundary.default

_WHOLE = "all"  # what a graph without boundaries is called
_NOT_DIFFERENTIABLE = frozenset([torch.ops.aten.detach.default, torch.ops.aten.detach_.default])
_POSITION_OF_TAGS = ("recompute",)  # what a partitioner reads off a node


@dataclass
class Region:
    """One part of a graph.

    Attributes:
        stage: its number, from 0.
        layer: qualified name of the module that it is, or a word for what lies between modules.
        graph_module: placeholders in the order of ``inputs``; returns a list in the order of ``outputs``.
        inputs: nodes of the whole graph: placeholders, constants, and values of earlier regions.
        outputs: nodes of the whole graph that later regions use, or that the graph returns.
        fake_inputs: a fake value for each input, that requires a gradient if the input does.
        structure: equal for equal regions.
    """

    stage: int
    layer: str
    graph_module: GraphModule
    inputs: list[Node]
    outputs: list[Node]
    fake_inputs: list[Any]
    structure: str

    def __repr__(self) -> str:
        return f"Region({self.stage}, {self.layer}, {len(self.graph_module.graph.nodes)} nodes)"


@dataclass(frozen=True)
class Rows:
    """Where the samples are in a value: along ``axis`` each sample has ``inner`` rows, one sample behind the other."""

    axis: int
    inner: sympy.Expr = sympy.S.One


@dataclass(frozen=True)
class MicroBatches:
    """How a batch is cut.

    Attributes:
        rows: for each value that is cut, by the name of its node.
        whole: the stages that need the whole batch, and why.
        symbols: the sizes that count samples.
    """

    rows: dict[str, Rows]
    whole: dict[int, str]
    symbols: frozenset[sympy.Symbol] = frozenset()


def has_boundaries(graph: CapturedGraph) -> bool:
    """Whether the graph has more than one region."""
    return bool(graph.graph_module.graph.find_nodes(op="call_function", target=BOUNDARY))


def split(graph: CapturedGraph) -> list[Region]:
    """The regions of a graph, in order; the graph stays as it is."""
    parts = list(_parts(graph.graph_module.graph))
    origin = origins(graph.graph_module.graph)
    differentiable = find_differentiable(graph)
    home = {node: stage for stage, _, nodes in parts for node in nodes}
    crossing = {origin[node] for node in graph.output_nodes if isinstance(node, Node)}
    for stage, _, nodes in parts:
        crossing |= {source for source in _sources(nodes, origin) if home.get(source, stage) != stage}
    regions = []
    for stage, layer, nodes in parts:
        outputs = [node for node in nodes if node in crossing]
        own = set(nodes)
        taken = [source for source in _sources(nodes, origin) if source not in own]
        taken += _missing_sizes(graph, [*taken, *nodes], taken)
        graph_module = _extract(graph, nodes, taken, outputs, origin)
        inputs = [node for node in taken if not _is_body(graph.graph_module, node)]
        fakes = [_fake_input(graph, node, node in differentiable) for node in inputs]
        structure = structure_of(nodes, differentiable, outputs, origin)
        regions.append(Region(stage, layer, graph_module, inputs, outputs, fakes, structure))
    return regions


def origins(graph: Graph) -> dict[Node, Node]:
    """For every node the one that it stands for: values that are handed through boundaries are those that entered."""
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        found[node] = node
        if _is_handed_through(node):
            boundary, position = cast(tuple[Node, int], node.args)
            found[node] = found[cast(Sequence[Node], boundary.args[0])[position]]
    return found


def held(graph_module: torch.nn.Module, node: Node) -> Any:
    """The tensor, or the body of a higher-order operator, that a ``get_attr`` node refers to."""
    value: Any = graph_module
    for part in cast(str, node.target).split("."):
        value = getattr(value, part)
    return value


def stages_of(graph: CapturedGraph, store: str = "device") -> dict[int, Stage]:
    """For each parameter, by its position among the graph's inputs, the region that uses it first."""
    position = {
        node: index
        for index, (node, described) in enumerate(zip(graph.placeholders, graph.inputs, strict=True))
        if described.kind is InputKind.PARAMETER
    }
    found: dict[int, Stage] = {}
    for index, layer, nodes in _parts(graph.graph_module.graph):
        for node in nodes:
            for argument in node.all_input_nodes:
                if argument in position:
                    found.setdefault(position[argument], Stage(index, layer, store))
    return found


def find_differentiable(graph: CapturedGraph) -> set[Node]:
    """The values that gradients may flow to: at least those, also where an operator turns out to need none."""
    found = {
        node
        for node, described, fake in zip(graph.placeholders, graph.inputs, graph.fake_inputs, strict=True)
        if isinstance(fake, Tensor) and (described.requires_grad or fake.requires_grad)
    }
    enabled = graph.grad_enabled
    for node in graph.graph_module.graph.nodes:
        if node.target is _compat.set_grad_enabled_op:
            enabled = bool(node.args[0])
        elif node.op == "call_function" and enabled and node.target not in _NOT_DIFFERENTIABLE:
            leaves = pytree.tree_leaves(node.meta.get("val"))
            floating = any(isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in leaves)
            if floating and any(argument in found for argument in node.all_input_nodes):
                found.add(node)
    return found


def structure_of(
    nodes: Sequence[Node],
    differentiable: set[Node],
    outputs: Iterable[Node] = (),
    origin: Mapping[Node, Node] | None = None,
) -> str:
    """A hash that is equal for parts of graphs that do the same to inputs that look the same.

    Args:
        nodes: the part, in order.
        differentiable: from `find_differentiable`.
        outputs: those of the nodes that the part returns.
        origin: what stands for what: values that pass a boundary are those that entered it.
    """
    number: dict[Node, int] = {}
    rows: list[Any] = []
    own = set(nodes)

    def refer(node: Node) -> str:
        source = origin.get(node, node) if origin is not None else node
        if source not in number:
            number[source] = len(number)
            assert source not in own
            constant = _constant(source) if source.op == "get_attr" else ""
            rows.append(("input", _look(source), source in differentiable, constant))
        return f"%{number[source]}"

    for node in nodes:
        arguments = torch.fx.map_arg((node.args, node.kwargs), lambda n: _Reference(refer(n)))
        number[node] = len(number)
        tags = tuple((tag, str(node.meta[tag])) for tag in _POSITION_OF_TAGS if tag in node.meta)
        rows.append((str(node.target), repr(arguments), _look(node), tags))
    rows.append([number[node] for node in outputs])
    return hashlib.sha256(repr(rows).encode()).hexdigest()


class _Reference(str):
    """Stands for a node in a description; prints without quotes, so that no string argument looks like it."""

    def __repr__(self) -> str:
        return str(self)


def _parts(graph: Graph) -> Iterator[tuple[int, str, list[Node]]]:
    """Number, name and nodes of each part; placeholders, constants, boundaries and the output belong to none."""
    stage, layer, nodes = 0, _WHOLE, list[Node]()
    for node in graph.nodes:
        if node.target is BOUNDARY:
            if nodes:
                yield stage, layer, nodes
            stage, layer, nodes = cast(int, node.args[1]), cast(str, node.args[2]), []
        elif node.op not in ("placeholder", "get_attr", "output") and not _is_handed_through(node):
            nodes.append(node)
    yield stage, layer, nodes


def _is_handed_through(node: Node) -> bool:
    return node.target is operator.getitem and cast(Node, node.args[0]).target is BOUNDARY


def _sources(nodes: Sequence[Node], origin: Mapping[Node, Node]) -> list[Node]:
    """What the nodes use, in the order of first use."""
    return list(dict.fromkeys(origin[argument] for node in nodes for argument in node.all_input_nodes))


def _missing_sizes(graph: CapturedGraph, nodes: Sequence[Node], inputs: Sequence[Node]) -> list[Node]:
    """Inputs of the graph for the symbols that stand in the sizes of a region, but are the size of none of its inputs.

    A compiler reads the value of a symbol off an input.
    """
    needed: set[sympy.Symbol] = set()
    for node in nodes:
        needed |= {symbol for size in _sizes(node) for symbol in size.free_symbols if isinstance(symbol, sympy.Symbol)}
    known = {size for node in inputs for size in _sizes(node)}
    found = []
    for node, fake in zip(graph.placeholders, graph.fake_inputs, strict=True):
        if not isinstance(fake, torch.SymInt) or node in inputs:
            continue
        expression = _compat.own_symbol(
            fake
        )  # of several that were found to be equal, the one that the others stand for
        if expression in needed - known:
            known.add(expression)
            found.append(node)
    return found


def _sizes(node: Node) -> list[sympy.Expr]:
    """The sizes of a value, or the size that it is."""
    found: list[sympy.Expr] = []
    for leaf in pytree.tree_leaves(node.meta.get("val")):
        sizes = leaf.shape if isinstance(leaf, Tensor) else (leaf,)
        found += [_expression(size) for size in sizes if isinstance(size, torch.SymInt)]
    return found


def _expression(size: torch.SymInt) -> sympy.Expr:
    return cast(sympy.Expr, size.node.shape_env.replace(size.node.expr))


def _extract(
    graph: CapturedGraph,
    nodes: Sequence[Node],
    taken: Sequence[Node],
    outputs: Sequence[Node],
    origin: Mapping[Node, Node],
) -> GraphModule:
    """The nodes as a graph of their own, with names that depend on its structure alone."""
    extracted, copies = Graph(), dict[Node, Node]()
    bodies = {node: held(graph.graph_module, node) for node in taken if _is_body(graph.graph_module, node)}
    for node in taken:
        if node not in bodies:
            copies[node] = extracted.placeholder(f"input_{len(copies)}")
            copies[node].meta = {"val": node.meta["val"]} if "val" in node.meta else {}
    for node in bodies:
        copies[node] = extracted.get_attr(cast(str, node.target))
    for node in nodes:
        copies[node] = extracted.node_copy(node, lambda argument: copies[origin[argument]])
        copies[node].name = f"{getattr(node.target, '__name__', 'node').replace('.', '_')}_{len(copies)}"
    extracted.output([copies[node] for node in outputs])
    return GraphModule({cast(str, node.target): body for node, body in bodies.items()}, extracted)


def _fake_input(graph: CapturedGraph, node: Node, requires_grad: bool) -> Any:
    if node.op == "placeholder":
        return graph.fake_inputs[graph.placeholders.index(node)]
    value = held(graph.graph_module, node) if node.op == "get_attr" else node.meta["val"]
    if not isinstance(value, Tensor):
        return value
    with graph.fake_mode, torch.no_grad():
        fake = value if isinstance(value, _compat.FakeTensor) else graph.fake_mode.from_tensor(value)
        return fake.detach().requires_grad_(requires_grad and (fake.is_floating_point() or fake.is_complex()))


def _is_body(graph_module: torch.nn.Module, node: Node) -> bool:
    """Whether a node is the body of a higher-order operator, and so no value that could be an input."""
    return node.op == "get_attr" and isinstance(held(graph_module, node), torch.nn.Module)


def _constant(node: Node) -> str:
    """Identity of the body of a higher-order operator; tensors are inputs, whatever they hold."""
    module = node.graph.owning_module
    body = held(module, node) if module is not None else None
    return body.code if isinstance(body, GraphModule) else ""


def _look(node: Node) -> str:
    """What is known about a value before it exists."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr" and node.graph.owning_module is not None:
        value = held(node.graph.owning_module, node)
    return repr([_look_of(leaf) for leaf in pytree.tree_leaves(value)])


def _look_of(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return str(value)
    shape, strides = [str(size) for size in value.shape], [str(size) for size in value.stride()]
    return shape, strides, str(value.dtype), str(value.device)
