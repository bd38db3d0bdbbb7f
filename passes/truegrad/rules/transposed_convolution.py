"""``aten.conv_transpose1d``, ``aten.conv_transpose2d`` and ``aten.conv_transpose3d``: a linear layer whose output is patches.

Legend: N samples, L input positions, C channels in, I values in a patch of the output (channels of a group times kernel size).
X_NLC is the input, Q_NLI are the patches of the gradient at the output, G_NPO that gradient at all output positions P.

    weight:  sum_n (sum_l X_nlc Q_nli)^2          bias:  sum_n (sum_p G_npo)^2

It is the convolution with the roles of input and output gradient exchanged: output padding adds places to G that no patch
covers.

Cost: as in `rules.convolution`, with patches of the output gradient. ``per="token"`` counts each input position of the weight
and each output position of the bias by itself, so the two have different numbers of positions; it is refused.

Source: as in `rules.convolution`; transposition.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import ClosedForm, Context, Declined, Refused, batched_rule, closed_form
from graphopt.passes.truegrad.rules.convolution import Operands, serve, serve_batched, spread
from graphopt.passes.truegrad.sample_axis import argument_of

aten = torch.ops.aten

SAMPLES = (
    lambda: (nn.ConvTranspose1d(2, 3, 3), torch.randn(4, 2, 4)),
    lambda: (nn.ConvTranspose1d(2, 3, 2, bias=False), torch.randn(4, 2, 1)),
    lambda: (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), torch.randn(4, 2, 3, 4)),
    lambda: (nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 2), groups=2), torch.randn(4, 4, 3, 2)),
    lambda: (nn.ConvTranspose2d(2, 2, 2, stride=1, dilation=3, output_padding=2), torch.randn(4, 2, 2, 3)),
    lambda: (nn.ConvTranspose3d(2, 2, 2, stride=2), torch.randn(4, 2, 2, 1, 2)),
    lambda: (nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(2, 3, 3, stride=2)), torch.randn(4, 2, 4)),
)

_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@closed_form(*_TRANSPOSED)
def transposed_convolution(node: Node, context: Context) -> ClosedForm | Declined:
    """Replace it by ``graphopt::convolution``."""
    if context.per_token:
        return Declined("its weight has input positions and its bias output positions")
    return serve(node, context, _operands)


@batched_rule(*_TRANSPOSED)
def transposed_convolution_batched(node: Node, context: Context) -> Node | Declined:
    """Keep it, and add its derivative in the direction of its weight and bias."""
    if context.per_token:
        return Refused(
            "per-token statistics of a transposed convolution are not defined: its weight has input positions and its bias "
            "output positions"
        )
    return serve_batched(node, context, _operands)


def _operands(node: Node) -> Operands:
    axes = node.meta["val"].ndim - 2
    input, weight, bias = (
        argument_of(node, position, name) for position, name in enumerate(("input", "weight", "bias"))
    )
    stride, padding = argument_of(node, 3, "stride", [1]), argument_of(node, 4, "padding", [0])
    output_padding, groups = argument_of(node, 5, "output_padding", [0]), argument_of(node, 6, "groups", 1)
    dilation = argument_of(node, 7, "dilation", [1])
    geometry = (
        spread(stride, axes),
        spread(padding, axes),
        spread(dilation, axes),
        True,
        spread(output_padding, axes),
        groups,
    )
    return Operands(input, weight, bias, geometry)
