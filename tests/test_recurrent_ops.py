"""The operators of recurrent layers: torch's own checks, and their gradients against those of ``torch.lstm`` and its like."""

import itertools

import pytest
import torch
from torch.library import opcheck

from graphopt import _compat, recurrent_ops

T, N, WIDTH, H, P = 3, 2, 3, 4, 2
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def tensors(*shapes, grad=True):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=grad) for shape in shapes]


def parameters(mode, biases=True, projects=False):
    rows, width = GATES[mode] * H, P if projects else H
    shapes = [(rows, WIDTH), (rows, width), *[(rows,), (rows,)] * biases, *[(P, H)] * projects]
    return tensors(*shapes, grad=False)


def of_lstm(biases=True, projects=False, reverse=False):
    width = P if projects else H
    values = tensors((T, N, width), (N, H))
    sides = tensors((T, N, 4 * H), (T, N, 4 * H))
    projected = tensors((T, N, P))[0] if projects else None
    params = parameters("lstm", biases, projects)
    return (
        *values,
        *sides,
        projected,
        *tensors((N, width), (N, H)),
        *tensors((T, N, WIDTH), grad=False),
        params,
        reverse,
    )


def of_gru(biases=True, reverse=False):
    sides = tensors((T, N, H), (T, N, 3 * H), (T, N, 3 * H), (N, H))
    return (*sides, *tensors((T, N, WIDTH), grad=False), parameters("gru", biases), reverse)


def of_rnn(relu, reverse=False):
    return (*tensors((T, N, H), (T, N, H), (T, N, H), (N, H)), *tensors((H, H), grad=False), relu, reverse)


def fixed(arguments):
    return tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in arguments)


def backward_of_lstm(**options):
    output, cell, _, _, _, hidden, first, input, params, reverse = fixed(of_lstm(**options))
    return output, cell, input, output.clone(), hidden, first, params, reverse


def backward_of_gru(**options):
    output, _, _, hidden, input, params, reverse = fixed(of_gru(**options))
    return output, input, output.clone(), hidden, params, reverse


def values_of(mode, reverse=False, **options):
    params = parameters(mode, **options)
    states = tensors((N, params[1].shape[1]), *[(N, H)] * (mode == "lstm"), grad=False)
    return mode, *tensors((T, N, WIDTH), grad=False), states, params, reverse


SAMPLE_INPUTS = {
    "sequence": [tuple(tensors((T, N, WIDTH)))],
    "recurrent_values": [
        *[values_of(mode, reverse) for mode in GATES for reverse in (False, True)],
        values_of("gru", biases=False),
        values_of("lstm", projects=True),
    ],
    "lstm_unprojected": [
        (lambda b: (b[2], b[3], b[4], b[5], b[6], b[7]))(backward_of_lstm(projects=True, reverse=reverse))
        for reverse in (False, True)
    ],
    "lstm": [of_lstm(), of_lstm(biases=False, reverse=True), of_lstm(projects=True)],
    "gru": [of_gru(), of_gru(biases=False, reverse=True)],
    "rnn": [of_rnn(False), of_rnn(True, reverse=True)],
    "lstm_backward": [backward_of_lstm(), backward_of_lstm(biases=False, projects=True, reverse=True)],
    "gru_backward": [backward_of_gru(), backward_of_gru(biases=False, reverse=True)],
    "rnn_backward": [
        (lambda a: (a[0], a[0].clone(), *a[3:]))(fixed(of_rnn(relu, reverse)))
        for relu, reverse in itertools.product((False, True), repeat=2)
    ],
}
CASES = [
    pytest.param(name, args, id=f"{name}-{i}") for name, cases in SAMPLE_INPUTS.items() for i, args in enumerate(cases)
]
DIFFERENTIABLE = ("sequence", "lstm", "gru", "rnn")
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def test_every_operator_is_tested():
    found = {
        name
        for name, value in vars(recurrent_ops).items()
        if isinstance(value, _compat.CustomOpDef) and not name.startswith("_")
    }
    assert set(SAMPLE_INPUTS) == found


@pytest.mark.parametrize(("name", "args"), CASES)
def test_opcheck(name, args):
    utils = ["test_schema", "test_faketensor"]
    if name in DIFFERENTIABLE:
        utils += ["test_autograd_registration"]
    opcheck(getattr(torch.ops.graphopt, name).default, args, test_utils=utils)


@pytest.mark.parametrize(("name", "args"), [case for case in CASES if case.values[0] in DIFFERENTIABLE])
def test_opcheck_compiled(name, args):
    opcheck(getattr(torch.ops.graphopt, name).default, args, test_utils=["test_aot_dispatch_dynamic"])


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("mode", [*GATES, "projected"])
def test_gradients_of_pre_activations(mode, reverse, biases):
    """Those of both sides, read off torch's own layer: what its biases would have, were there one for each position."""
    projects = mode == "projected"
    mode = "lstm" if projects else mode
    params = parameters(mode, biases, projects)
    states = tensors((N, params[1].shape[1]), *[(N, H)] * (mode == "lstm"))
    (input,) = tensors((T, N, WIDTH), grad=False)
    sides = tensors(*[(T, N, GATES[mode] * H)] * 2)
    output, cell = _by_equations(mode, input, states, params, sides, reverse)
    values, last = torch.ops.graphopt.recurrent_values(mode, input, [s.detach() for s in states], params, reverse)
    torch.testing.assert_close(values, output.detach(), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(output)
    loss = (weights * output).sum() + (cell.sin().sum() if mode == "lstm" else 0)
    expected = torch.autograd.grad(loss, [*sides, *states])
    if mode == "lstm":
        torch.testing.assert_close(last, cell.detach(), rtol=1e-12, atol=1e-12)
        found = recurrent_ops.lstm_backward(
            weights, cell.detach().cos(), input, values, *[s.detach() for s in states], params, reverse
        )
        found = (found[0], *found[:3])
    elif mode == "gru":
        found = recurrent_ops.gru_backward(weights, input, values, states[0].detach(), params, reverse)
    else:
        gates, first = recurrent_ops.rnn_backward(
            weights, values, states[0].detach(), params[1], mode == "rnn_relu", reverse
        )
        found = gates, gates, first
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-12)


def _by_equations(mode, input, states, params, sides, reverse):
    """One layer, with ``sides`` minus themselves added to the pre-activations, so that they have gradients."""
    weight_ih, weight_hh = params[:2]
    bias_ih, bias_hh = params[2:4] if len(params) > 3 else (0, 0)
    hidden, cell = states[0], states[-1]
    outputs = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        a = input[t] @ weight_ih.t() + bias_ih + sides[0][t] - sides[0][t].detach()
        b = hidden @ weight_hh.t() + bias_hh + sides[1][t] - sides[1][t].detach()
        if mode == "lstm":
            i, f, g, o = (a + b).chunk(4, 1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            hidden = hidden @ params[-1].t() if len(params) % 2 else hidden
        elif mode == "gru":
            (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
            z = (az + bz).sigmoid()
            hidden = (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * hidden
        else:
            hidden = (a + b).tanh() if mode == "rnn_tanh" else (a + b).relu()
        outputs[t] = hidden
    return torch.stack(outputs), cell
