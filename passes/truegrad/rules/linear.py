"""``aten.linear`` and the products that are linear layers in other words: ``addmm``, ``mm``, ``matmul``.

Legend: N samples, S positions of one sample (all leading axes but the sample's), I in, O out. X_NSI is the input, G_NSO the
gradient of the loss at the output.

    weight, S > 1:  sum_n (sum_s G_nso X_nsi)^2      one product for each sample; their sum is the gradient, so they replace its
                                                     matmul: N O I multiply-adds are added, memory O(O I) (`ops.sums`)
    weight, S = 1:  sum_n (G_no X_ni)^2 = (G^2)^T (X^2)                       one more matmul: 2 N O I operations
    bias:           sum_n (sum_s G_nso)^2                                      O(N S O), memory O(N O)

``per="token"`` counts each row by itself, which is the case S = 1 with N S rows. With ``square_dtype`` the squares of the
second line are rounded to that type before they are multiplied.

Source: Dangel, Kunstner, Hennig, "BackPACK: Packing more into backprop", arXiv:1912.10985, 2020, appendix A.1, for S = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad import ops  # noqa: F401  registers torch.ops.graphopt
from graphopt.passes.truegrad._registry import ClosedForm, Context, Declined, closed_form
from graphopt.passes.truegrad.sample_axis import SampleAxis

aten = torch.ops.aten


class _Addmm(nn.Module):
    """A linear layer as GPT-2 writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.bias = nn.Parameter(torch.randn(2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = torch.addmm(self.bias, input.flatten(0, -2), self.weight)
        return rows.reshape(*input.shape[:-1], -1)


class _Matmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight


class _Fused(nn.Module):
    """One weight, cut in three."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        query, key, value = self.weight.chunk(3)
        return nn.functional.linear(input, query) * nn.functional.linear(input, key) + nn.functional.linear(
            input, value
        )


SAMPLES = (
    lambda: (nn.Linear(3, 2), torch.randn(4, 3)),
    lambda: (nn.Linear(3, 2, bias=False), torch.randn(4, 5, 3)),
    lambda: (nn.Linear(3, 2), torch.randn(4, 5, 2, 3)),
    lambda: (_Addmm(), torch.randn(4, 5, 3)),
    lambda: (_Matmul(), torch.randn(4, 3)),
    lambda: (_Matmul(), torch.randn(4, 5, 3)),
    lambda: (_Fused(), torch.randn(4, 5, 3)),
)


@dataclass(frozen=True)
class _Operands:
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool  # the weight is (I, O)


@closed_form(aten.linear.default)
def linear(node: Node, context: Context) -> ClosedForm | Declined:
    """Replace the product by ``graphopt::linear``."""
    operands = find_operands(node)
    if isinstance(operands, Declined):
        return operands
    input, weight, bias = operands.input, operands.weight, operands.bias
    layout = context.layout(input)
    if not isinstance(layout, SampleAxis) or layout.axis == input.meta["val"].ndim - 1:
        return Declined("its parameter is not the right-hand side of a product with samples")
    served = []
    for value in (weight, bias):
        if value is None or value not in context.uses.params:
            continue
        if value not in context.uses.views:
            return Declined("its parameter is computed from others")
        served.append(value)
    if bias is not None and bias.meta["val"].shape != weight.meta["val"].shape[1 if operands.transposed else 0 :][:1]:
        return Declined("the summand is not a bias")

    def emit() -> Node:
        found = cast(_Operands, find_operands(node))  # again: other rules may have replaced them
        return emit_linear(
            context, found.input, found.weight, found.bias, layout, served=served, transposed=found.transposed
        )

    return ClosedForm(tuple(served), emit, *_cost(input, weight))


def emit_linear(
    context: Context,
    input: Node,
    weight: Node,
    bias: Node | None,
    layout: SampleAxis,
    *,
    served: Sequence[Node],
    transposed: bool = False,
) -> Node:
    """``graphopt::linear`` with all statistics of its parameters; other rules express themselves in it.

    Args:
        context: of the rewrite.
        input: (..., I), with samples on ``layout.axis``, which is not the last.
        weight: (O, I), or (I, O) if ``transposed``.
        bias: (O,).
        layout: where the samples are in ``input``.
        served: those of ``weight`` and ``bias`` whose statistics are wanted; views of parameters (see `Uses.extend` for views
            that a rule makes).
        transposed: whether the weight is (I, O).
    """
    editor = context.editor
    if transposed:
        turned = editor.call(aten.t.default, weight)
        if weight in served:
            context.uses.extend(weight, turned)
        served, weight = [turned if value is weight else value for value in served], turned
    of_weight = context.companions(weight) if weight in served else []
    of_bias = context.companions(bias) if bias is not None and bias in served else []
    tail = (context.wanted, layout.axis, *editor.rows(layout), context.per_token, context.square_dtype)
    return editor.call(torch.ops.graphopt.linear.default, input, weight, bias, of_weight, of_bias, *tail)


def find_operands(node: Node) -> _Operands | Declined:
    """Input, weight and bias, whichever way the product is written."""
    args = cast(Any, node.args)
    if node.target is aten.linear.default:
        if args[1].meta["val"].ndim != 2:
            return Declined("its parameter is not a matrix")
        return _Operands(args[0], args[1], args[2] if len(args) > 2 else None, transposed=False)
    if node.target is aten.addmm.default:
        if any(node.kwargs.get(scale, 1) != 1 for scale in ("alpha", "beta")):
            return Declined("addmm with alpha or beta")
        return _Operands(args[1], args[2], args[0], transposed=True)
    if node.target not in (aten.mm.default, aten.matmul.default):
        return Declined("it is not a linear layer")
    if args[1].meta["val"].ndim != 2 or args[0].meta["val"].ndim < 2:
        return Declined("its parameter is not a matrix")
    return _Operands(args[0], args[1], None, transposed=True)


def _cost(input: Node, weight: Node) -> tuple[int, int]:
    rows = input.meta["val"]
    size = weight.meta["val"].numel()
    num = _hint(rows.shape[0])
    positions = _hint(rows.numel()) // max(1, num * _hint(rows.shape[-1]))
    return (2 * num * size, 4 * size) if positions == 1 else (3 * num * size, 12 * size)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
