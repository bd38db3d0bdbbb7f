"""``aten.layer_norm`` and ``aten.rms_norm``: the affine part is a product and a sum that broadcast.

Legend: N samples, S positions, D features. H_NSD is the normalised input, G_NSD the gradient at the output.

    weight:  sum_n (sum_s G_nsd H_nsd)^2          bias:  sum_n (sum_s G_nsd)^2

Cost: the reductions of the ordinary backward, kept apart by sample: memory O(N D). ``per="token"`` squares before the sum
over s.

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
)


@batched_rule(aten.layer_norm.default)
def layer_norm(node: Node, context: Context) -> Node | Declined:
    """Split into normalisation, product and sum."""
    input, shape, weight, bias, *tail = (*cast(Any, node.args), *(None, None)[len(node.args) - 2 :])
    normalised = context.editor.call(aten.layer_norm.default, input, shape, None, None, *tail[:1])
    return _affine(node, context, normalised, weight, bias)


@batched_rule(aten.rms_norm.default)
def rms_norm(node: Node, context: Context) -> Node | Declined:
    """Split into normalisation and product."""
    input, shape, weight, *tail = (*cast(Any, node.args), *(None,)[len(node.args) - 2 :])
    normalised = context.editor.call(aten.rms_norm.default, input, shape, None, *tail)
    return _affine(node, context, normalised, weight, None)


def _affine(node: Node, context: Context, normalised: Node, weight: Node | None, bias: Node | None) -> Node:
    editor, result = context.editor, normalised
    for operation, value in ((aten.mul.Tensor, weight), (aten.add.Tensor, bias)):
        if value is not None:
            operand = context.batched(value, node) if value in context.uses.params else value
            result = editor.call(operation, result, operand)
    dtype = node.meta["val"].dtype
    return result if result.meta["val"].dtype == dtype else editor.call(aten._to_copy.default, result, dtype=dtype)
