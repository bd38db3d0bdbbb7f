"""The models and batches that benchmarks train: built from configurations, with synthetic data; nothing is downloaded.

A workload is named and sized by plain values, so that it can be built again in another process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass
class Workload:
    """A model in training mode and a batch for it.

    Args:
        model: What is trained.
        batch: Tensors whose first axis is the samples.
        forward: ``(model, batch) -> outputs``, and
        criterion: ``(outputs, batch) -> loss``, the mean over the samples.
    """

    model: nn.Module
    batch: Batch
    forward: Callable[[Callable[..., Any], Batch], Any]
    criterion: Callable[[Any, Batch], Tensor]

    @property
    def num_samples(self) -> int:
        """The batch's size."""
        return len(next(iter(self.batch.values())))

    def loss(self, model: Callable[..., Any] | None = None, batch: Batch | None = None) -> Tensor:
        """The mean loss of ``batch``, the workload's own by default."""
        batch = self.batch if batch is None else batch
        return self.criterion(self.forward(self.model if model is None else model, batch), batch)

    def sample(self, index: int) -> Batch:
        """A batch of one."""
        return {name: tensor[index : index + 1] for name, tensor in self.batch.items()}


def make(kind: str, *, dropout: bool = True, seed: int = 0, **sizes: int) -> Workload:
    """Build a workload, the same one for the same arguments.

    Args:
        kind: ``"bert"``, ``"gpt2"``, ``"llama"``, ``"llama_layers"``, ``"mlp"``, ``"resnet"`` or ``"cnn"``.
        dropout: Whether the model's default dropout stays.
        seed: Of the weights and the data; afterwards torch's generator goes on from there.
        sizes: The keyword arguments of the function of that name below.
    """
    torch.manual_seed(seed)
    makers: tuple[Callable[..., Workload], ...] = (bert, gpt2, llama, llama_layers, mlp, resnet, cnn)
    workload = next(maker for maker in makers if maker.__name__ == kind)(**sizes)
    workload.model.train()
    if not dropout:
        for module in workload.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # transformers' attention reads it from such a module, too
    return workload


def bert(*, layers: int = 4, hidden: int = 256, heads: int = 4, batch: int = 16, length: int = 128) -> Workload:
    """Hugging Face's BERT for sequence classification, with its default vocabulary (30522 tokens) and dropout (0.1)."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        problem_type="single_label_classification",
    )
    tokens = torch.randint(1000, config.vocab_size, (batch, length))
    labels = torch.randint(config.num_labels, (batch,))
    return _hugging_face(BertForSequenceClassification(config), {"input_ids": tokens, "labels": labels})


def gpt2(
    *, layers: int = 4, hidden: int = 256, heads: int = 4, vocabulary: int = 50257, batch: int = 8, length: int = 128
) -> Workload:
    """Hugging Face's GPT-2 language model: the token embedding is also the output projection."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    tokens = torch.randint(vocabulary, (batch, length))
    return _hugging_face(GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens})


def llama(
    *,
    layers: int = 4,
    hidden: int = 256,
    intermediate: int = 704,
    heads: int = 4,
    vocabulary: int = 1000,
    batch: int = 8,
    length: int = 128,
    meta: bool = False,
) -> Workload:
    """Hugging Face's Llama language model; with ``meta`` without values, on the meta device."""
    from transformers import LlamaForCausalLM

    config = _llama_config(layers, hidden, intermediate, heads, vocab_size=vocabulary)
    with torch.device("meta" if meta else "cpu"):
        model = LlamaForCausalLM(config)
    tokens = torch.randint(vocabulary, (batch, length))
    return _hugging_face(model, {"input_ids": tokens, "labels": tokens})


def llama_layers(
    *, layers: int = 12, hidden: int = 512, intermediate: int = 1408, heads: int = 8, batch: int = 8, length: int = 128
) -> Workload:
    """Hugging Face's Llama layers in a row, from one tensor to one tensor: a layer takes nothing but what the one before gave.

    The loss is the mean squared distance from random targets.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = _llama_config(layers, hidden, intermediate, heads)
    model = _InARow([_WithPositions(LlamaDecoderLayer(config, 0), LlamaRotaryEmbedding(config)) for _ in range(layers)])
    data = {name: torch.randn(batch, length, hidden) for name in ("x", "y")}
    return Workload(model, data, _apply_to_x, lambda outputs, batch: F.mse_loss(outputs, batch["y"]))


def mlp(*, inputs: int = 784, hidden: int = 1024, depth: int = 3, outputs: int = 10, batch: int = 256) -> Workload:
    """Linear layers with ReLU between them, the size of MNIST by default; class and initialisation are torch's."""
    widths = [inputs, *[hidden] * depth]
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
    data = {"x": torch.randn(batch, inputs), "y": torch.randint(outputs, (batch,))}
    return Workload(model, data, _apply_to_x, _cross_entropy_of_y)


def resnet(
    *, width: int = 32, blocks: int = 2, size: int = 32, outputs: int = 10, batch: int = 64, grouped: bool = False
) -> Workload:
    """A residual network for images of CIFAR's size: three stages of 3x3 convolutions, each half as large and twice as wide.

    Args:
        width: Channels of the first stage.
        blocks: Residual blocks of each stage, two convolutions each.
        size: Rows and columns of an image.
        outputs: Classes.
        batch: Images.
        grouped: GroupNorm instead of BatchNorm, which makes samples independent of each other.
    """
    stages = [_Block(3, width, 1, grouped)]
    for stage in range(3):
        for block in range(blocks):
            inputs = stages[-1].outputs
            stages.append(_Block(inputs, width << stage, 2 if stage and not block else 1, grouped))
    model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stages[-1].outputs, outputs))
    return Workload(model, _images(batch, size, outputs), _apply_to_x, _cross_entropy_of_y)


def cnn(*, width: int = 32, size: int = 32, outputs: int = 10, batch: int = 64) -> Workload:
    """Convolutions, ReLU and pooling in a row, without anything that BackPACK does not know."""
    layers: list[nn.Module] = []
    inputs = 3
    for stage in range(3):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width << stage, 3, padding=1), nn.ReLU()]
            inputs = width << stage
        layers.append(nn.MaxPool2d(2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * (size // 8) ** 2, outputs))
    return Workload(model, _images(batch, size, outputs), _apply_to_x, _cross_entropy_of_y)


class _InARow(nn.Module):
    """Modules that are called one after the other; a list holds them, as layer-to-layer-pytorch wants it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input = layer(input)
        return input


class _WithPositions(nn.Module):
    """A layer of a decoder that makes its rotary tables itself."""

    def __init__(self, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, input: Tensor) -> Tensor:
        positions = torch.arange(input.shape[1], device=input.device).unsqueeze(0)
        output: Tensor = self.layer(input, position_embeddings=self.rotary(input, positions))
        return output


class _Block(nn.Module):
    """Two convolutions and what they are added to; the first of all blocks has none to add to."""

    def __init__(self, inputs: int, outputs: int, stride: int, grouped: bool) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.GroupNorm(4, outputs) if grouped else nn.BatchNorm2d(outputs)

        self.outputs = outputs
        self.first, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm()
        self.second, self.last_norm = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm()
        same = stride == 1 and inputs == outputs
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm())

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu(self.norm(self.first(input)))
        output: Tensor = F.relu(self.last_norm(self.second(hidden)) + self.skip(input))
        return output


def _llama_config(layers: int, hidden: int, intermediate: int, heads: int, **more: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        attn_implementation="sdpa",
        use_cache=False,
        **more,
    )


def _images(batch: int, size: int, outputs: int) -> Batch:
    return {"x": torch.randn(batch, 3, size, size), "y": torch.randint(outputs, (batch,))}


def _hugging_face(model: nn.Module, batch: Batch) -> Workload:
    return Workload(model, batch, lambda model, batch: model(**batch), lambda outputs, batch: outputs.loss)


def _apply_to_x(model: Callable[..., Any], batch: Batch) -> Tensor:
    output: Tensor = model(batch["x"])
    return output


def _cross_entropy_of_y(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch["y"])
