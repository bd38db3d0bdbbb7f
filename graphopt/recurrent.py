"""Recurrent layers as captured graphs hold them: two linear layers, and a recurrence without parameters.

For one layer in one direction, with ``a_t = W_ih x_t + b_ih`` and ``b_t = W_hh h_(t-1) + b_hh`` the two pre-activations,

    values   = the layer itself, as torch runs it; everything detached            (one opaque node, whatever the length)
    a        = linear(x, W_ih, b_ih)                                              its forward is dead code
    b        = linear(h_(t-1), W_hh, b_hh), h detached                            its forward is dead code
    output   = values; backward: through time, to a, b and the first states       (`recurrent_ops`)

So the values are torch's own, gradients are exact, and whatever a pass knows about linear layers (statistics, scales, tied and
computed weights) it knows about recurrent ones. Layers, directions, dropout and an LSTM's projection are composed around it.
Cells (``nn.LSTMCell``) are written out.

Dynamo would run the layer on fake tensors one position after the other, which takes half a minute for a GRU of 256 positions;
`opaque_layers` puts the form above in its place while a transformed model is traced.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt import _compat
from graphopt.errors import UnsupportedError
from graphopt.recurrent_ops import register_decompositions

_tracing = threading.local()


@contextmanager
def opaque_layers() -> Iterator[None]:
    """While this is entered, tracing a recurrent layer on this thread takes the same time for any length."""
    _install()
    outer = getattr(_tracing, "on", False)
    _tracing.on = True
    try:
        yield
    finally:
        _tracing.on = outer


def lower_recurrent(target: Any, args: Sequence[Any], where: str) -> Any:
    """Run a recurrent operator of torch in the form above, with the casts that autocast would make.

    Args:
        target: one of `LOWERED`.
        args: its arguments, all by position, as ``torch.nn`` gives them.
        where: the user's source line, for errors.

    Returns:
        What the operator returns.

    Raises:
        UnsupportedError: a packed sequence.
    """
    register_decompositions()
    if target in _LAYERS and not isinstance(args[3], bool):
        raise packed_error(f"the model runs a {target.__name__} over a packed sequence{where}")
    return _run(target, args)


def packed_error(what: str) -> UnsupportedError:
    """Why a packed sequence is refused, and what to do."""
    return UnsupportedError(
        f"{what}, in which no axis counts samples. Pad instead: run the layer over the padded batch, and mask its output (or "
        "take output[arange(N), lengths - 1] for the last state). Or decorate the function that packs and runs it with "
        "torch.compiler.disable: with TrueGrad(unsupported='skip') its parameters then have gradients, but no statistics"
    )


# --- layers -------------------------------------------------------------------------------------------------------------------


def _layers(
    mode: str,
    input: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:
    """All layers; returns the output and the last states, each (layers * directions, N, H)."""
    rows = input.transpose(0, 1) if batch_first else input
    directions = 2 if bidirectional else 1
    each = len(params) // (num_layers * directions)
    last: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            own = params[index * each : (index + 1) * each]
            first = [state[index] for state in states]
            output, final = _direction(mode, rows, first, own, has_biases, reverse=direction == 1)
            outputs.append(output)
            last.append(final)
        rows = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            rows = F.dropout(rows, dropout)
    finals = [torch.stack(state) for state in zip(*last, strict=True)]
    return (rows.transpose(0, 1) if batch_first else rows), finals


def _direction(
    mode: str, input: Tensor, first: list[Tensor], params: Sequence[Tensor], has_biases: bool, *, reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction: (T, N, I) -> (T, N, P), and its last states."""
    ops = torch.ops.graphopt
    weight_ih, weight_hh = params[:2]
    bias_ih, bias_hh = params[2:4] if has_biases else (None, None)
    fixed = [param.detach() for param in params]
    input = ops.sequence(input)
    rows, states = input.detach(), [state.detach() for state in first]
    values, cell = ops.recurrent_values(mode, rows, states, fixed, reverse)
    start = states[0].unsqueeze(0)
    before = torch.cat([values[1:], start] if reverse else [start, values[:-1]])
    from_input = F.linear(input, weight_ih, bias_ih)
    from_hidden = F.linear(before, weight_hh, bias_hh)
    if mode == "lstm":
        from_projection = None
        if len(params) % 2:
            from_projection = F.linear(ops.lstm_unprojected(rows, values, *states, fixed, reverse), params[-1])
        output, cell = ops.lstm(values, cell, from_input, from_hidden, from_projection, *first, rows, fixed, reverse)
    elif mode == "gru":
        output = ops.gru(values, from_input, from_hidden, *first, rows, fixed, reverse)
    else:
        output = ops.rnn(values, from_input, from_hidden, *first, fixed[1], mode == "rnn_relu", reverse)
    hidden = output[0 if reverse else -1]
    return output, (hidden, cell) if mode == "lstm" else (hidden,)


def _lstm(input: Tensor, states: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    output, (hidden, cell) = _layers("lstm", input, states, *rest)
    return output, hidden, cell


def _with_one_state(mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def layers(input: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        output, (hidden,) = _layers(mode, input, [state], *rest)
        return output, hidden

    return layers


# --- cells --------------------------------------------------------------------------------------------------------------------


def _lstm_cell(input: Tensor, states: Sequence[Tensor], *params: Any) -> tuple[Tensor, Tensor]:
    hidden, cell = states
    i, f, g, o = _side(input, hidden, params).chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru_cell(input: Tensor, hidden: Tensor, *params: Any) -> Tensor:
    from_input, from_hidden = (side.chunk(3, 1) for side in _sides(input, hidden, params))
    r, z = ((a + b).sigmoid() for a, b in zip(from_input[:2], from_hidden[:2], strict=True))
    n = (from_input[2] + r * from_hidden[2]).tanh()
    return (hidden - n) * z + n


def _rnn_tanh_cell(input: Tensor, hidden: Tensor, *params: Any) -> Tensor:
    return _side(input, hidden, params).tanh()


def _rnn_relu_cell(input: Tensor, hidden: Tensor, *params: Any) -> Tensor:
    return _side(input, hidden, params).relu()


def _sides(input: Tensor, hidden: Tensor, params: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The two pre-activations, (N, G H) each."""
    weight_ih, weight_hh, *biases = params
    bias_ih, bias_hh = biases or (None, None)
    return F.linear(input, weight_ih, bias_ih), F.linear(hidden, weight_hh, bias_hh)


def _side(input: Tensor, hidden: Tensor, params: Sequence[Any]) -> Tensor:
    """The sum of the two pre-activations."""
    from_input, from_hidden = _sides(input, hidden, params)
    return from_input + from_hidden


# --- tracing ------------------------------------------------------------------------------------------------------------------

_LAYERS: dict[Any, Callable[..., Any]] = {
    torch.lstm: _lstm,
    torch.gru: _with_one_state("gru"),
    torch.rnn_tanh: _with_one_state("rnn_tanh"),
    torch.rnn_relu: _with_one_state("rnn_relu"),
}
LOWERED: dict[Any, Callable[..., Any]] = {
    **_LAYERS,
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell,
    torch.rnn_tanh_cell: _rnn_tanh_cell,
    torch.rnn_relu_cell: _rnn_relu_cell,
}


@functools.cache
def _install() -> None:
    """Put the forms above where the compiler looks up how torch's operators are composed; they step aside unless asked for."""
    for function in _LAYERS:
        operator = getattr(torch.ops.aten, function.__name__).input

        def choose(original: Callable[..., Any], function: Any = function) -> Callable[..., Any]:
            def composed(*args: Any) -> Any:
                return _run(function, args) if getattr(_tracing, "on", False) else original(*args)

            return composed

        _compat.wrap_composition(operator, choose)


def _run(target: Any, args: Sequence[Any]) -> Any:
    """The operator in the form above, in the dtype that autocast runs it in."""
    device = args[0].device.type
    if (target not in _LAYERS and device == "cpu") or not torch.is_autocast_enabled(device):
        return LOWERED[target](*args)
    dtype = torch.get_autocast_dtype(device)
    # torch casts everything, but on a CPU the state of a GRU and the cells of an LSTM with a projection.
    projects = target is torch.lstm and len(args[2]) % (4 if args[3] else 2) != 0
    mixed = device == "cpu" and (target is torch.gru or projects)
    with _compat.disable_autocast():
        results = LOWERED[target](*(args if mixed else _cast(args, dtype)))
    return (*_cast(results[:2], dtype), results[2]) if mixed and projects else results


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return [_cast(item, dtype) for item in value]
    keeps = not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64
    return value if keeps else value.to(dtype)
