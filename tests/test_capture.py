"""The lowered graph: ATen before autograd, named inputs, explicit casts, Dynamo's own graph untouched."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.capture import CapturedGraph, InputKind
from graphopt.inspect.location import describe, module_path, plain_name, source_line
from graphopt.pipeline import Pass, PassResult

aten = torch.ops.aten


def captured(model, *args, **kwargs):
    """The graph that the first pass is given."""
    found = []

    class Keep(Pass):
        name = "test_capture_keep"
        changes_numerics = False

        def run(self, graph: CapturedGraph) -> PassResult:
            found.append(graph)
            return PassResult(graph, 0)

    options = kwargs.pop("options", None)
    graphopt.transform(model, [Keep()], compiler="eager", options=options)
    model(*args, **kwargs)
    (graph,) = found
    return graph


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.ones(4))

    def forward(self, ids, mask, scale=2.0):
        hidden = self.norm(self.embed(ids)) + self.shift
        return self.head(self.frozen(hidden) * mask[..., None] * scale)


def batch():
    return torch.randint(7, (3, 5)), torch.rand(3, 5)


def inputs(graph):
    return {described.name: described for described in graph.inputs}


def test_names_and_kinds():
    graph = captured(Model(), *batch())
    named = inputs(graph)
    kinds = {name: described.kind for name, described in named.items() if described.kind is not InputKind.SIZE}
    parameters = ["embed.weight", "norm.weight", "norm.bias", "frozen.weight", "frozen.bias"]
    assert {name for name, kind in kinds.items() if kind is InputKind.PARAMETER} == set(parameters)
    assert kinds["shift"] is InputKind.BUFFER
    assert sum(kind is InputKind.SAMPLES for kind in kinds.values()) == 2
    assert not named["frozen.weight"].requires_grad
    assert named["embed.weight"].requires_grad
    assert [d.sample_axis for d in graph.inputs if d.kind is InputKind.SAMPLES] == [0, 0]
    assert len(graph.placeholders) == len(graph.inputs) == len(graph.fake_inputs)
    assert "\n" not in repr(graph)


def test_operators_stand_as_single_nodes():
    graph = captured(Model(), *batch())
    targets = {node.target for node in graph.graph_module.graph.nodes if node.op == "call_function"}
    assert {aten.embedding.default, aten.layer_norm.default, aten.linear.default} <= targets
    assert all(isinstance(target, torch._ops.OpOverload) for target in targets)


def test_every_node_has_a_value_and_a_place():
    graph = captured(Model(), *batch())
    for node in graph.graph_module.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            assert __file__ in source_line(node) or "torch/nn" in source_line(node)
    (norm,) = graph.graph_module.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    assert module_path(norm) == "norm"
    assert "aten.layer_norm.default in norm (" in describe(norm)
    assert "self.norm(self.embed(ids))" in describe(norm)


def test_the_batch_is_symbolic():
    graph = captured(Model(), *batch())
    (norm,) = graph.graph_module.graph.find_nodes(op="call_function", target=aten.layer_norm.default)
    size = norm.meta["val"].shape[0]
    assert isinstance(size, torch.SymInt)
    assert all(
        str(fake.shape[0]) == str(size)
        for fake, d in zip(graph.fake_inputs, graph.inputs, strict=True)
        if d.kind is InputKind.SAMPLES
    )


def test_argument_without_samples_is_a_constant():
    graph = captured(Model(), *batch(), options={"sample_axis": {"mask": None}})
    kinds = [d.kind for d in graph.inputs]
    assert kinds.count(InputKind.SAMPLES) == kinds.count(InputKind.CONSTANT) == 1


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x)
            with torch.autocast("cpu", enabled=False):
                return self.second(x.float())


def test_autocast_is_explicit():
    model, x = Autocast(), torch.randn(5, 3)
    graph = captured(model, x)
    nodes = list(graph.graph_module.graph.nodes)
    assert not any("autocast" in str(node.target) for node in nodes)
    assert not any("autocast" in node.meta.get("custom", {}) for node in nodes)
    first, second = graph.graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert [argument.meta["val"].dtype for argument in first.args] == [torch.bfloat16] * 3
    assert [argument.meta["val"].dtype for argument in second.args] == [torch.float32] * 3
    assert all(argument.target is aten._to_copy.default for argument in first.args)
    assert torch.equal(model(x), graphopt.restore(model)(x))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(3, 1)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.last(x)


def test_checkpointed_bodies_stand_inline():
    graph = captured(Checkpointed(), torch.randn(5, 3))
    linears = graph.graph_module.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert len(linears) == 3
    ids = [node.meta.get("ac_graph_id") for node in linears]
    assert ids[0] != ids[1]
    assert None not in ids[:2]
    assert ids[2] is None
    assert ["recompute" in node.meta for node in linears] == [True, True, False]
    assert not list(graph.graph_module.children())


def test_dynamos_graph_is_untouched():
    from graphopt.capture import NamedTensors, describe_inputs, lower

    seen = []

    def backend(graph_module, example_inputs):
        before = graph_module.code, [(n.name, set(n.meta)) for n in graph_module.graph.nodes]
        graph = lower(graph_module, describe_inputs(graph_module, example_inputs, NamedTensors()))
        assert (graph_module.code, [(n.name, set(n.meta)) for n in graph_module.graph.nodes]) == before
        seen.append(graph)
        return graph_module.forward

    for model, args in ((Model(), batch()), (Autocast(), (torch.randn(5, 3),)), (Checkpointed(), (torch.randn(5, 3),))):
        torch.compile(model, backend=backend)(*args).sum().backward()
    assert len(seen) == 3


def test_copy_shares_no_nodes():
    graph = captured(Model(), *batch())
    clone = graph.copy()
    clone.inputs.pop()
    clone.graph_module.graph.erase_node(next(iter(clone.output_nodes[0].users)))
    assert len(graph.inputs) == len(graph.placeholders)
    graph.graph_module.graph.lint()


def test_no_grad_call():
    with torch.no_grad():
        assert not captured(Model(), *batch()).grad_enabled
    torch._dynamo.reset()
    assert captured(Model(), *batch()).grad_enabled


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['a']._parameters['weight']", "a.weight"),
        ("L['self']._modules['layers']._modules['0']._buffers['mask']", "layers.0.mask"),
        ("L['x']", "x"),
    ],
)
def test_plain_names(source, name):
    assert plain_name(source) == name
