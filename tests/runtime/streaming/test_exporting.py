"""The files are those that safetensors and transformers write, and no more than one tensor is in memory."""

import json
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn

import graphopt
from graphopt.errors import OptionError, StreamError
from graphopt.passes import LayerToLayer
from graphopt.runtime.stores import DiskStore
from graphopt.runtime.streaming.exporting import save_safetensors
from graphopt.runtime.streaming.filling import fill_store

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e5m2fnuz, torch.float8_e4m3fnuz),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.complex64),
]
STATES = {
    "dtypes": lambda: {
        f"{name}.{dtype}": torch.randn(size).mul(3).abs().to(dtype)
        for dtype in DTYPES
        for name, size in (("b", 3), ("a", (2, 3)), ("c", ()))
    },
    "sizes": lambda: {"none": torch.ones(0, 4), "one": torch.ones(()), "large": torch.randn(700, 900)},
    "names": lambda: {'ü"\\\n': torch.ones(1), "z": torch.ones(1), "a b": torch.ones(2)},
    "views": lambda: {"t": torch.randn(3, 4).t(), "part": torch.randn(9)[::2]},
    "nothing": dict,
}


@pytest.mark.parametrize("name", STATES)
def test_the_bytes_are_those_of_safetensors(name, tmp_path):
    state = STATES[name]()
    save_safetensors(state, tmp_path / "folder")
    plain = {key: value.contiguous() for key, value in state.items()}
    save_file(plain, tmp_path / "expected.safetensors", {"format": "pt"})
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "folder" / "model.safetensors")
    assert all(
        torch.equal(found[key].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
        for key, value in plain.items()
    )


@pytest.mark.parametrize("limit", [1, 40, 100, 250, 10_000])
def test_shards(limit, tmp_path):
    """Cut where huggingface_hub cuts, with the index that transformers reads."""
    state = {f"layers.{index}": torch.randn(size) for index, size in enumerate((3, 10, 1, 7, 40, 2, 2))}
    state["tied"] = state["layers.1"]
    save_safetensors(state, tmp_path, max_shard_bytes=limit)
    expected = split_torch_state_dict_into_shards(
        {key: value for key, value in state.items() if key != "tied"}, max_shard_size=limit
    )
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == sorted(
        [*expected.filename_to_tensors, *(["model.safetensors.index.json"] if len(files) > 1 else [])]
    )
    for file, names in expected.filename_to_tensors.items():
        with safe_open(tmp_path / file, "pt") as content:
            assert sorted(content.keys()) == sorted(names)
            assert content.metadata() == {"format": "pt", **({"tied": "layers.1"} if "layers.1" in names else {})}
            assert all(torch.equal(content.get_tensor(key), state[key]) for key in names)
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == expected.tensor_to_filename
        assert index["metadata"] == {"total_size": 4 * 65, "total_parameters": 65}


def test_earlier_files_are_replaced(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for limit, num_files in ((1, 4), (10_000, 1), (1, 4), (13, 3)):
        save_safetensors({"a": torch.ones(3), "b": torch.zeros(2), "c": torch.ones(1)}, tmp_path, max_shard_bytes=limit)
        assert len(list(tmp_path.glob("*"))) == num_files + 1
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_files_are_replaced(moment, tmp_path, monkeypatch):
    """What is left has no index, so that nothing takes files of two exports for one."""
    save_safetensors({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path, max_shard_bytes=1)
    replace, count = Path.replace, 0

    def dying(self, target):
        nonlocal count
        count += 1
        if count > moment:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)
    if moment == 3:
        save_safetensors({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path, max_shard_bytes=1)
        assert (tmp_path / "model.safetensors.index.json").exists()
        return
    with pytest.raises(KeyboardInterrupt):
        save_safetensors({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path, max_shard_bytes=1)
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert not list(tmp_path.glob(".model-*"))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("scratch", torch.ones(2), persistent=False)


def test_round_trip(tmp_path):
    """From a streamed model to a model in memory, to the values that another store is filled with, and to a streamed one."""
    model, plain = Tied(), Tied()
    plain.load_state_dict(model.state_dict())
    graphopt.transform(model, [LayerToLayer(store="disk", store_path=tmp_path / "store")], compiler="eager")
    save_safetensors(model.state_dict(), tmp_path / "out", max_shard_bytes=200)
    assert len(list((tmp_path / "out").iterdir())) > 2
    save_safetensors(model.state_dict(), tmp_path / "one")
    other = Tied()
    load_model(other, tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in other.state_dict().items())
    with torch.device("meta"):
        again = Tied()
    fill_store(
        again,
        tmp_path / "again",
        checkpoint=tmp_path / "out",
        initialize=lambda module: None if module is not again else again.scratch.fill_(1),
    )
    with DiskStore(tmp_path / "again") as store:
        assert all(torch.equal(store.read(f"parameter/{name}"), param) for name, param in plain.named_parameters())
    load_model(model, tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(value.cpu(), plain.state_dict()[name]) for name, value in model.state_dict().items())


def test_transformers_reads_it(tmp_path):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, vocab_size=50,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    graphopt.transform(model, [LayerToLayer(store="cpu")], compiler="eager")
    save_safetensors(model.state_dict(), tmp_path, max_shard_bytes=3000)
    config.save_pretrained(tmp_path)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())


def test_one_tensor_in_memory(tmp_path, monkeypatch):
    model = graphopt.transform(Tied(), [LayerToLayer(store="disk", store_path=tmp_path / "store")], compiler="eager")
    read, last, count = DiskStore.read, lambda: None, 0

    def reading(self, key):
        nonlocal last, count
        assert last() is None, "the tensor before is still in memory"
        value = read(self, key)
        last, count = weakref.ref(value), count + 1
        return value

    monkeypatch.setattr(DiskStore, "read", reading)
    save_safetensors(model.state_dict(), tmp_path / "out")
    assert count == 6  # the tied one once


def test_errors(tmp_path):
    with pytest.raises(OptionError, match=r"save_safetensors\(max_shard_bytes=0\): it is at least 1"):
        save_safetensors({}, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(StreamError, match=r"extra is a int; a safetensors file holds tensors only"):
        save_safetensors({"extra": 3}, tmp_path / "out")
    with pytest.raises(StreamError, match=r"x is torch\.complex128, which the safetensors format does not know"):
        save_safetensors({"x": torch.ones(1, dtype=torch.complex128)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
