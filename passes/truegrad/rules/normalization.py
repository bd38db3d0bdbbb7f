"""``layer_norm``, ``rms_norm``, ``group_norm``, ``instance_norm``, ``batch_norm``: the affine part is a product and a sum.

Legend: N samples, S positions, D features. H_NSD is the normalised input, G_NSD the gradient at the output.

    weight:  sum_n (sum_s G_nsd H_nsd)^2          bias:  sum_n (sum_s G_nsd)^2

The operator stays as it is, its parameters detached. Beside it stands ``H * weight + bias`` with one row of weight and bias for
each sample: its forward is dead code, its backward delivers the rows. So outputs and input gradients are the model's own.

Cost: the reductions of the ordinary backward, kept apart by sample: memory O(N D). ``per="token"`` squares before the sum
over s.

A sample's contribution is its own rows' term: where the normalisation itself mixes samples (``batch_norm`` in training), the
statistics of the batch are taken as given, and G is the gradient of the whole loss, what flows through those statistics
included; so the contributions add up to the gradient. Running statistics are updated once, as ever.

Source: the chain rule for y = H * weight + bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import Context, Declined, batched_rule
from graphopt.passes.truegrad.rules.convolution import over_channels
from graphopt.passes.truegrad.sample_axis import Known, Layout, Lost, SampleAxis, axis_rule

aten = torch.ops.aten

SAMPLES = (
    lambda: (nn.LayerNorm(3), torch.randn(4, 3)),
    lambda: (nn.LayerNorm(3), torch.randn(4, 5, 3)),
    lambda: (nn.LayerNorm([5, 3]), torch.randn(4, 5, 3)),
    lambda: (nn.LayerNorm(3, bias=False), torch.randn(4, 5, 3)),
    lambda: (nn.RMSNorm(3), torch.randn(4, 5, 3)),
    lambda: (nn.RMSNorm([2, 3], eps=1e-3), torch.randn(4, 5, 2, 3)),
    lambda: (nn.GroupNorm(2, 4), torch.randn(4, 4, 5)),
    lambda: (nn.GroupNorm(1, 4), torch.randn(4, 4)),
    lambda: (nn.InstanceNorm1d(3, affine=True), torch.randn(4, 3, 5)),
    lambda: (nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(), torch.randn(4, 3, 2, 4)),
    lambda: (nn.BatchNorm1d(3).eval(), torch.randn(4, 3)),
    lambda: (nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 2, 2)),
)


@axis_rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def over_the_last_axes(node: Node, value: Tensor, known: Known) -> Layout:
    """Samples on any axis that is not normalised."""
    layout, normalised = known.layout(node.args[0]), len(cast(Sequence[Any], node.args[1]))
    if not isinstance(layout, SampleAxis):
        return Lost(node, "its weight or bias differs from sample to sample")
    return layout if layout.axis < value.ndim - normalised else Lost(node, f"{_name(node)} works across samples")


@axis_rule("group_norm", "instance_norm")
def over_all_places(node: Node, value: Tensor, known: Known) -> Layout:
    """Samples on the first axis."""
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "its weight or bias differs from sample to sample")
    return (
        layout if layout.axis == 0 else Lost(node, f"{_name(node)} works across samples that are not on the first axis")
    )


@axis_rule("batch_norm")
def over_the_batch(node: Node, value: Tensor, known: Known) -> Layout:
    """Samples on any axis but that of the channels."""
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "its weight or bias differs from sample to sample")
    return layout if layout.axis != 1 else Lost(node, "batch_norm has its channels where the samples are")


@batched_rule(aten.layer_norm.default)
def layer_norm(node: Node, context: Context) -> Node | Declined:
    """Parameters of the shape that is normalised."""
    input, shape, weight, bias, *tail = _padded(node.args, 4)
    normalised = context.editor.call(aten.layer_norm.default, input, shape, None, None, *tail[:1])
    return _beside(node, context, normalised, (2, weight), (3, bias))


@batched_rule(aten.rms_norm.default)
def rms_norm(node: Node, context: Context) -> Node | Declined:
    """A weight of the shape that is normalised."""
    input, shape, weight, *tail = _padded(node.args, 3)
    normalised = context.editor.call(aten.rms_norm.default, input, shape, None, *tail)
    return _beside(node, context, normalised, (2, weight))


@batched_rule(aten.group_norm.default)
def group_norm(node: Node, context: Context) -> Node | Declined:
    """Parameters over channels."""
    input, groups, weight, bias, *tail = _padded(node.args, 4)
    normalised = context.editor.call(aten.group_norm.default, input, groups, None, None, *tail[:1])
    return _beside(node, context, normalised, (2, weight), (3, bias), channels=True)


@batched_rule(aten.batch_norm.default, aten.instance_norm.default)
def batch_norm(node: Node, context: Context) -> Node | Declined:
    """Parameters over channels; what is normalised for the second time leaves the running statistics alone."""
    input, weight, bias, *running, of_the_batch, momentum, eps, cudnn = cast(Any, node.args)
    if of_the_batch:
        running = [None, None]
    tail = (*running, of_the_batch, momentum, eps, cudnn)
    normalised = context.editor.call(cast(Any, node.target), input, None, None, *tail)
    return _beside(node, context, normalised, (1, weight), (2, bias), channels=True)


def _beside(
    node: Node, context: Context, normalised: Node, *affine: tuple[int, Node | None], channels: bool = False
) -> Node:
    """The operator, and beside it product and sum with the parameters' rows; ``affine`` are the places of weight and bias."""
    editor, args, dtype = context.editor, list(node.args), node.meta["val"].dtype
    tangent = editor.detached(normalised)
    wide = torch.promote_types(dtype, torch.float32)
    if wide != dtype:  # products and their sums are rounded once, as the operator's own backward does
        tangent = editor.call(aten._to_copy.default, tangent, dtype=wide)
    for (place, value), operation in zip(affine, (aten.mul.Tensor, aten.add.Tensor), strict=False):
        if value is None or value not in context.uses.params:
            continue
        args[place] = editor.detached(value)
        rows = context.batched(over_channels(value, node, context) if channels else value, node)
        tangent = editor.call(operation, tangent, rows)
    result = editor.call(cast(Any, node.target), *args, **node.kwargs)
    if tangent.meta["val"].dtype != dtype:
        tangent = editor.call(aten._to_copy.default, tangent, dtype=dtype)
    return editor.call(torch.ops.graphopt.with_tangent.default, result, tangent)


def _padded(args: tuple[Any, ...], length: int) -> tuple[Any, ...]:
    """Arguments with ``None`` for optional ones that are not given."""
    return (*args, *[None] * (length - len(args)))


def _name(node: Node) -> str:
    return str(cast(Any, node.target).overloadpacket.__name__)
