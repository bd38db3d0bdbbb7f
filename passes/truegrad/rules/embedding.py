"""``aten.embedding``: rows of a table, looked up by each sample.

Legend: N samples, S positions, V rows, D width. G_NSD is the gradient at the output, i_ns the row looked up.

    table:  sum_n (sum_{s: i_ns = v} G_nsd)^2      positions of a sample that look up the same row are added before squaring

Cost: a sort of N S keys and O(N S D) additions, memory O(N S D); never (N, V, D) (`ops.embedding_sums`). ``per="token"``
squares each look-up by itself.

Source: the definition of the statistic; the segmented sum is that of ``embedding_dense_backward``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad import ops  # noqa: F401  registers torch.ops.graphopt
from graphopt.passes.truegrad._registry import ClosedForm, Context, Declined, Refused, batched_rule, closed_form
from graphopt.passes.truegrad.sample_axis import SampleAxis

aten = torch.ops.aten

REFUSED_SPARSE = "its gradient is sparse, and the statistic is dense: build it with sparse=False"
REFUSED_SCALE = (
    "it scales gradients by how often a row occurs in the whole batch: build it with scale_grad_by_freq=False"
)

SAMPLES = (
    lambda: (nn.Embedding(5, 3), torch.randint(0, 5, (4, 6))),
    lambda: (nn.Embedding(5, 3), torch.randint(0, 5, (4,))),
    lambda: (nn.Embedding(5, 3, padding_idx=1), torch.randint(0, 5, (4, 2, 6))),
)


@closed_form(aten.embedding.default)
def embedding(node: Node, context: Context) -> ClosedForm | Declined:
    """Replace the look-up by ``graphopt::embedding``."""
    checked = check(node)
    if isinstance(checked, Declined):
        return checked
    table, indices, _ = checked
    layout = context.layout(indices)
    if table not in context.uses.views or not isinstance(layout, SampleAxis):
        return Declined("the table is computed from parameters")

    def emit() -> Node:
        table, indices, padding_idx = cast(Any, check(node))  # again: other rules may have replaced them
        return emit_embedding(context, table, indices, layout, padding_idx)

    looked_up = node.meta["val"].numel()
    count = int(looked_up.node.hint) if isinstance(looked_up, torch.SymInt) else int(looked_up)
    return ClosedForm((table,), emit, 3 * count, 12 * count)


@batched_rule(aten.embedding.default)
def embedding_batched(node: Node, context: Context) -> Node | Declined:
    """A table that is tied to something else, or computed: sample n looks up its own (V, D) slice."""
    checked = check(node)
    if isinstance(checked, Declined):
        return checked
    table, indices, padding_idx = checked
    editor = context.editor
    found = emit_own_rows(context, context.tangent(table), indices, context.sample_axis(indices), padding_idx)
    value = editor.call(aten.embedding.default, editor.detached(table), indices, padding_idx)
    return editor.call(torch.ops.graphopt.with_tangent.default, value, found)


def emit_embedding(context: Context, table: Node, indices: Node, layout: SampleAxis, padding_idx: int = -1) -> Node:
    """``graphopt::embedding`` with all statistics of the table; other rules express themselves in it.

    Args:
        context: of the rewrite.
        table: (V, D), a view of a parameter (see `Uses.extend` for views that a rule makes).
        indices: with samples as ``layout`` says; none negative.
        layout: where the samples are in ``indices``.
        padding_idx: the row that learns nothing, -1 for none.
    """
    tail = (context.wanted, indices, padding_idx, layout.axis, *context.editor.rows(layout), context.per_token)
    return context.editor.call(torch.ops.graphopt.embedding.default, table, context.companions(table), *tail)


def emit_own_rows(context: Context, tables: Node, indices: Node, layout: SampleAxis, padding_idx: int = -1) -> Node:
    """(N, V, D), and indices as in `emit_embedding` -> (*indices.shape, D): each sample looks up rows of its own table."""
    editor, (outer, num, inner) = context.editor, context.editor.rows(layout)
    device = indices.meta["val"].device
    start = editor.call(aten.mul.Tensor, editor.call(aten.arange.default, num, device=device), _rows(tables))
    if not layout.is_plain:
        start = editor.call(aten.expand.default, editor.call(aten.view.default, start, [1, -1, 1]), [outer, num, inner])
        start = editor.call(aten.reshape.default, start, [-1])
    shape = [1] * indices.meta["val"].ndim
    shape[layout.axis] = -1
    own = editor.call(aten.add.Tensor, indices, editor.call(aten.view.default, start, shape))
    found = editor.call(aten.embedding.default, editor.call(aten.flatten.using_ints, tables, 0, 1), own)
    if padding_idx >= 0:
        keep = editor.call(aten.unsqueeze.default, editor.call(aten.ne.Scalar, indices, padding_idx), -1)
        found = editor.call(aten.mul.Tensor, found, keep)
    return found


def _rows(tables: Node) -> int:
    return int(tables.meta["val"].shape[1])


def check(node: Node) -> tuple[Node, Node, int] | Declined:
    """Table, indices and padding row; sparse gradients, and gradients scaled by frequency, are declined."""
    given: tuple[Any, ...] = node.args
    defaults: tuple[Any, ...] = (-1, False, False)
    table, indices, padding_idx, scale, sparse = (*given, *defaults[len(given) - 2 :])
    if sparse:
        return Refused(REFUSED_SPARSE)
    if scale:
        return Refused(REFUSED_SCALE)
    return table, indices, padding_idx
