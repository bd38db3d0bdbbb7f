"""A model on the meta device gets the values in a store that the same model would have in memory, a module at a time."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import GraphoptError, OptionError, StoreError
from graphopt.passes import LayerToLayer
from graphopt.runtime.stores import DiskStore, StoredTensor
from graphopt.runtime.streaming.filling import fill_store
from tests.runtime.streaming.filled_models import (
    LINEAR,
    TRANSFORMERS,
    Model,
    Scale,
    assert_on_meta,
    assert_same,
    bert,
    config_of,
    initialised,
    linear_with,
    on_meta,
    reset,
    saved,
    streamed,
)

# ------------------------------------------------------------------------------------------------------------ plain modules

PLAIN = {
    "model": Model,
    "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.GroupNorm(2, 4)),
    "transformer": lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True),
    "recurrent": lambda: nn.ModuleDict({"lstm": nn.LSTM(3, 4, num_layers=2), "cell": nn.GRUCell(4, 2)}),
    "integers": lambda: Counting(),
    "numbers": lambda: nn.Sequential(nn.Bilinear(1, 1, 1), nn.LayerNorm(()), nn.LayerNorm(0)),
    "half": lambda: nn.Linear(5, 4, dtype=torch.bfloat16),
}


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3))
        self.register_buffer("order", torch.empty(3, dtype=torch.int64), persistent=False)
        self.register_buffer("mask", torch.empty(3, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.uniform_(self.weight)
        with torch.no_grad():
            torch.arange(3, out=self.order) if not self.order.is_meta else None
            self.mask.fill_(False)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_modules(name, tmp_path):
    """The numbers are those that ``model.apply`` gives, which also says in what order they are drawn."""
    expected = PLAIN[name]()
    torch.manual_seed(3)
    expected.apply(reset)
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = PLAIN[name]()
    params = dict(model.named_parameters())
    torch.manual_seed(3)
    fill_store(model, tmp_path / "store")
    assert torch.equal(torch.get_rng_state(), state)
    assert_on_meta(model)
    assert all(params[name] is param for name, param in model.named_parameters())
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in expected.parameters()]
    with DiskStore(tmp_path / "store") as store:
        assert set(store.keys()) == {f"parameter/{name}" for name in params}
        for name, param in expected.named_parameters():
            assert torch.equal(store.read(f"parameter/{name}"), param), name
        for name, buffer in expected.named_buffers():
            assert torch.equal(store.small[f"buffer/{name}"], buffer), name
            assert torch.equal(model.get_buffer(name), buffer), name
        assert torch.equal(store.small["random/0"], state)
    records = json.loads((tmp_path / "store" / "manifest.json").read_text())["body"]["records"]
    offsets = [records[f"parameter/{name}"]["offset"] for name, param in params.items() if param.numel()]
    assert offsets == sorted(
        offsets
    )  # a layer lies together on disk, though its parts are initialised at different times


CONTEXTS = {
    "torch.device": lambda: torch.device("meta"),
    "accelerate": accelerate.init_empty_weights,
    "accelerate with buffers": lambda: accelerate.init_empty_weights(include_buffers=True),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_training_is_that_of_the_model_in_memory(context, tmp_path):
    plain = Model()
    torch.manual_seed(3)
    plain.apply(reset)
    with CONTEXTS[context]():
        model = Model()
        model.embed.weight.tag = "kept"
        torch.manual_seed(3)
        fill_store(model, tmp_path / "store")  # which the context does not reach
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)  # made before the parameters leave the meta device
    graphopt.transform(model, [LayerToLayer(store="disk", store_path=tmp_path / "store")], compiler="eager")
    assert all(before is after for before, after in zip(params, model.parameters(), strict=True))
    assert model.embed.weight.tag == "kept"
    assert model.embed.weight.device.type == "cpu"
    assert [p.requires_grad for p in params] == [p.requires_grad for p in plain.parameters()]
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        ids = torch.randint(0, 11, (3, 4))
        losses = []
        for side, own in ((model, optimizer), (plain, reference)):
            loss = F.cross_entropy(side(ids).flatten(0, 1), ids.flatten())
            loss.backward()
            own.step()
            own.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.cpu(), plain.state_dict()[name])
    trained = {name: value.cpu().clone() for name, value in model.state_dict().items()}
    graphopt.stream(model).close()
    again = streamed(Model, tmp_path / "store")  # buffers and all come from the store
    assert_same(again, trained)
    assert not any(buffer.is_meta for buffer in again.buffers())
    graphopt.restore(again)
    assert_same(again, trained)
    torch.testing.assert_close(again.eval()(ids), plain.eval()(ids))


class Tied(nn.Module):
    def __init__(self, first="embed"):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_tied(tmp_path):
    """The first module that has the parameter initialises it; the other one does its own part."""
    with torch.device("meta"):
        model = Tied()
    torch.manual_seed(3)
    fill_store(model, tmp_path / "store")
    assert model.head.weight is model.embed.weight
    torch.manual_seed(3)
    expected = nn.Embedding(11, 6).weight
    with DiskStore(tmp_path / "store") as store:
        assert set(store.keys()) == {"parameter/embed.weight", "parameter/head.bias"}
        assert torch.equal(store.read("parameter/embed.weight"), expected)
        assert 0 < store.read("parameter/head.bias").abs().max() < 6**-0.5
    model = streamed(Tied, tmp_path / "store")
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.state_dict()["head.weight"].load(), expected)


def test_initialize(tmp_path):
    """It has its way with every module, and what it leaves alone is initialised as ever."""
    seen = []

    def initialize(module):
        seen.append(type(module).__name__)
        if isinstance(module, Scale):
            nn.init.constant_(module.scale, 3)
            module.table.copy_(torch.arange(4))
        if isinstance(module, nn.Sequential):
            nn.init.constant_(module[0].bias, 5)  # of a child, which is in the store already

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 4), Scale())
    fill_store(model, tmp_path / "store", initialize=initialize)
    assert seen == ["Linear", "Linear", "Scale", "Sequential"]
    assert torch.equal(model[1].table, torch.arange(4.0))
    with DiskStore(tmp_path / "store") as store:
        assert (store.read("parameter/1.scale") == 3).all()
        assert (store.read("parameter/0.bias") == 5).all()
        assert 0 < store.read("parameter/0.weight").abs().max() < 2**-0.5


def test_one_module_in_memory(tmp_path):
    """When a module is initialised, the parameters of all others are on the meta device or in the store."""
    with torch.device("meta"):
        model = Model()

    def initialize(module):
        own = {id(param) for param in module.parameters(recurse=False)}
        for name, param in model.named_parameters():
            real = not (param.is_meta or isinstance(param, StoredTensor))
            assert real == (id(param) in own), (name, type(module))
        reset(module)

    fill_store(model, tmp_path / "store", initialize=initialize)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(dtype, tmp_path):
    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.BatchNorm1d(4))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.manual_seed(3)
    fill_store(model, tmp_path / "store", dtype=dtype)
    assert {param.dtype for param in model.parameters()} == {dtype}
    assert model[1].running_mean.dtype is torch.float32
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    layers = LayerToLayer(store="disk", store_path=tmp_path / "store")
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        StoreError, match=rf'belongs to another model: .*"torch\.{name}" in the store, "torch\.float32" given'
    ):
        graphopt.transform(other, [layers])
    graphopt.transform(other.to(dtype), [layers], compiler="eager")
    assert torch.equal(other.state_dict()["0.weight"].load(), expected[0].weight)
    assert other[1].running_mean.dtype is torch.float32  # not what .to() has made of a buffer without a value


# ------------------------------------------------------------------------------------------------- models of transformers


@pytest.mark.parametrize("context", ["torch.device", "accelerate"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(quiet, name, context, tmp_path):
    kind, config, options = TRANSFORMERS[name]
    expected = initialised(kind, config, options)
    with CONTEXTS[context]():
        model = kind(config_of(config, **options))
    torch.manual_seed(5)
    fill_store(model, tmp_path / "store")
    assert_on_meta(model)
    assert all(module._is_hf_initialized for module in model.modules())
    model = streamed(lambda: kind(config_of(config, **options)), tmp_path / "store")
    assert_same(model, expected)
    assert not any(hasattr(param, "_is_hf_initialized") for param in model.parameters())


def test_a_model_of_transformers_inside_another(quiet, tmp_path):
    """Its part is initialised by its own rules, the rest by those of torch."""

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = bert(transformers.BertModel, initializer_range=1e-6)
            self.head = nn.Linear(16, 16)

    with torch.device("meta"):
        model = Wrapper()
    fill_store(model, tmp_path / "store")
    with DiskStore(tmp_path / "store") as store:
        assert store.read("parameter/encoder.encoder.layer.0.output.dense.weight").std() < 1e-5
        assert store.read("parameter/head.weight").std() > 0.1


# ------------------------------------------------------------------------------------------------------------------ errors


def quantised(tmp_path):
    return linear_with(tmp_path, weight=torch.ones(4, 3, dtype=torch.int8))


def doubled(tmp_path):
    linear_with(tmp_path)
    save_file({"bias": torch.ones(4)}, tmp_path / "n.safetensors")
    return {"checkpoint": [tmp_path / "m.safetensors", tmp_path / "n.safetensors"]}


def garbage(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"no such thing")
    return {"checkpoint": tmp_path / "m.safetensors"}


def other_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "pytorch_model.bin").touch()
    return {"checkpoint": tmp_path / "folder"}


def ties_that_differ(tmp_path):
    return saved(
        tmp_path, **{"embed.weight": torch.ones(11, 6), "head.weight": torch.zeros(11, 6), "head.bias": torch.ones(11)}
    )


def replacing(module):
    module.weight = nn.Parameter(torch.ones(4, 3))


def failing(module):
    raise ZeroDivisionError


def partial(module):
    nn.init.ones_(module.weight[:2])
    nn.init.ones_(module.bias)


def mixed():
    model = nn.Sequential(on_meta(lambda: nn.Linear(3, 4)), nn.Linear(4, 1))
    return model


class Linear(nn.Module):
    """Without a way to initialise it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(4, 3)), nn.Parameter(torch.empty(4))


ERRORS = {
    "no parameters": (lambda: nn.Tanh(), None, OptionError, r"no parameter of this Tanh is on it"),
    "values": (lambda: nn.Linear(3, 4), None, OptionError, r"weight, bias of this Linear has values\. Build it under torch\.device"),
    "some values": (mixed, None, OptionError, r"1\.weight, 1\.bias of this Sequential has values.*drop all values with model\.to\('meta'\)"),
    "lazy": (lambda: nn.LazyLinear(3, device="meta"), None, OptionError, r"weight is a UninitializedParameter; only plain parameters"),
    "integers": (LINEAR, {"dtype": torch.int32}, OptionError, r"fill_store\(dtype=torch\.int32\): parameters are floating-point"),
    "no way": (lambda: on_meta(lambda: nn.ModuleList([Linear(), Scale()])), None, OptionError,
               r"nothing initialises weight, bias of 0 \(Linear\), nor what 1 more modules have: .*fill_store\(\.\.\., initialize=function\)"),
    "no way for the model": (lambda: on_meta(Scale), None, OptionError, r"nothing initialises scale, table of the model \(Scale\)"),
    "half done": (lambda: on_meta(Linear), {"initialize": partial}, OptionError, r"nothing initialises weight of the model \(Linear\)"),
    "replaced": (lambda: on_meta(Linear), {"initialize": replacing}, OptionError,
                 r"initialising the model has put another tensor in the place of weight.*change it in place"),
    "raised": (LINEAR, {"initialize": failing}, ZeroDivisionError, None),
    "missing": (LINEAR, lambda p: saved(p, weight=torch.ones(4, 3)), StoreError,
                r"the checkpoint does not fit Linear: it lacks bias\. To initialise what the file lacks, pass initialize= as well: a function"),
    "unexpected": (LINEAR, lambda p: linear_with(p, extra=torch.ones(1)), StoreError, r"does not fit Linear: the model has no extra$"),
    "misspelt": (LINEAR, lambda p: saved(p, wieght=torch.ones(4, 3), bias=torch.ones(4)), StoreError,
                 r"it lacks weight \(like wieght\?\); the model has no wieght \(like weight\?\)"),
    "many": (lambda: on_meta(Model), lambda p: saved(p, x=torch.ones(1)), StoreError, r"it lacks embed\.weight, .*, .*, .*, .* and \d+ more"),
    "shape": (LINEAR, lambda p: linear_with(p, weight=torch.ones(3, 4)), StoreError, r"weight is \[3, 4\] in it and \[4, 3\] in the model"),
    "quantised": (LINEAR, quantised, StoreError, r"weight is torch\.int8 in the checkpoint and torch\.float32 in the model: quantised"),
    "tied": (lambda: on_meta(Tied), ties_that_differ, StoreError,
             r"embed\.weight and head\.weight are one tensor in the model, and differ in the checkpoint"),
    "twice": (LINEAR, doubled, OptionError, r"checkpoint: bias is in .*m\.safetensors and in .*n\.safetensors"),
    "garbage": (LINEAR, garbage, OptionError, r"m\.safetensors cannot be read as a safetensors file"),
    "absent": (LINEAR, lambda p: {"checkpoint": p / "no"}, OptionError, r"checkpoint: there is no file .*no$"),
    "other folder": (LINEAR, other_folder, OptionError,
                     r"has neither model\.safetensors\.index\.json nor model\.safetensors, but pytorch_model\.bin"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, tmp_path):
    """The text; the model is as it was; and the folder can be filled afterwards."""
    build, options, kind, text = ERRORS[name]
    options = options(tmp_path) if callable(options) else options or {}
    model = build()
    before = {
        name: (tensor, tensor.device, tensor.dtype)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    with pytest.raises(kind, match=text) as caught:
        fill_store(model, tmp_path / "store", **options)
    if kind is ZeroDivisionError:
        assert caught.value.__notes__ == ["in graphopt.fill_store, while the model was being initialised"]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert before[name][0] is tensor
        assert before[name][1:] == (tensor.device, tensor.dtype)
        assert type(tensor) is not StoredTensor
    fill_store(on_meta(lambda: nn.Linear(2, 2)), tmp_path / "store")


def test_an_error_leaves_buffers_alone(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3), Scale())
    model[0].running_mean.fill_(7)
    for module in model:
        module._parameters = {key: nn.Parameter(param.to("meta")) for key, param in module._parameters.items()}
    with pytest.raises(OptionError, match="nothing initialises scale of 1"):
        fill_store(model, tmp_path / "store", initialize=lambda module: nn.init.zeros_(model[0].running_mean))
    assert (model[0].running_mean == 7).all()


def test_a_store_with_values_is_kept(tmp_path):
    fill_store(on_meta(lambda: nn.Linear(3, 4)), tmp_path / "store")
    with pytest.raises(
        StoreError, match=r"store holds a store already, at step 0; transform.*give another folder or remove this one"
    ):
        fill_store(on_meta(lambda: nn.Linear(3, 4)), tmp_path / "store")
    with torch.device("meta"):
        model = nn.Linear(3, 4)
    graphopt.transform(model, [LayerToLayer(store="disk", store_path=tmp_path / "store")])  # which is still there


@pytest.mark.parametrize("moment", ["before", "within", "last"])
def test_killed(moment, tmp_path):
    """A store that is not filled to the end is refused, and is filled anew."""
    count = {"before": 0, "within": 1, "last": 2}[moment]

    def killing(module):
        nonlocal count
        if count == 0:
            os._exit(7)
        count -= 1
        reset(module)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later: threads and forks
        child = os.fork()
    if child == 0:
        try:
            fill_store(
                on_meta(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))), tmp_path / "store", initialize=killing
            )
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    model = on_meta(lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
    passes = [LayerToLayer(store="disk", store_path=tmp_path / "store")]
    with pytest.raises(
        StoreError,
        match=r"4 parameters are on the meta device \(0\.weight, 0\.bias, 1\.weight, \.\.\.\), and the store in .*store is empty: "
        r"it is new, or was not filled to the end\. Fill it layer by layer: graphopt\.fill_store\(model, '.*store'\)",
    ):
        graphopt.transform(model, passes)
    fill_store(model, tmp_path / "store")
    graphopt.transform(model, passes, compiler="eager")
    assert model(torch.ones(2, 3)).isfinite().all()


def test_errors_are_of_graphopt():
    assert all(issubclass(kind, GraphoptError) for _, _, kind, _ in ERRORS.values() if kind is not ZeroDivisionError)


# ------------------------------------------------------------------------------------------------------------------ memory

_LIMITED = """
import os, resource, sys
import torch
from torch import nn
import graphopt
from graphopt.passes import LayerToLayer
from graphopt.runtime.streaming.filling import fill_store

def build(width, depth):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))

def train(width, depth, folder):
    with torch.device("meta"):
        model = build(width, depth)
    fill_store(model, folder)
    graphopt.transform(model, [LayerToLayer(store="disk", store_path=folder)], compiler="eager")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, width)).square().mean().backward()
    optimizer.step()
    assert graphopt.stream(model).step == 1
    graphopt.stream(model).close()

train(8, 3, sys.argv[1] + "/small")  # loads what is loaded late, and starts threads
torch._dynamo.reset()
size = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
if os.fork() == 0:
    try:
        build(724, 40)  # 80 MiB
    except RuntimeError as error:
        os._exit(3 if "can't allocate memory" in str(error) else 4)
    os._exit(5)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 3, "the limit does not hold"
train(724, 40, sys.argv[1] + "/large")
print("trained")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_larger_than_memory(tmp_path):
    """A model of 80 MiB, with gradients and states of AdamW 320 MiB, trains within 64 MiB, where its weights alone do not fit."""
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)],
        env={**os.environ, **settings},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "trained\n", done.stderr
