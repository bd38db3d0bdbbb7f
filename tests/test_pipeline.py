"""The contract of a pass, and what the driver makes of a list of them."""

import copy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import graphopt
from graphopt.annotations import GRAD_SNR, GRAD_VARIANCE, NUM_SAMPLES, SUM_GRAD_SQUARED
from graphopt.capture import CapturedGraph
from graphopt.errors import GraphoptError, OptionError, PassError
from graphopt.passes import TrueGrad
from graphopt.pipeline import Pass, PassResult, Record, count_ops, resolve_passes, run_passes

aten = torch.ops.aten


@dataclass(frozen=True)
class Rename(Pass):
    """Replace tanh by sigmoid, in the way that ``how`` says."""

    how: str = "right"

    name = "test_rename"
    changes_numerics = True

    def run(self, graph: CapturedGraph) -> PassResult:
        nodes = graph.graph_module.graph.find_nodes(op="call_function", target=aten.tanh.default)
        if self.how == "raise":
            graph.graph_module.graph.erase_node(next(iter(graph.output_nodes[0].users)))
            raise ZeroDivisionError("on purpose")
        if self.how == "option":
            raise OptionError("on purpose")
        for node in nodes:
            with graph.graph_module.graph.inserting_before(node):
                new = graph.graph_module.graph.call_function(aten.sigmoid.default, node.args)
            if self.how != "no value":
                new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.graph_module.graph.erase_node(node)
        if self.how == "input":
            graph.inputs.pop()
        return PassResult(graph, len(nodes), notes=("renamed",))


@dataclass(frozen=True)
class Reader(Pass):
    name = "test_reader"
    requires = frozenset({SUM_GRAD_SQUARED})
    changes_numerics = False

    def run(self, graph: CapturedGraph) -> PassResult:
        return PassResult(graph, 0)


def capture(*passes):
    """The record and the inputs of one graph: linear, tanh, linear."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    graphopt.transform(model, list(passes), compiler="eager")
    model(torch.randn(5, 3))
    (record,) = graphopt.records(model)
    return record


def captured_graph():
    """A graph as a pass gets it."""
    found = []

    class Keep(Pass):
        name = "test_keep"
        changes_numerics = False

        def run(self, graph: CapturedGraph) -> PassResult:
            found.append(graph)
            return PassResult(graph, 0)

    capture(Keep())
    return found[0]


# The contract -------------------------------------------------------------------------------------------------------------------


def test_misspelt_hook():
    with pytest.raises(
        TypeError, match=r"Misspelt defines \['runn'\], which Pass does not declare: a misspelt 'run'\?"
    ):

        class Misspelt(Pass):
            name = "test_misspelt"
            changes_numerics = False

            def runn(self, graph):
                """Never called."""


@pytest.mark.parametrize("missing", ["name", "changes_numerics"])
def test_missing_attribute(missing):
    attributes = {"name": "test_missing", "changes_numerics": False, "run": lambda self, graph: None}
    del attributes[missing]
    with pytest.raises(TypeError, match=f"Incomplete must define the class attribute '{missing}'"):
        type("Incomplete", (Pass,), attributes)


def test_duplicate_name():
    with pytest.raises(TypeError, match=r"two passes are called 'truegrad': TrueGrad and .*Other"):

        class Other(Pass):
            name = "truegrad"
            changes_numerics = False

            def run(self, graph):
                """Never called."""

    assert resolve_passes(["truegrad"]) == [TrueGrad()]


def test_run_is_abstract():
    class Nothing(Pass):
        name = "test_nothing"
        changes_numerics = False

    with pytest.raises(TypeError, match="abstract"):
        Nothing()


# The list -----------------------------------------------------------------------------------------------------------------------


def test_order_is_the_users():
    record = capture(Rename(), TrueGrad(), Reader())
    assert [item.name for item in record.passes] == ["test_rename", "truegrad", "test_reader"]
    record = capture(TrueGrad(), Reader(), Rename())
    assert [item.name for item in record.passes] == ["truegrad", "test_reader", "test_rename"]


@pytest.mark.parametrize("passes", [[Reader()], [Reader(), TrueGrad()]])
def test_missing_requirement(passes):
    with pytest.raises(
        OptionError, match=r"the pass 'test_reader' requires \['sum_grad_squared'\], which no pass before it provides"
    ):
        resolve_passes(passes)


def test_disable():
    passes = ["truegrad", "test_rename"]
    assert resolve_passes(passes, ["truegrad"]) == [Rename()]
    assert resolve_passes(passes, ["truegrad", "test_rename"]) == []
    assert resolve_passes([TrueGrad()], ["test_rename"]) == [TrueGrad()]
    with pytest.raises(OptionError, match="there is no pass 'nothing'; the passes are"):
        resolve_passes(passes, ["nothing"])
    with pytest.raises(OptionError, match="requires"):
        resolve_passes(["truegrad", "test_reader"], ["truegrad"])


def test_disable_by_option():
    model = nn.Linear(3, 2)
    graphopt.transform(model, compiler="eager", options={"disable": ["truegrad"]})
    model(torch.randn(5, 3)).sum().backward()
    assert graphopt.annotations.find(model.weight, SUM_GRAD_SQUARED) is None


# What is recorded ---------------------------------------------------------------------------------------------------------------


def test_record():
    record = capture(Rename(), TrueGrad())
    assert isinstance(record, Record)
    first, second = record.passes
    assert first.before is record.before
    assert first.after is second.before
    assert second.after is record.after
    assert first.op_changes == {"aten.sigmoid.default": 1, "aten.tanh.default": -1}
    assert second.op_changes == {"aten.linear.default": -2, "graphopt.linear.default": 2}
    assert count_ops(record.before) == {"aten.linear.default": 2, "aten.tanh.default": 1}
    assert first.result.notes == ("renamed",)
    assert first.result.num_changed == 1
    assert record.results == (first.result, second.result)
    assert {row.name for row in record.coverage} == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(0 <= item.seconds < 60 for item in record.passes)
    assert all("\n" not in repr(thing) for thing in (record, first, first.result.graph))


def test_record_of_nothing():
    record = capture()
    assert record.before is record.after
    assert record.passes == ()
    assert record.coverage == ()


def test_same_object_when_nothing_applies():
    graph = captured_graph()
    (result,) = [record.result for record in run_passes(graph, [Reader()])[1]]
    assert result.graph is graph
    assert result.num_changed == 0
    after, records = run_passes(graph, [Reader(), Rename(), Reader()])
    assert records[0].after is graph.graph_module
    assert records[2].after is records[1].after is after.graph_module


def test_second_run_of_truegrad_changes_nothing():
    graph = captured_graph()
    once, _ = run_passes(graph, [TrueGrad()])
    inputs = len(once.inputs)
    again = TrueGrad().run(once.copy())
    assert again.num_changed == 0
    assert len(again.graph.inputs) == inputs


def test_input_graph_is_untouched():
    graph = captured_graph()
    code, inputs, fakes = graph.graph_module.code, list(graph.inputs), list(graph.fake_inputs)
    metas = {node.name: dict(node.meta) for node in graph.graph_module.graph.nodes}
    run_passes(graph, [Rename(), TrueGrad()])
    assert (graph.graph_module.code, graph.inputs) == (code, inputs)
    assert len(graph.fake_inputs) == len(fakes)
    assert metas.keys() == {node.name for node in graph.graph_module.graph.nodes}
    for node in graph.graph_module.graph.nodes:
        assert node.meta.keys() == metas[node.name].keys()


def test_explain_changes_nothing():
    graph = captured_graph()
    code = graph.graph_module.code
    assert TrueGrad().explain(graph).num_changed == 2
    assert graph.graph_module.code == code


FAILURES = {
    "raise": r"the pass 'test_rename' failed with ZeroDivisionError: on purpose\. The model is unchanged\. Leave the pass out",
    "no value": r"the pass 'test_rename' failed with ValueError: the node sigmoid\S* \(aten\.sigmoid\.default\) has no meta\['val'\]",
    "input": r"the pass 'test_rename' failed with ValueError: 6 placeholders, 5 inputs and 6 fake inputs",
}


@pytest.mark.parametrize("how", FAILURES)
def test_failing_pass(how):
    graph = captured_graph()
    code, inputs = graph.graph_module.code, list(graph.inputs)
    with pytest.raises(PassError, match=FAILURES[how]) as caught:
        run_passes(graph, [Reader(), Rename(how)])
    assert caught.value.__cause__ is not None
    assert r"options={'disable': ['test_rename']}" in str(caught.value)
    assert (graph.graph_module.code, graph.inputs) == (code, inputs)
    graph.graph_module.graph.lint()


def test_error_of_a_pass_keeps_its_class():
    with pytest.raises(OptionError, match="on purpose") as caught:
        run_passes(captured_graph(), [Rename("option")])
    (note,) = caught.value.__notes__
    assert "raised by the pass 'test_rename'" in note
    assert isinstance(caught.value, GraphoptError)


class Counted(nn.Module):
    """Calls an operator that returns nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        hidden = self.linear(x)
        with torch.no_grad():
            torch._foreach_add_([self.mean], [hidden.mean(0)])
        return hidden - self.mean


def test_operators_that_return_nothing_need_no_value():
    model, x = Counted(), torch.randn(4, 3)
    plain = copy.deepcopy(model)
    graphopt.transform(model, compiler="aot_eager")
    for one in (model, plain):
        one(x).square().sum().backward()
    torch.testing.assert_close(model.mean, plain.mean)
    torch.testing.assert_close(model.linear.weight.grad, plain.linear.weight.grad)


# uuid ---------------------------------------------------------------------------------------------------------------------------


def test_uuid_depends_on_the_options():
    variants = [
        TrueGrad(),
        TrueGrad(per="token"),
        TrueGrad(square_dtype=torch.bfloat16),
        TrueGrad(where="a.*"),
        Rename(),
        Rename("x"),
    ]
    assert len({item.uuid for item in variants}) == len(variants)
    assert TrueGrad().uuid == TrueGrad(per="sample").uuid
    assert TrueGrad().uuid.startswith("truegrad-")


def test_uuid_is_the_same_in_another_process():
    script = (
        "import torch; from graphopt.passes import TrueGrad;"
        "print(TrueGrad(where=('a', 'b'), square_dtype=torch.bfloat16).uuid)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TrueGrad(where=("a", "b"), square_dtype=torch.bfloat16).uuid


def test_uuid_covers_every_source_of_the_pass():
    """A change of a rule, or of an operator, must not find what the old one was compiled to."""
    import inspect
    from pathlib import Path

    folder = Path(inspect.getfile(TrueGrad)).parent
    assert {"sample_axis.py", "rewrite.py"} <= {file.name for file in folder.glob("*.py")}
    uuid, target = TrueGrad().uuid, folder / "rules" / "linear.py"
    read = Path.read_bytes
    try:
        Path.read_bytes = lambda self: read(self) + (b"#" if self == target else b"")
        assert TrueGrad().uuid != uuid
    finally:
        Path.read_bytes = read


def test_provides():
    assert TrueGrad.provides == {SUM_GRAD_SQUARED, NUM_SAMPLES, GRAD_VARIANCE, GRAD_SNR}
    assert TrueGrad.requires == frozenset()
    assert TrueGrad.changes_numerics is False
