"""``aten.repeat`` of a value that no sample enters: a class token, one copy for each sample.

    y = value.repeat(N, 1, 1):   sample n's gradient of the value is row n of the gradient at the output

Cost: none beside the rows themselves.

Source: the definition of ``repeat``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import Context, Declined, batched_rule

aten = torch.ops.aten


class _Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.repeat(input.shape[0], 2, 1), input], 1)


SAMPLES = (lambda: (_Token(), torch.randn(4, 5, 3)),)


@batched_rule(aten.repeat.default)
def repeat(node: Node, context: Context) -> Node | Declined:
    """Give the value its rows, and repeat it along the other axes only."""
    value, times = cast(Any, node.args)
    if context.per_token:
        return Declined("there is no per-token rule for repeat")
    axis = context.sample_axis(node).axis
    others = [1 if position == axis else count for position, count in enumerate(times)]
    return context.editor.call(aten.repeat.default, context.batched(value, node), others)
