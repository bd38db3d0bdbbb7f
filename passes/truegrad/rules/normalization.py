"""``layer_norm``, ``rms_norm``, ``group_norm``, ``instance_norm``, ``batch_norm``: the affine part is a product and a sum.

Legend: N samples, S positions, D features. H_NSD is the normalised input, G_NSD the gradient at the output.

    weight:  sum_n (sum_s G_nsd H_nsd)^2          bias:  sum_n (sum_s G_nsd)^2

Cost: the reductions of the ordinary backward, kept apart by sample: memory O(N D). ``per="token"`` squares before the sum
over s.

A sample's contribution is its own rows' term: where the normalisation itself mixes samples (``batch_norm`` in training), the
statistics of the batch are taken as given.

Source: the chain rule for y = H * weight + bias.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import Context, Declined, batched_rule

aten = torch.ops.aten

SAMPLES = (
    lambda: (nn.LayerNorm(3), torch.randn(4, 3)),
    lambda: (nn.LayerNorm(3), torch.randn(4, 5, 3)),
    lambda: (nn.LayerNorm([5, 3]), torch.randn(4, 5, 3)),
    lambda: (nn.LayerNorm(3, bias=False), torch.randn(4, 5, 3)),
    lambda: (nn.RMSNorm(3), torch.randn(4, 5, 3)),
    lambda: (nn.GroupNorm(2, 4), torch.randn(4, 4, 5)),
    lambda: (nn.InstanceNorm1d(3, affine=True), torch.randn(4, 3, 5)),
    lambda: (nn.BatchNorm1d(3).eval(), torch.randn(4, 3)),
    lambda: (nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 2, 2)),
)


@batched_rule(aten.layer_norm.default)
def layer_norm(node: Node, context: Context) -> Node | Declined:
    """Split into normalisation, product and sum."""
    input, shape, weight, bias, *tail = _padded(node.args, 4)
    normalised = context.editor.call(aten.layer_norm.default, input, shape, None, None, *tail[:1])
    return _affine(node, context, normalised, weight, bias)


@batched_rule(aten.rms_norm.default)
def rms_norm(node: Node, context: Context) -> Node | Declined:
    """Split into normalisation and product."""
    input, shape, weight, *tail = _padded(node.args, 3)
    normalised = context.editor.call(aten.rms_norm.default, input, shape, None, *tail)
    return _affine(node, context, normalised, weight, None)


@batched_rule(aten.group_norm.default)
def group_norm(node: Node, context: Context) -> Node | Declined:
    """Split into normalisation, product and sum over channels."""
    input, groups, weight, bias, *tail = _padded(node.args, 4)
    normalised = context.editor.call(aten.group_norm.default, input, groups, None, None, *tail[:1])
    return _affine(node, context, normalised, *(_over_channels(value, node, context) for value in (weight, bias)))


@batched_rule(aten.batch_norm.default, aten.instance_norm.default)
def batch_norm(node: Node, context: Context) -> Node | Declined:
    """Split into normalisation, product and sum over channels; running statistics are updated as before."""
    input, weight, bias, *tail = cast(Any, node.args)
    normalised = context.editor.call(cast(Any, node.target), input, None, None, *tail)
    return _affine(node, context, normalised, *(_over_channels(value, node, context) for value in (weight, bias)))


def _padded(args: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    """Arguments with ``None`` for optional ones that are not given."""
    return (*args, *[None] * (length - len(args)))


def _over_channels(value: Node | None, node: Node, context: Context) -> Node | None:
    """(C,) -> (C, 1, ...), so that it broadcasts over the axes behind the channels."""
    behind = node.meta["val"].ndim - 2
    if value is None or not behind:
        return value
    column = context.editor.call(aten.reshape.default, value, [-1] + [1] * behind)
    if value in context.uses.params:
        context.uses.extend(value, column)
    return column


def _affine(node: Node, context: Context, normalised: Node, weight: Node | None, bias: Node | None) -> Node:
    editor, result = context.editor, normalised
    for operation, value in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if value is not None:
            operand = context.batched(value, node) if value in context.uses.params else value
            result = editor.call(operation, result, operand)
    dtype = node.meta["val"].dtype
    return result if result.meta["val"].dtype == dtype else editor.call(aten._to_copy.default, result, dtype=dtype)
