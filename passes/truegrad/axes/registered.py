"""The operators that this package registers (`graphopt.passes.truegrad.ops`), for passes that read a rewritten graph."""

from __future__ import annotations

import operator
from typing import cast

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.axes.elementwise import broadcast
from graphopt.passes.truegrad.sample_axis import Known, Layout, Lost, SampleAxis, axis_rule, functional_name, value_of

_INDICES = 3  # position of the indices among the arguments of embeddings


@axis_rule("tied_linear")
def linear(node: Node, value: Tensor, known: Known) -> Layout:
    """Rows of the input."""
    return known.layout(node.args[0])


@axis_rule("tied_embedding")
def embedding(node: Node, value: Tensor, known: Known) -> Layout:
    """The rows looked up, and a tensor (N, S, D) without memory that receives gradients."""
    layout = known.layout(node.args[_INDICES])
    carries = value.ndim == 3 and any(
        user.target is operator.getitem and user.args[1] == 1 and value_of(user) is value for user in node.users
    )
    if carries and isinstance(layout, SampleAxis):
        return SampleAxis(0, layout.num, layout.source, order=layout.order)
    return layout


@axis_rule("with_tangent", "deliver")
def alongside(node: Node, value: Tensor, known: Known) -> Layout:
    """The first argument, with a second place for its gradient to go."""
    layout = known.layout(node.args[0])
    return layout if isinstance(layout, SampleAxis) else broadcast(node, value.ndim, known)


@axis_rule("convolution_tangent")
def on_first_axis(node: Node, value: Tensor, known: Known) -> Layout:
    """Images of the input."""
    layout = known.layout(cast(Node, node.args[1]))
    same = isinstance(layout, SampleAxis) and layout.axis == 0
    return layout if same else Lost(node, f"{functional_name(node)} with samples that are not on the first axis")
