"""`patch_model`: in place, in part, and undone; numbers against the loop over samples."""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt import patch_model, patch_torch
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import OptionError, StaleAnnotation, UnsupportedError
from graphopt.nn import TrueGradParameter
from tests.nn.cases import N, rand, total
from tests.oracle import loop_over_samples

EXACT = {"rtol": 1e-9, "atol": 1e-12}


class Mixed(nn.Module):
    """Own parameters, a tied table, a frozen layer, a function of torch.nn.functional."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3))
        self.table, self.mix, self.head = nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.table.weight
        self.norm = nn.LayerNorm(3)
        self.norm.bias.requires_grad_(False)

    def forward(self, ids):
        x = torch.tanh(F.linear(self.table(ids), self.mix.weight, self.mix.bias) + self.shift)
        return self.head(self.norm(x))


def step(model, *inputs):
    model.zero_grad()
    output = model(*inputs)
    total(output).backward()
    return output.detach()


def assert_exact(model, expected, num_samples=N):
    for name, param in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(param.grad, expected[name].grad, **EXACT)
            torch.testing.assert_close(find(param, SUM_GRAD_SQUARED), expected[name].sum_grad_squared, **EXACT)
            assert find(param, NUM_SAMPLES) == num_samples
        else:
            assert find(param, SUM_GRAD_SQUARED) is None, name


def ids():
    return torch.randint(0, 7, (N, 5))


def test_identity_ties_and_frozen_parameters_stay():
    model = Mixed().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # before patching
    before, keys, kind = dict(model.named_parameters()), list(model.state_dict()), type(model)
    x = ids()
    expected = loop_over_samples(model, (x,), total, reduction="sum")
    reference = step(copy.deepcopy(model), x)
    assert patch_model(model) is model
    assert all(param is before[name] for name, param in model.named_parameters())
    assert (list(model.state_dict()), type(model)) == (keys, kind)
    assert model.head.weight is model.table.weight
    assert not model.norm.bias.requires_grad
    assert all(type(param) is nn.Parameter and isinstance(param, TrueGradParameter) for param in model.parameters())
    assert torch.equal(step(model, x), reference)
    assert_exact(model, expected)
    old = model.mix.weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(model.mix.weight.detach(), old - 0.1 * model.mix.weight.grad)


def test_restore_undoes_it():
    model, x = Mixed().double(), ids()
    reference = step(copy.deepcopy(model), x)
    step(patch_model(model), x)
    graphopt.restore(model)
    assert not any(isinstance(param, TrueGradParameter) for param in model.parameters())
    model.zero_grad()
    assert all(find(param, SUM_GRAD_SQUARED) is None for param in model.parameters())
    assert torch.equal(step(model, x), reference)


def test_only_the_modules_own_parameters():
    model, x = Mixed().double(), ids()
    expected = loop_over_samples(model, (x,), total, reduction="sum")
    patch_model(model, recurse=False)
    assert [name for name, param in model.named_parameters() if isinstance(param, TrueGradParameter)] == ["shift"]
    step(model, x)
    assert_exact(model, {"shift": expected["shift"]})


def test_patching_one_submodule_leaves_the_others_plain():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), rand(N, 3)
    expected = loop_over_samples(model, (x,), total, reduction="sum")
    patch_model(model[2])
    assert [isinstance(param, TrueGradParameter) for param in model.parameters()] == [False, False, True, True]
    assert "_compiled_call_impl" not in model[0].__dict__
    step(model, x)
    assert_exact(model, {name: value for name, value in expected.items() if name.startswith("2.")})


def test_every_module_by_itself():
    """As the seed's comment suggests: ``model.apply(lambda m: patch_model(m, recurse=False))``, outermost last."""
    model, x = Mixed().double(), ids()
    expected = loop_over_samples(model, (x,), total, reduction="sum")
    model.apply(lambda module: patch_model(module, recurse=False))
    assert all(isinstance(param, TrueGradParameter) for param in model.parameters())
    step(model, x)
    assert_exact(model, expected)


def test_a_patched_part_that_is_used_twice_is_an_error_when_read():
    part, x = nn.Linear(3, 3).double(), rand(N, 3)
    model = nn.Sequential(part, nn.Tanh(), part)
    expected = loop_over_samples(model, (x,), total, reduction="sum")
    patch_model(part)
    step(model, x)
    with pytest.raises(
        StaleAnnotation, match=r"served by graphopt\.patch_model, was used by 2 calls.*Patch the model that makes"
    ):
        find(part.weight, SUM_GRAD_SQUARED)
    step(patch_model(model), x)
    assert_exact(model, expected)
    graphopt.restore(part), graphopt.restore(model).zero_grad()
    graphopt.transform(part, compiler="eager")
    (total(part(x[:2])) + total(part(x[2:]))).backward()  # different samples, as the user knows
    assert find(part.weight, NUM_SAMPLES) == N


def test_a_module_without_parameters_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 2))
    patch_model(model, recurse=False)
    assert "_compiled_call_impl" not in model.__dict__
    assert not any(isinstance(param, TrueGradParameter) for param in model.parameters())


def test_twice_is_once():
    model, x = Mixed().double(), ids()
    expected = loop_over_samples(model, (x,), total, reduction="sum")
    patch_model(patch_model(model))
    step(model, x)
    step(model, x)
    assert_exact(model, expected)


def test_modules_of_graphopt_nn_are_welcome():
    """The forerunner could not mix the two ways."""
    layer = graphopt.nn.Linear(3, 3)
    model, x = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2)).double(), rand(N, 3)
    plain = copy.deepcopy(model)
    plain[0].__class__ = nn.Linear
    expected = loop_over_samples(plain, (x,), total, reduction="sum")
    step(patch_model(model), x)
    assert_exact(model, expected)
    graphopt.restore(model)
    assert [isinstance(param, TrueGradParameter) for param in model.parameters()] == [True, True, False, False]


def test_no_model():
    with pytest.raises(OptionError, match=r"patch_model takes a torch\.nn\.Module and got Parameter"):
        patch_model(nn.Parameter(torch.zeros(2)))


class Views(nn.Module):
    """One weight, transposed, cut in three and expanded; a layer used twice; functions without modules."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(3, 9)), nn.Parameter(torch.randn(1, 3))
        self.conv = nn.Conv1d(3, 3, 3, padding=1)
        self.gain = nn.Parameter(torch.randn(3))

    def forward(self, x):
        first, second, third = self.weight.t().split(3)
        x = F.linear(x, first) * F.linear(x, second) + F.linear(x, third)
        x = x * self.scale.expand(x.shape[0], 3)[:, None]
        x = torch.tanh(self.conv(torch.tanh(self.conv(x.transpose(1, 2)))))
        return F.prelu(F.group_norm(x, 3, self.gain), self.gain.abs())


MODELS = {
    "views": (Views, lambda: (rand(N, 5, 3),)),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, groups=2, padding="same", padding_mode="circular"), nn.GroupNorm(2, 4), nn.PReLU(),
            nn.Conv2d(4, 3, 3, stride=2, dilation=2), nn.Flatten(),
        ),
        lambda: (rand(N, 4, 7, 7),),
    ),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 2, 2)), lambda: (rand(N, 2, 5),)),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(2, 2, 2), nn.BatchNorm3d(2).eval(), nn.Flatten()), lambda: (rand(N, 2, 3, 3, 3),)),
    "padding": (lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Linear(4, 3)), lambda: (ids(),)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), lambda: (rand(N, 5, 4),)),
    "bilinear": (lambda: nn.Bilinear(3, 2, 4), lambda: (rand(N, 3), rand(N, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_numbers(name):
    model, inputs = MODELS[name][0]().double(), MODELS[name][1]()
    expected = loop_over_samples(model, inputs, total, reduction="sum")
    assert set(expected) == {name for name, _ in model.named_parameters()}
    reference = step(copy.deepcopy(model), *inputs)
    torch.testing.assert_close(step(patch_model(model), *inputs), reference, rtol=1e-12, atol=1e-12)
    assert_exact(model, expected)


# --- patch_torch ------------------------------------------------------------------------------------------------------------


def everything():
    """What `patch_torch` could have changed."""
    return {
        (owner.__name__, name): value
        for owner in (torch, nn, F, nn.Module, nn.Linear, nn.Parameter)
        for name, value in vars(owner).items()
    }


def test_patch_torch_serves_models_that_are_made_and_called_inside():
    x = ids()
    with patch_torch():
        model = Mixed().double()
        nn.Linear(2, 3, device="cpu", dtype=torch.float64)
        expected = loop_over_samples(graphopt.restore(copy.deepcopy(model)), (x,), total, reduction="sum")
        with torch.no_grad():
            model(x)
        assert not isinstance(model.shift, TrueGradParameter)
        step(model, x)
        nn.CrossEntropyLoss()(rand(N, 3), torch.zeros(N, dtype=torch.long))
        assert isinstance(model.shift, TrueGradParameter)
        assert_exact(model, expected)
    assert not isinstance(model.shift, TrueGradParameter)
    assert_exact(model, expected)  # until the gradients are cleared
    model.zero_grad()
    assert find(model.shift, SUM_GRAD_SQUARED) is None


def test_patch_torch_leaves_nothing_behind():
    graphopt.annotations.expose()
    before = everything()
    with patch_torch():
        inside = nn.Module.__call__
        with patch_torch():
            assert nn.Module.__call__ is inside
        step(nn.Linear(3, 2), torch.randn(N, 3))
        assert nn.Module.__call__ is inside
    with pytest.raises(ZeroDivisionError), patch_torch():
        raise ZeroDivisionError
    after = everything()
    assert all(after[key] is before[key] for key in before)
    assert set(after) == set(before)


def test_patch_torch_refuses_by_name():
    with patch_torch(), pytest.raises(UnsupportedError, match=r"weight: .*sparse=False"):
        nn.Embedding(7, 3, sparse=True)(ids())


def test_patch_torch_leaves_what_is_served_already():
    model = graphopt.transform(nn.Linear(3, 2), [], compiler="eager")
    layer = graphopt.nn.Linear(3, 2)
    with patch_torch():
        model(torch.randn(N, 3)), layer(torch.randn(N, 3))
    assert graphopt.records(model)
    assert "_compiled_call_impl" not in layer.__dict__


def hugging_face(name):
    if name == "bert":
        config = transformers.BertConfig(
            vocab_size=7,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=8,
        )
        return transformers.BertForSequenceClassification(config), (ids(),)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    return transformers.ResNetForImageClassification(config), (rand(N, 3, 32, 32),)


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_patch_torch_serves_every_parameter_of(name):
    model, inputs = hugging_face(name)
    with patch_torch():
        total(model.double()(*inputs).logits).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert find(param, SUM_GRAD_SQUARED).isfinite().all(), name
        assert find(param, NUM_SAMPLES) == N
