"""Look-ups in other words: ``table[ids]``, ``index_select``, ``gather`` and ``take``, from parameters of any shape.

Legend: N samples, S look-ups of one sample. The axes that are indexed make one, V rows; the others one, D columns: what is
looked up is then an embedding (`rules.embedding`), and so are the statistics,

    table:  sum_n (sum_{s: i_ns = v} G_nsd)^2

A table of experts (E, I, O) that is indexed by the expert of each position, as mixtures of experts are written, has E rows of
I O columns.

Cost: that of an embedding, memory O(N S D). A table that is computed or tied: O(N V D), reported as a fallback.

Source: the definition of indexing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import ClosedForm, Context, Declined, batched_rule, closed_form
from graphopt.passes.truegrad.rules.embedding import emit_embedding, emit_own_rows
from graphopt.passes.truegrad.sample_axis import SampleAxis

aten = torch.ops.aten


class _Table(nn.Module):
    """``function(ids, table)``."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, self.table)


class _Mixture(nn.Module):
    """Each position goes to its own expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, input: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        rows = input.flatten(0, 1).unsqueeze(1)
        return torch.bmm(rows, self.experts[expert.flatten()]).view(*input.shape[:-1], -1)


SAMPLES = (
    lambda: (_Table(lambda ids, table: table[ids], 5, 3), torch.randint(0, 5, (4, 6))),
    lambda: (_Table(lambda ids, table: table[:, ids - 5, 1:].movedim(0, -1), 3, 5, 2), torch.randint(0, 5, (4, 6))),
    lambda: (_Mixture(), torch.randn(4, 5, 4), torch.randint(0, 3, (4, 5))),
    lambda: (
        _Table(lambda ids, table: torch.tanh(table[ids]) @ table.t(), 5, 3),
        torch.randint(0, 5, (4, 6)),
    ),
)


@closed_form(aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default)
def look_up(node: Node, context: Context) -> ClosedForm | Declined:
    """Put an embedding of the flattened table beside the look-up."""
    found = _find(node, context)
    if isinstance(found, Declined):
        return found
    table = found.table
    if table not in (context.uses.selections if context.per_token else context.uses.views):
        return Declined("the table is computed from parameters")

    def emit() -> Node:
        again = _find(node, context)  # other rules may have replaced its operands
        assert not isinstance(again, Declined)

        def view(target: Any, value: Node, *args: Any) -> Node:
            result = context.editor.call(target, value, *args)
            context.uses.extend(value, result)
            return result

        matrix = again.as_matrix(again.table, 0, view)
        rows = emit_embedding(context, matrix, again.rows(context), again.layout)
        return _beside(node, again, again.unfolded(rows, context), context)

    looked_up = node.meta["val"].numel()
    count = int(looked_up.node.hint) if isinstance(looked_up, torch.SymInt) else int(looked_up)
    return ClosedForm((table,), emit, 3 * count, 12 * count)


@batched_rule(aten.index.Tensor, aten.index_select.default, aten.gather.default, aten.take.default)
def look_up_batched(node: Node, context: Context) -> Node | Declined:
    """A table that is tied to something else, or computed: each sample looks up rows of its own."""
    if context.per_token:
        return Declined("per-token statistics of a table that is computed or tied are not defined")
    found = _find(node, context)
    if isinstance(found, Declined):
        return found
    matrices = found.as_matrix(context.tangent(found.table), 1, context.editor.call)
    rows = emit_own_rows(context, matrices, found.rows(context), found.layout)
    return _beside(node, found, found.unfolded(rows, context), context)


@dataclass(frozen=True)
class _LookUp:
    """``table[..., i, j, ...]`` with indices on some of its axes.

    Attributes:
        table: no samples enter it.
        indices: one for each of ``axes``; they broadcast.
        axes: the axes of the table that are indexed.
        start: the first axis of the result that the indices give.
        block: how many axes they give.
        layout: where the samples are among these.
    """

    table: Node
    indices: tuple[Node, ...]
    axes: tuple[int, ...]
    start: int
    block: int
    layout: SampleAxis

    def as_matrix(self, value: Node, lead: int, call: Callable[..., Node]) -> Node:
        """(V, D), behind ``lead`` leading axes."""
        ndim = self.table.meta["val"].ndim
        others = [axis for axis in range(ndim) if axis not in self.axes]
        order = [*range(lead), *(lead + axis for axis in (*self.axes, *others))]
        if order != sorted(order):
            value = call(aten.permute.default, value, order)
        if len(self.axes) > 1:
            value = call(aten.flatten.using_ints, value, lead, lead + len(self.axes) - 1)
        if not others:
            return call(aten.unsqueeze.default, value, -1)
        return value if len(others) == 1 else call(aten.flatten.using_ints, value, lead + 1, -1)

    def rows(self, context: Context) -> Node:
        """The row of each look-up, counted from 0."""
        editor, shape = context.editor, self.table.meta["val"].shape
        total: Node | None = None
        for axis, index in zip(self.axes, self.indices, strict=True):
            size = int(shape[axis])
            row = editor.call(aten.remainder.Scalar, index, size)  # indices may count from the end
            if total is None:
                total = row
            else:
                total = editor.call(aten.add.Tensor, editor.call(aten.mul.Tensor, total, size), row)
        assert total is not None
        return total

    def unfolded(self, rows: Node, context: Context) -> Node:
        """(*block, D) -> the axes of the result."""
        editor = context.editor
        others = [int(size) for axis, size in enumerate(self.table.meta["val"].shape) if axis not in self.axes]
        if not others:
            return editor.call(aten.squeeze.dim, rows, -1)
        if len(others) > 1:
            rows = editor.call(aten.unflatten.int, rows, -1, others)
        if not self.start:
            return rows
        block = range(self.block)
        return editor.call(aten.movedim.intlist, rows, list(block), [self.start + axis for axis in block])


def _find(node: Node, context: Context) -> _LookUp | Declined:
    args = cast(Any, node.args)
    table = args[0]
    layout = context.layout(node)
    if table not in context.uses.params or not isinstance(layout, SampleAxis):
        return Declined("what is looked up is not a parameter")
    ndim = table.meta["val"].ndim
    if node.target is aten.index.Tensor:
        given: Sequence[Any] = args[1]
        axes = tuple(axis for axis, index in enumerate(given) if index is not None)
        indices = tuple(given[axis] for axis in axes)
        adjacent = axes == tuple(range(axes[0], axes[-1] + 1))
        start = axes[0] if adjacent else 0
    elif node.target is aten.index_select.default:
        axes, indices = (args[1] % ndim,), (args[2],)
        start = axes[0]
    else:  # gather and take pick single elements
        if node.target is aten.gather.default and ndim != 1:
            return Declined("gather from a table with several axes")
        axes, indices, start = tuple(range(ndim)), (args[-1],), 0
        if node.target is aten.take.default and ndim != 1:
            return Declined("take from a table with several axes")
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for index in indices):
        return Declined("rows are selected by a mask")
    block = max(index.meta["val"].ndim for index in indices)
    if not start <= layout.axis < start + block:
        return Declined("its indices hold no samples")
    return _LookUp(table, indices, axes, start, block, layout.at(layout.axis - start))


def _beside(node: Node, found: _LookUp, tangent: Node, context: Context) -> Node:
    """The look-up itself, which passes no gradient to the table, and the tangent."""
    editor = context.editor
    args = torch.fx.map_arg(node.args, lambda a: editor.detached(a) if a is found.table else a)
    value = editor.call(cast(Any, node.target), *args, **node.kwargs)
    return editor.call(torch.ops.graphopt.with_tangent.default, value, tangent)
