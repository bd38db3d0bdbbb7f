"""Operators that cut a tensor along one axis, join several, or write into a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.axes.elementwise import broadcast
from graphopt.passes.truegrad.axes.indexing import index as index_rule
from graphopt.passes.truegrad.axes.indexing import row_numbers, selected
from graphopt.passes.truegrad.sample_axis import (
    Known,
    Layout,
    Lost,
    SampleAxis,
    Size,
    argument_of,
    axis_rule,
    functional_name,
    shape_of,
    size_of,
    value_of,
)

MEET = "samples meet on different axes"
MASKED_WRITE = (
    "values are written through a mask, in an order that is not known: use torch.where(mask, values, x), "
    "with values of x's shape"
)


@axis_rule(
    "split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk"
)
def split(node: Node, value: Tensor, known: Known) -> Layout:
    """Cut along an axis that is not the samples', or between whole sets of samples."""
    kept = _along(node, known, argument_of(node, 2, "dim", 0))
    layout = known.layout(node.args[0])
    if isinstance(kept, SampleAxis) or not isinstance(layout, SampleAxis):
        return kept
    pieces = [_sets(layout, shape_of(piece)[layout.axis]) for piece in node.meta["val"]]
    return (_whole_sets(layout, value) or kept) if None not in pieces else kept


@axis_rule("hsplit", "vsplit", "dsplit")
def split_along(node: Node, value: Tensor, known: Known) -> Layout:
    """The axis is in the name."""
    dim = {"hsplit": 1, "vsplit": 0, "dsplit": 2}[functional_name(node)]
    return _along(node, known, dim if value.ndim > 1 else 0)


@axis_rule(
    "scatter", "scatter_add", "scatter_reduce", "select_scatter", "slice_scatter", "index_add", "index_copy", "index_fill",
    "index_reduce",
)  # fmt: skip
def scatter(node: Node, value: Tensor, known: Known) -> Layout:
    """Write along an axis that is not the samples', or add rows up that belong to the row which they are added to."""
    name = functional_name(node)
    dim = cast(int, argument_of(node, 2 if name in ("select_scatter", "slice_scatter") else 1, "dim", 0)) % value.ndim
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    _, *others = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
    written = [own for a in others if isinstance(own := known.layout(a), SampleAxis)]
    if dim != layout.axis:
        shift = int(name == "select_scatter" and dim < layout.axis)
        return layout if all(own == layout.at(layout.axis - shift) for own in written) else Lost(node, MEET)
    numbers = row_numbers(others[0]) if name == "index_add" and others else None
    if numbers is not None and written == [selected(layout, numbers)]:
        return layout
    return Lost(node, "rows are written to the rows of other samples, or to their own, as an index says")


@axis_rule("diagonal_scatter")
def diagonal_scatter(node: Node, value: Tensor, known: Known) -> Layout:
    """Write to a diagonal of axes that are not the samples'."""
    layout = known.layout(node.args[0])
    pair = [cast(int, argument_of(node, place, f"dim{place - 2}", place - 3)) % value.ndim for place in (3, 4)]
    own = isinstance(layout, SampleAxis) and layout.axis not in pair
    return layout if own else Lost(node, "a diagonal through the samples")


@axis_rule("slice", "narrow")
def cut(node: Node, value: Tensor, known: Known) -> Layout:
    """A slice of an axis that is not the samples', the whole of any, or whole sets of samples."""
    layout = known.layout(node.args[0])
    if isinstance(layout, SampleAxis) and shape_of(value) == shape_of(value_of(node.args[0])):
        return layout
    kept = _along(node, known, argument_of(node, 1, "dim", 0))
    if isinstance(kept, SampleAxis) or not isinstance(layout, SampleAxis):
        return kept
    start, step = (
        argument_of(node, 2, "start", 0),
        argument_of(node, 4, "step", 1) if functional_name(node) == "slice" else 1,
    )
    first = _number(start if start is not None else 0)
    if step != 1 or first is None or (first != 0 and _sets(layout, first) is None):
        return kept
    return _whole_sets(layout, value) or kept


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
    """Join along an axis that is not the samples', or whole sets of samples end to end."""
    return _joined(node, value, known, cast(int, argument_of(node, 1, "dim", 0)) % value.ndim)


@axis_rule("hstack", "vstack", "dstack", "column_stack")
def join_along(node: Node, value: Tensor, known: Known) -> Layout:
    """The axis is in the name."""
    name = functional_name(node)
    least = {"hstack": 2, "vstack": 2, "dstack": 3, "column_stack": 2}[name]
    if any(value_of(part).ndim < least for part in cast(Sequence[Any], node.args[0])):
        return Lost(node, f"{name} of tensors with fewer than {least} axes")
    return _joined(node, value, known, {"hstack": 1, "vstack": 0, "dstack": 2, "column_stack": 1}[name])


@axis_rule("stack")
def stack(node: Node, value: Tensor, known: Known) -> Layout:
    """A new axis."""
    dim = cast(int, argument_of(node, 1, "dim", 0)) % value.ndim
    layouts = [known.layout(part) for part in cast(Sequence[Any], node.args[0])]
    found = {part.at(part.axis) for part in layouts if isinstance(part, SampleAxis)}
    if len(found) != 1:
        return Lost(node, MEET)
    part = found.pop()
    return part.at(part.axis + (dim <= part.axis))


@axis_rule("index_put", "_unsafe_index_put")
def index_put(node: Node, value: Tensor, known: Known) -> Layout:
    """``y[:, rows] = x``, ``y[arange(batch), last] = x``; through a mask, one number."""
    layout, written = known.layout(node.args[0]), known.layout(node.args[2])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    indices = [index for index in cast(Sequence[Any], node.args[1]) if index is not None]
    if any(value_of(index).dtype in (torch.bool, torch.uint8) for index in indices):
        one = value_of(node.args[2]).numel() == 1 and not isinstance(written, SampleAxis)
        return layout if one else Lost(node, MASKED_WRITE)
    place = index_rule(node, value, known)
    if not isinstance(place, SampleAxis):
        return place
    if isinstance(written, SampleAxis):
        places = value_of(node.args[0]).ndim - len(indices) + max(value_of(index).ndim for index in indices)
        written = written.at(written.axis + places - value_of(node.args[2]).ndim)
        if written != place.at(place.axis):
            return Lost(node, MEET)
    return layout


@axis_rule("masked_scatter")
def masked_scatter(node: Node, value: Tensor, known: Known) -> Layout:
    """Takes the elements of its source one after the other, from whichever sample they are."""
    return Lost(node, MASKED_WRITE)


@axis_rule("copy_")
def copy(node: Node, value: Tensor, known: Known) -> Layout:
    """What is written to holds what was written."""
    source = known.layout(node.args[1])
    if isinstance(source, Lost):
        return source
    return broadcast(node, value.ndim, known)


def _joined(node: Node, value: Tensor, known: Known, dim: int) -> Layout:
    layouts = [known.layout(part) for part in cast(Sequence[Any], node.args[0])]
    found = {part.at(part.axis) for part in layouts if isinstance(part, SampleAxis)}
    if len(found) == 1 and next(iter(found)).axis != dim:
        return found.pop()
    # The outer repetitions of the parts follow one another.
    parts = [layout for layout in layouts if isinstance(layout, SampleAxis) and layout.axis == dim]
    if len(parts) == len(layouts) and len({(part.num, part.inner, part.order) for part in parts}) == 1:
        return replace(parts[0].at(dim), outer=cast(Size, sum(part.outer for part in parts)))
    return Lost(node, "samples are joined end to end")


def _whole_sets(layout: SampleAxis, value: Tensor) -> SampleAxis | None:
    """The layout of a piece that holds each sample as often as every other."""
    outer = _sets(layout, shape_of(value)[layout.axis])
    return None if outer is None else replace(layout.at(layout.axis), outer=outer)


def _sets(layout: SampleAxis, rows: Size) -> Size | None:
    """How many times all samples fill these rows; ``None`` if a row is left."""
    ratio = sympy.cancel(rows / (layout.num * layout.inner))
    return cast(Size, ratio) if ratio.as_numer_denom()[1] == 1 and ratio != 0 else None


def _number(value: Any) -> Size | None:
    if isinstance(value, Node):
        value = value.meta.get("val")
    return size_of(value) if isinstance(value, int | torch.SymInt) else None


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
