"""Stages of a pipeline in one process, called one after the other as a schedule calls them."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from graphopt.annotations import STAGE, find
from graphopt.errors import OptionError, UnsupportedError
from graphopt.passes import LayerToLayer, TrueGrad
from graphopt.runtime.pipeline_cut import PipelineCut
from graphopt.transform import Setup
from tests.layered_models import MODELS, scalar
from tests.runtime.pipeline_models import Several, mlp

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def cut(model, args=(), kwargs=None, *, num_stages=2, passes=(), compiler="eager", boundaries="auto"):
    setup = Setup.parse({"passes": list(passes), "compiler": compiler})
    return PipelineCut(model, args, kwargs or {}, num_stages, setup, boundaries, torch.device("cpu"))


def call(stages, args=(), kwargs=None):
    """What the last stage returns, and what goes from stage to stage: as it was sent, and as it was received."""
    value, travelled = stages[0](*args, **(kwargs or {})), []
    for stage in stages[1:]:
        received = [v.detach().requires_grad_(v.requires_grad) for v in value]
        travelled.append((value, received))
        value = stage(*received)
    return value, travelled


def backward(loss, travelled):
    loss.backward()
    for sent, received in reversed(travelled):
        pairs = [
            (s, torch.zeros_like(s) if r.grad is None else r.grad)
            for s, r in zip(sent, received, strict=True)
            if s.requires_grad
        ]
        torch.autograd.backward([s for s, _ in pairs], [g for _, g in pairs])


def layered(name):
    torch.manual_seed(0)
    model, kwargs = MODELS[name].build()
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kwargs.items()}
    return model.double(), wide


@pytest.mark.parametrize("name", ["encoder_decoder", "batch_norm", "skips_of_a_u_net", "in_place", "no_modules"])
def test_three_stages_compute_what_the_model_does(name):
    model, kwargs = layered(name)
    plain = copy.deepcopy(model)
    whole = cut(model, kwargs=kwargs, num_stages=3)
    stages = [whole.stage(index) for index in range(3)]
    for _ in range(2):
        result, travelled = call(stages, kwargs=kwargs)
        expected = scalar(plain(**kwargs))
        loss = scalar(result)
        torch.testing.assert_close(loss, expected, **EXACT)
        expected.backward()
        backward(loss, travelled)
    owned = [dict(stage.named_parameters()) for stage in stages]
    assert sum(map(len, owned)) == len(list(plain.parameters()))  # each parameter is in one stage
    for parameters in owned:
        for name, param in parameters.items():
            assert param is model.get_parameter(name)
            torch.testing.assert_close(param.grad, plain.get_parameter(name).grad, **EXACT)
    for stage in stages:
        for name, buffer in stage.named_buffers():
            torch.testing.assert_close(buffer, plain.get_buffer(name), **EXACT)
    states = [stage.state_dict() for stage in stages]
    assert {key for state in states for key in state} == set(plain.state_dict())


def test_each_distinct_layer_is_compiled_once():
    model, x = mlp(6), torch.randn(3, 6, dtype=torch.float64)
    whole = cut(model, (x,), compiler="aot_eager")
    stages = [whole.stage(index) for index in range(2)]
    assert [stage.layout.layers for stage in stages] == [["0", "2", "4"], ["6", "8", "10", "12"]]
    compiled = [stage._graph._compiled for stage in stages]
    assert [program.num_compiled for program in compiled] == [
        2,
        2,
    ]  # the first gets an input without gradient; the head
    result, travelled = call(stages, (x,))
    torch.testing.assert_close(result, model(x), **EXACT)
    backward(result.square().sum(), travelled)
    with torch.no_grad():
        result, _ = call(stages, (x,))
    assert not result.requires_grad
    assert find(model[6].weight, STAGE).layer == "6"
    assert "receives" in repr(stages[1])
    assert "stage 1 of 2: 6, 8, 10, 12" in repr(stages[1])


def test_layers_are_shared_out_by_bytes():
    sizes = [4, 4, 4, 4, 16, 16]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(sizes)))
    groups = cut(model, (torch.randn(2, 4),)).groups
    assert [[segment.name for segment in group] for group in groups] == [["0", "1", "2", "3"], ["4"]]
    half = cut(model, (torch.randn(2, 4),), boundaries=lambda path: "first" if path[0] in "01" else "second")
    assert [[segment.name for segment in group] for group in half.groups] == [["first"], ["second"]]


def test_other_stages_leave_no_memory_behind():
    model, x = mlp(), torch.randn(3, 6, dtype=torch.float64)
    stage = cut(model, (x,)).stage(0)
    own, other = weakref.ref(model[0].weight), weakref.ref(model[8].weight)
    del model
    gc.collect()
    assert own() is stage.get_parameter("0.weight")
    assert other() is None


class Tied(nn.Module):
    """A table that is the head as well, and a layer under two names."""

    def __init__(self, num_layers=4):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(num_layers))
        self.again = self.layers[0]
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.unused = nn.Linear(2, 2)
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, ids):
        x = self.table(ids) + self.shift
        for layer in self.layers:
            x = (layer(x) * self.scale).tanh()
        return self.head(x)


def test_from_the_meta_device():
    """A rank holds its own parameters only, filled from a state dict; ties stay ties, also where torch makes new tensors."""
    torch.manual_seed(2)
    plain = Tied().double()
    state, ids = plain.state_dict(), torch.randint(7, (3, 5))
    with torch.device("meta"):
        model = Tied().double()
    whole = cut(model, (ids.to("meta"),))
    stages = [whole.stage(index) for index in range(2)]
    assert all(param.is_meta for stage in stages for param in stage.parameters())
    assert set(stages[0].state_dict()) | set(stages[1].state_dict()) == set(state)
    with pytest.raises(OptionError, match=r"stage 0 has no values for table\.weight.*on the meta device.*assign=True"):
        stages[0](ids)
    for stage in stages:
        stage.load_state_dict({key: state[key].clone() for key in stage.state_dict()}, assign=True)
    assert stages[0].table.weight is stages[0].head.weight
    assert stages[0].get_parameter("layers.0.weight") is stages[0].get_parameter("again.weight")
    with pytest.raises(OptionError, match="no values for scale"):  # in no state dict
        stages[0](ids)
    for stage in stages:
        stage.scale = plain.scale.clone()
    result, travelled = call(stages, (ids,))
    backward(scalar(result), travelled)
    scalar(plain(ids)).backward()
    for stage in stages:
        for name, param in stage.named_parameters():
            expected = plain.get_parameter(name).grad
            assert (param.grad is None) == (expected is None), name
            if expected is not None:
                torch.testing.assert_close(param.grad, expected, **EXACT)
    emptied = stages[0].to_empty(device="meta")
    assert emptied.table.weight is emptied.head.weight


@dataclasses.dataclass
class Batch:
    x: Tensor
    more: list[Tensor]

    def __getitem__(self, name):
        return getattr(self, name)


class Odd(nn.Module):
    """A tensor that is no buffer, arguments in a dict, a parameter that is returned as it is."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.scale = nn.Parameter(torch.rand(4))
        self.table = torch.rand(4)

    def forward(self, batch):
        x = batch["x"] * self.scale
        for layer in self.layers:
            x = layer(x + self.table * batch["more"][0])
        return x, self.scale


def test_odd_inputs_and_outputs():
    model = Odd()
    batch = {"x": torch.randn(3, 4), "more": [torch.randn(3, 1)]}
    whole = cut(model, (batch,))
    stages = [whole.stage(index) for index in range(2)]
    (output, scale), travelled = call(stages, ({"x": batch["x"], "more": [batch["more"][0]]},))
    expected, _ = model(batch)
    torch.testing.assert_close(output, expected)
    assert scale is not model.scale
    expected = torch.autograd.grad((expected * scale).sum() + model.scale.square().sum(), model.scale)
    backward((output * scale.detach()).sum() + scale.square().sum(), travelled)
    torch.testing.assert_close(model.scale.grad, expected[0])
    with pytest.raises(UnsupportedError, match=r"Odd uses the tensor batch\.x, which is no parameter or buffer.*dicts"):
        cut(Odd(), (Batch(**batch),))
    model = Odd()
    model.table = model.table.to("meta")
    with pytest.raises(UnsupportedError, match=r"Odd cannot be captured in one graph .*meta.*test_pipeline_cut\.py"):
        cut(model, (batch,))


def test_what_the_last_stage_returns():
    model = Several().double()
    x, labels = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    whole = cut(model, (x,), {"labels": labels, "scale": 2.0})
    stages = [whole.stage(index) for index in range(2)]
    found, _ = call(stages, (x, 2.0), {"labels": labels})  # by position what was by name
    expected = model(x, 2.0, labels=labels)
    wanted = [expected["loss"], expected["last"], *expected["hidden"], expected["input"]]
    assert isinstance(found, tuple)
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, **EXACT)
    with torch.no_grad():
        found, _ = call(stages, (x,), {"labels": labels, "scale": 2.0})
    assert not any(value.requires_grad for value in found)


# --- what is refused ----------------------------------------------------------------------------------------------------------


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return self.layers[1](x)


class Normed(nn.Module):
    """One batch norm behind each of two layers, and a number that is the only result."""

    def __init__(self, returns="tensor"):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.BatchNorm1d(4)
        self.returns = returns

    def forward(self, x):
        for layer in self.layers:
            x = self.norm(layer(x))
        return x if self.returns == "tensor" else {"shape": x.shape[1]}


def test_models_that_cannot_be_cut():
    x = torch.randn(3, 4)
    with pytest.raises(
        OptionError, match=r"num_stages=9, but Sequential has 5 layers .*\(0, 2, 4, 6, 8\)\. Use at most 5 stages"
    ):
        cut(mlp(), (torch.randn(3, 6).double(),), num_stages=9)
    with pytest.raises(UnsupportedError, match=r"Breaks cannot be captured in one graph .*TORCH_LOGS=graph_breaks"):
        cut(Breaks(), (x,))
    with pytest.raises(
        OptionError, match=r"arguments do not fit the forward of Breaks .*missing a required argument: 'x'"
    ):
        cut(Breaks(), ())
    with pytest.raises(UnsupportedError, match=r"norm\.\w+ of Normed is written by layers of the stages \[0, 1\]"):
        cut(Normed(), (x,), boundaries="layers")
    with pytest.raises(UnsupportedError, match="Normed returns a dict with no tensor in it"):
        cut(Normed("nothing"), (x,))
    with pytest.raises(OptionError, match=r"LayerToLayer\(store='cpu'\) streams the layers of a whole model"):
        cut(mlp(), (torch.randn(3, 6).double(),), passes=[LayerToLayer(store="cpu")])
    with pytest.raises(
        UnsupportedError,
        match=r"table\.weight of Tied is used in the stages \[0, 1\].*sum_grad_squared.*TrueGrad\(where=",
    ):
        cut(Tied(), (torch.randint(7, (3, 5)),), passes=[TrueGrad()])


def test_calls_that_a_stage_was_not_cut_for():
    model = Several().double()
    x = torch.randn(3, 4).double()
    whole = cut(model, (x,), {"scale": 2.0})
    stages = [whole.stage(index) for index in range(2)]
    with pytest.raises(
        OptionError, match=r"x of a micro-batch is float64\[2, 4\], and the model was cut for float64\[3, 4\]"
    ):
        stages[0](x[:2], scale=2.0)
    with pytest.raises(OptionError, match=r"scale is 3\.0, and the model was cut for 2\.0"):
        stages[0](x, scale=3.0)
    with pytest.raises(
        OptionError, match=r"cut for a call with \['scale', 'x'\] and the schedule calls it with \['x'\]"
    ):
        stages[0](x)
    with pytest.raises(OptionError, match=r"stage 1 was called with 1 tensors, and the stage before it sends \d"):
        stages[1](x)
    with pytest.raises(OptionError, match=r"stage 1 was cut out of a model in training mode.*after model\.eval\(\)"):
        stages[1].eval()
    stages[1]._layout = dataclasses.replace(stages[1].layout, device=torch.device("cuda", 0))
    stages[1].double()
    with pytest.raises(
        OptionError, match=r"stage 1 computes on cuda:0, and layers\.\d\.weight.*are on cpu.*submod\.to"
    ):
        stages[1](*[torch.zeros(wire.shape) for wire in stages[1].layout.received])
