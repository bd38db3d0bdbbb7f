"""Small models that the tests train: each builder returns a module and a batch for it.

Modules are in float32; ``double`` makes a module and its batch float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_SAMPLES = 4


def double(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """Module and batch in float64; integers stay."""
    wide = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    return module.double(), tuple(wide)


def smooth(output: Tensor) -> Tensor:
    """A loss of no special form: the gradient differs from entry to entry and from sample to sample."""
    return (output + 0.3 * torch.arange(output.shape[-1], device=output.device)).sin().sum()


# --- written by hand -------------------------------------------------------------------------------------------------------


def mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)), (torch.randn(NUM_SAMPLES, 3),)


class RMSNorm(nn.Module):
    """In elementary operators, as Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Attention(nn.Module):
    """One product for queries, keys and values, cut in three; a temperature for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = (q @ k.transpose(-2, -1)) * self.temperature / math.sqrt(d / self.heads)
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        probabilities = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.out((probabilities @ v).transpose(1, 2).reshape(n, t, d))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.attention = RMSNorm(width), Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def transformer_block() -> tuple[nn.Module, tuple[Any, ...]]:
    return Block(4), (torch.randn(NUM_SAMPLES, 5, 4),)


class Positions(nn.Module):
    """A table of positions that is looked up once and added to every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        return self.head(torch.tanh(x + self.table(ids)))


class ClassToken(nn.Module):
    """A token that is expanded to the batch and joined to it."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 3)), nn.Parameter(torch.randn(1, 6, 3))
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(torch.tanh(self.mix(x.transpose(1, 2)).transpose(1, 2)))[:, 0]


class LoRA(nn.Module):
    """A frozen weight and a trainable product of two factors, in two forms."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 4)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2))
        self.merged_down, self.merged_up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.base(x) + 0.5 * F.linear(F.linear(x, self.down), self.up))
        return F.linear(x, self.merged_up @ self.merged_down)


class TiedLM(nn.Module):
    """A table that is also the output projection."""

    def __init__(self, *, bias: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(7, 3), nn.Linear(3, 3)
        self.bias = nn.Parameter(torch.randn(7)) if bias else None
        self.twice = twice

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.mix(self.table(ids)))
        if self.twice:
            x = x + torch.tanh(self.table((3 * ids[:, :2] + 1) % 7)).mean(1, keepdim=True)
        return F.linear(x, self.table.weight, self.bias)


class Shared(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(torch.tanh(self.norm(self.layer(x)))))


class Experts(nn.Module):
    """All experts for all rows, weighted by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 3, 4))
        self.bias = nn.Parameter(torch.randn(2, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        rows = x.reshape(n * t, d)
        each = torch.bmm(rows.expand(2, -1, -1), self.weight) + self.bias  # (experts, rows, out)
        gate = self.gate(rows).softmax(-1).t().unsqueeze(-1)
        return (each * gate).sum(0).view(n, t, -1)


class EinsumHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Parameter(torch.randn(2, 3, 4)), nn.Parameter(torch.randn(2, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bthe,hed->btd", torch.tanh(torch.einsum("btd,hde->bthe", x, self.inward)), self.outward)


class Temperature(nn.Module):
    """A scalar parameter, and one that scales a similarity."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.log_scale = nn.Linear(3, 4), nn.Parameter(torch.tensor(0.3))
        self.shift = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.layer(x), dim=-1) * self.log_scale.exp() + self.shift


class WeightNorm(nn.Module):
    """The weight is computed from two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.length = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.rand(4, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.direction / self.direction.norm(dim=1, keepdim=True) * self.length)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)
        )
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class MixedFrozen(nn.Module):
    """Every other parameter is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.norm, self.last = (
            nn.Embedding(7, 3),
            nn.Linear(3, 4),
            nn.LayerNorm(4),
            nn.Linear(4, 2),
        )
        for frozen in (self.table.weight, self.first.bias, self.norm.weight, self.last.weight):
            frozen.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.first(self.table(ids)))))


def _ids(*shape: int) -> Tensor:
    return torch.randint(0, 7, (NUM_SAMPLES, *shape))


def _rows(*shape: int) -> Tensor:
    return torch.randn(NUM_SAMPLES, *shape)


MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "mlp": mlp,
    "transformer_block": transformer_block,
    "positions": lambda: (Positions(), (_rows(5, 3),)),
    "class_token": lambda: (ClassToken(), (_rows(5, 3),)),
    "lora": lambda: (LoRA(), (_rows(5, 3),)),
    "tied": lambda: (TiedLM(), (_ids(5),)),
    "tied_bias": lambda: (TiedLM(bias=True), (_ids(5),)),
    "tied_three_uses": lambda: (TiedLM(bias=True, twice=True), (_ids(5),)),
    "shared": lambda: (Shared(), (_rows(5, 3),)),
    "experts": lambda: (Experts(), (_rows(5, 3),)),
    "einsum_heads": lambda: (EinsumHeads(), (_rows(5, 3),)),
    "temperature": lambda: (Temperature(), (_rows(5, 3),)),
    "weight_norm": lambda: (WeightNorm(), (_rows(5, 3),)),
    "conv_net": lambda: (ConvNet(), (_rows(2, 6, 6),)),
    "mixed_frozen": lambda: (MixedFrozen(), (_ids(5),)),
}


# --- Hugging Face ------------------------------------------------------------------------------------------------------------

# One layer each: a second one has the same operators. T5 has two, which share the relative positions of the first.


@dataclass(frozen=True)
class HuggingFace:
    """A model, a function that makes a batch of it, and how much each sample weighs in the loss of the batch.

    Attributes:
        model: in train mode.
        batch: number of samples to keyword arguments, labels among them.
        weight: the labels of one sample to the number of terms it adds to the mean that is the loss.
    """

    model: nn.Module
    batch: Callable[[int], dict[str, Tensor]]
    weight: Callable[[Tensor], int]

    def sample_losses(self, batch: dict[str, Tensor]) -> Any:
        """What each sample adds to the loss of the batch."""
        num = len(batch["labels"])
        counts = [self.weight(batch["labels"][n : n + 1]) for n in range(num)]
        for n, count in enumerate(counts):
            one = {name: value[n : n + 1] for name, value in batch.items()}
            yield self.model(**one).loss * (count / sum(counts))


def _tokens(num: int, length: int = 6, vocabulary: int = 29) -> Tensor:
    return torch.randint(2, vocabulary, (num, length))


def _padding_mask(num: int, length: int = 6) -> Tensor:
    lengths = 2 + torch.arange(num) % (length - 1)
    return (torch.arange(length) < lengths[:, None]).long()


def _masked(num: int) -> dict[str, Tensor]:
    ids, mask = _tokens(num), _padding_mask(num)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _all_terms(labels: Tensor) -> int:
    return labels.numel()


def _kept_terms(labels: Tensor) -> int:
    return int((labels != -100).sum())


def _shifted_terms(labels: Tensor) -> int:
    return int((labels[:, 1:] != -100).sum())


def bert_classifier(dropout: float = 0.0) -> HuggingFace:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(_bert(dropout, num_labels=3))

    def batch(num: int) -> dict[str, Tensor]:
        return {"input_ids": _tokens(num), "attention_mask": _padding_mask(num), "labels": torch.arange(num) % 3}

    return HuggingFace(model.train(), batch, _all_terms)


def bert_masked_lm(dropout: float = 0.0) -> HuggingFace:
    from transformers import BertForMaskedLM

    return HuggingFace(BertForMaskedLM(_bert(dropout)).train(), _masked, _kept_terms)


def _bert(dropout: float, **options: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=29, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **options,
    )  # fmt: skip


def gpt2(dropout: float = 0.0) -> HuggingFace:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=29, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
    )  # fmt: skip
    return HuggingFace(GPT2LMHeadModel(config).train(), _masked, _shifted_terms)


def llama(dropout: float = 0.0) -> HuggingFace:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=29, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, attention_dropout=dropout,
    )  # fmt: skip
    return HuggingFace(LlamaForCausalLM(config).train(), _masked, _shifted_terms)


def t5(dropout: float = 0.0) -> HuggingFace:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=29, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, relative_attention_num_buckets=8,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, dropout_rate=dropout,
    )  # fmt: skip

    def batch(num: int) -> dict[str, Tensor]:
        labels = _tokens(num, 5)
        return {**_masked(num), "labels": labels.masked_fill(_padding_mask(num, 5) == 0, -100)}

    return HuggingFace(T5ForConditionalGeneration(config).train(), batch, _kept_terms)


def vit(dropout: float = 0.0) -> HuggingFace:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip

    def batch(num: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(num, 3, 8, 8), "labels": torch.arange(num) % 3}

    return HuggingFace(ViTForImageClassification(config).train(), batch, _all_terms)


HUGGING_FACE: dict[str, Callable[..., HuggingFace]] = {
    "bert_classifier": bert_classifier,
    "bert_masked_lm": bert_masked_lm,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "vit": vit,
}
