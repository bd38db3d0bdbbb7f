"""``aten.conv1d``, ``aten.conv2d`` and ``aten.conv3d`` in every form, and ``aten.convolution``: a linear layer over patches.

Legend: N samples, L output positions, I values in a patch (input channels of a group times kernel size), O channels out.
P_NLI are the patches of the input, G_NLO the gradient at the output; with groups, each has its own slice of O and I.

    weight:  sum_n (sum_l G_nlo P_nli)^2          bias:  sum_n (sum_l G_nlo)^2

Cost: one product for each sample in place of the weight gradient, and the patches of a bounded slice of samples, never those of
all (`ops.convolution`). A depthwise convolution, or one of many narrow groups, runs as one convolution with N times the groups,
which costs what its weight gradient costs, and memory N |weight| for a slice of samples. With L = 1 (the kernel covers the
image) it is the weight gradient of squared factors. A weight that is computed (weight norm) or used twice needs one gradient for
each sample, memory N |weight|. ``per="token"`` counts each output position by itself.

Source: Rochette, Manoel, Tramel, "Efficient per-example gradient computations in convolutional neural networks",
arXiv:1912.06015, 2019, for the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Node

from graphopt.passes.truegrad import ops  # noqa: F401  registers torch.ops.graphopt
from graphopt.passes.truegrad._registry import ClosedForm, Context, Declined, batched_rule, closed_form
from graphopt.passes.truegrad.sample_axis import (
    Free,
    Known,
    Layout,
    Lost,
    SampleAxis,
    argument_of,
    axis_rule,
    size_of,
    value_of,
)

aten = torch.ops.aten


class _Function(nn.Module):
    """``torch.convolution``, which takes everything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 1, 3))

    def forward(self, input: Tensor) -> Tensor:
        return torch.convolution(input, self.weight, None, [2], [1], [1], False, [0], 2)


class _Twice(nn.Module):
    """One kernel, used twice, and its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 2, 3, padding=1, groups=2)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.layer(torch.tanh(self.layer(input)))
        return output


SAMPLES = (
    lambda: (nn.Conv2d(2, 3, 2, stride=2), torch.randn(4, 2, 6, 6)),
    lambda: (nn.Conv2d(2, 3, 3, padding=1, dilation=2), torch.randn(4, 2, 6, 5)),
    lambda: (nn.Conv2d(2, 3, 3, bias=False), torch.randn(4, 2, 6, 5)),
    lambda: (nn.Conv1d(2, 3, 3, padding=2, stride=2), torch.randn(4, 2, 7)),
    lambda: (nn.Conv3d(2, 3, 2), torch.randn(4, 2, 3, 4, 3)),
    lambda: (nn.Conv2d(2, 3, 1), torch.randn(4, 2, 3, 4)),
    lambda: (nn.Conv2d(2, 4, 3, padding=1, groups=2), torch.randn(4, 2, 5, 4)),
    lambda: (nn.Conv1d(3, 6, 3, groups=3, dilation=2), torch.randn(4, 3, 7)),
    lambda: (nn.Conv2d(2, 3, (1, 3), padding="same"), torch.randn(4, 2, 5, 4)),
    lambda: (nn.Conv2d(2, 3, 3), torch.randn(4, 2, 3, 3)),
    lambda: (_Function(), torch.randn(4, 2, 7)),
    lambda: (nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 3)), torch.randn(4, 2, 6)),
    lambda: (_Twice(), torch.randn(4, 2, 6)),
)

_FORWARD = (
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv1d.padding, aten.conv2d.padding,
    aten.conv3d.padding, aten.convolution.default,
)  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """The arguments of any convolution.

    Attributes:
        input: (rows, C, *places).
        weight: (O, C / groups, *kernel); (C, O / groups, *kernel) if ``transposed``.
        bias: (O,).
        geometry: stride, padding, dilation, transposed, output_padding, groups, as ``aten.convolution`` takes them.
        behind: how many zeros ``padding="same"`` puts behind the last place of each axis beyond what it puts in front.
    """

    input: Node
    weight: Node
    bias: Node | None
    geometry: tuple[list[int], list[int], list[int], bool, list[int], int]
    behind: tuple[int, ...] = ()


Parse = Callable[[Node], Operands]


@axis_rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution_axis(node: Node, value: Tensor, known: Known) -> Layout:
    """Samples in front, or each sample with a kernel of its own as a group of channels."""
    input, weight = known.layout(node.args[0]), known.layout(node.args[1])
    name = cast(Any, node.target).overloadpacket.__name__
    if value.ndim != value_of(node.args[1]).ndim:
        return Lost(
            node,
            f"{name} of an image without an axis for samples: call the model with a batch, such as image.unsqueeze(0)",
        )
    if isinstance(input, SampleAxis) and isinstance(weight, Free):
        return input if input.axis == 0 else Lost(node, f"{name} with samples that are not on the first axis")
    return _own_kernels(node, value, input, weight) or Lost(node, f"{name} with a kernel that differs between samples")


def _own_kernels(node: Node, value: Tensor, input: Layout, weight: Layout) -> SampleAxis | None:
    """(1, N * C, ...) with a weight (N * O, C, ...) in N groups, as in StyleGAN2."""
    groups = argument_of(node, 8 if node.target is aten.convolution.default else 6, "groups", 1)
    groups = groups.meta["val"] if isinstance(groups, Node) else groups
    if not isinstance(input, SampleAxis) or not isinstance(weight, SampleAxis):
        return None
    if input.axis != 1 or weight.axis != 0 or input.outer != 1 or weight.outer != 1 or size_of(groups) != input.num:
        return None
    return replace(weight.at(1), inner=size_of(value.shape[1]) / input.num)


@closed_form(*_FORWARD)
def convolution(node: Node, context: Context) -> ClosedForm | Declined:
    """Replace it by ``graphopt::convolution``."""
    return serve(node, context, operands)


@batched_rule(*_FORWARD)
def convolution_batched(node: Node, context: Context) -> Node | Declined:
    """Keep it, and add its derivative in the direction of its weight and bias."""
    return serve_batched(node, context, operands)


def operands(node: Node) -> Operands:
    """Input, weight, bias and geometry of a convolution, with one number for each spatial axis."""
    input, weight, bias = (
        argument_of(node, position, name) for position, name in enumerate(("input", "weight", "bias"))
    )
    axes = node.meta["val"].ndim - 2
    if node.target is aten.convolution.default:
        stride, padding, dilation, transposed, output_padding, groups = cast(Any, node.args[3:])
    else:
        stride, padding = argument_of(node, 3, "stride", [1]), argument_of(node, 4, "padding", [0])
        dilation, groups = argument_of(node, 5, "dilation", [1]), argument_of(node, 6, "groups", 1)
        transposed, output_padding = False, [0]
    kernel = [int(size) for size in weight.meta["val"].shape[2:]]
    stride, dilation, output_padding = (spread(value, axes) for value in (stride, dilation, output_padding))
    behind: tuple[int, ...] = ()
    if padding == "same":
        reach = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        padding, behind = [total // 2 for total in reach], tuple(total % 2 for total in reach)
    elif padding == "valid":
        padding = [0]
    geometry = (stride, spread(padding, axes), dilation, transposed, output_padding, groups)
    return Operands(input, weight, bias, geometry, behind)


def spread(value: Any, axes: int) -> list[int]:
    """One number for each spatial axis."""
    return [*value] * (axes if len(value) == 1 else 1)


def serve(node: Node, context: Context, parse: Parse) -> ClosedForm | Declined:
    """The closed form of any convolution."""
    found = parse(node)
    layout = context.layout(found.input)
    if not isinstance(layout, SampleAxis) or layout.axis != 0 or not isinstance(context.layout(found.weight), Free):
        return Declined("its samples are not on the first axis, or have kernels of their own")
    values = [value for value in (found.weight, found.bias) if value is not None and value in context.uses.params]
    if any(value not in context.uses.views for value in values):
        return Declined("its parameter is computed from others")

    def emit() -> Node:
        found = parse(node)  # again: other rules may have replaced its input
        companions = [
            context.companions(value) if value is not None and value in values else []
            for value in (found.weight, found.bias)
        ]
        tail = (context.wanted, *found.geometry, *context.editor.rows(layout), context.per_token, context.square_dtype)
        input = _padded(found, context)
        return context.editor.call(
            torch.ops.graphopt.convolution.default, input, found.weight, found.bias, *companions, *tail
        )

    return ClosedForm(tuple(values), emit, *_cost(found))


def serve_batched(node: Node, context: Context, parse: Parse) -> Node | Declined:
    """The batched form of any convolution: for weights that are computed, or used in several places."""
    if context.per_token:
        return Declined("per-token statistics of a kernel that is computed or used twice are not defined")
    found, editor = parse(node), context.editor
    layout = context.sample_axis(node)
    if layout.axis != 0 or not isinstance(context.layout(found.weight), Free):
        return Declined("its kernels differ between samples, and its other operands depend on parameters")
    fixed = [
        editor.detached(value) if value is not None and value in context.uses.params else value
        for value in (found.weight, found.bias)
    ]
    input = _padded(found, context)
    result = editor.call(aten.convolution.default, input, *fixed, *found.geometry)
    if found.weight in context.uses.params:
        tail = (*found.geometry, *editor.rows(layout))
        rows = context.tangent(found.weight)
        tangent = editor.call(torch.ops.graphopt.convolution_tangent.default, rows, editor.detached(input), *tail)
        result = editor.call(torch.ops.graphopt.with_tangent.default, result, tangent)
    if found.bias is not None and found.bias in context.uses.params:
        column = over_channels(found.bias, node, context)
        zeros = editor.call(aten.zeros_like.default, editor.detached(result))
        summand = editor.call(aten.add.Tensor, zeros, context.batched(column, node))
        result = editor.call(torch.ops.graphopt.with_tangent.default, result, summand)
    return result


def over_channels(value: Node, node: Node, context: Context) -> Node:
    """(C,) -> (C, 1, ...), so that it broadcasts over the axes behind the channels of ``node``."""
    behind = node.meta["val"].ndim - 2
    if not behind:
        return value
    column = context.editor.call(aten.reshape.default, value, [-1] + [1] * behind)
    if value in context.uses.params:
        context.uses.extend(value, column)
    return column


def _padded(found: Operands, context: Context) -> Node:
    if not any(found.behind):
        return found.input
    amounts = [amount for size in reversed(found.behind) for amount in (0, size)]
    return context.editor.call(aten.constant_pad_nd.default, found.input, amounts, 0.0)


def _cost(found: Operands) -> tuple[int, int]:
    weight = found.weight.meta["val"]
    rows = found.input.meta["val"].shape[0]
    num = int(rows.node.hint) if isinstance(rows, torch.SymInt) else int(rows)
    return 3 * num * int(weight.numel()), 12 * int(weight.numel())
