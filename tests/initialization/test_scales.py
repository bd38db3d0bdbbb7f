"""Modules of every kind compute with scaled weights: as ``functional_call`` with ``scale * weight`` and autograd say."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.errors import OptionError

IDS = torch.arange(12).reshape(4, 3) % 7


class Of(nn.Module):
    """A function of parts and an input; parameters of the given shapes."""

    def __init__(self, function, *parts):
        super().__init__()
        self.parts = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(p)) for p in parts if isinstance(p, tuple))
        self.function = function

    def forward(self, x):
        return self.function(*self.parts, *self.weights, x)


class Registered(nn.Module):
    """Wants to know of every class derived from it, and each to have a key of its own."""

    keys: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls, *, key, **options):
        assert key not in Registered.keys
        Registered.keys.append(key)


class Linear(Registered, key="linear"):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return (x @ self.weight).tanh()


class Strict(nn.Module):
    """Takes no attribute that it does not know, and has one that nobody has set."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def __setattr__(self, name, value):
        if name != "weight" and name not in vars(nn.Module()):
            raise AttributeError(name)
        super().__setattr__(name, value)

    def __getattr__(self, name):
        return 3 if name == "factor" else super().__getattr__(name)

    def forward(self, x):
        return (x @ self.weight).tanh() * self.factor


class Collections(nn.Module):
    def __init__(self):
        super().__init__()
        self.named = nn.ParameterDict({"weight": torch.randn(3, 3), "shift": torch.randn(3)})
        self.listed = nn.ParameterList([torch.randn(3, 3), self.named["weight"]])  # tied

    def forward(self, x):
        weight, *others = self.listed
        for other in others:
            x = (x @ weight @ other).tanh()
        return sum(x * value.sum() for _, value in self.named.items())


def pruned():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    torch.nn.utils.prune.l1_unstructured(model[0], "weight", 0.3)
    return model


def called_twice(layer, x):
    return layer(layer(x).tanh())


def with_hooks():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[0].register_forward_hook(lambda module, args, output: output + module.weight.sum())
    return model


def silent(linear, empty, number, x):
    """Weights without gradient, without entries, without axes."""
    return linear(x).relu() + number * x.tanh() + empty.sum()


def silenced():
    model = Of(silent, nn.Linear(3, 3), (0,), ())
    nn.init.constant_(model.parts[0].bias, -100.0)
    return model


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 7, "n_positions": 8, "n_embd": 4, "n_layer": 2, "n_head": 2}
    drop = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)
    config = GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=0)
    return Of(lambda model, ids: model(ids).logits, GPT2LMHeadModel(config))


S, N = nn.Sequential, nn.utils.parametrizations
KINDS = {
    "a class that registers others": (lambda: S(Linear(), nn.Linear(3, 2)), (4, 3)),
    "attributes of its own": (Strict, (4, 3)),
    "collections": (Collections, (4, 3)),
    "pruned": (pruned, (4, 3)),
    "spectral_norm of old": (lambda: S(nn.utils.spectral_norm(nn.Linear(3, 3)), nn.Tanh()).eval(), (4, 3)),
    "spectral_norm": (lambda: S(N.spectral_norm(nn.Linear(3, 3)), nn.Tanh()).eval(), (4, 3)),
    "orthogonal": (lambda: S(N.orthogonal(nn.Linear(3, 3)), nn.Tanh()), (4, 3)),
    "a module called twice": (lambda: Of(called_twice, nn.Linear(3, 3)), (4, 3)),
    "a traced module": (lambda: torch.fx.symbolic_trace(S(nn.Linear(3, 3), nn.Tanh())), (4, 3)),
    "hooks": (with_hooks, (4, 3)),
    "silent": (silenced, (4, 3)),
    "an encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (2, 3, 4)),
    "max_norm": (lambda: S(nn.Embedding(7, 3, max_norm=1.0), nn.Linear(3, 2), nn.Tanh()), None),
    "scale_grad_by_freq": (lambda: S(nn.Embedding(7, 3, scale_grad_by_freq=True), nn.Linear(3, 2)), None),
    "gpt2": (gpt2, None),
}


def built(name):
    torch.manual_seed(0)
    build, shape = KINDS[name]
    return build().double(), IDS if shape is None else torch.randn(shape, dtype=torch.float64)


def set_scales(ginit):
    with torch.no_grad():
        for position, scale in enumerate(ginit.parameters()):
            scale.fill_(1 + 0.1 * position)


def differentiate(model, x, norm):
    """Output, norm of the gradient, and its derivative."""
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        output = model(x)
        total = ginit.grad_loss(output.square().sum(), norm, gamma=0.0)
        slopes = torch.autograd.grad(total, list(ginit.parameters()), allow_unused=True, materialize_grads=True)
        return output.detach(), total.detach(), torch.stack(slopes)


def reference(model, x, norm):
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    scales = [torch.tensor(1 + 0.1 * k, dtype=torch.float64, requires_grad=True) for k in range(len(weights))]
    scaled = {name: s * w for s, (name, w) in zip(scales, weights.items(), strict=True)}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        output = functional_call(model, scaled, (x,), tie_weights=True)
    grads = torch.autograd.grad(
        output.square().sum(), list(scaled.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    total = torch.cat([grad.flatten() for grad in grads]).norm(p=norm)
    slopes = torch.autograd.grad(total, scales, allow_unused=True, materialize_grads=True)
    return output.detach(), total.detach(), torch.stack(slopes)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("name", KINDS)
def test_modules(name, norm):
    expected = reference(*built(name), norm)
    model, x = built(name)
    kinds, keys = [type(module) for module in model.modules()], list(Registered.keys)
    torch.testing.assert_close(differentiate(model, x, norm), expected, rtol=1e-10, atol=1e-12)
    assert [type(module) for module in model.modules()] == kinds
    assert Registered.keys == keys


def test_sparse_gradients_are_dense_inside():
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = S(nn.Embedding(7, 3, sparse=sparse), nn.Linear(3, 2), nn.Tanh()).double()
        found.append(differentiate(model, IDS, 2))
        assert model[0].sparse is sparse
        model(IDS).sum().backward()
        assert model[0].weight.grad.is_sparse is sparse
    torch.testing.assert_close(*found)


def test_checkpointed_parts():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3).double(), torch.randn(4, 3, dtype=torch.float64)
    expected = differentiate(copy.deepcopy(Of(lambda f, x: f(x).tanh(), layer)), x, 2)
    found = differentiate(Of(lambda f, x: checkpoint(lambda x: f(x).tanh(), x, use_reentrant=False), layer), x, 2)
    torch.testing.assert_close(found, expected)


def test_weights_held_elsewhere_are_refused():
    layer = nn.Linear(3, 3)
    held = [layer.weight]
    model = Of(lambda f, x: f(x) @ held[0], layer)
    with (
        graphopt.GradInitWrapper(model) as ginit,
        pytest.raises(OptionError, match=r"parts\.0\.weight of Of are used .* through a list or closure that holds"),
    ):
        ginit.grad_loss(model(torch.randn(4, 3)).sum())


def test_a_module_that_refuses_leaves_the_others_as_they_were(monkeypatch):
    from graphopt.initialization import scales

    model, calls, dress = S(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)), [], scales._dress

    def fail_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise TypeError("object layout differs")
        dress(*args)

    monkeypatch.setattr(scales, "_dress", fail_at_the_third)
    with pytest.raises(TypeError, match="layout differs"):
        graphopt.GradInitWrapper(model)
    assert [type(module) for module in model.modules()] == [nn.Sequential, nn.Linear, nn.Tanh, nn.Linear]
    assert [p.ndim for p in model.parameters()] == [2, 1, 2, 1]


# --- what users do inside the block --------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return S(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(4, 3, dtype=torch.float64)


def test_without_gradients_first():
    model, x = small()
    expected = differentiate(copy.deepcopy(model), x, 2)
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), expected[0], rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected[0], rtol=0, atol=0)
        assert ginit.grad_loss(model(x).square().sum(), 2, gamma=0.0).item() == expected[1].item()


def test_values_by_name():
    """``functional_call`` inside computes with what it is given, or with scales where it is given those."""
    model, x = small()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = model(x)
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        assert torch.equal(functional_call(model, weights, (x,)), before)
        assert torch.equal(functional_call(model, dict(model.named_parameters()), (x,)), model(x))
        assert not torch.equal(model(x), before)


def test_parameters_that_come_and_go():
    model, x = small()
    with graphopt.GradInitWrapper(model) as ginit:
        model[0].bias = None
        model[2].register_parameter("more", nn.Parameter(torch.ones(2)))
        assert list(model.state_dict()) == ["0.weight", "2.weight", "2.bias", "2.more"]
        ginit.grad_loss(model(x).square().sum(), gamma=0.0).backward()
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "2.weight", "2.bias", "2.more"]
    assert torch.equal(model[2].more, torch.ones(2))


def test_load_state_dict_that_assigns():
    model, x = small()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        model.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(model(x), other(x))
        ginit.grad_loss(model(x).square().sum(), gamma=0.0)
    torch.testing.assert_close(dict(model.named_parameters()), dict(other.named_parameters()), rtol=0, atol=0)


def test_freezing_inside_freezes_scales():
    model, x = small()
    with graphopt.GradInitWrapper(model):
        model.requires_grad_(False)
        assert not model(x).requires_grad
    assert all(p.requires_grad for p in model.parameters())


def test_blocks_one_after_the_other_multiply():
    model, _ = small()
    before = copy.deepcopy(model)
    for _ in range(2):
        with graphopt.GradInitWrapper(model) as ginit:
            set_scales(ginit)
    for position, (param, old) in enumerate(zip(model.parameters(), before.parameters(), strict=True)):
        torch.testing.assert_close(param, old * (1 + 0.1 * position) ** 2)
        assert param.init_scale.item() == 1 + 0.1 * position


def test_part_of_a_model():
    """A part is wrapped; the rest trains as ever."""
    model, x = small()
    with graphopt.GradInitWrapper(model[0]) as ginit:
        assert [p.ndim for p in model.parameters()] == [0, 0, 2, 1]
        ginit.grad_loss(model(x).square().sum(), gamma=0.0).backward()
        assert all(p.grad is not None for p in model.parameters())
    F.mse_loss(model(x), torch.zeros(4, 2, dtype=torch.float64)).backward()
