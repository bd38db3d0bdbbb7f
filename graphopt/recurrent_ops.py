"""The registered operators that a recurrent layer becomes when it is captured; `recurrent` puts them together.

The values come from torch's own fused operator (`recurrent_values`). What stands beside it, `lstm`, `gru` and `rnn`, hands these
values on; its backward is back-propagation through time. It has no parameters of its own: the gradients of the pre-activations
leave it, one for every position, and the linear layers that made them turn them into gradients of weights.

Legend: T positions, N samples, I features in, H hidden, P features out (H, or ``proj_size`` of an LSTM), G gates (4 for an LSTM,
3 for a GRU, 1 for a plain RNN). ``params`` are ``[weight_ih (G H, I), weight_hh (G H, P)]``, followed by
``[bias_ih (G H,), bias_hh (G H,)]`` if there are biases and by ``[weight_hr (P, H)]`` if there is a projection. ``reverse`` runs
from the last position to the first. Gates are not kept: backward computes those of all positions with two products.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt import _compat


@torch.library.custom_op("graphopt::sequence", mutates_args=())
def sequence(input: Tensor) -> Tensor:
    """``input`` (T, N, I): says which axis is which, to whom it may concern."""
    return input.clone()


sequence.register_fake(lambda input: torch.empty_like(input))
sequence.register_autograd(lambda ctx, grad: grad, setup_context=lambda ctx, inputs, output: None)


# --- values -----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::recurrent_values", mutates_args=())
def recurrent_values(
    mode: str, input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor]:
    """One layer in one direction: output (T, N, P) and the last cell state (N, H), which is empty if it is no LSTM.

    Args:
        mode: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        input: (T, N, I).
        states: the hidden state (N, P), and the cell state (N, H) of an LSTM.
        params: as above.
        reverse: the direction.
    """
    rows = input.flip(0) if reverse else input
    tail = (list(params), len(params) > 3, 1, 0.0, False, False, False)
    hidden = [state.unsqueeze(0) for state in states]
    with _compat.disable_autocast(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        if mode == "lstm":
            output, _, cell = torch.lstm(rows, hidden, *tail)
        else:
            output, _ = getattr(torch, mode)(rows, hidden[0], *tail)
            cell = input.new_empty(1, 0)
    return (output.flip(0) if reverse else output.contiguous()), cell.squeeze(0).clone()


@recurrent_values.register_fake
def _(
    mode: str, input: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor]:
    output = input.new_empty((input.shape[0], *states[0].shape))
    return output, states[1].new_empty(states[1].shape) if mode == "lstm" else input.new_empty(0)


@torch.library.custom_op("graphopt::lstm_unprojected", mutates_args=())
def lstm_unprojected(
    input: Tensor, output: Tensor, hidden: Tensor, cell: Tensor, params: Sequence[Tensor], reverse: bool
) -> Tensor:
    """What an LSTM with a projection projects, (T, N, H)."""
    gates, cells, _ = _lstm_gates(input, _before(output, hidden, reverse), cell, params, reverse)
    return gates[:, :, 3] * cells.tanh_()


@lstm_unprojected.register_fake
def _(input: Tensor, output: Tensor, hidden: Tensor, cell: Tensor, params: Sequence[Tensor], reverse: bool) -> Tensor:
    return input.new_empty((input.shape[0], *cell.shape))


# --- back-propagation through time -------------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::lstm_backward", mutates_args=())
def lstm_backward(
    grad_output: Tensor,
    grad_cell: Tensor,
    input: Tensor,
    output: Tensor,
    hidden: Tensor,
    cell: Tensor,
    params: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations (T, N, 4 H), of the first states (N, P), (N, H), and at the output (T, N, P).

    With i, f, g, o the gates and c the cells, ``c_t = f_t c_(t-1) + i_t g_t`` and ``h_t = o_t tanh(c_t)``, projected or not.
    Everything that does not depend on a later position is computed for all of them at once; what is left of a step is five
    operations.

    Reference: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997, with the forget gate of
    Gers, Schmidhuber, Cummins, "Learning to forget", 2000.
    """
    weight_hh, projection = params[1], params[-1] if len(params) % 2 else None
    gates, cells, cells_before = _lstm_gates(input, _before(output, hidden, reverse), cell, params, reverse)
    i, f, g, o = gates.unbind(2)
    activated = cells.tanh_()
    into_cell = o * (1 - activated * activated)
    factors = torch.empty_like(gates)
    torch.mul(g, i * (1 - i), out=factors[:, :, 0])
    torch.mul(cells_before, f * (1 - f), out=factors[:, :, 1])
    torch.mul(i, 1 - g * g, out=factors[:, :, 2])
    torch.mul(activated, o * (1 - o), out=factors[:, :, 3])
    at_output = grad_output.new_empty(grad_output.shape if projection is not None else (0,))
    num, back = input.shape[1], weight_hh.t().contiguous()
    grad_c = grad_cell.clone(memory_format=torch.contiguous_format)
    grad_h = hidden.new_zeros(hidden.shape)
    forgets, into_cells, steps = f.unbind(0), into_cell.unbind(0), factors.unbind(0)
    for position in _order(len(input), not reverse):
        grad_h = grad_h.add_(grad_output[position])
        grad_m = grad_h
        if projection is not None:
            at_output[position] = grad_h
            grad_m = grad_h @ projection
        grad_c.addcmul_(grad_m, into_cells[position])
        step = steps[position]
        step[:, :3].mul_(grad_c.unsqueeze(1))
        step[:, 3].mul_(grad_m)
        grad_c.mul_(forgets[position])
        grad_h = _compat.onednn_linear(step.view(num, -1), back, None)
    return factors.flatten(2), grad_h, grad_c, at_output


@lstm_backward.register_fake
def _(
    grad_output: Tensor,
    grad_cell: Tensor,
    input: Tensor,
    output: Tensor,
    hidden: Tensor,
    cell: Tensor,
    params: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    at_output = grad_output.new_empty(grad_output.shape if len(params) % 2 else (0,))
    return (
        input.new_empty((*input.shape[:2], params[0].shape[0])),
        hidden.new_empty(hidden.shape),
        cell.new_empty(cell.shape),
        at_output,
    )


@torch.library.custom_op("graphopt::gru_backward", mutates_args=())
def gru_backward(
    grad_output: Tensor, input: Tensor, output: Tensor, hidden: Tensor, params: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the pre-activations of both sides (T, N, 3 H) and of the first state (N, H).

    With r, z, n the gates, ``n_t = tanh(a_t + r_t b_t)`` and ``h_t = (1 - z_t) n_t + z_t h_(t-1)``: the new gate's hidden side b
    is multiplied by r after its product, so that the two sides have different gradients there.

    Reference: Cho et al., "Learning phrase representations using RNN encoder-decoder", arXiv:1406.1078, 2014, as
    ``torch.nn.GRU`` has it.
    """
    before = _before(output, hidden, reverse)
    shape = (*output.shape[:2], 3, output.shape[2])
    weight_ih, weight_hh, bias_ih, bias_hh = _padded(params)
    from_input = _compat.onednn_linear(input, weight_ih, bias_ih).view(shape)
    from_hidden = _compat.onednn_linear(before, weight_hh, bias_hh).view(shape)
    r, z = (from_input[:, :, :2] + from_hidden[:, :, :2]).sigmoid_().unbind(2)
    new_hidden = from_hidden[:, :, 2]
    n = torch.tanh(from_input[:, :, 2] + r * new_hidden)
    sides = from_input  # d(input side) / d(h), the last gate's; then the gradients
    torch.mul(1 - z, 1 - n * n, out=sides[:, :, 2])
    torch.mul(sides[:, :, 2] * new_hidden, r * (1 - r), out=sides[:, :, 0])
    torch.mul(before - n, z * (1 - z), out=sides[:, :, 1])
    hidden_sides = from_hidden.copy_(sides)
    hidden_sides[:, :, 2].mul_(r)
    at_output = torch.empty_like(output)
    grad_h = hidden.new_zeros(hidden.shape)
    num, back = input.shape[1], weight_hh.t().contiguous()
    for position in _order(len(input), not reverse):
        total = torch.add(grad_h, grad_output[position], out=at_output[position])
        step = hidden_sides[position].mul_(total.unsqueeze(1))
        grad_h = _compat.onednn_linear(step.view(num, -1), back, None).addcmul_(total, z[position])
    sides.mul_(at_output.unsqueeze(2))
    return sides.flatten(2), hidden_sides.flatten(2), grad_h


@gru_backward.register_fake
def _(
    grad_output: Tensor, input: Tensor, output: Tensor, hidden: Tensor, params: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gates = (*input.shape[:2], params[0].shape[0])
    return input.new_empty(gates), input.new_empty(gates), hidden.new_empty(hidden.shape)


@torch.library.custom_op("graphopt::rnn_backward", mutates_args=())
def rnn_backward(
    grad_output: Tensor, output: Tensor, hidden: Tensor, weight_hh: Tensor, relu: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the pre-activations (T, N, H) and of the first state (N, H); ``h_t = tanh(a_t)``, or ``relu(a_t)``.

    Reference: Elman, "Finding structure in time", Cognitive Science 14(2), 1990.
    """
    factors = (output > 0).to(output.dtype) if relu else 1 - output * output
    grad_h, back = hidden.new_zeros(hidden.shape), weight_hh.t().contiguous()
    for position in _order(len(output), not reverse):
        step = factors[position].mul_(grad_h.add_(grad_output[position]))
        grad_h = _compat.onednn_linear(step, back, None)
    return factors, grad_h


@rnn_backward.register_fake
def _(
    grad_output: Tensor, output: Tensor, hidden: Tensor, weight_hh: Tensor, relu: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    return output.new_empty(output.shape), hidden.new_empty(hidden.shape)


# --- values with that backward ------------------------------------------------------------------------------------------------


@torch.library.custom_op("graphopt::lstm", mutates_args=())
def lstm(
    output: Tensor,
    last_cell: Tensor,
    from_input: Tensor,
    from_hidden: Tensor,
    from_projection: Tensor | None,
    hidden: Tensor,
    cell: Tensor,
    input: Tensor,
    params: Sequence[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """``output`` (T, N, P) and ``last_cell`` (N, H), whose gradients go to the pre-activations and the first states.

    What ``from_input`` and ``from_hidden`` (T, N, 4 H) and ``from_projection`` (T, N, P) hold is never read; nothing else but
    they and the states has a gradient.
    """
    return output.clone(), last_cell.clone()


@torch.library.custom_op("graphopt::gru", mutates_args=())
def gru(
    output: Tensor,
    from_input: Tensor,
    from_hidden: Tensor,
    hidden: Tensor,
    input: Tensor,
    params: Sequence[Tensor],
    reverse: bool,
) -> Tensor:
    """As `lstm`."""
    return output.clone()


@torch.library.custom_op("graphopt::rnn", mutates_args=())
def rnn(
    output: Tensor,
    from_input: Tensor,
    from_hidden: Tensor,
    hidden: Tensor,
    weight_hh: Tensor,
    relu: bool,
    reverse: bool,
) -> Tensor:
    """As `lstm`."""
    return output.clone()


def _lstm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, _, _, _, projection, hidden, cell, input, params, ctx.reverse = inputs
    ctx.projects, ctx.num_params = projection is not None, len(params)
    ctx.save_for_backward(input, values, hidden, cell, *params)


def _lstm_gradients(ctx: Any, grad_output: Tensor, grad_cell: Tensor) -> tuple[Any, ...]:
    input, values, hidden, cell, *params = ctx.saved_tensors
    gates, grad_hidden, grad_first, at_output = torch.ops.graphopt.lstm_backward(
        grad_output, grad_cell, input, values, hidden, cell, params, ctx.reverse
    )
    projected = at_output if ctx.projects else None
    return None, None, gates, gates, projected, grad_hidden, grad_first, None, [None] * ctx.num_params, None


def _gru_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, _, _, hidden, input, params, ctx.reverse = inputs
    ctx.num_params = len(params)
    ctx.save_for_backward(input, values, hidden, *params)


def _gru_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    input, values, hidden, *params = ctx.saved_tensors
    sides = torch.ops.graphopt.gru_backward(grad_output, input, values, hidden, params, ctx.reverse)
    return None, *sides, None, [None] * ctx.num_params, None


def _rnn_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    values, _, _, hidden, weight_hh, ctx.relu, ctx.reverse = inputs
    ctx.save_for_backward(values, hidden, weight_hh)


def _rnn_gradients(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    values, hidden, weight_hh = ctx.saved_tensors
    gates, grad_hidden = torch.ops.graphopt.rnn_backward(grad_output, values, hidden, weight_hh, ctx.relu, ctx.reverse)
    return None, gates, gates, grad_hidden, None, None, None


lstm.register_fake(lambda output, last_cell, *_: (torch.empty_like(output), torch.empty_like(last_cell)))
gru.register_fake(lambda output, *_: torch.empty_like(output))
rnn.register_fake(lambda output, *_: torch.empty_like(output))
lstm.register_autograd(_lstm_gradients, setup_context=_lstm_setup)
gru.register_autograd(_gru_gradients, setup_context=_gru_setup)
rnn.register_autograd(_rnn_gradients, setup_context=_rnn_setup)


@functools.cache
def register_decompositions() -> None:
    """Tell Inductor that the pre-activations are never read, so that it drops what computes them; idempotent."""
    _compat.register_inductor_decompositions(
        {
            sequence._opoverload: lambda input: input,
            lstm._opoverload: lambda output, last_cell, *_: (output, last_cell),
            gru._opoverload: lambda output, *_: output,
            rnn._opoverload: lambda output, *_: output,
        }
    )


# --- helpers ------------------------------------------------------------------------------------------------------------------


def _before(output: Tensor, hidden: Tensor, reverse: bool) -> Tensor:
    """The hidden state that each position starts from, (T, N, P)."""
    first = hidden.unsqueeze(0)
    return torch.cat([output[1:], first]) if reverse else torch.cat([first, output[:-1]])


def _lstm_gates(
    input: Tensor, before: Tensor, cell: Tensor, params: Sequence[Tensor], reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates (T, N, 4, H) and cells (T, N, H), and the cells one step earlier."""
    weight_ih, weight_hh, bias_ih, bias_hh = _padded(params)
    rows = _compat.onednn_linear(input, weight_ih, bias_ih)
    rows += _compat.onednn_linear(before, weight_hh, bias_hh)
    gates = rows.unflatten(2, (4, -1))
    gates[:, :, :2].sigmoid_()
    gates[:, :, 2].tanh_()
    gates[:, :, 3].sigmoid_()
    cells = gates[:, :, 0] * gates[:, :, 2]
    earlier = torch.empty_like(cells)
    current = cell
    for position in _order(len(input), reverse):
        earlier[position] = current
        current = cells[position].addcmul_(gates[position, :, 1], current)
    return gates, cells, earlier


def _padded(params: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Weights and biases."""
    biases = (params[2], params[3]) if len(params) > 3 else (None, None)
    return params[0], params[1], *biases


def _order(length: int, backwards: bool) -> range:
    return range(length - 1, -1, -1) if backwards else range(length)
