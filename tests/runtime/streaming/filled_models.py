"""Models that are built on the meta device and filled from files, and what they are compared with."""

from collections.abc import Mapping

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import graphopt
from graphopt.passes import LayerToLayer
from graphopt.runtime.stores import StoredTensor

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 50}


def streamed(build, folder, **options):
    """The model of a store, built anew as another process would."""
    with torch.device("meta"):
        model = build()
    return graphopt.transform(model, [LayerToLayer(store="disk", store_path=folder, **options)], compiler="eager")


def assert_same(model, expected):
    """Parameters and all buffers; ``expected`` is a model in memory, or its state dict."""
    values = expected if isinstance(expected, Mapping) else expected.state_dict()
    assert list(model.state_dict()) == list(values)
    for name, value in model.state_dict().items():
        assert torch.equal(value.load() if isinstance(value, StoredTensor) else value, values[name]), name
    if not isinstance(expected, Mapping):
        buffers = dict(expected.named_buffers())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, buffers[name]), name


def assert_on_meta(model):
    assert all(type(param) is nn.Parameter and param.is_meta for param in model.parameters())


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 6)
        self.out.weight.requires_grad_(False)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.out(self.norm(x.flatten(0, 1)).view_as(x))


class Model(nn.Module):
    """With a child whose values its parent changes, as models of transformers do, and one that has no parameters."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(6, 11))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def reset_parameters(self):
        nn.init.normal_(self.head[1].weight, std=0.1)
        nn.init.zeros_(self.head[1].weight[2])
        self.head[1].weight.data[3] /= 7


def reset(module):
    for name in ("reset_parameters", "_reset_parameters"):
        if hasattr(module, name):
            getattr(module, name)()


class Scale(nn.Module):
    """Nothing says how it is initialised."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4.0))


def config_of(kind, **options):
    return {
        "llama": lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=1, **options),
        "gpt2": lambda: transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0, **options),
        "bert": lambda: transformers.BertConfig(**SMALL, **options),
        "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3, **options),
        "resnet": lambda: transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[2], **options),
    }[kind]()  # fmt: skip


TRANSFORMERS = {
    "llama": (transformers.LlamaForCausalLM, "llama", {}),
    "tied llama": (transformers.LlamaForCausalLM, "llama", {"tie_word_embeddings": True}),
    "gpt2": (transformers.GPT2LMHeadModel, "gpt2", {"tie_word_embeddings": True}),  # parents initialise their children
    "bert": (
        transformers.BertForMaskedLM,
        "bert",
        {"tie_word_embeddings": True},
    ),  # ties a child's bias with its parent's
    "mixtral": (transformers.MixtralForCausalLM, "mixtral", {}),  # files have a tensor for each expert
    "resnet": (transformers.ResNetForImageClassification, "resnet", {}),  # buffers that are saved
}


def initialised(kind, name, options):
    """A model of transformers with values that were drawn from seed 5, by its own means."""
    model = kind(config_of(name, **{**options, "tie_word_embeddings": False}))
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    torch.manual_seed(5)
    model.initialize_weights()
    if options:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return model


def bert(kind, **options):
    return kind(config_of("bert", **options))


def on_meta(build):
    with torch.device("meta"):
        return build()


LINEAR = lambda: on_meta(lambda: nn.Linear(3, 4))  # noqa: E731


def saved(tmp_path, **tensors):
    save_file(tensors, tmp_path / "m.safetensors")
    return {"checkpoint": tmp_path / "m.safetensors"}


def linear_with(tmp_path, **changes):
    return saved(tmp_path, **{"weight": torch.ones(4, 3), "bias": torch.ones(4), **changes})
