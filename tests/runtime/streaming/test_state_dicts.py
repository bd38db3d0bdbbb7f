"""State dicts of a streamed model are those of the model in memory; what its values would not follow is refused."""

import copy
import io
import pickle
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

import graphopt
from graphopt.errors import StreamError
from graphopt.passes import LayerToLayer
from graphopt.runtime.stores import StoredTensor


class Head(nn.Module):
    """As in BERT: a parameter of its own is also its child's."""

    def __init__(self, weight):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(7))
        self.decoder = nn.Linear(4, 7)
        self.decoder.weight, self.decoder.bias = weight, self.bias

    def forward(self, x):
        return self.decoder(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.norm = nn.BatchNorm1d(4)
        self.temperature = nn.Parameter(torch.tensor([2.0]))
        self.head = Head(self.embed.weight)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x.flatten(0, 1)).view_as(x)
        return self.head(x / self.temperature)


def ids():
    return torch.randint(0, 7, (3, 5))


@pytest.fixture(params=["cpu", "disk"])
def make(request, tmp_path):
    """``make()``: a streamed model, and one in memory with the same values."""
    made = []

    def build(model=None):
        plain = model or Model()
        where = {"store_path": tmp_path / f"store{len(made)}"} if request.param == "disk" else {}
        made.append(
            graphopt.transform(copy.deepcopy(plain), [LayerToLayer(store=request.param, **where)], compiler="eager")
        )
        return made[-1], plain

    yield build
    for model in made:
        if "_graphopt" in model.__dict__:
            graphopt.stream(model).close()


def loaded(state):
    return {name: value.load() if isinstance(value, StoredTensor) else value for name, value in state.items()}


def assert_same(state, expected):
    state = loaded(state)
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def assert_usable(model):
    """What a call does first."""
    graphopt.stream(model).check()


# -------------------------------------------------------------------------------------------------------------- state_dict


def test_state_dict(make):
    model, plain = make()
    assert_same(model.state_dict(), plain.state_dict())
    assert_same(model.state_dict(keep_vars=True), plain.state_dict())
    assert_same(model.head.state_dict(prefix="head."), plain.head.state_dict(prefix="head."))
    assert_same(model.layers[1][0].state_dict(), plain.layers[1][0].state_dict())
    assert {name for name, value in model.state_dict().items() if not isinstance(value, StoredTensor)} == {
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert model.state_dict()._metadata == plain.state_dict()._metadata


def by_torch_save(model, path):
    torch.save(model.state_dict(), path / "m.pt")
    return torch.load(path / "m.pt")


def by_torch_save_in_memory(model, path):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def by_save_file(model, path):
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "m.safetensors")
    return load_file(path / "m.safetensors")


def by_save_model(model, path):
    save_model(model, path / "m.safetensors")
    other = Model()
    load_model(other, path / "m.safetensors")
    return other.state_dict()


def by_loading(model, path):
    other = Model()
    other.load_state_dict(model.state_dict())
    assert all(type(param) is nn.Parameter for param in other.parameters())
    return other.state_dict()


def by_assigning(model, path):
    with torch.device("meta"):
        other = Model()
    other.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()}, assign=True)
    return other.state_dict()


def by_restoring(model, path):
    return graphopt.restore(model).state_dict()


WAYS_OUT = {
    "torch.save": by_torch_save,
    "torch.save in memory": by_torch_save_in_memory,
    "safetensors save_file": by_save_file,
    "safetensors save_model": by_save_model,
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model.state_dict())),
    "deepcopy": lambda model, path: copy.deepcopy(model.state_dict()),
    "load_state_dict of another": by_loading,
    "assign": by_assigning,
    "restore": by_restoring,
}


@pytest.mark.parametrize("name", WAYS_OUT)
def test_ways_out(make, name, tmp_path):
    model, plain = make()
    found = WAYS_OUT[name](model, tmp_path)
    assert all(not isinstance(value, StoredTensor) for value in found.values())
    assert sorted(found) == sorted(plain.state_dict())
    assert_same({key: found[key] for key in plain.state_dict()}, plain.state_dict())
    if name != "restore":
        assert_same(model.state_dict(), plain.state_dict())
        assert_usable(model)


def test_tied_tensors_tell_libraries_that_they_are_one(make, tmp_path):
    model, _ = make()
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Some tensors share memory.*'head\.decoder\.weight'"):
        save_file(
            {"embed.weight": state["embed.weight"], "head.decoder.weight": state["head.decoder.weight"]}, tmp_path / "m"
        )
    with pytest.raises(ValueError, match=r"non contiguous tensor: `embed\.weight`.*call `\.contiguous\(\)`"):
        save_file(
            {"embed.weight": state["embed.weight"]}, tmp_path / "m"
        )  # it would read at an address where nothing is
    assert state["embed.weight"].data_ptr() == state["head.decoder.weight"].data_ptr() != state["head.bias"].data_ptr()
    assert state["head.bias"].data_ptr() == state["head.decoder.bias"].data_ptr()


TIED = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            vocab_size=50,
            tie_word_embeddings=True,
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50
        )
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_save_pretrained(make, name, tmp_path):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, plain = make(TIED[name]())
    for number, limit in enumerate((3000, "5GB")):
        model.save_pretrained(tmp_path / f"{number}", max_shard_size=limit)
        back = type(plain).from_pretrained(tmp_path / f"{number}")
        assert_same(back.state_dict(), plain.state_dict())
    assert (tmp_path / "0" / "model-00002-of-00002.safetensors").exists() or len(list((tmp_path / "0").iterdir())) > 4
    assert (tmp_path / "1" / "model.safetensors").exists()
    model.load_state_dict(loaded(make(TIED[name]())[0].state_dict()))  # nothing of husks gets into ties
    assert all(value.cpu().isfinite().all() for value in model.state_dict().values())


# --------------------------------------------------------------------------------------------------------- load_state_dict


def from_memory(model, plain, make):
    model.load_state_dict(plain.state_dict())


def from_another_store(model, plain, make):
    model.load_state_dict(make(plain)[0].state_dict())


def from_itself(model, plain, make):
    model.load_state_dict(plain.state_dict())
    model.load_state_dict(model.state_dict())


def from_another_dtype(model, plain, make):
    plain.to(torch.bfloat16).float()
    model.load_state_dict(
        {name: value.bfloat16() if value.is_floating_point() else value for name, value in plain.state_dict().items()}
    )


def by_modules(model, plain, make):
    for name in ("embed", "layers", "norm", "head"):
        getattr(model, name).load_state_dict(getattr(plain, name).state_dict())
    model.load_state_dict({"temperature": plain.temperature}, strict=False)


def in_parts(model, plain, make):
    state = plain.state_dict()
    for keys in (list(state)[::2], list(state)[1::2]):
        result = model.load_state_dict({**{key: state[key] for key in keys}, "extra": torch.ones(1)}, strict=False)
        assert result.unexpected_keys == ["extra"]
        assert set(result.missing_keys) == {
            key for key in set(state) - set(keys) if "num_b" not in key
        }  # torch is lenient there


WAYS_IN = [from_memory, from_another_store, from_itself, from_another_dtype, by_modules, in_parts]


@pytest.mark.parametrize("way", WAYS_IN)
def test_ways_in(make, way):
    model, _ = make()
    plain = Model()
    plain.norm.running_mean.fill_(0.5)
    params = list(model.parameters())
    way(model, plain, make)
    assert_same(model.state_dict(), plain.state_dict())
    assert all(before is after for before, after in zip(params, model.parameters(), strict=True))
    assert_usable(model)


def test_training_goes_on_with_what_is_loaded(make):
    model, _ = make()
    plain = Model()
    model.load_state_dict(plain.state_dict())
    batch = ids()
    for side in (model, plain):
        side(batch).square().mean().backward()
    for param, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(param.grad.load(), reference.grad)


def test_errors_of_torch(make):
    """Those that torch raises for the model in memory, with the same effect on all other parameters."""
    model, plain = make()
    state = Model().state_dict()
    wrong = {**state, "embed.weight": torch.ones(3, 4), "head.decoder.weight": torch.ones(2)}
    messages = []
    for side in (model, plain):
        with pytest.raises(
            RuntimeError, match=r"size mismatch for embed\.weight: copying a param with shape"
        ) as caught:
            side.load_state_dict(wrong)
        messages.append(str(caught.value))
        del wrong["layers.0.0.bias"], wrong["layers.1.0.bias"]
        wrong["extra"] = torch.ones(1)
        with pytest.raises(
            RuntimeError, match=r'Missing key\(s\) in state_dict: "layers\.0\.0\.bias", "layers\.1\.0\.bias"'
        ) as caught:
            side.load_state_dict(wrong)
        messages.append(str(caught.value))
        wrong = {**state, "embed.weight": torch.ones(3, 4), "head.decoder.weight": torch.ones(2)}
    assert messages[:2] == messages[2:]
    assert_same(model.state_dict(), plain.state_dict())
    assert_usable(model)


def test_interrupted(make):
    """An error in the middle leaves no parameter outside the store for longer than to the next load."""

    class Fails(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.copy_:
                raise KeyboardInterrupt
            return super().__torch_function__(function, types, args, kwargs or {})

    model, plain = make()
    with pytest.raises(KeyboardInterrupt):
        model.load_state_dict({**plain.state_dict(), "head.bias": torch.ones(7).as_subclass(Fails)})
    with pytest.raises(StreamError, match=r"temperature was given a value of its own"):
        graphopt.stream(model).check()
    model.load_state_dict({}, strict=False)
    assert_usable(model)
    assert_same(model.state_dict(), plain.state_dict())


def test_what_is_loaded_stays(tmp_path):
    """Neither the end of the process nor a step that fails takes it away, nor does it change the state of optimizers."""
    layers = LayerToLayer(store="disk", store_path=tmp_path / "store")
    model = graphopt.transform(Model(), [layers], compiler="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(ids()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    states = {
        key: graphopt.stream(model).store.read(key) for key in graphopt.stream(model).store.keys() if "state/" in key
    }
    steps = [int(state["step"]) for state in optimizer.state.values()]
    expected = Model()
    expected.norm.running_mean.fill_(0.5)
    model.load_state_dict(expected.state_dict())
    model(ids()).square().mean().backward()
    optimizer.param_groups[0]["betas"] = (None, None)
    with pytest.raises(TypeError):
        optimizer.step()
    assert_same(
        {key: value for key, value in model.state_dict().items() if "norm.r" not in key and "norm.n" not in key},
        {key: value for key, value in expected.state_dict().items() if "norm.r" not in key and "norm.n" not in key},
    )
    graphopt.stream(model).close()
    with torch.device("meta"):
        model = Model()
    graphopt.transform(model, [layers], compiler="eager")
    assert graphopt.stream(model).step == 1
    assert_same(model.state_dict(), expected.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    assert graphopt.stream(model).resume(optimizer) == 1
    assert {key: graphopt.stream(model).store.read(key).tolist() for key in states} == {
        k: v.tolist() for k, v in states.items()
    }
    assert [int(state["step"]) for state in optimizer.state.values()] == steps


def test_assign(make):
    model, plain = make()
    expected = {name: value.clone() for name, value in plain.state_dict().items()}
    for module in (model, model.norm, model.head):
        state = {name: torch.ones_like(value) for name, value in loaded(module.state_dict()).items()}
        with pytest.raises(
            StreamError,
            match=rf"load_state_dict\(assign=True\) would put other parameters .* those of {type(module).__name__},",
        ):
            module.load_state_dict(state, assign=True)
    assert_same(model.state_dict(), expected)
    assert_usable(model)


# ---------------------------------------------------------------------------------------------------------------- refused

REFUSED = {
    "deepcopy": (copy.deepcopy, "Model has parameters whose values are in a store, so it cannot be copied"),
    "deepcopy of a part": (lambda model: copy.deepcopy(model.layers), "ModuleList has parameters .* cannot be copied"),
    "deepcopy around": (lambda model: copy.deepcopy(nn.Sequential(model)), "Model has parameters .* cannot be copied"),
    "average": (torch.optim.swa_utils.AveragedModel, "cannot be copied"),
    "pickle": (pickle.dumps, "Model has parameters whose values are in a store, so it cannot be pickled"),
    "pickle of a part": (lambda model: pickle.dumps(model.head), "Head has parameters .* cannot be pickled"),
    "torch.save": (lambda model: torch.save(model, io.BytesIO()), r"cannot be pickled: .* Use model\.state_dict\(\), which has"),
    "half": (lambda model: model.half(), r"\.to\(\), \.half\(\) or another conversion of Model would replace temperature"),
    "double": (lambda model: model.to(torch.float64), r"would replace temperature, whose value is in a store"),
    "part": (lambda model: model.layers[1].bfloat16(), r"conversion of Sequential would replace layers\.1\.0\.weight"),
    "meta": (lambda model: model.to("meta"), r"Where layers compute is said by LayerToLayer\(device=\.\.\.\)"),
    "empty": (lambda model: model.to_empty(device="cpu"), r"to convert the model, graphopt\.restore\(model\) first"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(make, name):
    """Before anything is changed, or memory is taken."""
    model, plain = make()
    function, text = REFUSED[name]
    with pytest.raises(StreamError, match=text):
        function(model)
    assert all(buffer.dtype in (torch.float32, torch.int64) and not buffer.is_meta for buffer in model.buffers())
    assert_same(model.state_dict(), plain.state_dict())
    assert_usable(model)


ALLOWED = {
    "to": lambda model: model.to("cpu"),
    "to dtype": lambda model: model.to(torch.float32),
    "float": lambda model: model.float(),
    "cpu": lambda model: model.cpu(),
    "share": lambda model: model.share_memory(),
    "eval": lambda model: model.eval().train(),
    "frozen": lambda model: model.requires_grad_(False).requires_grad_(True),
    "a part without parameters": lambda model: [copy.deepcopy(model.layers[0][1]), pickle.dumps(model.layers[0][1])],
    "zero_grad": lambda model: model.zero_grad(),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(make, name):
    model, plain = make()
    ALLOWED[name](model)
    assert_same(model.state_dict(), plain.state_dict())
    assert_usable(model)


def change_data(param):
    param.data = torch.ones(4, 4)


def change_dtype(param):
    param.data = param.data.double()


CHANGES = {
    "data": ("layers.0.0.weight", change_data),
    "dtype": ("embed.weight", change_dtype),
    "in place": ("temperature", lambda param: nn.init.ones_(param)),
    "in place, all at once": ("norm.weight", lambda param: nn.init.zeros_(param)),
    "by an optimizer of its own kind": ("temperature", lambda param: param.detach().add_(1)),
}


def test_values_of_their_own_are_refused_by_the_next_call(make):
    """Which would not see them."""
    model, _ = make()
    assert model(ids()).isfinite().all()
    model.temperature.data = torch.ones(1)
    with pytest.raises(StreamError, match=r"temperature was given a value of its own"):
        model(ids())


@pytest.mark.parametrize("name", CHANGES)
def test_values_of_their_own(make, name):
    model, plain = make()
    path, change = CHANGES[name]
    change(model.get_parameter(path))
    with pytest.raises(
        StreamError,
        match=rf"{re.escape(path)} was given a value of its own .*graphopt\.stream\(model\)\.value\('{re.escape(path)}'\)\.copy_",
    ):
        graphopt.stream(model).check()
    graphopt.stream(model).value(path).copy_(torch.full(plain.get_parameter(path).shape, 3.0))
    model.load_state_dict({path: model.state_dict()[path]}, strict=False)
    assert_usable(model)
    assert (model.state_dict()[path].load() == 3).all()


def test_reading_a_parameter_gives_nan(make):
    model, _ = make()
    assert all(param.isnan().all() for param in model.parameters())
    with pytest.raises(
        RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"
    ):
        model.embed.weight.data.mul_(2)
    assert_usable(model)


def test_restore_takes_everything_off(make):
    model, plain = make()
    assert any(hooks for name, hooks in vars(model.embed).items() if "state_dict" in name)
    graphopt.restore(model)
    for module in model.modules():
        assert not any(hooks for name, hooks in vars(module).items() if "state_dict" in name)
        assert not {"__deepcopy__", "__reduce_ex__", "_apply"} & set(vars(module))
    assert_same(copy.deepcopy(model).state_dict(), plain.state_dict())
    assert_same(pickle.loads(pickle.dumps(model.state_dict())), plain.state_dict())
    assert model.head.decoder.weight is model.embed.weight
    assert model.half().embed.weight.dtype is torch.float16
