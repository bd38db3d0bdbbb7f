"""Hooks, autocast, and kinds of models and calls: the statistics stay exact, and the model behaves as it was written."""

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt import annotations
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.errors import MissingAnnotation, StaleAnnotation, UnsupportedError


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2, bias=False)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def data(*shape, dtype=torch.float64):
    return torch.randn(*(shape or (5, 3)), dtype=dtype)


def loss(model, x):
    return model(x).square().sum()


def transformed(model=None, **options):
    torch.manual_seed(1)
    return graphopt.transform((model or MLP()).double(), **{"compiler": "aot_eager", **options})


# Hooks --------------------------------------------------------------------------------------------------------------------------


WHEN = ["before transform", "before the first call", "after the first call"]


def with_hooks(when, register):
    """A transformed model, and what ``register(model)`` returned, called at the time that ``when`` says."""
    torch.manual_seed(1)
    model = MLP().double()
    handle = register(model) if when == WHEN[0] else None
    graphopt.transform(model, compiler="aot_eager")
    handle = register(model) if when == WHEN[1] else handle
    if when == WHEN[2]:
        loss(model, data()).backward()
        model.zero_grad()
        handle = register(model)
    return model, handle


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("where", ["", "first"])
def test_forward_hook(when, where, assert_exact):
    model, handle = with_hooks(
        when, lambda model: model.get_submodule(where).register_forward_hook(lambda module, args, output: 2 * output)
    )
    x, plain = data(), graphopt.restore(copy.deepcopy(model))
    torch.testing.assert_close(model(x), plain(x))
    loss(model, x).backward()
    assert_exact(model, loss, x)
    handle.remove()
    model.zero_grad()
    plain = MLP().double()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x))
    loss(model, x).backward()
    assert_exact(model, loss, x)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("where", ["", "second"])
def test_forward_pre_hook(when, where, assert_exact):
    model, _ = with_hooks(
        when, lambda model: model.get_submodule(where).register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    )
    x, plain = data(), graphopt.restore(copy.deepcopy(model))
    torch.testing.assert_close(model(x), plain(x))
    loss(model, x).backward()
    assert_exact(model, loss, x)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("where", ["", "second"])
def test_full_backward_hook(when, where, assert_exact):
    seen = []

    def hook(module, grad_input, grad_output):
        seen.append(grad_output[0].detach().clone())

    model, handle = with_hooks(when, lambda model: model.get_submodule(where).register_full_backward_hook(hook))
    x = data().requires_grad_()
    seen.clear()
    if where and when != "after the first call":
        with pytest.raises(UnsupportedError, match=r"second\.weight of MLP would have gradients but no statistics"):
            model(x)
        return
    loss(model, x).backward()
    assert len(seen) == 1
    assert torch.allclose(seen[0], 2 * model(x).detach())
    handle.remove()
    model.zero_grad()
    loss(model, x).backward()
    assert len(seen) == 1
    if where:  # Dynamo does not capture a module of torch.nn with backward hooks, and does not try again
        with pytest.raises((MissingAnnotation, StaleAnnotation)):
            annotations.get(model.second.weight, annotations.SUM_GRAD_SQUARED)
    else:
        assert_exact(model, loss, x)


def test_tensor_hooks_on_parameters():
    model, x = transformed(), data()
    model.first.weight.register_hook(lambda grad: grad / 2)
    seen = []
    model.second.weight.register_post_accumulate_grad_hook(lambda param: seen.append(param.grad.clone()))
    loss(model, x).backward()
    plain = graphopt.restore(copy.deepcopy(model))
    grads = torch.autograd.grad(loss(plain, x), [plain.first.weight, plain.second.weight])
    torch.testing.assert_close(model.first.weight.grad, grads[0] / 2)
    torch.testing.assert_close(seen, [grads[1]])


# Autocast -----------------------------------------------------------------------------------------------------------------------


def bfloat16_close(model, reference_model, x, run):
    """Gradients and statistics within the tolerance of bfloat16 of a loop in float32."""
    names = dict(reference_model.named_parameters())
    for name, param in model.named_parameters():
        per_sample = [
            torch.autograd.grad(run(reference_model, x[n : n + 1]).square().sum(), names[name])[0]
            for n in range(len(x))
        ]
        expected = sum(grad.float().square() for grad in per_sample)
        assert param.sum_grad_squared.dtype == torch.float32
        assert param.num_samples == len(x)
        error = (param.sum_grad_squared - expected).norm() / expected.norm()
        assert error < 0.03, f"{name}: {error}"


def outer(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


class Inner(MLP):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Nested(MLP):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x).tanh()
            with torch.autocast("cpu", enabled=False):
                return self.second(x.float())


def plain(model, x):
    return model(x)


AUTOCAST = {
    "outside": (MLP, outer, torch.bfloat16),
    "inside": (Inner, plain, torch.bfloat16),
    "both": (Inner, outer, torch.bfloat16),
    "nested": (Nested, plain, torch.float32),
    "nested, outside": (Nested, outer, torch.float32),
}


@pytest.mark.parametrize("shape", [(6, 3), (6, 4, 3)])
@pytest.mark.parametrize(("build", "run", "dtype"), AUTOCAST.values(), ids=AUTOCAST)
def test_autocast(build, run, dtype, shape):
    torch.manual_seed(1)
    model, x = build(), data(*shape, dtype=torch.float32)
    eager, exact = copy.deepcopy(model), MLP()
    exact.load_state_dict(model.state_dict())
    graphopt.transform(model, compiler="aot_eager")
    output = run(model, x)
    assert output.dtype == dtype
    assert torch.equal(output, run(eager, x))
    output.float().square().sum().backward()
    assert all(param.grad.dtype == torch.float32 for param in model.parameters())
    bfloat16_close(model, exact, x, plain)
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_on_and_off_between_calls(assert_exact):
    torch.manual_seed(1)
    model, x = graphopt.transform(MLP(), compiler="aot_eager"), data(dtype=torch.float32)
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(x)
        assert output.dtype == (torch.bfloat16 if enabled else torch.float32)
        model.zero_grad()
        output.float().square().sum().backward()
    loss_of_model = model.zero_grad() or loss(model, x)
    loss_of_model.backward()
    assert_exact(model, loss, x)


def test_bfloat16_parameters():
    torch.manual_seed(1)
    model, x = MLP(), data(6, 3, dtype=torch.float32)
    reference = copy.deepcopy(model)
    graphopt.transform(model.bfloat16(), compiler="aot_eager")
    model(x.bfloat16()).float().square().sum().backward()
    bfloat16_close(model, reference, x, plain)


# Kinds of models ----------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4), "linear": nn.Linear(4, 4)}) for _ in range(3)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block["linear"](block["norm"](x)).relu()
        return x


def encoder_layer(norm_first):
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, norm_first=norm_first, batch_first=True)


MODELS = {
    "Sequential": (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (5, 3)),
    "Linear": (lambda: nn.Linear(3, 2), (5, 3)),
    "Linear on a sequence": (lambda: nn.Linear(3, 2), (5, 4, 3)),
    "nested Sequential": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(4, 2))),
        (5, 3),
    ),
    "ModuleList": (Residual, (5, 4)),
    "encoder layer": (lambda: encoder_layer(False), (3, 5, 8)),
    "encoder layer, norm first": (lambda: encoder_layer(True), (3, 5, 8)),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(False), 2, enable_nested_tensor=False), (3, 5, 8)),
    "encoder, norm first": (
        lambda: nn.TransformerEncoder(encoder_layer(True), 2, enable_nested_tensor=False),
        (3, 5, 8),
    ),
}


@pytest.mark.parametrize(("build", "shape"), MODELS.values(), ids=MODELS)
def test_models_of_torch(build, shape, assert_exact):
    model, x = transformed(build()), data(*shape)
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_transformed_submodule_of_a_plain_model(assert_exact):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.inner, self.after = nn.Linear(3, 3), MLP(), nn.Linear(2, 2)

        def forward(self, x):
            return self.after(self.inner(self.before(x)))

    torch.manual_seed(1)
    model = Outer().double()
    graphopt.transform(model.inner, compiler="aot_eager")
    x = data()
    loss(model, x).backward()
    assert find(model.before.weight, SUM_GRAD_SQUARED) is None
    assert find(model.after.weight, SUM_GRAD_SQUARED) is None
    model.before.requires_grad_(False)
    model.after.requires_grad_(False)
    model.zero_grad()
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_transformed_submodule_of_a_transformed_model(assert_exact):
    model = nn.Sequential(MLP(), nn.Linear(2, 2))
    graphopt.transform(model[0], compiler="aot_eager")
    transformed(model)
    x = data()
    loss(model, x).backward()
    assert_exact(model, loss, x)


# Kinds of calls -----------------------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, inputs, mask=None, *, factor=1, mode="plain", extra=None):
        x = inputs["x"][0] if isinstance(inputs, dict) else inputs
        x = x if mask is None else x * mask
        y = self.linear(x) * factor
        y = y if extra is None else y + extra[1]
        return {"y": (y, mode)} if mode == "nested" else y


def take(output):
    return (output["y"][0] if isinstance(output, dict) else output).square().sum()


CALLS = {
    "keyword": lambda model, x, mask: take(model(inputs=x, mask=mask)),
    "dict": lambda model, x, mask: take(model({"x": (x,), "unused": mask}, mask)),
    "number": lambda model, x, mask: take(model(x, factor=3)),
    "string and nested output": lambda model, x, mask: take(model(x, mode="nested")),
    "tuple with None": lambda model, x, mask: take(model(x, extra=(None, mask[:, :2]))),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_arguments(call, assert_exact):
    model = transformed(Calls())
    for num in (5, 3):
        x, mask = data(num, 3), data(num, 3)
        model.zero_grad()
        call(model, x, mask).backward()
        assert_exact(model, call, x, mask)


def test_argument_without_samples(assert_exact):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x, table):
            return self.linear(x @ table)

    table = data(3, 3)
    model = transformed(Shared(), options={"sample_axis": {"table": None}})
    x = data(3, 3)
    model(x, table).square().sum().backward()
    assert_exact(model, lambda m, x: m(x, table).square().sum(), x)


def test_samples_on_the_second_axis(assert_exact):
    model = transformed(options={"sample_axis": 1})
    x = data(4, 5, 3)
    loss(model, x).backward()
    assert_exact(model, lambda m, x: loss(m, x.transpose(0, 1)), x.transpose(0, 1))


@pytest.mark.parametrize("move", [lambda m: m.float(), lambda m: m.to(torch.bfloat16), lambda m: m.double()])
def test_moved_after_the_first_step(move, assert_exact):
    model = transformed().float()
    loss(model, data(dtype=torch.float32)).backward()
    model.zero_grad()
    move(model)
    dtype = model.first.weight.dtype
    x = data(dtype=dtype)
    loss(model, x).backward()
    assert all(
        param.sum_grad_squared.dtype == torch.promote_types(dtype, torch.float32) for param in model.parameters()
    )
    if dtype != torch.bfloat16:
        assert_exact(model, loss, x)
