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
        kind: ``"bert"``, ``"gpt2"`` or ``"mlp"``.
        dropout: Whether the model's default dropout stays.
        seed: Of the weights and the data; afterwards torch's generator goes on from there.
        sizes: The keyword arguments of the function of that name below.
    """
    torch.manual_seed(seed)
    makers: dict[str, Callable[..., Workload]] = {"bert": bert, "gpt2": gpt2, "mlp": mlp}
    workload = makers[kind](**sizes)
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


def mlp(*, inputs: int = 784, hidden: int = 1024, depth: int = 3, outputs: int = 10, batch: int = 256) -> Workload:
    """Linear layers with ReLU between them, the size of MNIST by default; class and initialisation are torch's."""
    widths = [inputs, *[hidden] * depth]
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
    data = {"x": torch.randn(batch, inputs), "y": torch.randint(outputs, (batch,))}
    return Workload(model, data, _apply_to_x, _cross_entropy_of_y)


def _hugging_face(model: nn.Module, batch: Batch) -> Workload:
    return Workload(model, batch, lambda model, batch: model(**batch), lambda outputs, batch: outputs.loss)


def _apply_to_x(model: Callable[..., Any], batch: Batch) -> Tensor:
    output: Tensor = model(batch["x"])
    return output


def _cross_entropy_of_y(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch["y"])
