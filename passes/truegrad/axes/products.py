"""Products: the axis of the samples must not be summed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import Known, Layout, Lost, SampleAxis, axis_rule, value_of


@axis_rule("linear")
def linear(node: Node, value: Tensor, known: Known) -> Layout:
    """Samples on any axis but the last."""
    layout = known.layout(node.args[0])
    if isinstance(layout, SampleAxis) and layout.axis < value.ndim - 1:
        return layout
    return Lost(node, "a product over the samples")


@axis_rule("matmul", "mm", "bmm")
def matmul(node: Node, value: Tensor, known: Known) -> Layout:
    """Samples on a batch axis, on the rows of the left or the columns of the right operand."""
    return _product(node, value, known, node.args[0], node.args[1])


@axis_rule("addmm", "baddbmm")
def addmm(node: Node, value: Tensor, known: Known) -> Layout:
    """As in `matmul`."""
    return _product(node, value, known, node.args[1], node.args[2])


@axis_rule("einsum")
def einsum(node: Node, value: Tensor, known: Known) -> Layout:
    """The letter of the samples must stand in the result."""
    equation = cast(str, node.args[0]).replace(" ", "")
    if "." in equation or "->" not in equation:
        return Lost(node, "an einsum whose equation is not explicit")
    sides, output = equation.split("->")
    found = set()
    for letters, operand in zip(sides.split(","), cast(Sequence[Any], node.args[1]), strict=True):
        axis = known.layout(operand)
        if isinstance(axis, SampleAxis):
            if letters[axis.axis] not in output:
                return Lost(node, "a product over the samples")
            found.add(axis.at(output.index(letters[axis.axis])))
    return found.pop() if len(found) == 1 else Lost(node, "samples meet on different axes")


@axis_rule("scaled_dot_product_attention", "_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention",
           "_scaled_dot_product_efficient_attention", "_scaled_dot_product_flash_attention_for_cpu")  # fmt: skip
def attention(node: Node, value: Tensor, known: Known) -> Layout:
    """Samples on a batch axis."""
    layout = known.layout(node.args[0])
    if isinstance(layout, SampleAxis) and layout.axis < value.ndim - 2:
        return layout
    return Lost(node, "attention across samples")


def _product(node: Node, value: Tensor, known: Known, left: Any, right: Any) -> Layout:
    found = set()
    for operand, contracted in ((left, -1), (right, -2)):
        layout, ndim = known.layout(operand), value_of(operand).ndim
        if not isinstance(layout, SampleAxis):
            continue
        if ndim == 1 or layout.axis == ndim + contracted or value.ndim < 2:
            return Lost(node, "a product over the samples")
        found.add(layout.at(layout.axis + value.ndim - ndim))
    return found.pop() if len(found) == 1 else Lost(node, "samples meet on different axes")
