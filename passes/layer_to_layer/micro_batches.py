"""Which layers can run on a few samples at a time, and where the samples are in what passes between them.

A layer is split into micro-batches if every operator in it computes each sample's row from that sample alone. Where samples
meet (batch normalisation in training, a loss over the batch, an index that reorders), where a buffer is updated or where a number
depends on the size of the batch, the layer runs on the whole batch, and the report says why.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt.aliasing import root_of, written_arguments
from graphopt.capture import CapturedGraph
from graphopt.errors import SampleAxisError
from graphopt.inspect.location import describe
from graphopt.passes.layer_to_layer.segments import Segment
from graphopt.passes.truegrad.propagation import find_sample_axes
from graphopt.passes.truegrad.sample_axis import (
    Free,
    Layout,
    Layouts,
    Lost,
    SampleAxis,
    argument_of,
    functional_name,
    shape_of,
    size_of,
)
from graphopt.regions import MicroBatches, Rows

# Operators with statistics of the batch: position and name of the argument that says whether they use, and update, them.
_BATCH_STATISTICS = {
    "batch_norm": (5, "training"),
    "native_batch_norm": (5, "training"),
    "_native_batch_norm_legit": (5, "training"),
    "cudnn_batch_norm": (5, "training"),
    "miopen_batch_norm": (5, "training"),
    "_batch_norm_with_update": (99, ""),
}
_INDEXED_BY_NUMBER = frozenset("index index_put gather index_select _unsafe_index".split())
_ONE_SIZE = "the graph was captured for one batch size only: Python code or an option fixed it, or the batch has a single sample"


@dataclass
class Samples:
    """Where the samples are in a graph.

    Attributes:
        layouts: of every node.
        symbols: the sizes that count samples.
        problem: why nothing is known; then no layer is split.
        names: of the graph's inputs.
    """

    layouts: Layouts = field(default_factory=dict)
    symbols: frozenset[sympy.Symbol] = frozenset()
    problem: str | None = None
    names: Mapping[Node, str] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: CapturedGraph) -> Samples:
        """Follow the samples through the graph."""
        try:
            layouts = find_sample_axes(graph)
        except SampleAxisError as error:
            return cls(problem=str(error))
        nums = {layout.num for node in graph.placeholders if isinstance(layout := layouts[node], SampleAxis)}
        symbols = frozenset(symbol for num in nums for symbol in num.free_symbols)
        names = {node: described.name for node, described in zip(graph.placeholders, graph.inputs, strict=True)}
        return cls(layouts, symbols, None if symbols else _ONE_SIZE, names)

    def why_whole(self, node: Node) -> str | None:
        """Why an operator needs all samples at once; ``None`` if it does not."""
        if node.target is operator.getitem or not isinstance(node.target, torch._ops.OpOverload):
            return None
        if _takes_statistics(node):
            return f"{describe(node)} takes statistics of the batch"
        changed = [root for argument in written_arguments(node) if (root := root_of(argument)) in self.names]
        if changed:
            return f"{describe(node)} updates {self.names[changed[0]]}"
        if self._reads_batch_size(node):
            return f"{describe(node)} computes with the number of samples"
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        layouts = self.layouts.get(node, Free())
        values = pytree.tree_leaves(node.meta.get("val"))
        for layout, value in zip(
            layouts if isinstance(layouts, list) else [layouts] * len(values), values, strict=True
        ):
            if isinstance(value, Tensor) and (why := self._why_whole_value(node, layout, value, random)):
                return why
        return None

    def rows(self, node: Node) -> Rows | None:
        """How a value is cut at samples; ``None`` if it belongs to all of them."""
        layout = self.layouts.get(node)
        if isinstance(layout, SampleAxis) and layout.outer == 1 and not layout.order:
            return Rows(layout.axis, layout.inner)
        return None

    def _why_whole_value(self, node: Node, layout: Layout, value: Tensor, random: bool) -> str | None:
        if isinstance(layout, Lost):
            return f"{layout.why}, at {describe(layout.node)}"
        if isinstance(layout, SampleAxis):
            if layout.outer != 1:
                return f"{describe(node)} holds all samples several times, one batch behind the other"
            if layout.order:
                return f"{describe(node)} brings samples into another order"
            by_number = all(_is_index(user) for user in node.users)
            return None if not layout.is_iota or by_number else f"{describe(node)} numbers the samples of the batch"
        if any(size.free_symbols & self.symbols for size in shape_of(value)):
            return f"{describe(node)} has rows for the samples in an order that is not known"
        return f"{describe(node)} draws random numbers that all samples share" if random else None

    def _reads_batch_size(self, node: Node) -> bool:
        """Whether the number of samples enters as a number rather than as a size."""
        target = cast(torch._ops.OpOverload, node.target)
        if target.namespace == "graphopt" or target.overloadpacket.__name__ == "arange":
            return False  # all that they are told are sizes
        for argument, declared in zip(node.args, target._schema.arguments, strict=False):
            if "SymInt" in str(declared.real_type) or not isinstance(argument, Node):
                continue
            value = argument.meta.get("val")
            if isinstance(value, torch.SymInt) and size_of(value).free_symbols & self.symbols:
                return True
            if isinstance(value, torch.SymFloat) and value.node.expr.free_symbols & self.symbols:
                return True
        return False


def plan_micro_batches(graph: CapturedGraph, segments: Sequence[Segment], samples: Samples) -> MicroBatches:
    """Which segments are split, and how their values are cut.

    Args:
        graph: before its boundaries are inserted.
        segments: its layers, in order.
        samples: of the graph.
    """
    if samples.problem is not None:
        return MicroBatches({}, dict.fromkeys(range(len(segments)), samples.problem), samples.symbols)
    whole: dict[int, str] = {}
    for stage, segment in enumerate(segments):
        own = set(segment.nodes)
        entering = {a for node in segment.nodes for a in node.all_input_nodes if a not in own}
        lost = next((a for a in entering if isinstance(samples.layouts.get(a), Lost)), None)
        telling = sorted(segment.nodes, key=lambda node: not _takes_statistics(node))
        why = next((reason for node in telling if (reason := samples.why_whole(node))), None)
        if why is None and lost is not None:
            why = f"{lost.name}, which enters it, has no axis for the samples"
        if why is not None:
            whole[stage] = why
    cut = {node.name: rows for node in graph.graph_module.graph.nodes if (rows := samples.rows(node)) is not None}
    return MicroBatches(cut, whole, samples.symbols)


def split_tail(segments: Sequence[Segment], samples: Samples) -> list[Segment]:
    """Cut the last segment where samples meet, so that what comes before runs in micro-batches."""
    if samples.problem is not None or not segments:
        return list(segments)
    *front, last = segments
    mixing: set[Node] = set()
    for node in last.nodes:
        if samples.why_whole(node) or any(argument in mixing for argument in node.all_input_nodes):
            mixing.add(node)
    head = [node for node in last.nodes if node not in mixing]
    if not mixing or not head or not any(isinstance(samples.layouts.get(node), SampleAxis) for node in head):
        return list(segments)
    tail = [node for node in last.nodes if node in mixing]
    return [*front, Segment(last.name, head, last.layer, last.container), Segment(f"samples meet {last.name}", tail)]


def _takes_statistics(node: Node) -> bool:
    """Whether an operator normalises by statistics of the batch."""
    name = functional_name(node) if isinstance(node.target, torch._ops.OpOverload) else ""
    return name in _BATCH_STATISTICS and bool(argument_of(node, *_BATCH_STATISTICS[name], True))


def _is_index(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.overloadpacket.__name__.removesuffix("_") in _INDEXED_BY_NUMBER
