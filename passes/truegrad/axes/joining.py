"""Operators that cut a tensor along one axis, join several, or write into a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import (
    Known,
    Layout,
    Lost,
    SampleAxis,
    argument_of,
    axis_rule,
    shape_of,
    value_of,
)


@axis_rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def split(node: Node, value: Tensor, known: Known) -> Layout:
    """Cut along an axis that is not the samples'."""
    return _along(node, known, argument_of(node, 2, "dim", 0))


@axis_rule("scatter", "scatter_add", "scatter_reduce", "select_scatter", "slice_scatter", "diagonal_scatter")
def scatter(node: Node, value: Tensor, known: Known) -> Layout:
    """Write along an axis that is not the samples'."""
    position = 2 if cast(Any, node.target).overloadpacket.__name__ in ("select_scatter", "slice_scatter") else 1
    return _along(node, known, argument_of(node, position, "dim", 0))


@axis_rule("slice", "narrow")
def cut(node: Node, value: Tensor, known: Known) -> Layout:
    """A slice of an axis that is not the samples', or the whole of any."""
    layout = known.layout(node.args[0])
    if isinstance(layout, SampleAxis) and shape_of(value) == shape_of(value_of(node.args[0])):
        return layout
    return _along(node, known, argument_of(node, 1, "dim", 0))


@axis_rule("unfold")
def unfold(node: Node, value: Tensor, known: Known) -> Layout:
    """Windows along an axis that is not the samples'."""
    return _along(node, known, argument_of(node, 1, "dimension", 0))


@axis_rule("select")
def select(node: Node, value: Tensor, known: Known) -> Layout:
    """One place of an axis that is not the samples'."""
    return _without(node, known, node.args[1])


@axis_rule("unbind")
def unbind(node: Node, value: Tensor, known: Known) -> Layout:
    """All places of an axis that is not the samples'."""
    return _without(node, known, argument_of(node, 1, "dim", 0))


@axis_rule("cat", "concat", "concatenate")
def cat(node: Node, value: Tensor, known: Known) -> Layout:
    """Join along an axis that is not the samples'."""
    dim = cast(int, argument_of(node, 1, "dim", 0)) % value.ndim
    layouts = [known.layout(part) for part in cast(Sequence[Any], node.args[0])]
    found = {part.at(part.axis) for part in layouts if isinstance(part, SampleAxis)}
    if len(found) == 1 and next(iter(found)).axis != dim:
        return found.pop()
    return Lost(node, "samples are joined end to end")


@axis_rule("stack")
def stack(node: Node, value: Tensor, known: Known) -> Layout:
    """A new axis."""
    dim = cast(int, argument_of(node, 1, "dim", 0)) % value.ndim
    layouts = [known.layout(part) for part in cast(Sequence[Any], node.args[0])]
    found = {part.at(part.axis) for part in layouts if isinstance(part, SampleAxis)}
    if len(found) != 1:
        return Lost(node, "samples meet on different axes")
    part = found.pop()
    return part.at(part.axis + (dim <= part.axis))


@axis_rule("copy_")
def copy(node: Node, value: Tensor, known: Known) -> Layout:
    """What is written to holds what was written."""
    source = known.layout(node.args[1])
    if isinstance(source, Lost):
        return source
    found = {
        layout.at(layout.axis + value.ndim - value_of(argument).ndim)
        for argument in node.all_input_nodes
        if isinstance(layout := known.layout(argument), SampleAxis)
    }
    return found.pop() if len(found) == 1 else Lost(node, "samples meet on different axes")


def _along(node: Node, known: Known, dim: Any) -> Layout:
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    dim = cast(int, dim) % value_of(node.args[0]).ndim
    return layout if dim != layout.axis else Lost(node, "samples are cut apart")


def _without(node: Node, known: Known, dim: Any) -> Layout:
    kept = _along(node, known, dim)
    if not isinstance(kept, SampleAxis):
        return kept
    dim = cast(int, dim) % value_of(node.args[0]).ndim
    return kept.at(kept.axis - (dim < kept.axis))
