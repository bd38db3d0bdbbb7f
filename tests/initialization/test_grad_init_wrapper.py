"""A wrapped model computes with scaled weights, shows its scales, and is itself again afterwards."""

import copy
import gc
import io
import math
import pickle
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import graphopt
from graphopt.errors import InitError, MixedPrecisionInit, OptionError, StreamError
from graphopt.passes import GradInit, LayerToLayer, TrueGrad
from graphopt.pipeline import count_ops

SCALE = "graphopt.scale_parameter.default"


class Net(nn.Module):
    """A tied weight, a frozen one, zero biases, running statistics, dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight
        self.shift = nn.Parameter(torch.randn(6), requires_grad=False)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids):
        hidden = self.mix(self.embed(ids)).tanh() + self.shift
        return self.head(self.drop(self.norm(hidden.flatten(0, 1))))


IDS, LABELS = torch.arange(12).reshape(3, 4) % 7, torch.arange(12) % 5


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def loss_of(model):
    return F.cross_entropy(model(IDS), LABELS)


def set_scales(ginit):
    with torch.no_grad():
        for position, scale in enumerate(ginit.parameters()):
            scale.fill_(1 + 0.1 * position)


def reference(model, norm, scales):
    """Norm of the gradient and its derivative with respect to the scales, and that of the loss, by nothing but autograd."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    leaves = [scale.clone().requires_grad_() for scale in scales]
    scaled = {name: leaf * weight for leaf, (name, weight) in zip(leaves, weights.items(), strict=True)}
    loss = F.cross_entropy(functional_call(model, scaled, (IDS,), tie_weights=True), LABELS)
    grads = torch.autograd.grad(loss, list(scaled.values()), create_graph=True)
    total = torch.cat([grad.flatten() for grad in grads]).norm(p=norm)
    return total, torch.autograd.grad(total, leaves, retain_graph=True), torch.autograd.grad(loss, leaves)


def snapshot(model):
    return {
        name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)
    }


def assert_as_before(model, before, buffers=None):
    after = snapshot(model)
    assert list(after) == list(before)
    for name, (identity, needs, value) in before.items():
        assert after[name][:2] == (identity, needs), name
        assert torch.equal(after[name][2], value), name
    for name, buffer in (buffers or {}).items():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name


COMPILERS = [None, "eager", "aot_eager"]


def built(compiler):
    model = net()
    return model if compiler is None else graphopt.transform(model, compiler=compiler)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_nothing_learned_changes_nothing(compiler):
    model = built(compiler).eval()
    before, output, kinds = snapshot(model), model(IDS).detach().clone(), [type(m) for m in model.modules()]
    with graphopt.GradInitWrapper(model):
        torch.testing.assert_close(model(IDS), output, rtol=1e-12, atol=1e-14)
        assert type(model).__name__ == "Net"
    assert_as_before(model, before)
    assert torch.equal(model(IDS), output)
    assert [type(m) for m in model.modules()] == kinds
    assert not any("_graphopt_scales" in vars(m) for m in model.modules())


def test_inside_the_parameters_are_the_scales():
    model = net()
    with graphopt.GradInitWrapper(model) as ginit:
        scales = list(model.parameters())
        assert [id(s) for s in scales] == [id(s) for s in ginit.parameters()]
        assert [s.shape for s in scales] == [()] * 6
        assert [name for name, _ in ginit.named_parameters()] == [
            *("embed.weight", "mix.weight", "mix.bias", "norm.weight", "norm.bias", "head.bias")
        ]
        assert model.head._parameters["weight"] is model.embed._parameters["weight"]
        assert torch.equal(model.shift, model.shift.detach())
        assert not model.shift.requires_grad
        assert "6 scales" in repr(ginit)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_grad_loss(compiler, norm):
    model = built(compiler)
    plain = net()
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        scales = [s.detach().clone() for s in ginit.parameters()]
        total, second, first = reference(plain, norm, scales)
        loss = loss_of(model)
        found = ginit.grad_loss(loss, norm, gamma=total.item() * (1 - 1e-9))
        torch.testing.assert_close(found, total, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, list(ginit.parameters())), second, rtol=1e-9, atol=1e-11)
        loss = loss_of(model)
        assert ginit.grad_loss(loss, norm, gamma=total.item() * (1 + 1e-9)) is loss
        loss.backward()
        torch.testing.assert_close([s.grad for s in ginit.parameters()], list(first), rtol=1e-9, atol=1e-11)
    assert all(p.grad is None for p in model.parameters())


def test_gradients():
    model = net()
    with graphopt.GradInitWrapper(model) as ginit:
        found = ginit.gradients(loss_of(model))
    assert list(found) == ["embed.weight", "mix.weight", "mix.bias", "norm.weight", "norm.bias", "head.bias"]
    plain = net()
    expected = torch.autograd.grad(loss_of(plain), [p for p in plain.parameters() if p.requires_grad])
    torch.testing.assert_close(list(found.values()), list(expected))


def test_the_loss_takes_over_at_gamma():
    model = net()
    with graphopt.GradInitWrapper(model) as ginit:
        loss = loss_of(model)
        total = ginit.grad_loss(loss, gamma=0.0).item()
        assert ginit.grad_loss(loss, gamma=total) is loss
        assert ginit.grad_loss(loss, gamma=math.nextafter(total, 0)).item() == total
        assert ginit.grad_loss(loss_of(model), gamma=math.inf).item() == loss.item()
        assert (ginit.grad_loss(loss_of(model) * 100) > 1).item()  # by default 1, of the 1-norm


def test_afterwards_the_scales_are_multiplied_in():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        factors = {name: s.item() for name, s in ginit.named_parameters()}
        loss_of(model)
    for name, (identity, needs, value) in before.items():
        param = dict(model.named_parameters(remove_duplicate=False))[name]
        factor = factors.get("embed.weight" if name == "head.weight" else name, 1.0)
        assert (id(param), param.requires_grad) == (identity, needs)
        torch.testing.assert_close(param.detach(), value * factor, rtol=1e-15, atol=0)
        if needs:
            assert param.init_scale.item() == factor
    assert model.head.weight is model.embed.weight
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_detach_ends_it_once():
    model = net()
    ginit = graphopt.GradInitWrapper(model)
    set_scales(ginit)
    ginit.detach()
    after = snapshot(model)
    ginit.detach()
    assert_as_before(model, after)
    assert "detached" in repr(ginit)
    with pytest.raises(OptionError, match="is detached: wrap the model again"):
        ginit.clamp_scales()


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_deleting_the_wrapper_ends_it(compiler):
    model = built(compiler)
    ginit = graphopt.GradInitWrapper(model)
    loss_of(model).backward()
    del ginit
    gc.collect()
    assert [p.shape for p in model.parameters()] == [p.shape for p in net().parameters()]


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_after_an_exception_the_model_is_as_it_was(compiler):
    model = built(compiler)
    before, buffers = snapshot(model), {name: b.clone() for name, b in model.named_buffers()}

    def fail():
        with graphopt.GradInitWrapper(model, reinit_zeros=True) as ginit:
            set_scales(ginit)
            loss_of(model).backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert_as_before(model, before, buffers)
    if compiler is not None:
        loss_of(model).backward()
        assert model.mix.weight.sum_grad_squared.shape == (6, 6)


def test_reinit_zeros():
    model = nn.Linear(1000, 1000)
    nn.init.zeros_(model.bias)
    weight = model.weight.detach().clone()
    torch.manual_seed(0)
    with graphopt.GradInitWrapper(model, reinit_zeros=True, reinit_std=0.1):
        pass
    assert 0.05 < model.bias.std().item() < 0.2
    assert torch.equal(model.weight, weight)


def test_clamp_scales():
    with graphopt.GradInitWrapper(net()) as ginit:
        with torch.no_grad():
            for scale in ginit.parameters():
                scale.fill_(-3)
        ginit.clamp_scales()
        assert {s.item() for s in ginit.parameters()} == {0.01}
        ginit.clamp_scales(0.5)
        assert {s.item() for s in ginit.parameters()} == {0.5}


def test_a_scaler_changes_nothing_but_overflow():
    model, scaler = net(torch.float32), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    with pytest.warns(MixedPrecisionInit), graphopt.GradInitWrapper(model) as ginit:  # noqa: PT031
        plain = ginit.grad_loss(loss_of(model), gamma=0.0)
        scaled = ginit.grad_loss(loss_of(model), gamma=0.0, scaler=scaler)
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=0)
        huge = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        huge.scale(torch.ones(()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(IDS)
        loss = ginit.grad_loss(F.cross_entropy(output.float(), LABELS) * 1e6, gamma=0.0, scaler=huge)
        huge.scale(loss).backward()
        huge.step(optimizer)
        huge.update()
        assert not torch.isfinite(loss)
        assert {s.item() for s in ginit.parameters()} == {1.0}
        assert huge.get_scale() == 2.0**126


def test_a_scaler_that_is_off_is_none():
    """As in ``GradScaler(enabled=mixed_precision)``: no warning either."""
    model, scaler = net(), torch.amp.GradScaler("cpu", enabled=False)
    with graphopt.GradInitWrapper(model) as ginit:
        total = ginit.grad_loss(loss_of(model), gamma=0.0, scaler=scaler)
        assert total.item() == ginit.grad_loss(loss_of(model), gamma=0.0).item()
        with pytest.raises(InitError, match="not finite"):
            ginit.grad_loss(loss_of(model) * torch.inf, scaler=scaler)


def test_bfloat16_autocast_is_near():
    model = net(torch.float32)
    with pytest.warns(MixedPrecisionInit), graphopt.GradInitWrapper(model) as ginit:  # noqa: PT031
        exact = ginit.grad_loss(loss_of(model), gamma=0.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        torch.testing.assert_close(ginit.grad_loss(loss, gamma=0.0), exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", ["attention", "lstm", "gru", "cell", "list", "weight_norm"])
def test_every_scale_is_reached(name):
    torch.manual_seed(0)

    class Of(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = {
                "attention": lambda: nn.MultiheadAttention(4, 2),
                "lstm": lambda: nn.LSTM(4, 4),
                "gru": lambda: nn.GRU(4, 4),
                "cell": lambda: nn.GRUCell(4, 4),
                "list": lambda: nn.ParameterList([torch.randn(4, 4), torch.randn(4)]),
                "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            }[name]()
            if name == "attention":
                nn.init.normal_(self.part.in_proj_bias)

        def forward(self, x):
            if name == "attention":
                return self.part(x, x, x)[0]
            if name == "list":
                return (x @ self.part[0]).tanh() * self.part[1]
            output = self.part(x[0] if name == "cell" else x)
            return output[0] if isinstance(output, tuple) else output

    model, x = Of().double(), torch.randn(3, 2, 4, dtype=torch.float64)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        total = ginit.grad_loss(model(x).square().sum(), norm=2, gamma=0.0)
        total.backward()
        slopes = {n: s.grad.item() for n, s in ginit.named_parameters()}
    step = 1e-6
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for position, (n, p) in enumerate(moved.named_parameters()):
                p.copy_(weights[n] * (1 + 0.1 * position + sign * step * (position + 1)))
        loss = moved(x).square().sum()
        grads = torch.autograd.grad(loss, list(moved.parameters()))
        ends.append(torch.cat([g.flatten() for g in grads]).norm())
    slope = sum(slopes[n] * (position + 1) for position, n in enumerate(weights))
    assert slope == pytest.approx(((ends[0] - ends[1]) / (2 * step)).item(), rel=1e-5)


def test_a_submodule_can_be_called_by_itself():
    model = net()
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        x = torch.randn(2, 6, dtype=torch.float64)
        torch.testing.assert_close(model.mix(x), F.linear(x, net().mix.weight * 1.1, net().mix.bias * 1.2))
        ginit.grad_loss(model.mix(x).square().sum(), gamma=0.0).backward()
        assert dict(ginit.named_parameters())["mix.weight"].grad is not None


@pytest.mark.parametrize("compiler", COMPILERS)
def test_norms_of_several_batches_add_up(compiler):
    model = built(compiler)
    with graphopt.GradInitWrapper(model) as ginit:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            ginit.grad_loss(loss_of(model), norm=2, gamma=0.0).backward()
        twice = [s.grad.clone() for s in ginit.parameters()]
        optimizer.zero_grad()
        ginit.grad_loss(loss_of(model), norm=2, gamma=0.0).backward()
        torch.testing.assert_close([2 * s.grad for s in ginit.parameters()], twice)


def test_several_backward_passes_add_up():
    model = net()
    with graphopt.GradInitWrapper(model) as ginit:
        for _ in range(2):
            (loss_of(model) / 2).backward()
        twice = [s.grad.clone() for s in ginit.parameters()]
        for scale in ginit.parameters():
            scale.grad = None
        loss_of(model).backward()
        torch.testing.assert_close([s.grad for s in ginit.parameters()], twice)


def scaled(model):
    """The model with the scales of `set_scales` multiplied in."""
    with torch.no_grad():
        for position, param in enumerate(p for p in model.parameters() if p.requires_grad):
            param.mul_(1 + 0.1 * position)
    return model


@pytest.mark.parametrize("compiler", [None, "eager"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save", "state_dict"])
def test_copies_have_their_scales_multiplied_in(way, compiler):
    model, expected = built(compiler), scaled(net())
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        elif way == "save":
            torch.save(model, buffer := io.BytesIO())
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
        else:
            assert list(model.state_dict()) == list(net().state_dict())
            other = net()
            other.load_state_dict(model.state_dict())
        assert type(other) is Net
        assert len(list(model.parameters())) == 6
    torch.testing.assert_close(other.state_dict(), expected.state_dict(), rtol=1e-15, atol=0)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-15, atol=0)
    assert other.head.weight is other.embed.weight


def test_load_state_dict_sets_what_the_model_computes_with():
    model, other = net(), scaled(net())
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        model.load_state_dict(other.state_dict())
        assert {s.item() for s in ginit.parameters()} == {1.0}
        torch.testing.assert_close(model(IDS), other(IDS))
    torch.testing.assert_close(dict(model.named_parameters()), dict(other.named_parameters()))


def test_dtypes_can_change_inside():
    model = net(torch.float32)
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        model.double()
        assert {s.dtype for s in ginit.parameters()} == {torch.float64}
        ginit.grad_loss(loss_of(model), gamma=0.0).backward()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.mix.weight.init_scale.item() == pytest.approx(1.1)


KILLED = """
import os, signal, sys, torch
from torch import nn
import graphopt
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
with graphopt.GradInitWrapper(model) as ginit:
    with torch.no_grad():
        for scale in ginit.parameters():
            scale.fill_(3.0)
    torch.save(model.state_dict(), sys.argv[1])
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_inside_what_was_saved_is_usable(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "model.pt")], check=False)
    assert done.returncode == -signal.SIGKILL
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    expected = model[0].weight.detach() * 3
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    torch.testing.assert_close(model[0].weight.detach(), expected)
    model(torch.randn(4, 3)).sum().backward()


def test_two_models_at_once():
    first, second = net(), net()
    with graphopt.GradInitWrapper(first) as one, graphopt.GradInitWrapper(second) as two:
        set_scales(one)
        assert {s.item() for s in two.parameters()} == {1.0}
        assert not torch.equal(first(IDS), second(IDS))


def test_a_transformed_model_is_transformed_again_afterwards():
    model = graphopt.transform(net(), compiler="aot_eager")
    loss_of(model).backward()
    statistic = model.mix.weight.sum_grad_squared.clone()
    model.zero_grad()
    with graphopt.GradInitWrapper(model) as ginit:
        ginit.grad_loss(loss_of(model), gamma=0.0).backward()
    loss_of(model).backward()
    torch.testing.assert_close(model.mix.weight.sum_grad_squared, statistic)
    asleep, awake = graphopt.records(model)
    assert count_ops(asleep.after)[SCALE] == 0
    assert count_ops(awake.after)[SCALE] == 7  # the tied weight is used twice
    assert [item.name for item in awake.passes] == ["gradinit", "layer_to_layer"]
    assert "running statistics stay as they are" in " ".join(awake.results[0].notes)


@pytest.mark.slow
def test_inductor():
    model, plain = graphopt.transform(net(), [GradInit(), TrueGrad()]), net()
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        total, second, _ = reference(plain, 1, [s.detach().clone() for s in ginit.parameters()])
        found = ginit.grad_loss(loss_of(model), gamma=0.0)
        torch.testing.assert_close(found, total)
        torch.testing.assert_close(torch.autograd.grad(found, list(ginit.parameters())), second, rtol=1e-7, atol=1e-9)


class Outside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return torch.compiler.disable(lambda y: F.linear(y, self.outer.weight))(self.inner(x))


def test_a_parameter_that_is_read_outside_any_graph_is_refused():
    model = graphopt.transform(Outside(), [], compiler="aot_eager")
    with graphopt.GradInitWrapper(model) as ginit:
        loss = model(torch.randn(2, 3)).sum()
        with pytest.raises(
            OptionError, match=r"outer\.weight of Outside are used outside any captured graph.*compiler='eager'"
        ):
            ginit.grad_loss(loss)
    with graphopt.GradInitWrapper(graphopt.restore(model)) as ginit:
        ginit.grad_loss(model(torch.randn(2, 3)).sum(), gamma=0.0).backward()


def make_lazy():
    return nn.LazyLinear(3)


def make_meta():
    return nn.Linear(3, 3, device="meta")


def make_complex():
    return nn.Linear(3, 3, dtype=torch.complex64)


def make_scripted():
    with pytest.warns(DeprecationWarning, match="jit"):
        return nn.Sequential(torch.jit.script(nn.Linear(3, 3)))


def make_old_weight_norm():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 3))


REFUSED = {
    "not a module": (lambda: [1], "for a torch.nn.Module, not for list"),
    "nothing to train": (lambda: nn.Linear(3, 3).requires_grad_(False), "Linear has no trainable parameter"),
    "torch.compile": (lambda: torch.compile(nn.Linear(3, 3)), r"wrap the module itself \(model._orig_mod\)"),
    "lazy": (make_lazy, "has no shape yet: call the model once"),
    "meta": (make_meta, "is on the meta device"),
    "complex": (make_complex, "is complex"),
    "scripted": (make_scripted, "scripted module"),
    "weight_norm": (make_old_weight_norm, "use torch.nn.utils.parametrizations.weight_norm"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_scaled(name):
    make, text = REFUSED[name]
    with pytest.raises(OptionError, match=text):
        graphopt.GradInitWrapper(make())


def test_wrapped_twice():
    model = net()
    with (
        graphopt.GradInitWrapper(model),
        pytest.raises(OptionError, match=r"Net is in a GradInitWrapper already.*ginit\.detach\(\)"),
    ):
        graphopt.GradInitWrapper(model)


def test_streamed():
    model = graphopt.transform(
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), [LayerToLayer(store="cpu")], compiler="eager"
    )
    with pytest.raises(StreamError, match="are streamed from a store"):
        graphopt.GradInitWrapper(model)
    graphopt.restore(model)


def test_losses_that_mean_nothing():
    model = net()
    with graphopt.GradInitWrapper(model) as ginit:
        with pytest.raises(OptionError, match="depends on no parameter of Net"):
            ginit.grad_loss(torch.ones((), requires_grad=True) * 2)
        with pytest.raises(OptionError, match="depends on no parameter of Net"):
            ginit.grad_loss(torch.ones(()))
        with pytest.raises(OptionError, match=r"scalar loss and got one of shape \(12, 7\)"):
            ginit.grad_loss(model(IDS))
        with pytest.raises(OptionError, match="norm=3"):
            ginit.grad_loss(loss_of(model), norm=3)
        with pytest.raises(InitError, match=r"gradient of the loss is not finite in embed\.weight.*start='he'"):
            ginit.grad_loss(loss_of(model) * torch.inf)
    with pytest.raises(OptionError, match="reinit_std=0"):
        graphopt.GradInitWrapper(model, reinit_zeros=True, reinit_std=0)
