"""``aten.conv1d``, ``aten.conv2d`` and ``aten.conv3d``: a linear layer over patches.

Legend: N samples, L output positions, I values in a patch (input channels of the group times kernel size), O channels out.
P_NLI are the patches of the input (``unfold``), G_NLO the gradient at the output.

    weight:  sum_n (sum_l G_nlo P_nli)^2          bias:  sum_n (sum_l G_nlo)^2

The convolution itself stays; beside it stands the product of patches and weight, whose forward is dead code and whose backward
is that of `rules.linear`: the patches are made once, in backward.

Cost: the patches, N L I values, which is the kernel size times the input; one product for each sample in place of the weight
gradient. ``per="token"`` counts each output position by itself.

Source: Rochette, Manoel, Tramel, "Efficient per-example gradient computations in convolutional neural networks",
arXiv:1912.06015, 2019, for the identity; the accumulation is that of `ops.sums`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad import ops  # noqa: F401  registers torch.ops.graphopt
from graphopt.passes.truegrad._registry import ClosedForm, Context, Declined, closed_form
from graphopt.passes.truegrad.editor import Editor
from graphopt.passes.truegrad.rules.linear import emit_linear
from graphopt.passes.truegrad.sample_axis import SampleAxis, shape_of

aten = torch.ops.aten

SAMPLES = (
    lambda: (nn.Conv2d(2, 3, 2, stride=2), torch.randn(4, 2, 6, 6)),
    lambda: (nn.Conv2d(2, 3, 3, padding=1, dilation=2), torch.randn(4, 2, 6, 5)),
    lambda: (nn.Conv2d(2, 3, 3, bias=False), torch.randn(4, 2, 6, 5)),
    lambda: (nn.Conv1d(2, 3, 3, padding=2, stride=2), torch.randn(4, 2, 7)),
    lambda: (nn.Conv3d(2, 3, 2), torch.randn(4, 2, 3, 4, 3)),
)


@closed_form(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(node: Node, context: Context) -> ClosedForm | Declined:
    """Put the product of patches and weight beside the convolution."""
    input, weight, bias, stride, padding, dilation, groups = _arguments(node)
    layout = context.layout(input)
    if not isinstance(layout, SampleAxis) or layout.axis != 0 or not layout.is_plain:
        return Declined("its samples are not on the first axis")
    if groups != 1:
        return Declined("grouped convolution")
    values = [value for value in (weight, bias) if value is not None and value in context.uses.params]
    if any(value not in context.uses.views for value in values):
        return Declined("its parameter is computed from others")

    def emit() -> Node:
        editor = context.editor
        input = _arguments(node)[0]  # again: other rules may have replaced it
        patches = _patches(
            context.editor, editor.detached(input), weight.meta["val"].shape[2:], stride, padding, dilation
        )
        matrix = editor.call(aten.flatten.using_ints, weight, 1)
        if weight in values:
            context.uses.extend(weight, matrix)
        served = [matrix if value is weight else value for value in values]
        rows = emit_linear(context, patches, matrix, bias, layout, served=served)
        channels = editor.call(aten.transpose.int, rows, 1, 2)  # (N, O, L)
        spatial = [editor.size(size) for size in shape_of(node.meta["val"])[2:]]
        tangent = editor.call(aten.unflatten.int, channels, 2, spatial)
        fixed = [editor.detached(value) if value in values else value for value in (weight, bias)]
        value = editor.call(cast(Any, node.target), input, *fixed, stride, padding, dilation, groups)
        return editor.call(torch.ops.graphopt.with_tangent.default, value, tangent)

    size = int(weight.meta["val"].numel())
    return ClosedForm(tuple(values), emit, 3 * size, 12 * size)


def _patches(
    editor: Editor, image: Node, kernel: Any, stride: list[int], padding: list[int], dilation: list[int]
) -> Node:
    """(N, C, *spatial) -> (N, L, C * kernel). ``im2col`` would do, but its shape function fixes the number of samples."""
    axes = len(kernel)
    if any(padding):
        around = [amount for size in reversed(padding) for amount in (size, size)]
        image = editor.call(aten.constant_pad_nd.default, image, around, 0.0)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        image = editor.call(aten.unfold.default, image, 2 + axis, (int(size) - 1) * gap + 1, step)
        if gap > 1:
            image = editor.call(aten.slice.Tensor, image, 2 + axes + axis, 0, None, gap)
    order = [0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes)]
    image = editor.call(aten.permute.default, image, order)  # (N, *positions, C, *kernel)
    flat = editor.call(aten.flatten.using_ints, image, 1 + axes, -1)
    return editor.call(aten.flatten.using_ints, flat, 1, axes)


def _arguments(node: Node) -> tuple[Any, ...]:
    given: tuple[Any, ...] = node.args
    defaults: tuple[Any, ...] = (None, [1], [0], [1], 1)
    input, weight, bias, stride, padding, dilation, groups = (*given, *defaults[len(given) - 2 :])
    axes = node.meta["val"].ndim - 2
    stride, padding, dilation = (
        [*value] * axes if len(value) == 1 else [*value] for value in (stride, padding, dilation)
    )
    return input, weight, bias, stride, padding, dilation, groups
