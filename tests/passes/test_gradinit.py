"""The pass: asleep it changes nothing; awake, every use of a trainable parameter is preceded by its scale."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import graphopt
from graphopt.annotations import INIT_PROBE, INIT_SCALE
from graphopt.capture import InputKind
from graphopt.errors import UnsupportedError
from graphopt.passes import GradInit
from graphopt.pipeline import count_ops, run_passes

SCALE = "graphopt.scale_parameter.default"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.tied, self.once, self.norm = nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x):
        hidden = F.linear(self.tied(x).tanh(), self.tied.weight) + self.frozen
        return self.once(self.norm(hidden))


def captured(module, *passes, x=None):
    """The record of the model's graph."""
    model = graphopt.transform(module, list(passes), compiler="eager")
    model(torch.randn(3, 4) if x is None else x)
    return graphopt.records(model)[-1]


def awake(model):
    with graphopt.GradInitWrapper(graphopt.transform(model, [GradInit()], compiler="eager")):
        model(torch.randn(3, 4))
        return graphopt.records(model)[-1]


def graph_before(model, x=None):
    """A captured graph that no pass has seen."""
    seen = []

    class Keep(graphopt.pipeline.Pass):
        name, changes_numerics = f"keep{len(graphopt.pipeline._passes)}", False

        def run(self, graph):
            seen.append(graph)
            return graphopt.pipeline.PassResult(graph, 0)

        @property
        def uuid(self):
            return "keep"

    try:
        captured(model, Keep(), x=x)
    finally:
        del graphopt.pipeline._passes[Keep.name]
    return seen[0]


def test_asleep_it_returns_what_it_was_given():
    graph = graph_before(Net())
    assert GradInit().run(graph).graph is graph
    assert captured(Net(), GradInit()).results[0].num_changed == 0
    assert not GradInit().needs_samples


def test_awake_it_precedes_every_use():
    record = awake(Net())
    assert count_ops(record.before)[SCALE] == 0
    assert count_ops(record.after)[SCALE] == 7  # one use more than there are trainable parameters
    (item,) = record.passes
    assert item.op_changes[SCALE] == 7
    assert item.result.notes[0] == "6 parameters scaled at 7 uses"


def test_companions():
    graph = GradInit(awake=True).run(graph_before(Net()).copy()).graph
    companions = [described for described in graph.inputs if described.kind is InputKind.COMPANION]
    assert len(companions) == 12
    assert not any(d.requires_grad for d in graph.inputs if d.kind is InputKind.PARAMETER)
    tied = [n for n in graph.graph_module.graph.nodes if str(n.target) == SCALE]
    by_weight = {}
    for node in tied:
        by_weight.setdefault(node.args[0], set()).add(node.args[1])
    assert len(by_weight) == 6
    assert all(len(scales) == 1 for scales in by_weight.values())  # a tied one has one scale


def test_the_graph_computes_with_scaled_weights():
    """As it stands: each weight is ``scale * weight + probe``, at every use; the probe's gradient is that of the weight."""
    model = Net().double()
    graph = GradInit(awake=True).run(graph_before(model, torch.randn(3, 4, dtype=torch.float64)).copy()).graph
    named = dict(model.named_parameters())
    x, values, leaves = torch.randn(5, 4, dtype=torch.float64), [], {}
    for position, described in enumerate(graph.inputs):
        if described.kind is InputKind.COMPANION:
            weight = graph.inputs[described.companion_of].name
            value = (
                torch.tensor(1.0 + position) if described.annotation is INIT_SCALE else torch.zeros(named[weight].shape)
            )
            values.append(leaves.setdefault((weight, described.annotation), value.double().requires_grad_()))
        elif described.kind is InputKind.SAMPLES:
            values.append(x)
        elif described.kind is not InputKind.SIZE:
            values.append({**named, **dict(model.named_buffers())}[described.name].detach())
        else:
            values.append(5)
    output = torch.fx.Interpreter(graph.graph_module).run(*values)[0]
    scaled = {n: (leaves[n, INIT_SCALE] * named[n]).detach().requires_grad_() for n, _ in leaves}
    expected = functional_call(graphopt.restore(model), scaled, (x,))
    torch.testing.assert_close(output, expected)
    probes = [n for n, key in leaves if key is INIT_PROBE]
    found = torch.autograd.grad(output.square().sum(), [leaves[n, INIT_PROBE] for n in probes], retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), [scaled[n] for n in probes])
    torch.testing.assert_close(found, wanted)
    slopes = torch.autograd.grad(output.square().sum(), [leaves[n, INIT_SCALE] for n in probes])
    torch.testing.assert_close(slopes, tuple((g * named[n]).sum() for g, n in zip(wanted, probes, strict=True)))


def test_scales_of_one_change_no_bit():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 4)
    expected = model(x)
    graphopt.transform(model, [GradInit()], compiler="eager")
    with graphopt.GradInitWrapper(model):
        assert torch.equal(model(x), expected)


def test_a_second_run_changes_nothing():
    graph = GradInit(awake=True).run(graph_before(Net()).copy()).graph
    assert GradInit(awake=True).run(graph).graph is graph
    assert GradInit(awake=True).run(graph).num_changed == 0


def test_nothing_to_scale():
    graph = graph_before(nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Tanh()))
    result = GradInit(awake=True).run(graph)
    assert (result.graph, result.num_changed, result.notes) == (graph, 0, ())


def test_running_statistics_are_not_written():
    record = awake(Net())
    norms = [n for n in record.after.graph.nodes if n.target is torch.ops.aten.batch_norm.default]
    assert [node.args[3:5] for node in norms] == [(None, None)]
    written = [n for n in record.after.graph.nodes if str(n.target) == "aten.add_.Tensor"]
    assert not written
    assert any(str(n.target) == "aten.add_.Tensor" for n in record.before.graph.nodes)


class Average(nn.Module):
    """A buffer that is read after it is written, and one that is only written."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        hidden = self.linear(x)
        with torch.no_grad():
            self.mean.lerp_(hidden.mean(0), 0.1)
            self.steps.add_(1)
        return hidden - self.mean


def test_buffers_that_are_read_are_written_in_a_copy():
    record = awake(Average())
    before, after = count_ops(record.before), count_ops(record.after)
    assert (before["aten.lerp_.Scalar"], before["aten.add_.Tensor"], before["aten.clone.default"]) == (1, 1, 0)
    assert (after["aten.lerp_.Scalar"], after["aten.add_.Tensor"], after["aten.clone.default"]) == (1, 0, 1)
    assert record.results[0].notes[1] == "running statistics stay as they are in 2 places"


def test_embeddings_are_dense():
    model = graphopt.transform(nn.Sequential(nn.Embedding(5, 4, sparse=True)), [GradInit()], compiler="eager")
    with graphopt.GradInitWrapper(model):
        model(torch.arange(3))
    (record,) = graphopt.records(model)
    sparse = [
        [n.args[4:] for n in g.graph.nodes if "embedding" in str(n.target)] for g in (record.before, record.after)
    ]
    assert sparse == [[(True,)], [(False,)]]


def test_an_error_names_the_pass_and_leaves_the_graph():
    graph = graph_before(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)), torch.arange(3))
    code = graph.graph_module.code
    with pytest.raises(UnsupportedError, match=r"writes to .*0\.weight, which has a scale") as caught:
        run_passes(graph, [GradInit(awake=True)])
    assert "raised by the pass 'gradinit'" in caught.value.__notes__[0]
    assert graph.graph_module.code == code


def test_recurrent_layers_are_refused():
    model = graphopt.transform(nn.LSTM(4, 4), [GradInit()], compiler="eager")
    with (
        pytest.raises(
            UnsupportedError, match=r"recurrent layer.*compiler='eager'.*GradInitWrapper\(graphopt\.restore\(model\)\)"
        ),
        graphopt.GradInitWrapper(model),
    ):
        model(torch.randn(3, 2, 4))
    assert [p.ndim for p in model.parameters()] == [2, 2, 1, 1]
