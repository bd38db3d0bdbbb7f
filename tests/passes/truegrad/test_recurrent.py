"""Recurrent layers: every form of ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells against a loop over samples."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, get
from graphopt.errors import MissingAnnotation, UncapturedParameter, UnsupportedError
from graphopt.passes import TrueGrad
from graphopt.recurrent import lower_recurrent, opaque_layers
from tests.models import double, smooth
from tests.oracle import Statistic, from_losses, loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, check, train_step

N, T, WIDTH, H = 4, 5, 3, 4
KINDS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
# AOTAutograd traces every kind in the test of batches of any size. Elsewhere it traces LSTMs alone, or nothing: it takes most of a
# test's time, and the operators are the same.
COMPILERS = {kind: "aot_eager" if kind == "lstm" else "eager" for kind in KINDS}
FORMS = {
    "plain": {},
    "sequence first": {"batch_first": False},
    "no bias": {"bias": False},
    "both directions": {"bidirectional": True},
    "two layers": {"num_layers": 2},
    "three layers, both directions, sequence first": {"num_layers": 3, "bidirectional": True, "batch_first": False},
    "two layers, both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}
PROJECTED = {
    "projected": {"proj_size": 2},
    "projected, two layers, both directions, no bias": {
        "proj_size": 2,
        "num_layers": 2,
        "bidirectional": True,
        "bias": False,
    },
}
CASES = [
    *[pytest.param(kind, form, id=f"{kind}, {name}") for kind in KINDS for name, form in FORMS.items()],
    *[pytest.param("lstm", form, id=f"lstm, {name}") for name, form in PROJECTED.items()],
]
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Sequence(nn.Module):
    """Uses the outputs, the last states, or both; samples come out in front."""

    def __init__(self, kind="lstm", uses=("output", "states"), **options):
        super().__init__()
        self.layer = KINDS[kind](WIDTH, H, **{"batch_first": True, **options})
        self.uses = uses

    def forward(self, *inputs):
        output, states = self.layer(*inputs)
        states = states if isinstance(states, tuple) else (states,)
        parts = []
        if "output" in self.uses:
            parts.append((output if self.layer.batch_first else output.transpose(0, 1)).flatten(1))
        if "states" in self.uses:
            parts += [state.transpose(0, 1).flatten(1) for state in states]
        return torch.cat(parts, 1)


def sequence(batch_first=True):
    return torch.randn(N, T, WIDTH) if batch_first else torch.randn(T, N, WIDTH)


@pytest.mark.parametrize(("kind", "form"), CASES)
def test_forms(kind, form):
    axis = 0 if form.get("batch_first", True) else 1
    check(Sequence(kind, **form), (sequence(axis == 0),), axes=axis, compiler="eager", options={"sample_axis": axis})


@pytest.mark.parametrize("uses", ["output", "states"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_one_of_the_results_is_used(kind, uses):
    check(Sequence(kind, (uses,), num_layers=2, bidirectional=True), (sequence(),), compiler=COMPILERS[kind])


class LearnedStart(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = KINDS[kind](WIDTH, H, 2, batch_first=True)
        self.start = nn.Parameter(torch.randn(2, 1, H))

    def forward(self, input):
        start = self.start.expand(-1, input.shape[0], -1)
        output, _ = self.layer(input, (start, 0.5 * start) if isinstance(self.layer, nn.LSTM) else start)
        return output


class GivenStart(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = KINDS[kind](WIDTH, H, 2, bidirectional=True)
        self.inner = nn.Linear(H, H)

    def forward(self, input, start):
        start = self.inner(start)
        output, _ = self.layer(input, (start, start.sin()) if isinstance(self.layer, nn.LSTM) else start)
        return output.transpose(0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_states(kind):
    check(LearnedStart(kind), (sequence(),), compiler=COMPILERS[kind])
    inputs = sequence(False), torch.randn(4, N, H)
    check(GivenStart(kind), inputs, axes=1, compiler="eager", options={"sample_axis": 1})


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_dropout_between_layers(kind):
    model, inputs = double(Sequence(kind, num_layers=3, dropout=0.4), (sequence(),))
    plain = copy.deepcopy(model)
    graphopt.transform(model, compiler=COMPILERS[kind])

    def loss_of(n):
        torch.manual_seed(6)
        return smooth(plain(*inputs)[n : n + 1])

    expected = from_losses(plain, (loss_of(n) for n in range(N)))
    torch.manual_seed(6)
    reference = plain(*inputs)
    torch.manual_seed(6)
    output = train_step(model, inputs)
    torch.testing.assert_close(output, reference, rtol=1e-12, atol=1e-12)
    assert_statistics(model, expected, N)
    assert not torch.equal(plain(*inputs), reference)  # dropout is on
    model.eval()
    torch.testing.assert_close(model(*inputs), plain.eval()(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_with_each_parameter_frozen_in_turn(kind):
    for name, _ in Sequence(kind).named_parameters():
        torch._dynamo.reset()
        model = Sequence(kind)
        model.get_parameter(name).requires_grad_(False)
        check(model, (sequence(),), compiler="eager")
        assert model.get_parameter(name).grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_size_without_recompiling(kind):
    model, inputs = double(Sequence(kind, bidirectional=True), (torch.randn(6, T, WIDTH),))
    plain = copy.deepcopy(model)
    graphopt.transform(model, compiler="aot_eager")
    train_step(model, inputs)
    for num in (2, 3, 5):
        batch = (inputs[0][:num],)
        with torch._dynamo.config.patch(error_on_recompile=True):
            train_step(model, batch)
        assert_statistics(model, loop_over_samples(plain, batch, smooth, reduction="sum"), num)
    train_step(model, (inputs[0][:1],))
    assert_statistics(model, loop_over_samples(plain, (inputs[0][:1],), smooth, reduction="sum"), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_does_not_grow_with_the_sequence(kind):
    sizes = []
    for length in (3, 40):
        torch._dynamo.reset()
        model = Sequence(kind).double()
        graphopt.transform(model, compiler="eager")
        model(torch.randn(N, length, WIDTH, dtype=torch.float64)).sum().backward()
        (record,) = graphopt.records(model)
        sizes.append((len(record.before.graph.nodes), len(record.after.graph.nodes)))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_tracing_does_not_run_the_sequence(kind):
    """By itself Dynamo takes a step for every position, which takes half a minute for a GRU of 256."""
    assert _traced_operators(kind, 3) < _traced_operators(kind, 30)
    with opaque_layers():
        assert _traced_operators(kind, 3) == _traced_operators(kind, 30)


def _traced_operators(kind, length):
    calls = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with FakeTensorMode(), enable_python_dispatcher(), Count():
        layer = KINDS[kind](WIDTH, H, batch_first=True, dtype=torch.float64)
        calls.clear()
        layer(torch.randn(N, length, WIDTH, dtype=torch.float64))
    return len(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_torch(kind):
    for dtype in (torch.float32, torch.float64):
        torch._dynamo.reset()
        model = Sequence(kind, num_layers=2, bidirectional=True).to(dtype)
        input = sequence().to(dtype)
        expected = model(input)
        graphopt.transform(model, compiler="eager")
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
        torch.testing.assert_close(model(input), expected, **tolerance)
        with torch.no_grad():
            torch.testing.assert_close(model(input), expected, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_without_statistics(kind):
    """Parameters that were not selected: gradients as ever, the input's included."""
    inputs = (sequence().double().requires_grad_(),)
    plain = Sequence(kind, num_layers=2, bidirectional=True).double()
    expected = torch.autograd.grad(smooth(plain(*inputs)), [*inputs, *plain.parameters()])
    model = graphopt.transform(copy.deepcopy(plain), [TrueGrad(where="nothing")], compiler=COMPILERS[kind])
    found = torch.autograd.grad(smooth(model(*inputs)), [*inputs, *model.parameters()])
    assert len(graphopt.records(model)) == 1
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-12)


# --- cells ----------------------------------------------------------------------------------------------------------------------

CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": functools.partial(nn.RNNCell, nonlinearity="relu"),
}


class Cell(nn.Module):
    """A cell, applied to the first positions of a sequence."""

    def __init__(self, kind, steps, bias=True):
        super().__init__()
        self.cell = CELLS[kind](WIDTH, H, bias=bias)
        self.steps = steps

    def forward(self, input):
        state, outputs = None, []
        for step in range(self.steps):
            state = self.cell(input[:, step], state)
            outputs.append(torch.cat(state, 1) if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, steps, bias):
    check(Cell(kind, steps, bias), (sequence(),), compiler="eager")  # AOTAutograd traces one in the test of autocast


# --- parameters that are shared or computed ---------------------------------------------------------------------------------------


class Shared(nn.Module):
    """One layer for two sequences, as in a siamese network."""

    def __init__(self, kind):
        super().__init__()
        self.layer = KINDS[kind](WIDTH, H, batch_first=True)

    def forward(self, first, second):
        return self.layer(first)[0].mean(1) * self.layer(second)[0].mean(1)


class Interleaved(nn.Module):
    """Several sequences of each sample, flattened into the batch."""

    def __init__(self, kind):
        super().__init__()
        self.layer = KINDS[kind](WIDTH, H, batch_first=True)

    def forward(self, input):
        output, _ = self.layer(input.flatten(0, 1))
        return output.unflatten(0, (-1, input.shape[1]))


class LanguageModel(nn.Module):
    """Embedding, layer, projection that is tied to the embedding."""

    def __init__(self, kind):
        super().__init__()
        self.table = nn.Embedding(7, H)
        self.layer = KINDS[kind](H, H, batch_first=True)

    def forward(self, tokens):
        return nn.functional.linear(self.layer(self.table(tokens))[0], self.table.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_shared_layer(kind):
    check(Shared(kind), (sequence(), sequence()), compiler="eager")


@pytest.mark.parametrize("kind", KINDS)
def test_several_sequences_of_a_sample(kind):
    check(Interleaved(kind), (torch.randn(N, 2, T, WIDTH),), compiler=COMPILERS[kind])


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_language_model(kind):
    check(LanguageModel(kind), (torch.randint(0, 7, (N, T)),), compiler=COMPILERS[kind])


class Computed(nn.Module):
    """A weight is a product of two parameters, another one is symmetric."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, WIDTH)), nn.Parameter(torch.randn(H, 2))
        self.core = nn.Parameter(torch.randn(H, H))

    def forward(self, input):
        weights = [self.up @ self.down, self.core + self.core.t()]
        return torch.rnn_tanh(input, input.new_zeros(1, input.shape[0], H), weights, False, 1, 0.0, True, False, True)[
            0
        ]


def test_computed_weights():
    check(Computed(), (sequence(),))


@pytest.mark.parametrize(("kind", "form"), [("lstm", {"proj_size": 2}), ("gru", {"num_layers": 2}), ("rnn_tanh", {})])
def test_per_token(kind, form):
    """Every position counts by itself: the squares of a layer that has a copy of its weights for each of them."""
    model, inputs = double(Sequence(kind, ("output",), **form), (sequence(),))
    expected = _per_position(kind, model.layer, inputs[0])
    graphopt.transform(model, [TrueGrad(per="token")], compiler=COMPILERS[kind])
    train_step(model, inputs)
    assert_statistics(model, {f"layer.{name}": value for name, value in expected.items()}, N * T)


def _per_position(kind, layer, input):
    """The layer by its equations, each position and sample with weights of its own."""
    copies = {
        name: param.detach().expand(N, T, *param.shape).clone().requires_grad_()
        for name, param in layer.named_parameters()
    }
    rows = input
    for index in range(layer.num_layers):
        own = {name.removesuffix(f"_l{index}"): value for name, value in copies.items() if name.endswith(f"_l{index}")}
        hidden = input.new_zeros(N, layer.proj_size or H)
        cell = input.new_zeros(N, H)
        outputs = []
        for t in range(T):
            a = torch.einsum("ngi,ni->ng", own["weight_ih"][:, t], rows[:, t]) + own["bias_ih"][:, t]
            b = torch.einsum("ngh,nh->ng", own["weight_hh"][:, t], hidden) + own["bias_hh"][:, t]
            if kind == "lstm":
                i, f, g, o = (a + b).chunk(4, 1)
                cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
                hidden = o.sigmoid() * cell.tanh()
                if layer.proj_size:
                    hidden = torch.einsum("nph,nh->np", own["weight_hr"][:, t], hidden)
            elif kind == "gru":
                (ar, az, an), (br, bz, bn) = a.chunk(3, 1), b.chunk(3, 1)
                r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
                hidden = (1 - z) * (an + r * bn).tanh() + z * hidden
            else:
                hidden = (a + b).tanh()
            outputs.append(hidden)
        rows = torch.stack(outputs, 1)
    grads = torch.autograd.grad(smooth(rows.flatten(1)), list(copies.values()))
    return {
        name: Statistic(grad.sum((0, 1)), grad.square().sum((0, 1))) for name, grad in zip(copies, grads, strict=True)
    }


# --- where the samples are ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sequence_first_asks_for_the_axis(kind):
    model = Sequence(kind, batch_first=False)
    graphopt.transform(model, compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=r"(?s)layer\.weight_ih_l0: .*runs along the axis.*'sample_axis': 1"):
        model(sequence(False))


def test_wrong_axis_asks_for_the_axis():
    model = Sequence("lstm")
    graphopt.transform(model, compiler="aot_eager", options={"sample_axis": 1})
    with pytest.raises(UnsupportedError, match=r"runs along the axis.*batch_first=True"):
        model(sequence())


def test_axis_by_argument():
    model = GivenStart("gru")
    inputs = sequence(False), torch.randn(4, N, H)
    check(model, inputs, axes=1, compiler="eager", options={"sample_axis": {"input": 1, "start": 1}})


class Packed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = KINDS[kind](WIDTH, H, batch_first=True)

    def forward(self, input, lengths):
        packed = pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False)
        _, state = self.layer(packed)
        return (state[0] if isinstance(state, tuple) else state)[0]


def test_packed_inside_the_model_is_refused():
    model = graphopt.transform(Packed("lstm"), compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=r"layer\.weight_ih_l0.*packed sequences.*Pad sequences"):
        model(sequence(), torch.tensor([5, 3, 2, 4]))


def test_packed_inside_the_model_has_no_statistics():
    """Dynamo breaks off at the packing: the layer runs outside any graph, and the report says so."""
    model = Packed("lstm")
    inputs = sequence(), torch.tensor([5, 3, 2, 4])
    plain = copy.deepcopy(model)
    graphopt.transform(model, [TrueGrad(unsupported="skip")], compiler="aot_eager")
    with pytest.warns(UncapturedParameter, match="of Packed has a gradient but no statistics"):
        model(*inputs).sum().backward()
    plain(*inputs).sum().backward()
    for param, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad)
        with pytest.raises(MissingAnnotation):
            get(param, SUM_GRAD_SQUARED)
    assert str(graphopt.Report.of(model)).count("no captured graph computes a gradient for it") == 4


def test_packed_input_is_refused():
    model = graphopt.transform(nn.LSTM(WIDTH, H, batch_first=True), compiler="aot_eager")
    packed = pack_padded_sequence(sequence(), torch.tensor([5, 4, 3, 2]), batch_first=True)
    with pytest.raises(UnsupportedError, match=r"packed sequence.*Pad instead"):
        model(packed)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_layer_is_refused(kind):
    target = getattr(torch, kind)
    params = list(KINDS[kind](WIDTH, H).parameters())
    with pytest.raises(UnsupportedError, match=rf"{kind} .*packed sequence at model.py:3.*Pad instead"):
        lower_recurrent(target, (torch.randn(7, WIDTH), torch.tensor([4, 3]), None, params), " at model.py:3")


# --- dtypes ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "cell"])
def test_autocast(kind):
    model = Cell("lstm", 2) if kind == "cell" else Sequence(kind, num_layers=2)
    inputs = (sequence(),)
    expected = loop_over_samples(copy.deepcopy(model).double(), (inputs[0].double(),), smooth, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(*inputs)
    graphopt.transform(model, compiler="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs)
    assert output.dtype == plain.dtype
    torch.testing.assert_close(output, plain, rtol=2e-2, atol=2e-2)
    smooth(output).backward()
    for name, param in model.named_parameters():
        for value, reference in (
            (param.grad, expected[name].grad),
            (param.sum_grad_squared, expected[name].sum_grad_squared),
        ):
            assert value.dtype == torch.float32
            error = (value - reference).norm() / reference.norm()
            assert error < 0.1, (name, error)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind):
    model = Sequence(kind, num_layers=2, bidirectional=True)
    inputs = (sequence(),)
    expected = loop_over_samples(copy.deepcopy(model).double(), (inputs[0].double(),), smooth, reduction="sum")
    graphopt.transform(model, compiler=COMPILERS[kind])
    train_step(model, inputs)
    assert_statistics(model, expected, N, rtol=1e-4, atol=1e-6)


class BothKinds(nn.Module):
    """An LSTM in front of a GRU in both directions, so that Inductor compiles one graph."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, H, batch_first=True)
        self.gru = nn.GRU(H, H, batch_first=True, bidirectional=True)

    def forward(self, input):
        return self.gru(self.lstm(input)[0])[0]


@pytest.mark.slow
def test_inductor():
    check(BothKinds(), (sequence(),), compiler="inductor")
