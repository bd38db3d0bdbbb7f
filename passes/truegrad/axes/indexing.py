"""Look-ups: tables by the samples' own numbers, rows by index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import Free, Known, Layout, Lost, SampleAxis, axis_rule, value_of


@axis_rule("embedding")
def embedding(node: Node, value: Tensor, known: Known) -> Layout:
    """The result has the axes of the indices, and one more."""
    layout, indices = known.layout(node.args[0]), known.layout(node.args[1])
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
    if isinstance(indices, Free) and isinstance(layout, SampleAxis) and dim != layout.axis:
        return layout
    return Lost(node, "samples are reordered")


@axis_rule("gather", "take_along_dim")
def gather(node: Node, value: Tensor, known: Known) -> Layout:
    """Each row picks from its own."""
    dim = cast(int, node.args[1]) % value.ndim
    layout, indices = known.layout(node.args[0]), known.layout(node.args[2])
    axis = layout if isinstance(layout, SampleAxis) else indices
    if isinstance(axis, SampleAxis) and axis.axis != dim and isinstance(indices, SampleAxis):
        return axis.at(axis.axis)
    return Lost(node, "samples are reordered")


@axis_rule("index", "_unsafe_index")
def index(node: Node, value: Tensor, known: Known) -> Layout:
    """``x[:, rows]``, ``x[arange(batch), last]``, ``table[ids]``."""
    layout = known.layout(node.args[0])
    indices = list(cast(Sequence[Any], node.args[1]))
    given = [position for position, index in enumerate(indices) if index is not None]
    if any(value_of(indices[position]).dtype is torch.bool for position in given):
        return Lost(node, "samples are selected by a mask")
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
            own = known.layout(indices[layout.axis])
            follows = isinstance(own, SampleAxis) and own.is_iota and layout.is_plain
            return rows.pop() if follows and len(rows) == 1 else Lost(node, "samples are reordered")
        if rows:
            return Lost(node, "samples meet on different axes")
        before = sum(position < layout.axis for position in given)
        shifted = layout.axis - before + (block if start <= layout.axis - before or not adjacent else 0)
        return layout.at(shifted)
    return rows.pop() if len(rows) == 1 else Lost(node, "samples are reordered")
