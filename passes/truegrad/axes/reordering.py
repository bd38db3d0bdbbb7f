"""Samples in another order: ``x[torch.randperm(n)]``, ``x.index_select(0, lengths.argsort())``.

The order of the samples does not matter to a sum over samples, as long as each row belongs to one sample and each sample to one
row. So a layout remembers by which indices its rows were reordered, and values in different orders do not meet. An index that is
not a permutation by what it is (``randperm``, ``argsort``) is checked when the model runs (`ops.permutation`).
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any, cast

import torch
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import SampleAxis, shape_of, value_of

aten = torch.ops.aten

_SAME = frozenset(
    [aten._to_copy.default, aten.to.dtype, aten.detach.default, aten.clone.default, aten.alias.default,
     aten.contiguous.default]
)  # fmt: skip
_PERMUTATIONS = frozenset(
    [aten.randperm.default, aten.argsort.default, aten.argsort.stable, aten.sort.default, aten.sort.stable]
)


def reordered(layout: SampleAxis, index: Node) -> SampleAxis | None:
    """Where the samples are in ``x[index]``, for an index with one entry for each; ``None`` if it is another."""
    value = value_of(index)
    if not layout.is_plain or value.ndim != 1 or shape_of(value)[0] != layout.num or value.is_floating_point():
        return None
    token = _peeled(index)
    order = layout.order or ()
    if order and _undoes(token, order[-1]):
        return replace(layout, order=order[:-1], is_iota=False)
    return replace(layout, order=(*order, token), is_iota=False)


def is_permutation(token: Node) -> bool:
    """Whether an index names each row once, whatever the values are that it was computed from."""
    return _source(token).target in _PERMUTATIONS and value_of(token).ndim == 1


def _undoes(token: Node, before: Node) -> bool:
    """Whether an index is the inverse permutation: ``argsort`` of the other one."""
    source = _source(token)
    if source.target not in _PERMUTATIONS or source.target is aten.randperm.default or not is_permutation(before):
        return False
    descending = source.args[2] if len(source.args) > 2 else source.kwargs.get("descending", False)
    if source.target in (aten.sort.stable, aten.argsort.stable):
        descending = source.kwargs.get("descending", source.args[3] if len(source.args) > 3 else False)
    return not descending and _peeled(cast(Node, source.args[0])) is before


def _source(token: Node) -> Node:
    """The operator; of ``sort``, whose second result are the indices."""
    if token.target is operator.getitem and cast(Any, token.args)[1] == 1:
        return cast(Node, token.args[0])
    return token


def _peeled(index: Node) -> Node:
    while index.target in _SAME:
        index = cast(Node, index.args[0])
    return index
