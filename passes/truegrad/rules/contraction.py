"""Products with a parameter that is tied, batched or computed: ``linear``, ``mm``, ``bmm``, ``matmul``, ``einsum``, ...

The product itself stays. Beside it stands its derivative in the direction of the parameter, one for each sample, as an einsum
of the input X and the parameter's tangent T: for ``y_nso = X_nsi W_oi`` that is ``X_nsi T_noi``. Its forward is dead code (see
`ops.with_tangent`); its backward, ``G_nso X_nsi -> (N, O, I)``, gives the per-sample gradients.

Cost: the per-sample gradients replace the gradient's own matmul; memory O(N O I), reported as a fallback.

Source: the product rule.
"""

from __future__ import annotations

import string
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import Context, Declined, batched_rule
from graphopt.passes.truegrad.sample_axis import Free, Layout, SampleAxis

aten = torch.ops.aten


class _Twice(nn.Module):
    """One weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        first: torch.Tensor = self.layer(input)
        second: torch.Tensor = self.layer(torch.tanh(first))
        return second


class _Heads(nn.Module):
    """A parameter with a batch axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nshi,hio->nsho", input, self.weight)


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.bmm(input.transpose(0, 1), self.weight).transpose(0, 1)


class _LowRank(nn.Module):
    """LoRA: the weight is a product of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.down, self.up = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight + self.up @ self.down)


SAMPLES = (
    lambda: (_Twice(), torch.randn(4, 3)),
    lambda: (_Twice(), torch.randn(4, 5, 3)),
    lambda: (_Heads(), torch.randn(4, 5, 2, 3)),
    lambda: (_Experts(), torch.randn(4, 2, 3)),
    lambda: (_LowRank(), torch.randn(4, 5, 3)),
)


@batched_rule(
    aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.matmul.default,
    aten.einsum.default,
)  # fmt: skip
def contraction(node: Node, context: Context) -> Node | Declined:
    """Keep the product, and add its derivative in the direction of the parameter."""
    if context.per_token:
        return Declined(
            "per-token statistics of a parameter that is computed, tied or has a batch axis are not defined"
        )
    parsed = _parse(node)
    if isinstance(parsed, Declined):
        return parsed
    operands, letters, output, summand = parsed
    editor, layout = context.editor, context.sample_axis(node)
    letter = output[layout.axis]
    rows = (
        letter if layout.is_plain else "PNQ"
    )  # an axis that holds other rows too is unfolded, and folded again at the end
    sample = letter if layout.is_plain else "N"
    tangents = []
    for position, operand in enumerate(operands):
        if operand not in context.uses.params:
            if not isinstance(context.layout(operand), Free | SampleAxis):
                return Declined("its other operand mixes samples")
            continue
        sides = [_unfolded(editor.detached(other), context.layout(other), context) for other in operands]
        sides[position] = context.tangent(operand)
        names = [name.replace(letter, rows) for name in letters]
        names[position] = sample + letters[position]
        equation = f"{','.join(names)}->{output.replace(letter, rows)}"
        tangent = editor.call(aten.einsum.default, equation, sides)
        if not layout.is_plain:
            tangent = editor.call(aten.flatten.using_ints, tangent, layout.axis, layout.axis + 2)
        tangents.append(tangent)
    value = editor.call(
        cast(Any, node.target),
        *torch.fx.map_arg(node.args, lambda a: editor.detached(a) if a in context.uses.params else a),
        **node.kwargs,
    )
    if summand is not None and summand in context.uses.params:
        bias = context.batched(summand, node)
        zero = editor.call(aten.zeros_like.default, editor.detached(value))
        tangents.append(editor.call(aten.add.Tensor, zero, bias))
    total = tangents[0]
    for tangent in tangents[1:]:
        total = editor.call(aten.add.Tensor, total, tangent)
    dtype = node.meta["val"].dtype
    if total.meta["val"].dtype != dtype:
        total = editor.call(aten._to_copy.default, total, dtype=dtype)
    return editor.call(torch.ops.graphopt.with_tangent.default, value, total)


def _unfolded(value: Node, layout: Layout, context: Context) -> Node:
    """The axis of the samples as three: (outer, N, inner)."""
    if not isinstance(layout, SampleAxis) or layout.is_plain:
        return value
    return context.editor.call(aten.unflatten.int, value, layout.axis, list(context.editor.rows(layout)))


def _parse(node: Node) -> tuple[list[Node], list[str], str, Node | None] | Declined:
    """Operands, the letters of each, the letters of the result, and what is added to it."""
    args = cast(Any, node.args)
    if node.target is aten.einsum.default:
        equation = args[0].replace(" ", "")
        if "." in equation or "->" not in equation:
            return Declined("an einsum whose equation is not explicit")
        sides, output = equation.split("->")
        return list(args[1]), sides.split(","), output, None
    if node.target in (aten.addmm.default, aten.baddbmm.default):
        if any(node.kwargs.get(scale, 1) != 1 for scale in ("alpha", "beta")):
            return Declined("a product with alpha or beta")
        summand, left, right = args[:3]
    else:
        left, right = args[:2]
        summand = args[2] if len(args) > 2 else None
    ndim_left, ndim_right = left.meta["val"].ndim, right.meta["val"].ndim
    letters = string.ascii_lowercase
    if node.target is aten.linear.default:
        batch = letters[: ndim_left - 1]
        return [left, right], [batch + "x", "yx"], batch + "y", summand
    if ndim_left < 2 or ndim_right < 2:
        return Declined("a product with a vector")
    shared = letters[: max(ndim_left, ndim_right) - 2]
    names = [shared[len(shared) - (ndim_left - 2) :] + "xy", shared[len(shared) - (ndim_right - 2) :] + "yz"]
    for side, name in zip((left, right), names, strict=True):
        sizes, whole = side.meta["val"].shape[:-2], node.meta["val"].shape
        if any(size == 1 and whole[position + len(whole) - 2 - len(sizes)] != 1 for position, size in enumerate(sizes)):
            return Declined(f"a product that broadcasts {name}")
    return [left, right], names, shared + "xz", summand
