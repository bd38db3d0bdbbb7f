"""`transform` changes a model in place, `restore` undoes it, and copies and files of the model are what they always were."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.capture import CapturedGraph
from graphopt.errors import OptionError, PassError, SampleAxisError, UncapturedCall, UnsupportedError
from graphopt.passes import TrueGrad
from graphopt.pipeline import Pass, PassResult, Record


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2, bias=False)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.second(self.first(x).tanh()) * self.scale


def mlp():
    torch.manual_seed(1)
    return MLP().double()


def data(num=5):
    return torch.randn(num, 3, dtype=torch.float64)


def loss(model, x):
    return model(x).square().sum()


def tiny_gpt2(**options):
    torch.manual_seed(1)
    sizes = {"vocab_size": 13, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **options)
    return transformers.GPT2LMHeadModel(config).double()


def token_loss(model, ids):
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="sum")


def without_statistics(model):
    return all(find(param, SUM_GRAD_SQUARED) is None for param in model.parameters())


# In place -----------------------------------------------------------------------------------------------------------------------


def test_in_place():
    model = mlp()
    before = dict(model.named_parameters()), list(model.state_dict()), set(vars(model)), type(model)
    assert graphopt.transform(model, compiler="aot_eager") is model
    loss(model, data()).backward()
    assert type(model) is before[3]
    assert list(model.state_dict()) == before[1]
    for name, param in model.named_parameters():
        assert param is before[0][name]
        assert type(param) is nn.Parameter
    assert not any("_orig_mod" in name for name, _ in model.named_modules())
    assert set(vars(model)) - before[2] == {"_graphopt", "_compiled_call_impl"}
    assert isinstance(model, MLP)
    assert inspect.signature(model.forward) == inspect.signature(MLP.forward).replace(
        parameters=list(inspect.signature(MLP.forward).parameters.values())[1:]
    )
    assert len(repr(model).splitlines()) == len(repr(mlp()).splitlines())


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_same_outputs_gradients_and_statistics(compiler, assert_exact):
    model, reference, x = mlp(), mlp(), data()
    graphopt.transform(model, compiler=compiler)
    torch.testing.assert_close(model(x), reference(x))
    loss(model, x).backward()
    loss(reference, x).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert_exact(model, loss, x)


def test_outputs_are_bitwise_those_without_passes():
    plain, rewritten, x = mlp(), mlp(), data()
    graphopt.transform(plain, [], compiler="aot_eager")
    graphopt.transform(rewritten, compiler="aot_eager")
    assert torch.equal(plain(x), rewritten(x))


def test_trains_like_the_plain_model():
    model, reference = mlp(), mlp()
    graphopt.transform(model, compiler="aot_eager")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, reference)]
    for num in (5, 5, 3):
        x = data(num)
        for trained, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            loss(trained, x).backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), reference.state_dict())


def test_load_state_dict_after_transform(assert_exact):
    model, x = graphopt.transform(mlp(), compiler="aot_eager"), data()
    loss(model, x).backward()
    model.zero_grad()
    model.load_state_dict({name: torch.randn_like(value) for name, value in mlp().state_dict().items()})
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_default_passes_and_names():
    given = {None: ["gradinit", "truegrad", "layer_to_layer"], ("truegrad",): ["truegrad"], (TrueGrad(),): ["truegrad"]}
    for passes, names in given.items():
        model = graphopt.transform(mlp(), passes, compiler="aot_eager")
        loss(model, data()).backward()
        assert not without_statistics(model)
        assert [item.name for record in graphopt.records(model) for item in record.passes] == names


def test_no_passes():
    model, x = graphopt.transform(mlp(), [], compiler="aot_eager"), data()
    loss(model, x).backward()
    assert without_statistics(model)
    torch.testing.assert_close(model(x), mlp()(x))
    assert graphopt.records(model)[0].passes == ()


def test_records():
    model = graphopt.transform(mlp(), compiler="aot_eager")
    assert graphopt.records(model) == []
    assert graphopt.records(mlp()) == []
    loss(model, data()).backward()
    (record,) = graphopt.records(model)
    assert isinstance(record, Record)
    assert {row.name for row in record.coverage} == {"first.weight", "first.bias", "second.weight"}
    assert all(row.status == "exact" for row in record.coverage)
    assert set(record.seconds) == {"capture", "passes", "compile"}
    for printed in (record, *record.passes, model._graphopt):
        assert "\n" not in repr(printed)


# restore, transform again -------------------------------------------------------------------------------------------------------


def test_restore():
    model, x = mlp(), data()
    attributes = set(vars(model))
    graphopt.transform(model, compiler="aot_eager")
    loss(model, x).backward()
    assert graphopt.restore(model) is model
    assert set(vars(model)) == attributes
    model.zero_grad()
    assert without_statistics(model)
    loss(model, x).backward()
    assert without_statistics(model)
    torch.testing.assert_close(model(x), mlp()(x))


def test_restore_of_a_plain_model_does_nothing():
    model = mlp()
    assert graphopt.restore(model) is model
    loss(model, data()).backward()


def test_restore_keeps_what_was_compiled_by_others():
    model = mlp()
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert graphopt.restore(model)._compiled_call_impl is compiled


def test_transform_twice(assert_exact):
    model, x = mlp(), data()
    for _ in range(2):
        graphopt.transform(model, compiler="aot_eager")
        model.zero_grad()
        loss(model, x).backward()
        assert_exact(model, loss, x)
        assert len(graphopt.records(model)) == 1
    graphopt.transform(model, [], compiler="aot_eager")
    model.zero_grad()
    assert without_statistics(model)
    loss(model, x).backward()
    assert without_statistics(model)


def test_transform_keeps_the_statistics_of_the_last_backward(assert_exact):
    model, x = graphopt.transform(mlp(), compiler="aot_eager"), data()
    loss(model, x).backward()
    graphopt.restore(model)
    assert_exact(model, loss, x)


# Copies and files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("called_before", [False, True])
def test_deepcopy(called_before, assert_exact):
    model, x = graphopt.transform(mlp(), compiler="aot_eager"), data()
    if called_before:
        loss(model, x).backward()
        model.zero_grad()
    clone = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in clone.parameters()}
    y = data(3)
    loss(clone, y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert without_statistics(model)
    assert_exact(clone, loss, y)
    loss(model, x).backward()
    assert_exact(clone, loss, y)
    assert_exact(model, loss, x)
    with torch.no_grad():
        clone.first.weight.zero_()
    assert model.first.weight.any()
    assert len(graphopt.records(clone)) == 1
    graphopt.restore(clone)
    model.zero_grad()
    loss(model, x).backward()
    assert_exact(model, loss, x)


def test_deepcopy_of_a_parent():
    parent = nn.ModuleDict({"inner": graphopt.transform(mlp(), compiler="aot_eager")})
    clone = copy.deepcopy(parent)
    loss(clone["inner"], data()).backward()
    assert not without_statistics(clone)
    assert without_statistics(parent)


def test_a_copy_of_a_module_shares_nothing_by_accident():
    model = graphopt.transform(mlp(), compiler="aot_eager")
    clone = copy.copy(model)  # shares its parameters, as torch's own copy.copy does
    loss(clone, data()).backward()
    assert model.first.weight.grad is clone.first.weight.grad


@pytest.mark.parametrize("save", [torch.save, pickle.dump])
def test_saved_model_is_a_plain_model(save):
    model, file, x = graphopt.transform(mlp(), compiler="aot_eager"), io.BytesIO(), data()
    loss(model, x).backward()
    save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False) if save is torch.save else pickle.load(file)
    assert type(loaded) is MLP
    assert without_statistics(loaded)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    loaded.zero_grad()
    loss(loaded, x).backward()
    assert without_statistics(loaded)
    assert graphopt.records(loaded) == []
    graphopt.transform(loaded, compiler="aot_eager")
    loss(loaded, x).backward()
    assert not without_statistics(loaded)


def test_saved_model_loads_without_graphopt(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2))
    graphopt.transform(model, compiler="aot_eager")(torch.randn(2, 3)).sum().backward()
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch; sys.modules['graphopt'] = None\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); print(model(torch.ones(1, 3)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch.Size([1, 2])", done.stderr


def test_state_dict_loads_weights_only(tmp_path):
    model = graphopt.transform(mlp(), compiler="aot_eager")
    loss(model, data()).backward()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    mlp().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_huggingface_round_trip(tmp_path, assert_exact):
    model, ids = graphopt.transform(tiny_gpt2(), compiler="aot_eager"), torch.randint(13, (3, 6))
    token_loss(model, ids).backward()
    assert_exact(model, token_loss, ids)
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    graphopt.transform(loaded, compiler="aot_eager")
    token_loss(loaded, ids).backward()
    assert_exact(loaded, token_loss, ids)


# Mistakes -----------------------------------------------------------------------------------------------------------------------


MISTAKES = {
    "pass name": ((["trugrad"],), {}, r"there is no pass 'trugrad'; the passes are \[.*'truegrad'.*\]"),
    "pass class": (([TrueGrad],), {}, r"passes holds <class .*TrueGrad'>, which is not a pass; write TrueGrad\(\)"),
    "pass twice": ((["truegrad", TrueGrad()],), {}, r"passes holds \['truegrad'\] more than once; each pass runs once"),
    "not a pass": (([3],), {}, r"passes holds 3, which is not a pass"),
    "compiler": (
        (),
        {"compiler": "inductr"},
        r"compiler='inductr' is unknown; it is one of \['inductor', 'aot_eager', 'eager'\]",
    ),
    "option": ((), {"options": {"max_autotun": True}}, r"unknown options \['max_autotun'\].*'sample_axis'"),
    "disable": ((), {"options": {"disable": ["trugrad"]}}, r"there is no pass 'trugrad'"),
    "sample_axis": ((), {"options": {"sample_axis": "x"}}, r"sample_axis is 'x'; it is an int, None, or a dict"),
}


@pytest.mark.parametrize(("args", "kwargs", "text"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_raise_before_anything_changes(args, kwargs, text):
    model = mlp()
    attributes = dict(vars(model))
    with pytest.raises(OptionError, match=f"(?s){text}"):
        graphopt.transform(model, *args, **kwargs)
    assert vars(model) == attributes


def test_a_mistake_leaves_a_transformed_model_transformed():
    model = graphopt.transform(mlp(), compiler="aot_eager")
    with pytest.raises(OptionError, match="there is no pass"):
        graphopt.transform(model, ["nonsense"])
    loss(model, data()).backward()
    assert not without_statistics(model)


@pytest.mark.parametrize(
    "thing", [lambda x: x, nn.Linear, None, torch.ones(1)], ids=["function", "class", "None", "tensor"]
)
def test_not_a_module(thing):
    with pytest.raises(OptionError, match=r"transform takes a torch\.nn\.Module and got "):
        graphopt.transform(thing)


class Failing(Pass):
    name = "failing"
    changes_numerics = False

    def run(self, graph: CapturedGraph) -> PassResult:
        for node in list(graph.graph_module.graph.nodes)[::-1]:
            if node.op == "call_function":
                node.replace_all_uses_with(node.args[0])
                graph.graph_module.graph.erase_node(node)
        raise RuntimeError("no luck")


def test_failing_pass_leaves_the_model_as_it_was():
    model, x = graphopt.transform(mlp(), [Failing()], compiler="aot_eager"), data()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):  # the failure is not remembered as a skipped frame
        with pytest.raises(PassError, match="the pass 'failing' failed with RuntimeError: no luck") as caught:
            model(x)
        assert caught.type is PassError
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert graphopt.records(model) == []
    torch.testing.assert_close(dict(model.state_dict()), state)
    graphopt.restore(model)
    loss(model, x).backward()
    assert model.first.weight.grad.any()
    model.zero_grad()
    graphopt.transform(model, compiler="aot_eager")
    loss(model, x).backward()
    assert not without_statistics(model)


class Penalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.weight, self.weight.square().sum()


class NoSamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self):
        return self.weight.exp()


UNWRAPPED = {
    "UnsupportedError": (
        Penalised,
        (torch.randn(4, 3),),
        UnsupportedError,
        r"weight: .* leaves the graph without having met samples",
    ),
    "SampleAxisError": (NoSamples, (), SampleAxisError, "the model was called without a tensor that holds samples"),
}


@pytest.mark.parametrize(("build", "args", "error", "text"), UNWRAPPED.values(), ids=UNWRAPPED)
def test_errors_arrive_unwrapped(build, args, error, text):
    model = graphopt.transform(build(), compiler="aot_eager")
    with pytest.raises(error, match=text) as caught:
        model(*args)
    assert caught.type is error
    assert any("raised by the pass 'truegrad'" in note for note in caught.value.__notes__)
    model = graphopt.restore(model)
    sum(output.sum() for output in pytree.tree_leaves(model(*args))).backward()
    assert model.weight.grad.any()


def test_sample_axis_that_a_tensor_does_not_have():
    model = graphopt.transform(mlp(), compiler="aot_eager", options={"sample_axis": 5})
    with pytest.raises(OptionError, match=r"sample_axis=5, but .* has shape \(5, 3\)"):
        model(data())


def test_sample_axis_of_an_argument_that_forward_does_not_take():
    model = graphopt.transform(mlp(), compiler="aot_eager", options={"sample_axis": {"images": 0}})
    with pytest.raises(
        OptionError, match=r"sample_axis names \['images'\], which forward does not take; it takes \['x'\]"
    ):
        model(data())


# Calls that nothing captures ----------------------------------------------------------------------------------------------------


def test_uncaptured_call_warns_once_and_readers_raise():
    model, x = graphopt.transform(mlp(), compiler="aot_eager"), data()
    optimizer = graphopt.optim.TGAdamW(model.parameters())
    with torch.compiler.set_stance("force_eager"):
        with pytest.warns(UncapturedCall, match="a call of the transformed MLP ran outside any captured graph"):
            outputs = model(x)
        torch.testing.assert_close(outputs, mlp()(x))
        loss(model, x).backward()  # filterwarnings=error: a second warning would raise
    assert without_statistics(model)
    with pytest.raises(
        graphopt.errors.MissingAnnotation, match="3 of 3 parameters with a gradient have no sum_grad_squared"
    ):
        optimizer.step()
    with pytest.raises(
        graphopt.errors.MissingAnnotation, match="no sum_grad_squared; it is provided by the pass TrueGrad"
    ):
        graphopt.annotations.get(model.first.weight, SUM_GRAD_SQUARED)
    model.zero_grad()
    loss(model, x).backward()
    assert not without_statistics(model)
    optimizer.step()


def test_no_warning_without_parameters():
    model = graphopt.transform(nn.ReLU(), compiler="aot_eager")
    assert model(data()).min() >= 0
