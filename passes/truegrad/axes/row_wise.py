"""Operators that treat every row alike and keep the shape of their first argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.axes.elementwise import broadcast
from graphopt.passes.truegrad.axes.reductions import named_axes
from graphopt.passes.truegrad.sample_axis import (
    Known,
    Layout,
    Lost,
    SampleAxis,
    axis_rule,
    functional_name,
    shape_of,
    value_of,
)

# The position of the argument that names the axes they work along; for those without one, the samples lie on another axis.
_ALONG: dict[str, int] = {
    "topk": 2, "argsort": 1, "softmax": 1, "_softmax": 1, "log_softmax": 1, "_log_softmax": 1, "cumsum": 1, "cumprod": 1,
    "flip": 1, "sort": 1, "logcumsumexp": 1, "cummax": 1, "cummin": 1, "glu": 1,
}  # fmt: skip
_LAST_BY_DEFAULT = ("sort", "argsort", "topk", "glu")
_ALIKE = (
    "prelu one_hot dropout "
    "native_dropout feature_dropout alpha_dropout feature_alpha_dropout to _to_copy clone contiguous detach alias "
    "lift_fresh_copy type_as zeros_like ones_like full_like empty_like rand_like randn_like tril triu normal_functional "
    "bernoulli masked_fill masked_fill_ copy gelu silu"
).split()
_ON_FIRST_AXIS = (
    "max_pool1d max_pool2d max_pool3d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d "
    "upsample_bicubic2d pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle grid_sampler grid_sampler_2d "
    "grid_sampler_3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa "
    "_upsample_bicubic2d_aa max_unpool2d max_unpool3d fractional_max_pool2d fractional_max_pool3d"
).split()
_LOSSES = (
    "cross_entropy_loss nll_loss nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits kl_div cosine_embedding_loss triplet_margin_loss multi_margin_loss "
    "multilabel_margin_loss multilabel_margin_loss_forward"
).split()


@axis_rule(*_ALONG, *_ALIKE)
def row_wise(node: Node, value: Tensor, known: Known) -> Layout:
    """The axis stays, unless the operator works along it."""
    op = functional_name(node)
    first: Any = node.args[0]
    layout = known.layout(first)
    if not isinstance(layout, SampleAxis):
        return broadcast(node, value.ndim, known)  # they enter through another argument: a mask, a slope for each
    axes = named_axes(node, _ALONG.get(op), value.ndim)
    if op in _LAST_BY_DEFAULT and axes is None:
        axes = [value.ndim - 1]
    mixes = axes is not None and layout.axis in axes
    keeps = layout.axis < value.ndim and shape_of(value)[layout.axis] == shape_of(value_of(first))[layout.axis]
    return layout if keeps and not mixes else Lost(node, f"{op} works across samples")


@axis_rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
           "replication_pad2d", "replication_pad3d")  # fmt: skip
def padding(node: Node, value: Tensor, known: Known) -> Layout:
    """The axis stays, unless it is padded."""
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    amounts = cast(Sequence[Any], node.args[1])
    padded = [pair for pair in range(len(amounts) // 2) if amounts[2 * pair] != 0 or amounts[2 * pair + 1] != 0]
    mixes = layout.axis in [value.ndim - 1 - pair for pair in padded]
    return layout if not mixes else Lost(node, f"{functional_name(node)} works across samples")


@axis_rule(*_ON_FIRST_AXIS)
def on_first_axis(node: Node, value: Tensor, known: Known) -> Layout:
    """Operators over channels and places expect the samples in front."""
    first: Any = node.args[0]
    layout = known.layout(first)
    same = isinstance(layout, SampleAxis) and layout.axis == 0 and value.ndim == value_of(first).ndim
    return layout if same else Lost(node, f"{functional_name(node)} with samples that are not on the first axis")


@axis_rule("im2col", "col2im", "affine_grid_generator")
def places_on_first_axis(node: Node, value: Tensor, known: Known) -> Layout:
    """The same, with one axis for all places."""
    layout = known.layout(node.args[0])
    same = isinstance(layout, SampleAxis) and layout.axis == 0 and value_of(node.args[0]).ndim >= 3 <= value.ndim
    return layout if same else Lost(node, f"{functional_name(node)} with samples that are not on the first axis")


@axis_rule(*_LOSSES)
def losses(node: Node, value: Tensor, known: Known) -> Layout:
    """A loss without reduction keeps the samples."""
    layout = known.layout(node.args[0])
    if isinstance(layout, SampleAxis) and 0 < value.ndim > layout.axis:
        return layout
    return Lost(node, "a loss over all samples")
