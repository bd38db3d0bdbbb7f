"""Recurrent layers and their cells: samples on the second axis, unless ``batch_first``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from graphopt.errors import UnsupportedError
from graphopt.nn.mirror import Arrangement, Mirror, one_sample, remove_axis

if TYPE_CHECKING:
    _Base = nn.RNNBase
else:
    _Base = object


class _Recurrent(Mirror, _Base):
    """(T, N, I), or (N, T, I) if ``batch_first``; states are (layers, N, H)."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            raise UnsupportedError(
                f"{type(self).__name__} of graphopt.nn got a PackedSequence, in which samples share no axis. Pad it "
                "(torch.nn.utils.rnn.pad_packed_sequence) and mask the loss, or use the layer of torch.nn"
            )
        return super().forward(input, hx)

    def _arrange(self, arguments: dict[str, Any]) -> Arrangement:
        axis = 0 if self.batch_first else 1
        axes: dict[str, int | None] = {"input": axis, "hx": 1}
        if arguments["input"].ndim == 3:
            return Arrangement(arguments, axes)

        def unbatch(result: Any) -> Any:
            output, states = result
            return output.squeeze(axis), remove_axis(states, 1)

        return one_sample(arguments, axes, unbatch)


class RNN(_Recurrent, nn.RNN):
    """`torch.nn.RNN`."""


class LSTM(_Recurrent, nn.LSTM):
    """`torch.nn.LSTM`."""


class GRU(_Recurrent, nn.GRU):
    """`torch.nn.GRU`."""


class RNNCell(Mirror, nn.RNNCell):
    """`torch.nn.RNNCell`."""

    num_axes = 2


class LSTMCell(Mirror, nn.LSTMCell):
    """`torch.nn.LSTMCell`."""

    num_axes = 2


class GRUCell(Mirror, nn.GRUCell):
    """`torch.nn.GRUCell`."""

    num_axes = 2
