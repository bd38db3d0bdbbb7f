"""`Layer2Layer` against ordinary training of a copy, where its forerunner differs from it, and what it says when used wrongly."""

import io
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.errors import OptionError, StreamError
from graphopt.runtime.streaming.layer2layer import Layer2Layer
from tests.runtime.streaming.towers import BITWISE, D, N, Tower, assert_same_gradients, batch, plain_and_streamed


class Attended(nn.Module):
    """Two tensors in, two out."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x, memory):
        memory = memory + self.value(x)
        return x + torch.sigmoid(self.query(x)) * memory, memory


class Irregular(nn.Module):
    """Integers in, parameters outside the list, a frozen layer, one that is called twice, and the order is not the list's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, D)
        self.bias = nn.Parameter(torch.randn(D))
        self.encoder = nn.Module()
        self.encoder.blocks = nn.ModuleList([Attended() for _ in range(3)])
        self.head = nn.Linear(D, 3)
        self.encoder.blocks[1].requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids) + self.bias
        memory = torch.zeros_like(x)
        for number in (2, 0, 1, 0):
            x, memory = self.encoder.blocks[number](x, memory)
        return self.head(x)


@pytest.fixture
def pair():
    """``pair(model, **options)``: the model as it was written, and a copy of it in `Layer2Layer`."""
    return plain_and_streamed


def assert_same_state(plain, l2l, **tolerance):
    own = l2l.main_model.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(own[name] + 0, value, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


# ------------------------------------------------------------------------------------------------------ ordinary training


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("parameters", [lambda l2l: l2l.main_model.parameters(), lambda l2l: l2l.main_params])
def test_trains_bit_for_bit_as_without(pair, reduction, parameters):
    plain, l2l = pair(Tower())
    loss_fn = nn.MSELoss(reduction=reduction)
    optimizer, own = torch.optim.AdamW(plain.parameters(), lr=0.1), torch.optim.AdamW(parameters(l2l), lr=0.1)
    for _ in range(3):
        x, y = batch(torch.float32)
        optimizer.zero_grad()
        loss = loss_fn(plain(x), y)
        loss.backward()
        optimizer.step()

        l2l.zero_grad()
        l2l.forward(x)
        assert l2l.backward(x, y, loss_fn).item() == loss.item()
        own.step()
        assert_same_gradients(plain, l2l, **BITWISE)
    l2l.update_main_model_params()
    assert_same_state(plain, l2l, **BITWISE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "n", [N, 3]
)  # the last micro-batch has two samples, and one that is smaller than a micro-batch
def test_micro_batches_change_nothing(pair, reduction, n):
    """The forerunner: loss 1.51 times too large for ten samples in fours, ZeroDivisionError for three."""
    plain, l2l = pair(Tower().double(), microbatch_size=4)
    x, y = batch(n=n)
    loss_fn = nn.MSELoss(reduction=reduction)
    expected = plain(x)
    loss = loss_fn(expected, y)
    loss.backward()
    output = l2l.forward(x)
    torch.testing.assert_close(output, expected.detach())
    assert not output.requires_grad
    computed = l2l.compute_loss(y, loss_fn)
    assert (computed.shape, computed.requires_grad) == ((), False)
    torch.testing.assert_close(computed, loss.detach())
    assert torch.equal(l2l.backward(), computed)
    assert_same_gradients(plain, l2l)


def test_a_layer_computes_one_micro_batch_at_a_time(pair):
    _, l2l = pair(Tower(), microbatch_size=4)
    x, _ = batch(torch.float32)
    l2l.forward(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        l2l.forward(x)
    rows = [event.input_shapes[0][0] for event in profile.events() if event.name == "aten::linear"]
    assert rows == [4, 4, 2] * 3
    assert not any("whole batch" in note for note in l2l.notes)


def test_arguments_are_there_when_layers_are_computed_again(pair):
    """The forerunner forgets them: a third of the gradient."""
    plain, l2l = pair(Tower().double(), microbatch_size=4)
    x, y = batch()
    F.huber_loss(plain(x, scale=3.0), y, delta=0.5).backward()
    l2l.forward(x, scale=3.0)
    l2l.backward(x, y, F.huber_loss, delta=0.5)
    assert_same_gradients(plain, l2l)
    l2l.zero_grad()
    plain.zero_grad()
    per_sample = torch.rand(N, 1, dtype=torch.float64)
    F.mse_loss(plain(x, scale=per_sample), y).backward()
    l2l.forward(x, scale=per_sample)
    l2l.backward(x, y, F.mse_loss)
    assert_same_gradients(plain, l2l)


def test_any_forward_of_the_model_runs(pair):
    """The forerunner: one tensor between layers, no parameters outside the list, none frozen, no integers."""
    plain, l2l = pair(Irregular().double(), layers_attr="encoder.blocks", microbatch_size=3)
    ids, labels = torch.randint(7, (N, 4)), torch.randint(3, (N, 4))

    def loss_fn(output, targets):
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())

    loss_fn(plain(ids), labels).backward()
    l2l.forward(ids)
    l2l.backward(ids, labels, loss_fn)
    assert_same_gradients(plain, l2l)
    frozen = set(plain.encoder.blocks[1].parameters())
    assert len(l2l.main_params) == len(list(plain.parameters())) - len(frozen)
    assert all(param.grad is None for param in l2l.main_model.encoder.blocks[1].parameters())
    assert (len(l2l), l2l.num_layers) == (3, 3)


def test_batch_statistics_are_of_the_whole_batch_and_kept_once(pair):
    """The forerunner: of micro-batches, and twice."""
    layers = [nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.LeakyReLU()), nn.Linear(D, D)]
    plain, l2l = pair(Tower(*layers).double(), microbatch_size=4)
    assert l2l.notes == []
    for step in range(2):
        x, y = batch()
        F.mse_loss(plain(x), y, reduction="sum").backward()
        l2l.forward(x)
        l2l.backward(x, y, nn.MSELoss(reduction="sum"))
        assert l2l.main_model.layers[0][1].num_batches_tracked == step + 1
    assert_same_gradients(plain, l2l)
    assert_same_state(plain, l2l)
    assert [note.partition(":")[0] for note in l2l.notes if "whole batch" in note] == ["layers.0 takes the whole batch"]


def test_dropout_is_that_of_the_forward_pass(pair):
    plain, l2l = pair(Tower(*(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.4)) for _ in range(3))))
    x, y = batch(torch.float32)
    torch.manual_seed(3)
    loss = F.mse_loss(plain(x), y)
    loss.backward()
    torch.manual_seed(3)
    l2l.forward(x)
    torch.rand(5)  # somebody draws between forward and backward
    assert torch.equal(l2l.backward(x, y, F.mse_loss), loss.detach())
    assert_same_gradients(plain, l2l, **BITWISE)


def test_dropout_in_micro_batches(pair):
    """The oracle draws in the order of L2L: a layer for all micro-batches before the next."""
    plain, l2l = pair(
        Tower(*(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.4)) for _ in range(3))).double(), microbatch_size=4
    )
    x, y = batch()
    torch.manual_seed(3)
    parts = x.split(4)
    for layer in plain.layers:
        parts = [layer(part) for part in parts]
    expected = torch.cat(parts)
    F.mse_loss(expected, y).backward()
    torch.manual_seed(3)
    torch.testing.assert_close(l2l.forward(x), expected.detach())
    l2l.backward(x, y, F.mse_loss)
    assert_same_gradients(plain, l2l)


def test_each_forward_counts_for_itself(pair):
    """The forerunner returns the first output again. Gradients of several backward passes add up, as ever."""
    plain, l2l = pair(Tower().double(), microbatch_size=4)
    (x, _), (other, y) = batch(), batch(n=7)
    l2l.forward(x)
    torch.testing.assert_close(l2l.forward(other), plain(other).detach())
    l2l.backward(other, y, F.mse_loss)
    F.mse_loss(plain(other), y).backward()
    assert_same_gradients(plain, l2l)
    l2l.forward(other.clone())
    l2l.backward(other, y, F.l1_loss)  # another tensor with the same values
    F.l1_loss(plain(other), y).backward()
    assert_same_gradients(plain, l2l)
    l2l.zero_grad()
    assert all(param.grad is None for param in l2l.main_params)


def test_evaluation_keeps_nothing(pair):
    plain, l2l = pair(Tower(nn.Linear(D, D), nn.Dropout(0.5)))
    x, y = batch(torch.float32)
    l2l.main_model.eval()
    with torch.no_grad():
        assert torch.equal(l2l.forward(x), plain.eval()(x))
    with pytest.raises(
        StreamError, match=r"backward after a forward under torch.no_grad\(\), which keeps nothing: call"
    ):
        l2l.backward(x, y, F.mse_loss)


# --------------------------------------------------------------------------------------------------------------- progress


class Screen(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self):
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_verbose(pair, monkeypatch, is_terminal):
    monkeypatch.setattr(sys, "stderr", Screen(is_terminal))
    _, l2l = pair(Tower(), verbose=True)
    x, y = batch(torch.float32)
    sys.stderr.truncate(0)
    l2l.forward(x)
    l2l.backward(x, y, F.mse_loss)
    drawn = sys.stderr.getvalue()
    if is_terminal:
        assert "Layers:   0%" in drawn
        assert "Reverse layers:   0%" in drawn
        assert "0/4 [" in drawn  # the last tanh is a region of its own
    else:
        assert drawn == ""
    sys.stderr.seek(0)
    sys.stderr.truncate(0)
    l2l.main_model(x)
    assert sys.stderr.getvalue() == ""


def test_each_layer_is_one_step_of_the_bar(pair, monkeypatch):
    made = []

    class Bar:
        def __init__(self, **options):
            made.append(self)
            self.options, self.count, self.is_open = options, 0, True

        def update(self):
            assert self.is_open
            self.count += 1

        def close(self):
            self.is_open = False

    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    _, l2l = pair(Tower(), verbose=True)
    x, y = batch(torch.float32)
    l2l.forward(x)
    l2l.backward(x, y, F.mse_loss)
    assert [bar.options["desc"] for bar in made] == ["Layers", "Reverse layers"]
    assert [(bar.options["total"], bar.count, bar.is_open) for bar in made] == [(4, 4, False)] * 2
    assert {bar.options["disable"] for bar in made} == {None}


def test_tqdm_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(
        OptionError, match=r"shows progress with tqdm, which is not installed: pip install tqdm, or verbose="
    ):
        Layer2Layer(Tower(), verbose=True)
    assert Layer2Layer(Tower(), gpu_device="cpu").verbose is False


# ----------------------------------------------------------------------------------------------------------------- errors


class Listless(nn.Module):
    def __init__(self):
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(2, 2))
        self.empty = nn.ModuleList()


@pytest.mark.parametrize(
    ("model", "path", "text"),
    [
        (Tower(), "blocks", r"Tower.blocks does not exist; it names the nn.ModuleList of layers. It has layers$"),
        (Irregular(), "layers", r"Irregular.layers does not exist; .* It has encoder.blocks$"),
        (Irregular(), "bias", r"Irregular.bias does not exist; .* It has encoder.blocks$"),
        (Irregular(), "head", r"Irregular.head is an nn.Linear; .* It has encoder.blocks$"),
        (Listless(), "stack", r"Listless.stack is an nn.Sequential; .* It has none: put its layers into self.layers ="),
        (Listless(), "empty", r"Listless.empty is empty; .* It has none"),
        (Tower(), 3, r"layers_attr=3\): Tower.3 does not exist"),
    ],
)
def test_a_list_that_is_not_there(model, path, text):
    with pytest.raises(OptionError, match=text):
        Layer2Layer(model, layers_attr=path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"microbatch_size": 0}, r"microbatch_size=0\): it is an int, at least 1, or None for the whole batch at once"),
        ({"microbatch_size": -4}, r"microbatch_size=-4\)"),
        ({"microbatch_size": 2.5}, r"microbatch_size=2.5\)"),
        ({"microbatch_size": True}, r"microbatch_size=True\)"),
        ({"loss_scale": 0.0}, r"loss_scale=0.0\): it is a number greater than zero; 1.0 scales nothing"),
        ({"loss_scale": -1}, r"loss_scale=-1\)"),
        ({"loss_scale": math.nan}, r"loss_scale=nan\)"),
        ({"loss_scale": math.inf}, r"loss_scale=inf\)"),
        ({"loss_scale": "dynamic"}, r"loss_scale='dynamic'\)"),
        ({"gpu_device": "gpu"}, r"gpu_device='gpu'\): it is 'cuda', 'cuda:1' or 'cpu'"),
        ({"gpu_device": "meta"}, r"gpu_device='meta'\): layers compute on 'cuda', 'cuda:1', ... or on 'cpu'"),
        ({"compiler": "gcc"}, r"compiler='gcc' is unknown"),
    ],
)
def test_options_without_meaning(options, text):
    model = Tower()
    before = model.layers[0].weight.data_ptr()
    with pytest.raises(OptionError, match=text):
        Layer2Layer(model, **options)
    assert model.layers[0].weight.data_ptr() == before  # nothing was moved


def test_no_model():
    with pytest.raises(OptionError, match=r"Layer2Layer takes a torch.nn.Module and got list"):
        Layer2Layer([nn.Linear(2, 2)])


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        OptionError, match=r"gpu_device='cuda'\): torch finds no CUDA device; gpu_device='cpu' computes in main"
    ):
        Layer2Layer(Tower(), gpu_device="cuda")
    assert Layer2Layer(Tower()).gpu_device == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(OptionError, match=r"gpu_device='cuda:2'\): torch finds 2 CUDA devices, from cuda:0"):
        Layer2Layer(Tower(), gpu_device="cuda:2")


def test_calls_in_the_wrong_order(pair):
    _, l2l = pair(Tower())
    x, y = batch(torch.float32)
    with pytest.raises(StreamError, match=r"backward before forward: call forward\(batch\) first"):
        l2l.backward(x, y, F.mse_loss)
    with pytest.raises(StreamError, match=r"compute_loss before forward: call forward\(batch\) first"):
        l2l.compute_loss(y, F.mse_loss)
    l2l.forward(x)
    with pytest.raises(
        StreamError, match=r"backward\(\) without a loss: call compute_loss\(targets, loss_fn\) first, or"
    ):
        l2l.backward()
    with pytest.raises(
        OptionError, match=r"backward takes all of \(batch, targets, loss_fn\), or nothing after compute_loss"
    ):
        l2l.backward(x, y)
    for other in (x + 1, x[:4], [x]):
        with pytest.raises(
            StreamError, match=r"got another batch than the last forward\(batch\), whose layers it would"
        ):
            l2l.backward(other, y, F.mse_loss)
    with pytest.raises(StreamError, match=r"loss_fn returned a tensor of shape \(10, 6\); it must return one number"):
        l2l.compute_loss(y, F.mse_loss, reduction="none")
    with pytest.raises(StreamError, match=r"loss_fn returned a float; it must return one number"):
        l2l.backward(x, y, lambda output, target: 1.0)
    with pytest.raises(StreamError, match=r"does not depend on what the model returned, so there are no gradients"):
        l2l.backward(x, y, lambda output, target: target.sum())
    l2l.compute_loss(y, F.mse_loss)  # all of this has left the forward pass as it was
    with pytest.raises(
        StreamError, match=r"compute_loss a second time for one forward\(batch\): it is not clear which"
    ):
        l2l.compute_loss(y, F.mse_loss)
    with pytest.raises(StreamError, match=r"compute_loss a second time"):
        l2l.backward(x, y, F.mse_loss)
    l2l.backward()
    for again in (lambda: l2l.backward(), lambda: l2l.backward(x, y, F.mse_loss)):
        with pytest.raises(
            StreamError, match=r"backward after backward, which has freed what forward had kept: call forward"
        ):
            again()
    with pytest.raises(StreamError, match=r"compute_loss after backward"):
        l2l.compute_loss(y, F.mse_loss)


def test_restore(pair):
    plain, l2l = pair(Tower())
    graphopt.restore(l2l.main_model)
    assert_same_state(plain, l2l, **BITWISE)
    with pytest.raises(StreamError, match="the store of this model is closed"):
        l2l.forward(torch.randn(N, D))
    with pytest.raises(StreamError, match="the store of this model is closed"):
        l2l.update_main_model_params()


class Held:
    def __init__(self, value):
        self.value = value


class Hidden(Tower):
    def forward(self, x):
        return Held(super().forward(x))


def test_tensors_that_cannot_be_reached(pair):
    plain, l2l = pair(Hidden())
    x, y = batch(torch.float32)
    l2l.forward(x)
    l2l.backward(x, y, lambda output, target: F.mse_loss(output.value, target))
    F.mse_loss(plain(x).value, y).backward()
    assert_same_gradients(plain, l2l, **BITWISE)
    _, l2l = pair(Hidden(), mixed_precision=True)
    with pytest.raises(
        StreamError, match=r"the model returned a Held, and with mixed_precision=True the gradients .* Leave it out"
    ):
        l2l.forward(x)


def test_repr(pair):
    _, l2l = pair(Tower(), microbatch_size=4)
    assert repr(l2l) == "Layer2Layer(Tower.layers, 3 layers, cpu, microbatch_size=4)"
    _, l2l = pair(Tower(), mixed_precision=True)
    assert repr(l2l) == (
        "Layer2Layer(Tower.layers, 3 layers, cpu, microbatch_size=None, torch.bfloat16, loss_scale=128.0)"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_from_host_memory_on_the_gpu(pair, mixed_precision):
    layers = [nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)), nn.Linear(D, D)]
    plain, l2l = pair(Tower(*layers), gpu_device=None, mixed_precision=mixed_precision, microbatch_size=4)
    assert l2l.gpu_device.type == "cuda"
    x, y = batch(torch.float32)
    F.mse_loss(plain(x), y).backward()
    assert l2l.forward(x).device == l2l.gpu_device
    l2l.backward(x, y, F.mse_loss)
    own = dict(l2l.main_model.named_parameters())
    tolerance = {"rtol": 0.05, "atol": 5e-3} if mixed_precision else {"rtol": 1e-3, "atol": 1e-5}
    for name, param in plain.named_parameters():
        torch.testing.assert_close(own[name].grad.load().cpu(), param.grad, **tolerance)
