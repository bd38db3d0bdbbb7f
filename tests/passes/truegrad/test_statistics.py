"""The statistics beside the sum of squares: norms of samples, squares of positions, variance, signal-to-noise ratio."""

import copy
import itertools

import pytest
import torch
from torch import nn

import graphopt
from graphopt import annotations
from graphopt.annotations import GRAD_SNR, GRAD_VARIANCE, SAMPLE_GRAD_NORM, SUM_POSITION_GRAD_SQUARED
from graphopt.errors import MissingAnnotation, OptionError, UnsupportedError
from graphopt.passes import TrueGrad
from tests import models
from tests.models import double, smooth
from tests.oracle import copy_per_position, split_samples
from tests.passes.truegrad.checks import assert_statistics, loop_over_samples, train_step

NORMS = ("sum_grad_squared", "sample_grad_norm")
POSITIONS = ("sum_grad_squared", "sum_position_grad_squared")
ALL = (*NORMS, "sum_position_grad_squared")
MODELS = {
    "mlp": models.mlp,
    "transformer block": models.transformer_block,
    "positions": lambda: (models.Positions(), (torch.randn(4, 5, 3),)),
    "class token": lambda: (models.ClassToken(), (torch.randn(4, 5, 3),)),
    "low rank": lambda: (models.LoRA(), (torch.randn(4, 5, 3),)),
    "tied table": lambda: (models.TiedLM(bias=True), (torch.randint(0, 7, (4, 5)),)),
    "tied table, twice": lambda: (models.TiedLM(twice=True), (torch.randint(0, 7, (4, 5)),)),
    "shared layer": lambda: (models.Shared(), (torch.randn(4, 5, 3),)),
    "convolution": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(3, 3)), (torch.randn(4, 2, 5, 5),)),
}  # fmt: skip


def build(name):
    torch.manual_seed(5)
    return double(*MODELS[name]())


def gradients(model, inputs):
    """Sample by sample, for each parameter: (N, *shape)."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    rows = []
    for args, _ in split_samples(inputs, {}):
        found = torch.autograd.grad(smooth(model(*args)), list(params.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), found, strict=True)])
    return {name: torch.stack(column) for name, column in zip(params, zip(*rows, strict=True), strict=True)}


def transform(model, statistics, compiler="aot_eager", **options):
    return graphopt.transform(model, [TrueGrad(statistics=statistics, **options)], compiler=compiler)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num", [4, 1])
def test_norms(name, num):
    model, inputs = build(name)
    inputs = tuple(value[:num] for value in inputs)
    expected, statistics = gradients(model, inputs), loop_over_samples(model, inputs, smooth, reduction="sum")
    transform(model, NORMS)
    train_step(model, inputs)
    for key, param in model.named_parameters():
        if key in expected:
            norms = expected[key].flatten(1).norm(dim=1)
            torch.testing.assert_close(param.sample_grad_norm, norms, rtol=1e-9, atol=1e-12, msg=key)
    total = torch.stack([g.flatten(1).square().sum(1) for g in expected.values()]).sum(0).sqrt()
    torch.testing.assert_close(annotations.sample_grad_norms(model.parameters()), total, rtol=1e-9, atol=1e-12)
    assert_statistics(model, statistics, num)


@pytest.mark.parametrize("name", MODELS)
def test_variance_and_signal_to_noise(name):
    model, inputs = build(name)
    expected = gradients(model, inputs)
    transform(model, ("sum_grad_squared",))
    train_step(model, inputs, reduction="mean")
    for key, param in model.named_parameters():
        if key in expected:
            mean, variance = expected[key].mean(0), expected[key].var(0, correction=0)
            torch.testing.assert_close(param.grad_variance, variance, rtol=1e-8, atol=1e-12, msg=key)
            torch.testing.assert_close(param.grad_variance, annotations.get(param, GRAD_VARIANCE))
            kept = (variance > 1e-9 * mean.square()) & (
                variance > 1e-15
            )  # key biases have rounding errors for gradients
            snr = annotations.get(param, GRAD_SNR)
            torch.testing.assert_close(snr[kept], (mean.square() / variance)[kept], rtol=1e-5, atol=1e-10, msg=key)


@pytest.mark.parametrize("statistics", [POSITIONS, ALL])
@pytest.mark.parametrize("name", ["mlp", "linear with positions", "norm with positions", "table", "convolution"])
def test_squares_of_positions(name, statistics):
    torch.manual_seed(5)
    ids = torch.randint(0, 7, (4, 5))
    model, inputs = double(
        *{
            "mlp": models.mlp,
            "linear with positions": lambda: (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (torch.randn(4, 5, 3),)),
            "norm with positions": lambda: (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), (torch.randn(4, 5, 3),)),
            "table": lambda: (nn.Sequential(nn.Embedding(7, 3, padding_idx=1), nn.Linear(3, 2)), (ids,)),
            "convolution": lambda: (nn.Conv2d(2, 3, 2, stride=2), (torch.randn(4, 2, 6, 6),)),
        }[name]()
    )  # fmt: skip
    expected, per_sample = copy_per_position(model, inputs, smooth), gradients(model, inputs)
    transform(model, statistics)
    train_step(model, inputs)
    for key, param in model.named_parameters():
        squares = expected[key][0].sum_grad_squared
        torch.testing.assert_close(annotations.get(param, SUM_POSITION_GRAD_SQUARED), squares, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(param.sum_grad_squared, per_sample[key].square().sum(0), rtol=1e-9, atol=1e-12)
        assert param.num_samples == 4


@pytest.mark.parametrize("name", ["low rank", "shared layer"])
def test_positions_of_what_has_none_are_refused_by_name(name):
    model, inputs = build(name)
    transform(model, POSITIONS)
    with pytest.raises(UnsupportedError, match=r"(?s)(merged_down|layer\.weight).*squares of single positions"):
        train_step(model, inputs)
    again, inputs = build(name)
    transform(again, POSITIONS, unsupported="skip")
    train_step(again, inputs)


def test_micro_batches_are_joined_and_cleared():
    model, inputs = build("mlp")
    expected = gradients(model, inputs)
    transform(model, ALL)
    for part in (slice(0, 1), slice(1, 4)):
        smooth(model(*(value[part] for value in inputs))).backward()
    for key, param in model.named_parameters():
        torch.testing.assert_close(param.sample_grad_norm, expected[key].flatten(1).norm(dim=1))
    (smooth(model(inputs[0][:2])) + smooth(model(inputs[0][2:]))).backward()  # two calls in one backward pass
    for key, param in model.named_parameters():
        norms = expected[key].flatten(1).norm(dim=1)
        torch.testing.assert_close(param.sample_grad_norm, torch.cat([norms, norms]))
    model.zero_grad()
    for param in model.parameters():
        with pytest.raises(AttributeError, match="sample_grad_norm"):
            _ = param.sample_grad_norm
    train_step(model, inputs)
    for key, param in model.named_parameters():
        torch.testing.assert_close(param.sample_grad_norm, expected[key].flatten(1).norm(dim=1))
        torch.testing.assert_close(param.sum_position_grad_squared, param.sum_grad_squared)


def test_rescaling_the_gradient_rescales_each_by_its_degree():
    model, inputs = build("mlp")
    transform(model, ALL)
    train_step(model, inputs)
    before = {p: (p.sample_grad_norm.clone(), p.sum_position_grad_squared.clone(), p.grad_variance.clone(), p.grad_snr)
              for p in model.parameters()}  # fmt: skip
    for param in model.parameters():
        param.grad.mul_(-3)
    for param, (norm, position, variance, snr) in before.items():
        torch.testing.assert_close(param.sample_grad_norm, 3 * norm)
        torch.testing.assert_close(param.sum_position_grad_squared, 9 * position)
        torch.testing.assert_close(param.grad_variance, 9 * variance)
        torch.testing.assert_close(param.grad_snr, snr)


@pytest.mark.slow
def test_inductor_without_recompiling():
    model, (batch,) = build("transformer block")
    plain = copy.deepcopy(model)
    transform(model, NORMS, compiler="inductor")
    for num, again in itertools.zip_longest((4, 3, 2), ()):
        assert again is None
        inputs = (batch[:num],)
        with torch._dynamo.config.patch(error_on_recompile=num < 4):
            train_step(model, inputs)
        expected = gradients(plain, inputs)
        for key, param in model.named_parameters():
            norms = expected[key].flatten(1).norm(dim=1)
            torch.testing.assert_close(param.sample_grad_norm, norms, rtol=1e-9, atol=1e-12, msg=key)


def test_options():
    with pytest.raises(OptionError, match=r"statistics=\['norms'\].*sample_grad_norm"):
        TrueGrad(statistics=("norms",))
    with pytest.raises(OptionError, match="per='token'"):
        TrueGrad(per="token", statistics=("sample_grad_norm",))
    assert TrueGrad(statistics="sample_grad_norm") == TrueGrad(statistics=NORMS)
    assert TrueGrad(statistics=("grad_variance", "grad_snr")) == TrueGrad()


def test_norms_of_several_parameters():
    model, inputs = build("mlp")
    with pytest.raises(MissingAnnotation, match="none of these parameters has a gradient"):
        annotations.sample_grad_norms(model.parameters())
    train_step(model, inputs)
    with pytest.raises(MissingAnnotation, match="no sample_grad_norm"):
        annotations.sample_grad_norms(model.parameters())
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    for param, num in ((first, 2), (second, 3)):
        param.grad = torch.ones(2)
        annotations.publish(param, torch.ones(2), num, others={SAMPLE_GRAD_NORM: torch.ones(num)})
    with pytest.raises(OptionError, match=r"different numbers of samples \(\[2, 3\]\)"):
        annotations.sample_grad_norms([first, second])


def test_derived_annotations_cannot_be_assigned():
    model, inputs = build("mlp")
    transform(model, ("sum_grad_squared",))
    train_step(model, inputs)
    with pytest.raises(AttributeError, match="computed from other annotations"):
        next(model.parameters()).grad_variance = 1
