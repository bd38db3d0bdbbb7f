"""Every rule, by the models in its own ``SAMPLES``: against a loop over samples, and untouched where nothing applies."""

import copy
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import graphopt
from graphopt.passes import TrueGrad
from graphopt.passes.truegrad import _registry, rules
from tests.models import double, smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, capture, train_step

MODULES = {
    info.name: importlib.import_module(f"{rules.__name__}.{info.name}") for info in pkgutil.iter_modules(rules.__path__)
}
SAMPLES = [
    pytest.param(sample, id=f"{name}-{index}")
    for name, module in MODULES.items()
    for index, sample in enumerate(module.SAMPLES)
]


def build(sample):
    torch.manual_seed(3)
    return double(*_as_batch(*sample()))


def _as_batch(module, *inputs):
    return module, inputs


def rows(inputs, num):
    return tuple(value[:num] for value in inputs)


def test_every_rule_file_is_tested():
    files = {path.stem for path in Path(rules.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(MODULES) == files
    assert {param.id.rpartition("-")[0] for param in SAMPLES} == files


def test_every_registered_rule_lives_in_a_rule_file():
    owners = {
        rule.__module__ for registry in (_registry.closed_rules, _registry.batched_rules) for rule in registry.values()
    }
    assert owners <= {module.__name__ for module in MODULES.values()}


@pytest.mark.parametrize("sample", SAMPLES)
def test_against_the_loop(sample):
    model, inputs = build(sample)
    plain = copy.deepcopy(model)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    for num in (len(inputs[0]), 3, 1):
        batch = rows(inputs, num)
        for reduction in ("sum", "mean"):
            what = f"{num} samples, {reduction}:"
            expected = loop_over_samples(plain, batch, smooth, reduction=reduction)
            output = train_step(model, batch, reduction=reduction)
            torch.testing.assert_close(output, train_step(plain, batch, reduction=reduction), rtol=1e-12, atol=1e-12)
            for (name, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(
                    param.grad, other.grad, rtol=1e-10, atol=1e-12, msg=lambda t, n=name, what=what: f"{what} {n}: {t}"
                )
            assert_statistics(model, expected, num, what)


@pytest.mark.parametrize("sample", SAMPLES)
def test_with_each_parameter_frozen_in_turn(sample):
    for frozen, _ in build(sample)[0].named_parameters():
        torch._dynamo.reset()
        model, inputs = build(sample)
        model.get_parameter(frozen).requires_grad_(False)
        if not any(param.requires_grad for param in model.parameters()):
            continue
        expected = loop_over_samples(model, inputs, smooth, reduction="sum")
        graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
        train_step(model, inputs)
        assert_statistics(model, expected, len(inputs[0]), f"without {frozen}:")
        assert model.get_parameter(frozen).grad is None


@pytest.mark.parametrize("sample", SAMPLES)
def test_fires_and_leaves_its_input_alone(sample):
    model, inputs = build(sample)
    graph = capture(model, *inputs)
    before = graph.graph_module.code
    result = TrueGrad().run(graph.copy())
    result.graph.graph_module.recompile()
    assert result.num_changed > 0
    assert "torch.ops.graphopt." in result.graph.graph_module.code
    assert "graphopt" not in before
    assert graph.graph_module.code == before
    assert {row.name for row in result.coverage} == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("sample", SAMPLES)
def test_changes_nothing_where_all_is_frozen(sample):
    model, inputs = build(sample)
    graph = capture(model.requires_grad_(False), *inputs)
    result = TrueGrad().run(graph)
    assert result.num_changed == 0
    assert result.graph is graph


def test_two_rules_for_one_operator_are_refused():
    target = torch.ops.aten.linear.default
    with pytest.raises(ValueError, match=r"aten\.linear\.default has two rules.*rules\.linear.*test_rules"):
        _registry.closed_form(target)(lambda node, context: None)
    with pytest.raises(ValueError, match=r"aten\.linear\.default has two rules.*rules\.contraction.*test_rules"):
        _registry.batched_rule(target)(lambda node, context: None)
