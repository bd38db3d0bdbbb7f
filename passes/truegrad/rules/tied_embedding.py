"""A table that is looked up and is also the weight of an output projection, as in GPT-2, BERT and T5.

Legend: N samples, S look-ups of one sample, T positions, V rows, D width. E_n and P_n are sample n's gradients of the table
from the look-ups and from the projection.

    sum_n (E_n + P_n)^2 = sum_n E_n^2 + sum_n P_n^2 + 2 sum_n E_n P_n

E_n is zero outside the rows that sample n looks up. The projection's backward computes just those rows of P_n, (N, S, D), and
sends them to the embedding's backward, which multiplies and scatters them (`ops.tied_embedding`). Several look-ups of one table
(T5's encoder and decoder) become one look-up of all their indices.

Cost: the closed forms of embedding and linear, and O(N S T D) operations for the rows that are owed; memory O(N S (T + D)),
never (N, V, D).

Source: the square of a sum; the sparsity of E_n.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import Context, Declined
from graphopt.passes.truegrad.rules.embedding import check
from graphopt.passes.truegrad.rules.linear import find_operands
from graphopt.passes.truegrad.sample_axis import SampleAxis
from graphopt.passes.truegrad.uses import Use

aten = torch.ops.aten


class _Tied(nn.Module):
    """A language model without the model."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)
        self.bias = nn.Parameter(torch.randn(7)) if bias else None

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(torch.tanh(self.table(indices)), self.table.weight, self.bias)


class _Shared(nn.Module):
    """Two look-ups and a projection, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 3)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        encoded = torch.tanh(self.table(indices)).mean(1, keepdim=True)
        decoded = torch.tanh(self.table((indices[:, :4] * 2) % 7))
        return nn.functional.linear(encoded + decoded, self.table.weight)


SAMPLES = (
    lambda: (_Tied(), torch.randint(0, 7, (4, 5))),
    lambda: (_Tied(bias=True), torch.randint(0, 7, (4, 5))),
    lambda: (_Shared(), torch.randint(0, 7, (4, 5))),
)


def is_tied_embedding(param: Node, uses: list[Use], context: Context) -> bool:
    """Whether the parameter is a table with one projection and at least one look-up, met directly in each."""
    projections, lookups = _split(uses)
    if len(projections) != 1 or not lookups or context.per_token:
        return False
    (projection,) = projections
    operands = find_operands(projection.node)
    if isinstance(operands, Declined) or operands.weight is not projection.value:
        return False
    if _reached(projection.value, operands.transposed) is not param or any(
        _reached(use.value, False) is not param for use in lookups
    ):
        return False
    bias_is_plain = (
        operands.bias is None or operands.bias in context.uses.views or operands.bias not in context.uses.params
    )
    checked = [check(use.node) for use in lookups]
    if any(isinstance(item, Declined) for item in checked) or not isinstance(
        context.layout(operands.input), SampleAxis
    ):
        return False
    layouts = [context.layout(_indices(use)) for use in lookups]
    if not all(isinstance(layout, SampleAxis) and (layout.is_plain or len(lookups) == 1) for layout in layouts):
        return False
    same_padding = len({_padding(use) for use in lookups}) == 1
    return bias_is_plain and same_padding and (len(lookups) == 1 or _movable(lookups))


def rewrite_tied_embedding(param: Node, uses: list[Use], context: Context) -> list[Node]:
    """Rewrite the look-ups and the projection; returns the nodes that are done with."""
    (projection,), lookups = _split(uses)
    editor, first = context.editor, lookups[0].node
    companions = context.companions(param)
    all_indices = [_indices(use) for use in lookups]
    for use, indices in zip(lookups[1:], all_indices[1:], strict=True):
        _hoist(indices, use.node, first)
    with editor.before(first):
        layout = context.sample_axis(all_indices[0])
        padding_idx = _padding(lookups[0])
        if len(lookups) == 1:
            indices, rows = all_indices[0], (layout.axis, *editor.rows(layout))
        else:
            parts = [_by_sample(context, indices) for indices in all_indices]
            indices = editor.call(aten.cat.default, parts, 1)
            rows = (0, 1, editor.size(layout.num), 1)
        pair = editor.call(
            torch.ops.graphopt.tied_embedding.default,
            param,
            companions,
            context.wanted,
            indices,
            padding_idx,
            *rows,
            False,
        )
        found, tie = editor.call(operator.getitem, pair, 0), editor.call(operator.getitem, pair, 1)
        ids_NS = _by_sample(context, all_indices[0]) if len(lookups) == 1 else indices
        results = [found] if len(lookups) == 1 else _parts(context, found, parts, all_indices)
    for use, result in zip(lookups, results, strict=True):
        context.replace(use.node, result)
    _project(projection.node, param, companions, tie, ids_NS, context)
    return [projection.node, *(use.node for use in lookups)]


def _project(node: Node, param: Node, companions: list[Node], tie: Node, ids_NS: Node, context: Context) -> None:
    operands = find_operands(node)
    assert not isinstance(operands, Declined)
    editor, layout = context.editor, context.sample_axis(operands.input)
    with editor.before(node):
        bias = operands.bias
        of_bias = context.companions(bias) if bias is not None and bias in context.uses.views else []
        tail = (context.wanted, tie, ids_NS, layout.axis, *editor.rows(layout))
        new = editor.call(
            torch.ops.graphopt.tied_linear.default, operands.input, param, bias, companions, of_bias, *tail
        )
    context.replace(node, new)


def _by_sample(context: Context, indices: Node) -> Node:
    """(N, S), whichever way the indices lie."""
    editor, layout = context.editor, context.sample_axis(indices)
    value = indices
    if not layout.is_plain:
        value = editor.call(aten.unflatten.int, value, layout.axis, list(editor.rows(layout)))
        value = editor.call(aten.movedim.int, value, layout.axis + 1, 0)
    elif layout.axis != 0:
        value = editor.call(aten.movedim.int, value, layout.axis, 0)
    return editor.call(aten.reshape.default, value, [editor.size(layout.num), -1])


def _parts(context: Context, found: Node, parts: list[Node], indices: list[Node]) -> list[Node]:
    """Cut the joint look-up into its parts, each in the shape of its indices."""
    editor, results = context.editor, []
    start: Any = 0
    for part, original in zip(parts, indices, strict=True):
        length = editor.call(aten.sym_size.int, part, 1)
        end = editor.call(operator.add, start, length)
        rows = editor.call(aten.slice.Tensor, found, 1, start, end)
        axis = context.sample_axis(original).axis
        others = [editor.call(aten.sym_size.int, original, a) for a in range(original.meta["val"].ndim) if a != axis]
        shaped = editor.call(aten.reshape.default, rows, [editor.call(aten.sym_size.int, rows, 0), *others, -1])
        results.append(editor.call(aten.movedim.int, shaped, 0, axis))
        start = end
    return results


def _indices(use: Use) -> Node:
    return cast(Node, use.node.args[1])


def _padding(use: Use) -> int:
    return cast(int, use.node.args[2]) if len(use.node.args) > 2 else -1


def _split(uses: list[Use]) -> tuple[list[Use], list[Use]]:
    lookups = [use for use in uses if use.node.target is aten.embedding.default and use.node.args[0] is use.value]
    return [use for use in uses if use not in lookups], lookups


def _reached(value: Node, transposed: bool) -> Node:
    """The parameter, seen through the transposition that a product written as ``addmm`` or ``matmul`` needs."""
    if transposed and value.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        return cast(Node, value.args[0])
    if transposed and value.target in (aten.transpose.int, aten.permute.default, aten.swapaxes.default):
        return cast(Node, value.args[0])
    return value if not transposed else value.graph._root


def _movable(lookups: list[Use]) -> bool:
    """Whether all indices can be computed before the first look-up: none depends on its result."""
    downstream = {lookups[0].node}
    for node in lookups[0].node.graph.nodes:
        if any(argument in downstream for argument in node.all_input_nodes):
            downstream.add(node)
    return not any(_sources(_indices(use), use.node) & downstream for use in lookups[1:])


def _hoist(node: Node, user: Node, target: Node) -> None:
    """Move what ``node`` is computed from, as ``user`` sees it, in front of ``target``."""
    wanted = _sources(node, user)
    behind = False
    for other in list(node.graph.nodes):
        behind = behind or other is target
        if behind and other in wanted:
            target.prepend(other)


def _sources(node: Node, user: Node) -> set[Node]:
    """Everything that decides the value of ``node`` when ``user`` reads it, writes in place included."""
    writes: dict[Node, list[Node]] = {}  # storage -> operators in front of the user that write to it
    for other in node.graph.nodes:
        if other is user:
            break
        if isinstance(other.target, torch._ops.OpOverload) and other.target._schema.is_mutable:
            writes.setdefault(_storage(cast(Node, other.args[0])), []).append(other)
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += [*current.all_input_nodes, *writes.get(_storage(current), ())]
    return found


def _storage(node: Node) -> Node:
    """The node whose memory this one shows."""
    while isinstance(node.target, torch._ops.OpOverload) and (node.target.is_view or node.target._schema.is_mutable):
        node = cast(Node, node.args[0])
    return node
