"""Safetensors files give a model on the meta device its values, under the names and in the parts that transformers writes."""

import os
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from graphopt.errors import OptionError, StoreError
from graphopt.runtime.stores import DiskStore
from graphopt.runtime.streaming.filling import fill_store
from tests.runtime.streaming.filled_models import (
    LINEAR,
    SMALL,
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
    streamed,
)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_checkpoint(quiet, name, tmp_path):
    """What ``save_pretrained`` writes is loaded, and what a streamed model writes is read by ``from_pretrained``."""
    kind, config, options = TRANSFORMERS[name]
    expected = initialised(kind, config, options)
    expected.save_pretrained(tmp_path / "saved", max_shard_size=2000)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    with torch.device("meta"):
        model = kind(config_of(config, **options))
    fill_store(model, tmp_path / "store", checkpoint=tmp_path / "saved")
    model = streamed(lambda: kind(config_of(config, **options)), tmp_path / "store")
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "again", max_shard_size=2000)
    assert sorted(os.listdir(tmp_path / "again")) == sorted(os.listdir(tmp_path / "saved"))
    assert_same(kind.from_pretrained(tmp_path / "again"), expected)


HEADS = {  # saved, built, whether something must be initialised
    "without its prefix": (transformers.BertModel, transformers.BertForSequenceClassification, True),
    "with its prefix": (transformers.BertForSequenceClassification, transformers.BertModel, False),
    "with another head": (transformers.BertForTokenClassification, transformers.BertForMaskedLM, True),
}


@pytest.mark.parametrize("name", HEADS)
def test_parts_of_models(quiet, name, tmp_path):
    """The base model is found with its prefix or without; heads of other tasks are passed over."""
    saved, built, is_incomplete = HEADS[name]
    expected = bert(saved)
    expected.save_pretrained(tmp_path / "saved")
    with torch.device("meta"):
        model = bert(built)
    if is_incomplete:
        with pytest.raises(
            StoreError, match=r"does not fit Bert.*it lacks .*pass initialize= as well: model\._init_weights"
        ):
            fill_store(model, tmp_path / "store", checkpoint=tmp_path / "saved")
    fill_store(
        model,
        tmp_path / "store",
        checkpoint=tmp_path / "saved",
        initialize=model._init_weights if is_incomplete else None,
    )
    model = streamed(lambda: bert(built), tmp_path / "store")
    base = {key.removeprefix("bert."): value for key, value in model.state_dict().items()}
    reference = {key.removeprefix("bert."): value for key, value in expected.state_dict().items()}
    shared = [key for key in base if key in reference]
    assert len(shared) > 35
    assert all(torch.equal(base[key].load(), reference[key]) for key in shared)
    for key in set(base) - set(shared):
        assert base[key].load().abs().max() < 1.01, key


def test_old_names(quiet, tmp_path):
    """Files of early versions: norms have a gamma and a beta, and a buffer was saved."""
    expected = bert(transformers.BertModel)
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
        for key, value in expected.state_dict().items()
    }
    old["embeddings.position_ids"] = torch.arange(512)[None]
    save_file(old, tmp_path / "old.safetensors")
    with torch.device("meta"):
        model = bert(transformers.BertModel)
    fill_store(model, tmp_path / "store", checkpoint=tmp_path / "old.safetensors")
    assert_same(streamed(lambda: bert(transformers.BertModel), tmp_path / "store"), expected)


@pytest.fixture
def files(tmp_path):
    """A model with values, and its files."""
    model = Model()
    torch.manual_seed(1)
    model.apply(reset)
    names = list(model.state_dict())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, tmp_path / "all.safetensors")
    save_file({name: state[name] for name in names[:5]}, tmp_path / "a.safetensors")
    save_file({name: state[name] for name in names[5:]}, tmp_path / "b.safetensors")
    return model


@pytest.mark.parametrize(
    "paths", [["all.safetensors"], ["a.safetensors", "b.safetensors"], "all.safetensors"], ids=["list", "two", "file"]
)
def test_checkpoint(files, paths, tmp_path):
    with torch.device("meta"):
        model = Model()
    checkpoint = tmp_path / paths if isinstance(paths, str) else [tmp_path / path for path in paths]
    fill_store(model, tmp_path / "store", checkpoint=checkpoint)
    assert_on_meta(model)
    assert torch.equal(model.blocks[0].norm.running_var, torch.ones(6))
    assert_same(streamed(Model, tmp_path / "store"), files)


def test_checkpoint_of_another_dtype(tmp_path):
    value = torch.randn(4, 3, dtype=torch.float64)
    save_file({"weight": value, "bias": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with torch.device("meta"):
            model = nn.Linear(3, 4)
        fill_store(model, tmp_path / str(dtype), checkpoint=tmp_path / "m.safetensors", dtype=dtype)
        with DiskStore(tmp_path / str(dtype)) as store:
            assert torch.equal(store.read("parameter/weight"), value.to(expected))


def test_checkpoint_and_initialize(files, tmp_path):
    """What the files have is loaded, whatever is done to it before; the rest is initialised."""
    with torch.device("meta"):
        model = nn.ModuleDict({"embed": nn.Embedding(11, 6), "scale": Scale()})
    save_file({"embed.weight": torch.ones(11, 6)}, tmp_path / "part.safetensors")

    def initialize(module):
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(7)

    fill_store(model, tmp_path / "store", checkpoint=tmp_path / "part.safetensors", initialize=initialize)
    with DiskStore(tmp_path / "store") as store:
        assert (store.read("parameter/embed.weight") == 1).all()
        assert (store.read("parameter/scale.scale") == 7).all()
    assert (model["scale"].table == 7).all()


def test_shapes_that_differ_are_not_all_listed(quiet, tmp_path):
    bert(transformers.BertModel).save_pretrained(tmp_path / "saved")
    model = on_meta(lambda: transformers.BertModel(transformers.BertConfig(**{**SMALL, "hidden_size": 8})))
    with pytest.raises(
        StoreError,
        match=r"does not fit BertModel: (\S+ is \[.*\] in it and \[.*\] in the model; ){5}and \d+ more shapes differ$",
    ):
        fill_store(model, tmp_path / "store", checkpoint=tmp_path / "saved")


def test_two_tensors_for_one(quiet, tmp_path):
    state = {key: value.clone() for key, value in bert(transformers.BertModel).state_dict().items()}
    save_file({**state, "embeddings.LayerNorm.gamma": torch.ones(16)}, tmp_path / "m.safetensors")
    with pytest.raises(
        StoreError,
        match=r"the checkpoint has two tensors for embeddings\.LayerNorm\.weight: embeddings\.LayerNorm\.gamma and embed",
    ):
        fill_store(
            on_meta(lambda: bert(transformers.BertModel)), tmp_path / "store", checkpoint=tmp_path / "m.safetensors"
        )


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({"other": torch.ones(4)}, r"the checkpoint's bias becomes other, which the model does not have"),
        ({}, r"the checkpoint has no values for weight, bias"),
    ],
    ids=["another name", "nothing"],
)
def test_conversions_that_go_wrong(found, text, tmp_path, monkeypatch):
    """Those of transformers may make of tensors what the model cannot take."""
    monkeypatch.setattr("graphopt.runtime.streaming.checkpoints.Group.read", lambda *_: dict(found))
    with pytest.raises(StoreError, match=text):
        fill_store(LINEAR(), tmp_path / "store", **linear_with(tmp_path))


def test_safetensors_is_needed_for_checkpoints_only(tmp_path, monkeypatch):
    options = linear_with(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(OptionError, match=r"checkpoint= reads safetensors files: pip install 'safetensors>=0\.8'"):
        fill_store(LINEAR(), tmp_path / "store", **options)
    fill_store(LINEAR(), tmp_path / "store")
