"""``aten.repeat`` of a value that no sample enters: a class token, or a table of positions, one copy for each sample.

    y = value.repeat(N, 1, 1):   sample n's gradient of the value is that of copy n, rows n H to (n + 1) H of the output, for
                                 a value with H rows

Cost: none beside the rows themselves.

Source: the definition of ``repeat``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import Context, Declined, batched_rule
from graphopt.passes.truegrad.sample_axis import shape_of

aten = torch.ops.aten


class _Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.repeat(input.shape[0], 2, 1), input], 1)


class _Heads(nn.Module):
    """Positions of each head, repeated for all samples, as DeBERTa writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(2, 1, 3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        copies = torch.tanh(self.positions).repeat(input.shape[0], 5, 1)
        scores = torch.bmm(input.flatten(0, 1), copies.transpose(1, 2))
        return scores.view(*input.shape[:2], *scores.shape[1:])


SAMPLES = (
    lambda: (_Token(), torch.randn(4, 5, 3)),
    lambda: (_Heads(), torch.randn(4, 2, 6, 3)),
)


@batched_rule(aten.repeat.default)
def repeat(node: Node, context: Context) -> Node | Declined:
    """Give the value its rows, and repeat it along the other axes only."""
    value, times = cast(Any, node.args)
    if context.per_token:
        return Declined("there is no per-token rule for repeat")
    editor, layout = context.editor, context.sample_axis(node)
    missing = len(times) - value.meta["val"].ndim
    own = layout.axis - missing
    rows = 1 if own < 0 else value.meta["val"].shape[own]
    others = [1 if position == layout.axis else count for position, count in enumerate(times)]
    if layout.outer != 1 or layout.inner != rows:
        return Declined("copies for several rows of each sample")
    copies = editor.call(aten.repeat.default, editor.detached(value), times)
    tangent = context.tangent(value)
    num, *sizes = (editor.size(size) for size in shape_of(tangent.meta["val"]))
    tangent = editor.call(aten.reshape.default, tangent, [num, *[1] * missing, *sizes])
    tangent = editor.call(aten.repeat.default, tangent, [1, *others])
    tangent = editor.call(aten.movedim.int, tangent, 0, layout.axis)
    tangent = editor.call(aten.flatten.using_ints, tangent, layout.axis, layout.axis + 1)
    return editor.call(torch.ops.graphopt.with_tangent.default, copies, tangent)
