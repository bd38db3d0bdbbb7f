"""``aten.embedding_bag``: sums, means or maxima of rows of a table; each bag a row of a matrix of indices.

Legend: N samples, S bags of one sample, L look-ups of one bag, V rows, D width. G_NSD is the gradient at the output, i_nsl the
row looked up, w_nsl its weight: that given for the look-up, or 1, and for means divided by the number of look-ups that count.

    sum, mean:  sum_n (sum_{s, l: i_nsl = v} w_nsl G_nsd)^2            an embedding (`rules.embedding`) of N S L look-ups
    max:        sum_n (sum_{s: m_nsd = v} G_nsd)^2                      m_nsd is the row that has the maximum

Look-ups of ``padding_idx`` count nowhere.

Cost: that of the embedding, memory O(N S L D) for sums and means, O(N S D) for maxima. A table that is computed or tied:
O(N V D), reported as a fallback.

Source: the definition of the operator; the segmented sum is that of ``embedding_dense_backward``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import ClosedForm, Context, Declined, Refused, batched_rule, closed_form
from graphopt.passes.truegrad.axes.indexing import bag_length
from graphopt.passes.truegrad.rules.embedding import REFUSED_SCALE, REFUSED_SPARSE, emit_embedding, emit_own_rows
from graphopt.passes.truegrad.sample_axis import SampleAxis, Size

aten = torch.ops.aten

_MEAN, _MAX = 1, 2  # the operator's numbers for its modes; sum is 0
_LookUp = Callable[[Node, SampleAxis, bool], Node]


class _Weighted(nn.Module):
    """Learned weights of the rows, as a bag of n-grams has them; they are a parameter too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.weights = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weights = self.weights[ids]
        return nn.functional.embedding_bag(ids, self.table, mode="sum", per_sample_weights=weights)


class _Tied(nn.Module):
    """A table that is computed."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.table, self.mode = nn.Parameter(torch.randn(5, 3)), mode

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding_bag(ids, self.table.tanh(), mode=self.mode)


SAMPLES = (
    lambda: (nn.EmbeddingBag(5, 3, mode="sum"), torch.randint(0, 5, (4, 6))),
    lambda: (nn.EmbeddingBag(5, 3, mode="mean", padding_idx=1), torch.randint(0, 5, (4, 6))),
    lambda: (nn.EmbeddingBag(5, 3, mode="max", padding_idx=1), torch.randint(0, 5, (4, 6))),
    lambda: (_Weighted(), torch.randint(0, 5, (4, 6))),
    lambda: (_Tied("mean"), torch.randint(0, 5, (4, 6))),
    lambda: (_Tied("max"), torch.randint(0, 5, (4, 6))),
)


@closed_form(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def embedding_bag(node: Node, context: Context) -> ClosedForm | Declined:
    """Put the embedding of all look-ups, summed over each bag, beside the operator."""
    bag = _read(node, context)
    if isinstance(bag, Declined):
        return bag
    if bag.table not in context.uses.views:
        return Declined("the table is computed from parameters")

    def emit() -> Node:
        found = _read(node, context)  # again: other rules may have replaced its operands
        assert not isinstance(found, Declined)

        def look_up(indices: Node, layout: SampleAxis, elements: bool) -> Node:
            table = found.table
            if elements:
                table = context.editor.call(aten.reshape.default, table, [-1, 1])
                context.uses.extend(found.table, table)
            return emit_embedding(context, table, indices, layout, -1 if elements else found.padding_idx)

        return _beside(node, found, look_up, context)

    looked_up = bag.indices.meta["val"].numel() * bag.table.meta["val"].shape[1]
    count = int(looked_up.node.hint) if isinstance(looked_up, torch.SymInt) else int(looked_up)
    return ClosedForm((bag.table,), emit, 3 * count, 12 * count)


@batched_rule(aten.embedding_bag.default, aten.embedding_bag.padding_idx)
def embedding_bag_batched(node: Node, context: Context) -> Node | Declined:
    """A table that is tied to something else, or computed: each sample looks up rows of its own."""
    bag = _read(node, context)
    if isinstance(bag, Declined):
        return bag
    if context.per_token:
        return Refused("per-token statistics of a table that is computed or tied are not defined")
    tangent = context.tangent(bag.table)

    def look_up(indices: Node, layout: SampleAxis, elements: bool) -> Node:
        tables = tangent
        if elements:
            tables = context.editor.call(
                aten.unsqueeze.default, context.editor.call(aten.flatten.using_ints, tangent, 1), -1
            )
        return emit_own_rows(context, tables, indices, layout, -1 if elements else bag.padding_idx)

    return _beside(node, bag, look_up, context)


@dataclass(frozen=True)
class _Bag:
    """What a call of the operator says.

    Attributes:
        table: (V, D).
        indices: of all bags, end to end.
        mode: 0 for sums, 1 for means, 2 for maxima.
        weights: one for each index, or ``None``.
        padding_idx: the row that learns nothing, -1 for none.
        length: look-ups of one bag.
        layout: where the samples are in ``indices``.
    """

    table: Node
    indices: Node
    mode: int
    weights: Node | None
    padding_idx: int
    length: Size
    layout: SampleAxis


def _read(node: Node, context: Context) -> _Bag | Declined:
    names = (
        "weight",
        "indices",
        "offsets",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "per_sample_weights",
        "last",
        "padding_idx",
    )
    defaults = (None, None, None, False, 0, False, None, False, None)
    given: dict[str, Any] = dict(zip(names, (*node.args, *defaults[len(node.args) :]), strict=True))
    given.update(node.kwargs)
    if given["sparse"]:
        return Refused(REFUSED_SPARSE)
    if given["scale_grad_by_freq"]:
        return Refused(REFUSED_SCALE)
    length, layout = bag_length(node), context.layout(given["indices"])
    if length is None or not isinstance(layout, SampleAxis):
        return Declined("its bags hold no samples")
    if given["weight"] not in context.uses.params:
        return Declined("its table is not a parameter")
    padding_idx = given["padding_idx"]
    return _Bag(
        given["weight"], given["indices"], given["mode"], given["per_sample_weights"],
        -1 if padding_idx is None else padding_idx, length, layout,
    )  # fmt: skip


def _beside(node: Node, bag: _Bag, look_up: _LookUp, context: Context) -> Node:
    """The operator itself, which passes no gradient to the table, and the tangent beside its first result."""
    editor = context.editor
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda a: editor.detached(a) if a is bag.table else a)
    value = editor.call(cast(Any, node.target), *args, **kwargs)
    bags = editor.call(operator.getitem, value, 0)
    tangent = _largest(value, bag, look_up, context) if bag.mode == _MAX else _summed(bag, look_up, context)
    result = editor.call(torch.ops.graphopt.with_tangent.default, bags, tangent)
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            context.replace(user, result)
    return value


def _summed(bag: _Bag, look_up: _LookUp, context: Context) -> Node:
    """(bags, D)."""
    editor, length = context.editor, context.editor.size(bag.length)
    indices = editor.call(aten.unflatten.int, bag.indices, 0, [-1, length])
    layout = bag.layout
    inner = layout.inner / bag.length  # of bags
    rows = look_up(indices, SampleAxis(0, layout.num, layout.source, layout.outer, inner), False)
    if bag.weights is not None:
        weights = editor.call(aten.unflatten.int, editor.detached(bag.weights), 0, [-1, length])
        rows = editor.call(aten.mul.Tensor, rows, editor.call(aten.unsqueeze.default, weights, -1))
    total = editor.call(aten.sum.dim_IntList, rows, [1])
    if bag.mode != _MEAN:
        return total
    if bag.padding_idx < 0:
        return editor.call(aten.div.Tensor, total, length)
    counted = editor.call(aten.sum.dim_IntList, editor.call(aten.ne.Scalar, indices, bag.padding_idx), [1], True)
    return editor.call(aten.div.Tensor, total, editor.call(aten.clamp.default, counted, 1))


def _largest(value: Node, bag: _Bag, look_up: _LookUp, context: Context) -> Node:
    """(bags, D): the elements of the table that are the maxima."""
    editor, layout = context.editor, bag.layout
    counted, rows = (editor.call(operator.getitem, value, place) for place in (2, 3))
    width = int(bag.table.meta["val"].shape[1])
    columns = editor.call(aten.arange.default, width, device=rows.meta["val"].device)
    elements = editor.call(aten.add.Tensor, editor.call(aten.mul.Tensor, rows, width), columns)
    inner = layout.inner / bag.length
    found = look_up(elements, SampleAxis(0, layout.num, layout.source, layout.outer, inner), True)
    filled = editor.call(aten.unsqueeze.default, editor.call(aten.gt.Scalar, counted, 0), -1)  # not all padding
    return editor.call(aten.mul.Tensor, editor.call(aten.squeeze.dim, found, -1), filled)
