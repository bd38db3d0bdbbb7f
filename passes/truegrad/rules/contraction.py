"""Products with a parameter, in any wording: ``matmul``, ``einsum``, ``tensordot``, ``bilinear``, ``addmm`` with alpha, ...

Legend: an operator is an equation (`graphopt.passes.truegrad.equation`): ``Y_nso = X_nsi W_oi`` and the like. T_noi is the
parameter's tangent, one for each sample, G_nso the gradient at the result. The product itself stays for its value; beside it
stands a product of the same shape whose forward is dead code (see `ops.with_tangent`).

**Closed form**, one operand W that is a view of a parameter. The other operands are multiplied to one X; the letters that W
shares with X and the result are heads H, with X alone are inputs I, with the result alone outputs O:

    Y_hso = X_hsi W_hoi     is, for each h, a linear layer (`rules.linear`): exact squares, bounded memory

**Batched form**, for a parameter that is tied or computed: the derivative in the direction of each operand,

    X_nsi T_noi -> (n, s, o),     whose backward  G_nso X_nsi -> (N, O, I)  gives the per-sample gradients

Cost: closed, that of the linear layers, and X if several operands make it (``bilinear``: N S I1 I2 values). Batched, the
per-sample gradients replace the gradient's own product; memory O(N O I), reported as a fallback.

Source: the product rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from graphopt.passes.truegrad._registry import ClosedForm, Context, Declined, batched_rule, closed_form
from graphopt.passes.truegrad.equation import Equation, equation_of
from graphopt.passes.truegrad.rules.linear import emit_linear
from graphopt.passes.truegrad.rules.linear import linear as linear_layer
from graphopt.passes.truegrad.sample_axis import Free, Layout, SampleAxis, shape_of

aten = torch.ops.aten

# Each head is a linear layer of its own: more of them than this, and one batched product is the better form.
_MAX_HEADS = 16


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


class _Product(nn.Module):
    """``function(input, *parameters)`` for parameters of the given shapes."""

    def __init__(self, function: Callable[..., torch.Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.params = nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in shapes])

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs, *self.params)


def _einsum(equation: str, *shapes: tuple[int, ...]) -> _Product:
    return _Product(lambda *operands: torch.einsum(equation, *operands), *shapes)


SAMPLES = (
    lambda: (_Twice(), torch.randn(4, 3)),
    lambda: (_Twice(), torch.randn(4, 5, 3)),
    lambda: (_Heads(), torch.randn(4, 5, 2, 3)),
    lambda: (_Experts(), torch.randn(4, 2, 3)),
    lambda: (_LowRank(), torch.randn(4, 5, 3)),
    lambda: (_einsum("...ti,...io->...to", (2, 3, 4)), torch.randn(4, 2, 5, 3)),
    lambda: (_einsum("ni,ii->ni", (3, 3)), torch.randn(4, 3)),
    lambda: (_einsum("ni,io,op->np", (3, 2), (2, 4)), torch.randn(4, 3)),
    lambda: (_Product(lambda x, w: torch.tensordot(x, w, dims=2), (5, 3, 4)), torch.randn(4, 5, 3)),
    lambda: (_Product(lambda x, w: x @ w, (3,)), torch.randn(4, 5, 3)),
    lambda: (nn.Bilinear(3, 2, 4), torch.randn(4, 5, 3), torch.randn(4, 5, 2)),
)


@closed_form(
    aten.matmul.default, aten.mm.default, aten.bmm.default, aten.einsum.default, aten.tensordot.default, aten.mv.default,
    aten.inner.default, aten.bilinear.default, aten.addmm.default, aten.baddbmm.default, aten.addmv.default,
    aten.outer.default, aten.linalg_vecdot.default, aten.linalg_multi_dot.default,
)  # fmt: skip
def product(node: Node, context: Context) -> ClosedForm | Declined:
    """Put a linear layer, or one for each head, beside the product."""
    plain = linear_layer(node, context) if node.target in _LINEAR_LAYERS else Declined("no linear layer")
    if isinstance(plain, ClosedForm):
        return plain
    found = _find_layer(node, context)
    if isinstance(found, Declined):
        return found
    layer, served = found

    def emit() -> Node:
        again = _find_layer(node, context)  # other rules may have replaced its operands
        assert not isinstance(again, Declined)
        tangent = again[0].emit(context, again[1])
        value = _value(node, context)
        return context.editor.call(torch.ops.graphopt.with_tangent.default, value, tangent)

    size = math.prod(int(size) for size in layer.weight.meta["val"].shape)
    return ClosedForm(tuple(served), emit, 3 * size, 12 * size)


@batched_rule(
    aten.linear.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.matmul.default,
    aten.einsum.default, aten.tensordot.default, aten.mv.default, aten.addmv.default, aten.addbmm.default,
    aten.inner.default, aten.bilinear.default, aten.outer.default, aten.ger.default, aten.addr.default,
    aten.linalg_vecdot.default, aten.linalg_multi_dot.default, aten.chain_matmul.default,
)  # fmt: skip
def contraction(node: Node, context: Context) -> Node | Declined:
    """Keep the product, and add its derivative in the direction of the parameter."""
    if context.per_token:
        return Declined(
            "per-token statistics of a parameter that is computed, tied or has a batch axis are not defined"
        )
    equation = equation_of(node)
    if isinstance(equation, str):
        return Declined(equation)
    editor, layout = context.editor, context.sample_axis(node)
    letter = equation.output[layout.axis]
    # An axis that holds other rows too is unfolded, and folded again at the end.
    rows, sample = (letter, letter) if layout.is_plain else ("PNQ", "N")
    tangents = []
    for position, operand in enumerate(equation.operands):
        if operand not in context.uses.params:
            if not isinstance(context.layout(operand), Free | SampleAxis):
                return Declined("its other operand mixes samples")
            continue
        sides, names = [], []
        for index, (other, letters) in enumerate(zip(equation.operands, equation.letters, strict=True)):
            value = context.tangent(other) if index == position else editor.detached(other)
            shift = int(index == position)
            if letter in letters and isinstance(context.layout(other), Free):  # it broadcasts over the samples
                if letters.count(letter) > 1 or other.meta["val"].shape[letters.index(letter)] != 1:
                    return Declined("an axis of its own lies where the samples are")
                value = editor.call(aten.squeeze.dim, value, letters.index(letter) + shift)
                letters = letters.replace(letter, "")
            else:
                value = _unfolded(value, context.layout(other), context)
            sides.append(value)
            names.append(sample * shift + letters.replace(letter, rows))
        tangent = editor.call(aten.einsum.default, f"{','.join(names)}->{equation.output.replace(letter, rows)}", sides)
        if not layout.is_plain:
            tangent = editor.call(aten.flatten.using_ints, tangent, layout.axis, layout.axis + 2)
        tangents.append(_scaled(tangent, equation.alpha, context))
    value = _value(node, context)
    if equation.summand is not None and equation.summand in context.uses.params:
        bias = context.batched(equation.summand, node)
        zero = editor.call(aten.zeros_like.default, editor.detached(value))
        tangents.append(editor.call(aten.add.Tensor, zero, _scaled(bias, equation.beta, context)))
    total = tangents[0]
    for tangent in tangents[1:]:
        total = editor.call(aten.add.Tensor, total, tangent)
    dtype = node.meta["val"].dtype
    if total.meta["val"].dtype != dtype:
        total = editor.call(aten._to_copy.default, total, dtype=dtype)
    return editor.call(torch.ops.graphopt.with_tangent.default, value, total)


_LINEAR_LAYERS = (aten.addmm.default, aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class _Layer:
    """``Y_hso = X_hsi W_hoi + b_o``, in the letters of an equation.

    Attributes:
        others: the factors that are not the weight, and their letters.
        weight: a view of a parameter, and its letters.
        bias: (O,), a view of a parameter, or ``None``.
        heads, rows, inputs, outputs: the letters h, s, i and o.
        output: the letters of the result, in its order.
        sizes: of the letters of the weight.
        layout: the samples, on the axis ``rows`` without the heads.
        alpha: factor of the product.
    """

    others: tuple[tuple[Node, str], ...]
    weight: Node
    letters: str
    bias: Node | None
    heads: str
    rows: str
    inputs: str
    outputs: str
    output: str
    sizes: dict[str, int]
    layout: SampleAxis
    alpha: float

    def emit(self, context: Context, served: Sequence[Node]) -> Node:
        """The linear layers, with all statistics of their parameters, in the shape of the result."""
        editor = context.editor
        input = _scaled(self._input(context), self.alpha, context)  # (heads, rows, inputs)
        weight = self._weight(context, served)
        results = []
        for places in itertools.product(*(range(self.sizes[letter]) for letter in self.heads)):
            own_input, own_weight = input, weight
            for place in places:
                own_input = editor.call(aten.select.int, own_input, 0, place)
                own_weight = self._view(context, served, aten.select.int, own_weight, 0, place)
            own = [own_weight if value is self.weight else value for value in served]
            results.append(emit_linear(context, own_input, own_weight, self.bias, self.layout, served=own))
        count = [self.sizes[letter] for letter in self.heads]
        result = results[0]
        if count:
            result = editor.call(aten.stack.default, results)
            result = editor.call(aten.unflatten.int, result, 0, count)
        result = editor.call(aten.unflatten.int, result, -1, [self.sizes[letter] for letter in self.outputs] or [1])
        if not self.outputs:
            result = editor.call(aten.squeeze.dim, result, -1)
        return _permuted(result, self.heads + self.rows + self.outputs, self.output, context)

    def _input(self, context: Context) -> Node:
        """(*heads, *rows, I): the product of all factors but the weight."""
        editor, wanted = context.editor, self.heads + self.rows + self.inputs
        values = [(editor.detached(other), letters) for other, letters in self.others]
        if len(values) == 1 and sorted(values[0][1]) == sorted(wanted):
            input = _permuted(*values[0], wanted, context)
        else:
            equation = f"{','.join(letters for _, letters in values)}->{wanted}"
            input = editor.call(aten.einsum.default, equation, [value for value, _ in values])
        return _folded(input, len(self.inputs), lambda *call: editor.call(*call))

    def _weight(self, context: Context, served: Sequence[Node]) -> Node:
        """(*heads, O, I): a view of the weight."""
        order = [self.letters.index(letter) for letter in self.heads + self.outputs + self.inputs]

        def view(target: Any, value: Node, *args: Any) -> Node:
            return self._view(context, served, target, value, *args)

        value = self.weight
        single = [axis for axis in range(len(self.letters)) if axis not in order]  # axes of size 1 that broadcast
        if single:
            value = view(aten.squeeze.dims, value, single)
            order = [axis - sum(other < axis for other in single) for axis in order]
        if order != sorted(order):
            value = view(aten.permute.default, value, order)
        value = _folded(value, len(self.inputs), view)
        heads, outputs = len(self.heads), len(self.outputs)
        if not outputs:
            return view(aten.unsqueeze.default, value, heads)
        return value if outputs == 1 else view(aten.flatten.using_ints, value, heads, heads + outputs - 1)

    def _view(self, context: Context, served: Sequence[Node], target: Any, value: Node, *args: Any) -> Node:
        result = context.editor.call(target, value, *args)
        if self.weight in served:
            context.uses.extend(value, result)
        return result


def _find_layer(node: Node, context: Context) -> tuple[_Layer, list[Node]] | Declined:
    """The linear layer that a product is, and those of its parameters that want a statistic."""
    equation = equation_of(node)
    if isinstance(equation, str):
        return Declined(equation)
    layout = context.layout(node)
    chains = context.uses.selections if context.per_token else context.uses.views
    positions = [index for index, operand in enumerate(equation.operands) if operand in context.uses.params]
    if len(positions) != 1 or not isinstance(layout, SampleAxis):
        return Declined("its parameter is not the one factor without samples")
    (position,) = positions
    weight, letters = equation.operands[position], equation.letters[position]
    bias = equation.summand if equation.summand in context.uses.params else None
    if weight not in chains or (bias is not None and bias not in chains):
        return Declined("its parameter is computed from others")
    split = _split(equation, position)
    if isinstance(split, Declined):
        return split
    heads, rows, inputs, outputs, others, sizes = split
    letter = equation.output[layout.axis]
    if letter not in rows:
        return Declined("an axis of its own lies where the samples are")
    if math.prod(sizes[head] for head in heads) > _MAX_HEADS:
        return Declined(f"more than {_MAX_HEADS} heads")
    if context.per_token and equation.output != rows + outputs:
        return Declined("per-token statistics of a parameter with a batch axis are not defined")
    if bias is not None:
        shape = [int(size) for size in bias.meta["val"].shape]
        is_bias = len(outputs) == 1 and equation.output[-1] == outputs and shape == [sizes[outputs]]
        if not is_bias or heads or equation.beta != 1:
            return Declined("the summand is not a bias")
    served = [weight] if bias is None else [weight, bias]
    layer = _Layer(
        others, weight, letters, bias, heads, rows, inputs, outputs, equation.output, sizes,
        layout.at(rows.index(letter)), equation.alpha,
    )  # fmt: skip
    return layer, served


def _split(
    equation: Equation, position: int
) -> tuple[str, str, str, str, tuple[tuple[Node, str], ...], dict[str, int]] | Declined:
    """Heads, rows, inputs and outputs; the other factors; the sizes of the weight's letters."""
    weight, letters = equation.operands[position], equation.letters[position]
    sizes = {letter: int(size) for letter, size in zip(letters, weight.meta["val"].shape, strict=True)}
    if len(sizes) != len(letters):
        return Declined("a diagonal of its parameter")
    others = tuple(
        (operand, names)
        for index, (operand, names) in enumerate(zip(equation.operands, equation.letters, strict=True))
        if index != position
    )
    wide: set[str] = set()  # letters on which the other factors are wider than 1, or where the weight is 1 too
    for operand, names in others:
        for name, size in zip(names, shape_of(operand.meta["val"]), strict=True):
            if size != 1 or sizes.get(name, 1) == 1:
                wide.add(name)
            else:
                return Declined("a factor that broadcasts against its parameter")
    own = [letter for letter in letters if not (sizes[letter] == 1 and letter in wide)]
    if any(letter not in wide and letter not in equation.output for letter in own):
        return Declined("its parameter is summed over an axis of its own")
    heads = "".join(letter for letter in own if letter in wide and letter in equation.output)
    inputs = "".join(letter for letter in own if letter in wide and letter not in equation.output)
    outputs = "".join(letter for letter in equation.output if letter in own and letter not in wide)
    rows = "".join(letter for letter in equation.output if letter not in own)
    if any(letter not in wide for letter in rows):
        return Declined("its result has an axis that no factor has")
    return heads, rows, inputs, outputs, others, sizes


def _value(node: Node, context: Context) -> Node:
    """The product itself, which passes no gradient to parameters."""
    args, kwargs = torch.fx.map_arg(
        (node.args, node.kwargs), lambda a: context.editor.detached(a) if a in context.uses.params else a
    )
    return context.editor.call(cast(Any, node.target), *args, **kwargs)


def _permuted(value: Node, letters: str, wanted: str, context: Context) -> Node:
    if letters == wanted:
        return value
    return context.editor.call(aten.permute.default, value, [letters.index(letter) for letter in wanted])


def _folded(value: Node, count: int, call: Callable[..., Node]) -> Node:
    """The last ``count`` axes as one."""
    if count == 0:
        return call(aten.unsqueeze.default, value, -1)
    return value if count == 1 else call(aten.flatten.using_ints, value, -count, -1)


def _scaled(value: Node, scale: float, context: Context) -> Node:
    return value if scale == 1 else context.editor.call(aten.mul.Tensor, value, scale)


def _unfolded(value: Node, layout: Layout, context: Context) -> Node:
    """The axis of the samples as three: (outer, N, inner)."""
    if not isinstance(layout, SampleAxis) or layout.is_plain:
        return value
    return context.editor.call(aten.unflatten.int, value, layout.axis, list(context.editor.rows(layout)))
