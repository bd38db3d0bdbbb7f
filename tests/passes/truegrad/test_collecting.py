"""Per-sample gradients in slices of samples: exact, bounded, for whatever an operator is."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import OptionError, UnsupportedError
from graphopt.passes import TrueGrad
from graphopt.passes.truegrad.ops import collect
from graphopt.pipeline import Status
from tests import models
from tests.models import double, smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, check, train_step

SLICED = ["transformer_block", "class_token", "lora", "shared", "experts", "temperature", "weight_norm", "mixed_frozen"]


def rows(model):
    return {row.name: row for record in graphopt.records(model) for row in record.coverage}


def is_sliced(row):
    return "in slices" in row.reason


@pytest.mark.parametrize("max_bytes", [1, 300])
@pytest.mark.parametrize("name", SLICED)
def test_against_the_loop(name, max_bytes):
    torch.manual_seed(2)
    model = check(*models.MODELS[name](), compiler="aot_eager" if max_bytes > 1 else "eager", max_bytes=max_bytes)
    sliced = [row for row in rows(model).values() if is_sliced(row)]
    assert sliced or max_bytes > 1
    assert all(row.status is Status.FALLBACK and row.extra_bytes <= max_bytes for row in sliced)


class Recurrent(nn.Module):
    """One matrix, used at every step, on samples that lie on the second axis."""

    def __init__(self):
        super().__init__()
        self.enter, self.step = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        state = x.new_zeros(x.shape[1], 4)
        for row in x.unbind(0):
            state = torch.tanh(self.enter(row) + self.step(state))
        return state


def test_samples_on_another_axis_and_many_uses():
    torch.manual_seed(2)
    options = {"sample_axis": 1}
    model = check(Recurrent(), (torch.randn(6, 4, 3),), axes=1, num_samples=4, options=options, max_bytes=1)
    assert is_sliced(rows(model)["step.weight"])


class Flattened(nn.Module):
    """Rows of a sample lie together, or apart, and the weight is computed."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.left, self.right = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        flat = (x if self.inside else x.transpose(0, 1)).flatten(0, 1)
        y = (flat @ (self.left @ self.right)).tanh()
        return y.view(*(x.shape[:2] if self.inside else (x.shape[1], x.shape[0])), 4).flatten(0, 1)[:, None]


@pytest.mark.parametrize("inside", [True, False])
def test_rows_of_samples_that_are_interleaved(inside):
    torch.manual_seed(2)
    model, inputs = double(Flattened(inside), (torch.randn(4, 5, 3),))
    expected = loop_over_samples(model, inputs, smooth, reduction="sum")
    graphopt.transform(model, [TrueGrad(max_bytes=1)], compiler="aot_eager")
    train_step(model, inputs)
    assert_statistics(model, expected, 4)
    assert is_sliced(rows(model)["left"])


def test_slices_are_as_large_as_allowed(monkeypatch):
    sizes = []
    original = collect._gradients_in_slices

    def spy(*args):
        for each in original(*args):
            sizes.append(sum(gradient.numel() * gradient.element_size() for gradient in each))
            yield each

    monkeypatch.setattr(collect, "_gradients_in_slices", spy)
    model, inputs = models.Shared(), (torch.randn(7, 5, 3),)
    layer = (9 + 3) * 4
    graphopt.transform(model, [TrueGrad(max_bytes=3 * layer)], compiler="aot_eager")
    train_step(model, inputs)
    norm = (3 + 3) * 4
    assert sorted(sizes) == sorted([3 * layer, 3 * layer, layer, 6 * norm, norm])


def test_what_vmap_cannot_batch_is_done_one_by_one(monkeypatch):
    calls = []

    def refuse(*args, **kwargs):
        calls.append(1)
        raise RuntimeError("no batching rule")

    torch.manual_seed(2)
    model, inputs = double(models.Shared(), (torch.randn(4, 5, 3),))
    expected = loop_over_samples(model, inputs, smooth, reduction="sum")
    graphopt.transform(model, [TrueGrad(max_bytes=300)], compiler="aot_eager")
    smooth(model(*inputs)).backward()
    model.zero_grad()
    monkeypatch.setattr(torch.func, "vmap", refuse)
    train_step(model, inputs)
    assert calls
    assert_statistics(model, expected, 4)


def test_norms():
    torch.manual_seed(2)
    model, inputs = double(models.Shared(), (torch.randn(4, 5, 3),))
    norms = torch.stack(
        [loop_over_samples(model, (inputs[0][n : n + 1],), smooth)["layer.weight"].grad.norm() for n in range(4)]
    )
    graphopt.transform(model, [TrueGrad(max_bytes=1, statistics="sample_grad_norm")], compiler="aot_eager")
    train_step(model, inputs)
    torch.testing.assert_close(model.layer.weight.sample_grad_norm, norms)
    assert is_sliced(rows(model)["layer.weight"])


class Dropped(nn.Module):
    """Random numbers between the parameter and its samples cannot be drawn again: both ways say so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        return x @ torch.dropout(self.weight, 0.5, True).t()


def test_random_operators_stay_with_the_other_way():
    torch.manual_seed(2)
    model, inputs = double(Dropped(), (torch.randn(4, 5, 3),))
    graphopt.transform(model, [TrueGrad(max_bytes=1)], compiler="aot_eager")
    try:
        train_step(model, inputs)
    except UnsupportedError as error:
        assert "weight" in str(error)
        assert "dropout" in str(error)
    else:
        assert not is_sliced(rows(model)["weight"])


@pytest.mark.slow
def test_inductor_and_ragged_batches():
    torch.manual_seed(2)
    model, (batch,) = double(models.Shared(), (torch.randn(6, 5, 3),))
    expected = {n: loop_over_samples(model, (batch[:n],), smooth, reduction="sum") for n in (6, 4, 3)}
    graphopt.transform(model, [TrueGrad(max_bytes=200)])
    for num, statistics in expected.items():
        with torch._dynamo.config.patch(error_on_recompile=num < 6):
            train_step(model, (batch[:num],))
        assert_statistics(model, statistics, num)


def test_option():
    with pytest.raises(OptionError, match="at least 1"):
        TrueGrad(max_bytes=0)


class Twice(nn.Module):
    """An operator that vmap takes one sample at a time."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Bilinear(2, 2, 2)

    def forward(self, x):
        return self.inner(self.inner(x, x), x)


@pytest.mark.filterwarnings("error")
def test_what_vmap_cannot_batch_is_no_reason_to_warn():
    model = check(Twice(), (torch.randn(3, 2),), max_bytes=1)
    assert is_sliced(rows(model)["inner.weight"])


class RowsOfItsOwn(nn.Module):
    """A parameter, or a constant beside one, with a row for each sample: it fits one batch size only."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.rows, self.matrix, self.linear = (
            nn.Parameter(torch.randn(4, 3)),
            nn.Parameter(torch.randn(4, 3, 2)),
            nn.Linear(3, 2),
        )
        self.register_buffer("constant", torch.randn(4, 3))

    def forward(self, x):
        match self.way:
            case "added":
                return self.linear(torch.tanh(x + self.rows))
            case "einsum":
                return torch.einsum("nd,nd->n", x, self.rows)
            case "bmm":
                return torch.bmm(x[:, None], self.matrix)
            case "similarity":
                return F.cosine_similarity(x, self.rows)
            case "constant":
                return x[:, :2] * self.linear(self.constant)
            case "distance":
                return torch.cdist((x * self.rows[0])[:, None], (self.constant * self.rows[0])[:, None])


@pytest.mark.parametrize("max_bytes", [1, 2**27])
@pytest.mark.parametrize("way", ["added", "einsum", "bmm", "similarity", "constant", "distance"])
def test_rows_for_the_samples_of_one_batch_are_refused(way, max_bytes):
    model = graphopt.transform(RowsOfItsOwn(way), [TrueGrad(max_bytes=max_bytes)], compiler="eager")
    with pytest.raises(UnsupportedError, match=r"one batch size|for one sample alone"):
        model(torch.randn(4, 3))


@pytest.mark.parametrize("way", ["added", "einsum", "bmm", "similarity", "constant", "distance"])
def test_what_is_skipped_has_its_gradient(way):
    model, x = RowsOfItsOwn(way).double(), torch.randn(4, 3).double()
    model(x).sin().sum().backward()
    expected = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    graphopt.transform(model, [TrueGrad(unsupported="skip")], compiler="eager")
    model(x).sin().sum().backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[name])
