"""The pass: where it puts boundaries, that the graph computes the same, and what it refuses."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt import compilation
from graphopt.annotations import STAGE, Stage, find
from graphopt.errors import OptionError
from graphopt.passes import LayerToLayer, TrueGrad
from graphopt.pipeline import count_ops, resolve_passes
from graphopt.regions import BOUNDARY, split
from tests.layered_models import MODELS, D, N, Stack, ids, scalar
from tests.models import Block, double


def built(name, **options):
    torch.manual_seed(0)
    model, kwargs = MODELS[name].build()
    model, values = double(model, tuple(kwargs.values()))
    return model, dict(zip(kwargs, values, strict=True))


def names_of(model):
    """The regions' names, in order."""
    (record,) = graphopt.records(model)
    return [node.args[2] for node in record.after.graph.nodes if node.target is BOUNDARY]


def assert_trains_alike(model, plain, kwargs, **tolerance):
    """One backward pass: loss, gradients and buffers."""
    expected, found = scalar(plain(**kwargs)), scalar(model(**kwargs))
    torch.testing.assert_close(found, expected, **tolerance)
    expected.backward()
    found.backward()
    for (name, param), reference in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (param.grad is None) == (reference.grad is None), name
        if reference.grad is not None:
            torch.testing.assert_close(param.grad, reference.grad, msg=lambda text, n=name: f"{n}: {text}", **tolerance)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), **tolerance)


FUNCTIONALISED = {"in_place", "batch_norm", "no_grad_across_layers"}  # what eager execution would do by itself


@pytest.mark.parametrize("name", MODELS)
def test_computes_the_same(name):
    model, kwargs = built(name)
    plain = copy.deepcopy(model)
    graphopt.transform(model, [LayerToLayer()], compiler="aot_eager" if name in FUNCTIONALISED else "eager")
    assert_trains_alike(model, plain, kwargs, atol=1e-12, rtol=1e-10)


SERVED = "mask_table_and_skip encoder_decoder one_layer_four_times frozen_layers no_grad_across_layers".split()


@pytest.mark.parametrize("name", SERVED)
def test_composes_with_truegrad(name):
    """What layers get in parts is what the graph as a whole gets."""
    model, kwargs = built(name)
    whole = graphopt.transform(copy.deepcopy(model), [TrueGrad()], compiler="eager")
    graphopt.transform(model, [TrueGrad(), LayerToLayer()], compiler="eager")
    assert_trains_alike(model, whole, kwargs, atol=1e-12, rtol=1e-10)
    for param, reference in zip(model.parameters(), whole.parameters(), strict=True):
        expected = find(reference, graphopt.annotations.SUM_GRAD_SQUARED)
        if expected is not None:
            torch.testing.assert_close(param.sum_grad_squared, expected, atol=1e-12, rtol=1e-10)


COUNTED = [name for name, case in MODELS.items() if case.regions is not None]


@pytest.mark.parametrize("name", COUNTED)
def test_one_compilation_for_each_distinct_layer(name, monkeypatch):
    compiled, compile_one = [], compilation._compile_one
    monkeypatch.setattr(compilation, "_compile_one", lambda *args: compiled.append(args) or compile_one(*args))
    model, kwargs = built(name)
    graphopt.transform(model, [LayerToLayer()], compiler="eager")
    scalar(model(**kwargs)).backward()
    assert len(names_of(model)) == MODELS[name].regions
    assert len(compiled) == MODELS[name].distinct
    assert f"{MODELS[name].regions} regions, {MODELS[name].distinct} of them distinct" in str(graphopt.Report.of(model))


@pytest.mark.parametrize("name", ["mask_table_and_skip", "batch_norm"])
def test_inductor(name):
    model, kwargs = built(name)
    plain = copy.deepcopy(model)
    graphopt.transform(model, [LayerToLayer()])
    assert_trains_alike(model, plain, kwargs, atol=1e-9, rtol=1e-7)


def test_boundaries_can_be_seen():
    model, kwargs = built("transformer")
    graphopt.transform(model, [LayerToLayer()], compiler="eager")
    model(**kwargs)
    assert names_of(model) == ["before layers.0", "layers.0", "layers.1", "layers.2", "after layers.2"]
    (record,) = graphopt.records(model)
    assert count_ops(record.after)["graphopt.boundary.default"] == 5
    assert count_ops(record.before)["graphopt.boundary.default"] == 0
    (_, second, *_) = record.after.graph.find_nodes(op="call_function", target=BOUNDARY)
    assert [node.name for node in second.args[0]] == ["embedding"]


def test_a_graph_with_boundaries_runs_as_it_stands():
    model, kwargs = built("mask_table_and_skip")
    expected = model(**kwargs)
    graphopt.transform(model, [LayerToLayer()], compiler="eager")
    model(**kwargs)
    (record,) = graphopt.records(model)
    values = {
        "ids": kwargs["ids"],
        "mask": kwargs["mask"],
        **{name.replace(".", "_"): param for name, param in model.named_parameters()},
    }
    args = []
    for node in record.after.graph.find_nodes(op="placeholder"):
        name = node.name.replace("model_", "").replace("modules_", "").replace("parameters_", "").replace("kwargs_", "")
        args.append(values[name] if name in values else N)
    torch.testing.assert_close(record.after(*args)[0], expected)


def test_stages_are_annotated():
    model, kwargs = built("encoder_decoder")
    graphopt.transform(model, [LayerToLayer(boundaries=["encoder", "decoder"])], compiler="eager")
    model(**kwargs)
    assert find(model.encoder[1].mlp[0].weight, STAGE) == Stage(2, "encoder.1", "device")
    assert model.embed.weight.stage.index == 0  # the first that uses it
    assert {param.stage.layer for param in model.decoder[0].parameters()} == {"decoder.0"}
    model.zero_grad()
    assert model.embed.weight.stage.index == 0


WAYS = {
    "auto": ["before layers.0", "layers.0", "layers.1", "layers.2", "after layers.2"],
    "layers": ["before layers.0", "layers.0", "layers.1", "layers.2", "after layers.2"],
    "layers.1": ["before layers.1", "layers.1", "after layers.1"],
    "layers.*": ["before layers.0", "layers.0", "layers.1", "layers.2", "after layers.2"],
}


@pytest.mark.parametrize("boundaries", WAYS)
def test_ways_to_say_where(boundaries):
    model, kwargs = built("transformer")
    graphopt.transform(model, [LayerToLayer(boundaries=boundaries)], compiler="eager")
    model(**kwargs)
    assert names_of(model) == WAYS[boundaries]


def test_boundaries_by_function():
    model, kwargs = built("transformer")
    plain = copy.deepcopy(model)
    pairs = {"layers.0": "first", "layers.1": "first", "layers.2": "second", "head": "second"}
    graphopt.transform(model, [LayerToLayer(boundaries=pairs.get)], compiler="eager")
    assert_trains_alike(model, plain, kwargs)
    assert names_of(model) == ["before first", "first", "second"]


def test_unknown_path():
    model, kwargs = built("transformer")
    graphopt.transform(model, [LayerToLayer(boundaries="encoder.layer")], compiler="eager")
    with pytest.raises(
        OptionError, match=r"boundaries='encoder.layer'\): no operator .*\. Modules with numbered layers: layers"
    ):
        model(**kwargs)


def test_nothing_to_gain():
    """Few operators: boundaries would cost more than they save, and the graph stays one."""
    model = graphopt.transform(
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), [LayerToLayer()], compiler="eager"
    )
    model(torch.randn(4, 3))
    (record,) = graphopt.records(model)
    assert record.results[0].num_changed == 0
    assert record.after is record.before


def test_a_second_run_changes_nothing():
    model, kwargs = built("transformer")
    seen = []

    class Twice(graphopt.pipeline.Pass):
        name = "test_twice"
        changes_numerics = False

        def run(self, graph):
            seen.append(LayerToLayer().run(graph))
            seen.append(LayerToLayer().run(seen[0].graph))
            return seen[0]

        uuid = "test_twice"

    graphopt.transform(model, [Twice()], compiler="eager")
    model(**kwargs)
    assert seen[0].num_changed == 5
    assert seen[1].num_changed == 0
    assert seen[1].graph is seen[0].graph


def test_must_be_last():
    with pytest.raises(OptionError, match="'layer_to_layer' must be the last one, and 'truegrad' stands behind it"):
        resolve_passes([LayerToLayer(), TrueGrad()])


OPTIONS = {
    "is one of \\['device', 'cpu', 'disk'\\]": {"store": "gpu"},
    "stash='ram'": {"store": "cpu", "stash": "ram"},
    "LayerToLayer\\(microbatch_size=4\\) has an effect only where layers are streamed": {"microbatch_size": 4},
    "a folder goes with store='disk', and only with it": {"store": "disk"},
    "store_path='x'\\): a folder": {"store": "cpu", "store_path": "x"},
    "only a disk store outlives its process": {"store": "cpu", "resume": True},
    "only a disk store has a file for it": {"store": "cpu", "stash": "disk"},
    "microbatch_size=0\\): it is an int, at least 1": {"store": "cpu", "microbatch_size": 0},
    "microbatch_size=True": {"store": "cpu", "microbatch_size": True},
    "prefetch=-1\\): it is an int, at least 0": {"store": "cpu", "prefetch": -1},
}


@pytest.mark.parametrize("text", OPTIONS)
def test_options_that_mean_nothing(text):
    with pytest.raises(OptionError, match=text):
        LayerToLayer(**OPTIONS[text])


def test_streaming_needs_the_model():
    compiled = torch.compile(Stack([Block(D)]), backend="graphopt", options={"passes": [LayerToLayer(store="cpu")]})
    with pytest.raises(Exception, match=r"use graphopt.transform\(model, \[...\]\)"):
        compiled(ids())


LAYERS = {
    "linear": lambda: nn.Linear(D, D),
    "block": lambda: Block(D),
    "mlp": lambda: nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.LayerNorm(2 * D), nn.Linear(2 * D, D)),
    "norm": lambda: nn.LayerNorm(D),
    "activation": lambda: nn.Tanh(),
}


@settings(max_examples=8, deadline=None)
@given(kinds=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=7), every=st.integers(1, 3))
def test_any_stack_of_layers(kinds, every):
    """Whatever stands in a row: the same numbers, and every part of a path pattern is found."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Stack([LAYERS[kind]() for kind in kinds * 2]).double()
    plain, kwargs = copy.deepcopy(model), {"ids": ids()}
    numbers = {f"layers.{i}": f"part {i // every}" for i in range(len(kinds) * 2)}
    graphopt.transform(model, [LayerToLayer(boundaries="auto" if every == 1 else numbers.get)], compiler="eager")
    assert_trains_alike(model, plain, kwargs)


def test_regions_of_a_graph_cover_it():
    """Every operator of the graph stands in exactly one region."""
    model, kwargs = built("encoder_decoder")
    found = []

    class Look(graphopt.pipeline.Pass):
        name = "test_look"
        changes_numerics = False
        uuid = "test_look"

        def run(self, graph):
            result = LayerToLayer(boundaries=["encoder", "decoder"]).run(graph)
            found.extend([count_ops(result.graph.graph_module), split(result.graph)])
            return result

    graphopt.transform(model, [Look()], compiler="eager")
    model(**kwargs)
    ops, regions = found
    total = sum((count_ops(region.graph_module) for region in regions), start=type(ops)())
    handed = sum(
        len(node.args[0])
        for node in graphopt.records(model)[0].after.graph.find_nodes(op="call_function", target=BOUNDARY)
    )
    del ops["graphopt.boundary.default"]
    ops["<built-in function getitem>"] -= handed
    assert +total == +ops
