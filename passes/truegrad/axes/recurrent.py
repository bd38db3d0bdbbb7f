"""Recurrent layers, as `graphopt.recurrent` writes them: positions on the first axis, samples on the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import Known, Layout, Lost, SampleAxis, axis_rule

_HINT = (
    "runs along the axis that is said to count samples. Its input is (positions, samples, features), or (samples, positions, "
    "features) with batch_first=True; for a sequence-first model say options={'sample_axis': 1}, or by argument "
    "options={'sample_axis': {'input': 1}}"
)


@axis_rule("recurrent_values")
def recurrent_values(node: Node, value: Tensor, known: Known) -> Layout:
    """Output (T, N, P) and last cell state (N, H)."""
    mode, input, states = cast(Any, node.args[:3])
    layout = known.layout(input)
    if not isinstance(layout, SampleAxis):
        first = [own for state in states if isinstance(own := known.layout(state), SampleAxis)]
        if isinstance(layout, Lost) or not first or first[0].axis != 0:
            return Lost(node, "samples enter only a part")
        layout = first[0].at(1)
    if layout.axis != 1:
        return Lost(node, f"{_NAMES[mode]} {_HINT}")
    return layout.at(value.ndim - 2)


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


_NAMES = {"lstm": "nn.LSTM", "gru": "nn.GRU", "rnn_tanh": "nn.RNN", "rnn_relu": "nn.RNN"}
