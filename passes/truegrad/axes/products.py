"""Products: the axis of the samples must not be summed over."""

from __future__ import annotations

import string
from typing import cast

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.equation import PRODUCTS, Equation, equation_of
from graphopt.passes.truegrad.sample_axis import Known, Layout, Lost, SampleAxis, agreed, axis_rule, value_of


@axis_rule(*PRODUCTS)
def product(node: Node, value: Tensor, known: Known) -> Layout:
    """The letter of the samples must stand in the result, and once in each operand (`graphopt.passes.truegrad.equation`)."""
    equation = equation_of(node)
    return Lost(node, equation) if isinstance(equation, str) else _follow(node, value, known, equation)


@axis_rule("cdist", "_euclidean_dist")
def distances(node: Node, value: Tensor, known: Known) -> Layout:
    """Distances of rows from rows have the axes of ``left @ right.mT``."""
    left, right = cast(tuple[Node, Node], node.args[:2])
    batches = [value_of(side).ndim - 2 for side in (left, right)]
    shared = string.ascii_lowercase[: max(batches)]
    letters = tuple(shared[len(shared) - count :] + row for count, row in zip(batches, ("xy", "zy"), strict=True))
    return _follow(node, value, known, Equation((left, right), letters, shared + "xz"))


def _follow(node: Node, value: Tensor, known: Known, equation: Equation) -> Layout:
    found = set()
    for letters, operand in zip(equation.letters, equation.operands, strict=True):
        layout = known.layout(operand)
        if not isinstance(layout, SampleAxis):
            continue
        letter = letters[layout.axis]
        if letter not in equation.output:
            return Lost(node, "a product over the samples")
        if letters.count(letter) > 1:
            return Lost(node, "a diagonal through the samples")
        found.add(layout.at(equation.output.index(letter)))
    summand = known.layout(equation.summand)
    if isinstance(summand, SampleAxis):
        found.add(summand.at(summand.axis + value.ndim - value_of(equation.summand).ndim))
    return agreed(found, node)


@axis_rule("scaled_dot_product_attention", "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention",
           "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu")  # fmt: skip
def attention(node: Node, value: Tensor, known: Known) -> Layout:
    """Samples on a batch axis."""
    layout = known.layout(node.args[0])
    if isinstance(layout, SampleAxis) and layout.axis < value.ndim - 2:
        return layout
    return Lost(node, "attention across samples")
