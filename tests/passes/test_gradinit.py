"""The pass: asleep it changes nothing; awake, every use of a trainable parameter is preceded by its scale."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.capture import InputKind
from graphopt.errors import UnsupportedError
from graphopt.passes import GradInit
from graphopt.pipeline import count_ops

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


def graph_before(model):
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
        captured(model, Keep())
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
