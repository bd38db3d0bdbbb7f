"""Look-ups: tables by the samples' own numbers, rows by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.axes.reordering import reordered
from graphopt.passes.truegrad.sample_axis import (
    FREE,
    Free,
    Known,
    Layout,
    Lost,
    SampleAxis,
    Size,
    argument_of,
    axis_rule,
    axis_rules,
    functional_name,
    shape_of,
    size_of,
    value_of,
)

REORDERED = (
    "samples are reordered by an index, and which sample a row belongs to is not known. Reorder the batch in front of the model, "
    "or the rows within each sample: x.gather(1, index)"
)
MASKED = (
    "samples are selected by a mask, and which sample a row belongs to is not known. Keep all rows and weight them: "
    "torch.where(mask, x, 0), or a loss that is multiplied with the mask"
)
RAGGED_BAGS = (
    "bags of different lengths (offsets). Give the bags as a matrix of indices, one row for each sample, filled up with "
    "padding_idx: embedding_bag(indices_2d, table, padding_idx=...)"
)


@axis_rule("embedding")
def embedding(node: Node, value: Tensor, known: Known) -> Layout:
    """The result has the axes of the indices, and one more."""
    own = cast(Any, node.target).namespace == "graphopt"  # `ops.embedding`
    layout, indices = known.layout(node.args[0]), known.layout(node.args[3 if own else 1])
    if isinstance(indices, SampleAxis) and not isinstance(layout, SampleAxis):
        return indices.at(indices.axis)
    return Lost(node, "a table that differs from sample to sample")


@axis_rule("index_select")
def index_select(node: Node, value: Tensor, known: Known) -> Layout:
    """Rows of a table without samples by the samples' numbers, or the same places of each sample."""
    dim = cast(int, node.args[1]) % value.ndim
    layout, indices = known.layout(node.args[0]), known.layout(node.args[2])
    if isinstance(layout, Free) and isinstance(indices, SampleAxis):
        return indices.at(dim)
    if isinstance(layout, SampleAxis) and dim != layout.axis:
        return layout if isinstance(indices, Free) else Lost(node, REORDERED)
    numbers = row_numbers(cast(Node, node.args[2])) if isinstance(layout, SampleAxis) else None
    if isinstance(layout, SampleAxis) and numbers is not None:
        return selected(layout, numbers) or Lost(node, REORDERED)
    if isinstance(layout, SampleAxis):
        return reordered(layout, cast(Node, node.args[2])) or Lost(node, REORDERED)
    return Lost(node, REORDERED)


@axis_rule("gather", "take_along_dim", "take")
def gather(node: Node, value: Tensor, known: Known) -> Layout:
    """Each row picks from its own, or from a table without samples."""
    op = functional_name(node)
    indices_at, dim_at = (2, 1) if op == "gather" else (1, 2)
    layout, indices = known.layout(node.args[0]), known.layout(node.args[indices_at])
    if not isinstance(indices, SampleAxis):
        return Lost(node, REORDERED)
    if isinstance(layout, Free):
        shift = value.ndim - value_of(node.args[indices_at]).ndim  # take_along_dim broadcasts
        return indices.at(indices.axis + shift)
    dim = argument_of(node, dim_at, "dim")
    if op == "take" or dim is None or not isinstance(layout, SampleAxis):
        return Lost(node, REORDERED)
    same = layout.at(layout.axis) == indices.at(indices.axis)
    return indices.at(indices.axis) if same and layout.axis != dim % value.ndim else Lost(node, REORDERED)


def counts_up(node: Node) -> bool:
    """Whether a node gives 0, 1, 2, ..."""
    op, args = node.target, cast(Any, node.args)
    return op is torch.ops.aten.arange.default or (
        (op is torch.ops.aten.arange.start and args[0] == 0)
        or (op is torch.ops.aten.arange.start_step and args[0] == 0 and (len(args) < 3 or args[2] == 1))
    )


def row_numbers(index: Node) -> SampleAxis | None:
    """How an index counts the rows of a table, if it is ``arange(rows)`` in another shape, each perhaps several times.

    Returns:
        A layout in which ``num`` is the number of rows, not of samples.
    """
    if counts_up(index):
        return SampleAxis(0, shape_of(value_of(index))[0], (-1, -1))
    if not isinstance(index.target, torch._ops.OpOverload):
        return None
    op = index.target.overloadpacket.__name__
    first = index.args[0] if index.args else None
    if op not in _SAME_NUMBERS or not isinstance(first, Node):
        return None
    found = row_numbers(first)
    if found is None:
        return None
    layout = axis_rules[op](index, value_of(index), _Only(first, found))
    return layout if isinstance(layout, SampleAxis) else None


def selected(layout: SampleAxis, numbers: SampleAxis) -> SampleAxis | None:
    """Where the samples are in ``table[index]``, for an index as `row_numbers` gives it that counts all rows of the table."""
    if sympy.cancel(layout.outer * layout.num * layout.inner - numbers.num) != 0:
        return None
    outer, inner = layout.outer * numbers.outer, layout.inner * numbers.inner
    return replace(layout, outer=outer, inner=inner, is_iota=False)


_SAME_NUMBERS = frozenset(
    "view reshape unsqueeze squeeze flatten unflatten expand repeat repeat_interleave clone contiguous to _to_copy detach alias "
    "transpose permute t _unsafe_view expand_as".split()
)


@dataclass(frozen=True)
class _Only:
    """Knows the layout of one node."""

    node: Node
    known: SampleAxis

    def layout(self, node: Any) -> Layout:
        return self.known if node is self.node else FREE


@axis_rule("embedding_bag")
def embedding_bag(node: Node, value: Tensor, known: Known) -> Layout:
    """Bags of one length, as a matrix of indices gives: each bag takes the place of its rows."""
    layout = known.layout(node.args[1])
    length = bag_length(node)
    if length is None or not isinstance(layout, SampleAxis):
        return Lost(node, RAGGED_BAGS)
    if isinstance(known.layout(node.args[0]), SampleAxis):
        return Lost(node, "a table that differs from sample to sample")
    inner = sympy.cancel(layout.inner / length)
    if layout.axis != 0 or inner.as_numer_denom()[1] != 1:
        return Lost(node, "bags cut through samples")
    # Beside the bags, the operator returns what its backward needs; only maxima have a row for each bag.
    return replace(layout.at(0), inner=inner) if value.ndim == 2 else Lost(node, "numbers that only its backward needs")


def bag_length(node: Node) -> Size | None:
    """How many indices each bag of an ``embedding_bag`` holds, if all hold as many; ``None`` if the graph does not say."""
    offsets, include_last_offset = node.args[2], argument_of(node, 7, "include_last_offset", False)
    if include_last_offset or not isinstance(offsets, Node) or offsets.target is not torch.ops.aten.arange.start_step:
        return None
    start, end, step = cast(Any, offsets.args[:3])
    start, end, step = (
        size_of(item.meta["val"]) if isinstance(item, Node) else sympy.sympify(item) for item in (start, end, step)
    )
    whole = start == 0 and end == shape_of(value_of(node.args[1]))[0]
    return step if whole else None


@axis_rule("index", "_unsafe_index")
def index(node: Node, value: Tensor, known: Known) -> Layout:
    """``x[:, rows]``, ``x[arange(batch), last]``, ``table[ids]``."""
    layout = known.layout(node.args[0])
    indices = list(cast(Sequence[Any], node.args[1]))
    given = [position for position, index in enumerate(indices) if index is not None]
    if any(value_of(indices[position]).dtype is torch.bool for position in given):
        return Lost(node, MASKED)
    adjacent = given == list(range(given[0], given[-1] + 1))
    block = max(value_of(indices[position]).ndim for position in given)
    start = given[0] if adjacent else 0
    rows = {
        axis.at(start + axis.axis + block - value_of(indices[position]).ndim)
        for position in given
        if isinstance(axis := known.layout(indices[position]), SampleAxis)
    }
    if isinstance(layout, SampleAxis):
        if layout.axis in given:
            numbers = row_numbers(indices[layout.axis]) if len(given) == 1 else None
            if numbers is not None and (found := selected(layout, numbers)) is not None:
                return found.at(start + numbers.axis)
            if len(given) == 1 and (moved := reordered(layout, indices[layout.axis])) is not None:
                return moved
            own = known.layout(indices[layout.axis])
            follows = isinstance(own, SampleAxis) and own.is_iota and layout.is_plain
            return rows.pop() if follows and len(rows) == 1 else Lost(node, REORDERED)
        if rows:
            return Lost(node, "samples meet on different axes")
        before = sum(position < layout.axis for position in given)
        shifted = layout.axis - before + (block if start <= layout.axis - before or not adjacent else 0)
        return layout.at(shifted)
    return rows.pop() if len(rows) == 1 else Lost(node, REORDERED)
