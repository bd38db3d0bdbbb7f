"""Recurrent layers, as `graphopt.recurrent` writes them: positions on the first axis, samples on the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import Free, Known, Layout, Lost, SampleAxis, axis_rule

_HINT = {
    True: "a recurrent layer runs along the axis that is said to count samples. Its input is (positions, samples, features), or "
    "(samples, positions, features) with batch_first=True; for a sequence-first model say options={'sample_axis': 1}, or by "
    "argument options={'sample_axis': {'input': 1}}",
    False: "the features of a recurrent layer are said to count samples",
}


@axis_rule("sequence")
def sequence(node: Node, value: Tensor, known: Known) -> Layout:
    """The input of a layer, (T, N, I)."""
    layout = known.layout(node.args[0])
    if isinstance(layout, SampleAxis) and layout.axis != 1:
        return Lost(node, _HINT[layout.axis == 0])
    return layout


@axis_rule("recurrent_values")
def recurrent_values(node: Node, value: Tensor, known: Known) -> Layout:
    """Output (T, N, P) and last cell state (N, H)."""
    input, states = cast(Any, node.args[1:3])
    layout = known.layout(input)
    if isinstance(layout, Free):  # one sequence for all samples, which start from states of their own
        found = [own for state in states if isinstance(own := known.layout(state), SampleAxis)]
        layout = found[0].at(found[0].axis + 1)
    if isinstance(layout, Lost):
        return layout
    return layout.at(value.ndim - 2) if layout.axis == 1 else Lost(node, _HINT[True])


@axis_rule("lstm", "gru", "rnn")
def recurrence(node: Node, value: Tensor, known: Known) -> Layout:
    """Hands on its first arguments."""
    outputs: Any = node.meta["val"]
    position = [output is value for output in outputs].index(True) if isinstance(outputs, Sequence) else 0
    return known.layout(node.args[position])


@axis_rule("lstm_unprojected")
def unprojected(node: Node, value: Tensor, known: Known) -> Layout:
    """(T, N, H), as the output."""
    return known.layout(node.args[1])
