"""Follow the samples through a graph, from the inputs that hold them, one operator at a time."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphopt.aliasing import is_view, written_arguments
from graphopt.capture import CapturedGraph, InputKind
from graphopt.errors import SampleAxisError
from graphopt.inspect.location import describe
from graphopt.passes.truegrad import axes, rules  # noqa: F401  register the axis rules
from graphopt.passes.truegrad.axes.elementwise import broadcast
from graphopt.passes.truegrad.axes.indexing import RAGGED_BAGS, counts_up
from graphopt.passes.truegrad.sample_axis import (
    FREE,
    Free,
    Layout,
    Layouts,
    Lost,
    SampleAxis,
    Size,
    axis_rules,
    functional_name,
    is_pointwise,
    shape_of,
    size_of,
    value_of,
)

BETWEEN_GRAPHS = (
    "{name} was computed between two graphs, where nobody follows the samples. Remove the graph break (TORCH_LOGS=graph_breaks "
    "shows it), or, if the batch's samples lie on one axis of all such tensors, in their order, say which: "
    "options={{'sample_axis_between_graphs': 0}}"
)
_CREATIONS = frozenset(
    "new_zeros new_ones new_empty new_full new_empty_strided _new_zeros_with_same_feature_meta".split()
)


def find_sample_axes(graph: CapturedGraph) -> Layouts:
    """The layout of every value of the graph.

    Raises:
        SampleAxisError: two inputs count samples differently and meet in one operator.
    """
    return _Propagation(graph).run()


class _Propagation:
    def __init__(self, graph: CapturedGraph) -> None:
        self.graph = graph
        self.layouts: Layouts = {}
        self.sources: dict[Size, tuple[int, int]] = {}  # number of samples -> the input that counts them
        self._order: tuple[Node, ...] | None = None  # of the samples that enter the operator that is being visited

    def run(self) -> Layouts:
        candidates = [
            (position, described.sample_axis, shape_of(fake)[described.sample_axis])
            for position, (described, fake) in enumerate(zip(self.graph.inputs, self.graph.fake_inputs, strict=True))
            if described.kind is InputKind.SAMPLES and described.sample_axis is not None
        ]
        # Dynamo keeps a size symbolic unless the model insists on its value; a size that it fixed beside one that it kept
        # (a mask or a table that was passed in) does not count samples.
        symbolic = [candidate for candidate in candidates if candidate[2].free_symbols]
        samples = {position: (axis, num) for position, axis, num in symbolic or candidates}
        for position, (node, described) in enumerate(zip(self.graph.placeholders, self.graph.inputs, strict=True)):
            self.layouts[node] = FREE
            if position in samples:
                axis, num = samples[position]
                source = self.sources.setdefault(num, (position, axis))
                self.layouts[node] = SampleAxis(axis, num, source)
            elif described.kind is InputKind.BETWEEN and described.requires_grad:
                self.layouts[node] = Lost(node, BETWEEN_GRAPHS.format(name=described.name))
            elif described.kind is InputKind.SAMPLES and described.requires_grad:
                self.layouts[node] = Lost(node, "an input without samples that depends on parameters")
        for node in self.graph.graph_module.graph.nodes:
            if node.op == "call_function":
                self.layouts[node] = self._visit(node)
            elif node.op == "get_attr":
                self.layouts[node] = FREE
        return self.layouts

    def layout(self, node: Any) -> Layout:
        """The layout of a node with one output; `Free` for anything that is not a node."""
        found = self.layouts.get(node, FREE) if isinstance(node, Node) else FREE
        if isinstance(found, SampleAxis) and found.order is None:
            return replace(found, order=self._order)  # a constant fits the order of what it meets
        return found if not isinstance(found, list) else FREE

    def _visit(self, node: Node) -> Layout | list[Layout]:
        if not isinstance(node.target, torch._ops.OpOverload):
            if node.target is operator.getitem:
                whole = self.layouts[cast(Node, node.args[0])]
                return whole[cast(int, node.args[1])] if isinstance(whole, list) else whole
            return FREE  # sizes and grad mode
        value = node.meta.get("val")
        outputs = list(value) if isinstance(value, list | tuple) else [value]
        found = [self._visit_output(node, output) for output in outputs]
        if _writes(node):
            self._written(node, found[0])
        return found if isinstance(value, list | tuple) else found[0]

    def _visit_output(self, node: Node, value: Any) -> Layout:
        if not isinstance(value, Tensor):
            return FREE
        self._order = None
        inputs = [self.layout(argument) for argument in node.all_input_nodes if _is_tensor(argument)]
        orders = {layout.order for layout in inputs if isinstance(layout, SampleAxis) and layout.order is not None}
        if orders:
            self._order = orders.pop() if len(orders) == 1 else ()
        known = [layout for layout in inputs if isinstance(layout, SampleAxis)]
        if not known:
            lost = next((layout for layout in inputs if isinstance(layout, Lost)), None)
            return lost if lost is not None else self._fresh(node, value)
        op = cast(Any, node.target).overloadpacket.__name__
        if {layout.num for layout in known} != {known[0].num}:
            if op == "embedding_bag":  # indices and offsets of different lengths
                return Lost(node, RAGGED_BAGS)
            self._refuse(node, known)
        if op in _CREATIONS:
            return self._fresh(node, value)
        rule = axis_rules.get(op) or axis_rules.get(functional_name(node))
        if rule is not None:
            axis = rule(node, value, self)
        elif is_pointwise(node.target):
            axis = broadcast(node, value.ndim, self)
        else:
            axis = Lost(node, f"{op} is not known to keep samples apart")
        if isinstance(axis, SampleAxis) and axis.axis >= value.ndim:
            raise AssertionError(f"sample axis {axis.axis} of {describe(node)} with {value.ndim} axes")
        return axis

    def _written(self, node: Node, result: Layout) -> None:
        """An operator writes in place: what it wrote to, and every view of it, now holds samples."""
        if isinstance(result, Free):
            return
        for argument in written_arguments(node):
            target: Any = argument
            while target is not None:
                if isinstance(self.layout(target), Free):
                    self.layouts[target] = Lost(node, "samples are written into a tensor that has no axis for them")
                target = target.args[0] if target.op == "call_function" and is_view(target) else None

    def _fresh(self, node: Node, value: Tensor) -> Layout:
        """A value that no sample enters may still have rows for them: ``x.new_zeros(batch)``, ``token.expand(batch, 1, d)``."""
        symbols = {symbol for num in self.sources for symbol in num.free_symbols}
        sizes = shape_of(value)
        found = [axis for axis, size in enumerate(sizes) if size.free_symbols & symbols]
        if not found:
            return FREE
        if len(found) == 1 and sizes[found[0]] in self.sources:
            num = sizes[found[0]]
            order = None if self._is_constant(node) else ()
            return SampleAxis(found[0], num, self.sources[num], is_iota=counts_up(node), order=order)
        return self._repeated(node, value) or Lost(node, "rows in an order that is not known")

    def _is_constant(self, node: Node) -> bool:
        """Whether a value is made from sizes alone, and stays as it is made."""
        op = cast(Any, node.target).overloadpacket.__name__
        return (op in _CREATIONS or not any(_is_tensor(a) for a in node.all_input_nodes)) and not _is_written_to(node)

    def _repeated(self, node: Node, value: Tensor) -> Layout | None:
        """``value.repeat(batch, 1)``: each sample has a copy of the whole value, one behind the other."""
        if node.target is not torch.ops.aten.repeat.default:
            return None
        times = [size_of(item.meta["val"] if isinstance(item, Node) else item) for item in cast(Any, node.args[1])]
        found = [axis for axis, count in enumerate(times) if count in self.sources]
        others = {symbol for axis, count in enumerate(times) if axis not in found for symbol in count.free_symbols}
        copied = value_of(node.args[0])
        if len(found) != 1 or others or any(size.free_symbols for size in shape_of(copied)):
            return None
        (axis,) = found
        own = axis - (value.ndim - copied.ndim)
        rows = shape_of(copied)[own] if own >= 0 else sympy.S.One
        return SampleAxis(axis, times[axis], self.sources[times[axis]], inner=rows)

    def _refuse(self, node: Node, known: Sequence[SampleAxis]) -> None:
        names = [self.graph.inputs[position].name for position in sorted({layout.source[0] for layout in known})]
        option = {name.rpartition(".")[2]: None for name in names[1:]}
        raise SampleAxisError(
            f"{describe(node)} joins values whose samples are counted by different inputs: {', '.join(names)}. Say which input "
            f"holds samples and on which axis, for example options={{'sample_axis': {option}}} for inputs without samples"
        )


def _writes(node: Node) -> bool:
    return bool(cast(Any, node.target)._schema.is_mutable)


def _is_written_to(node: Node) -> bool:
    """Whether an operator writes in place into a value, or into a view of it."""
    users = [user for user in node.users if isinstance(user.target, torch._ops.OpOverload)]
    return any(node in written_arguments(user) or (is_view(user) and _is_written_to(user)) for user in users)


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or isinstance(value, list | tuple)
