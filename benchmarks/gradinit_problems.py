"""What initialisations are compared on: two deep nets and the real data they are trained on, nothing of it downloaded.

A problem is named and sized by plain values, so that it can be built again in another process. Nets have what makes an
initialisation matter: convolutions in a row without normalisation or shortcuts, and a transformer that normalises after
each sum (post-LN), both deep for their width.
"""

from __future__ import annotations

import math
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Tensor]
CHANCE_MARGIN = 2.0  # accuracies below so many times chance count as chance


class Problem(ABC):
    """A net, its data, and how it is trained.

    Attributes:
        score: what is reported of the validation and the test data.
        higher_is_better: of two scores.
        clip: the largest norm of a training step's gradient; None leaves it.
    """

    score: ClassVar[str]
    higher_is_better: ClassVar[bool]
    clip: ClassVar[float | None] = None

    @abstractmethod
    def net(self) -> nn.Module:
        """A net with PyTorch's default initialisation, drawn from torch's generator."""

    @abstractmethod
    def optimizer(self, net: nn.Module, rate: float) -> torch.optim.Optimizer:
        """What trains it; the rate stays as it is but for the warm-up."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Training data without end."""

    @abstractmethod
    def loss(self, net: Any, batch: Batch) -> Tensor:
        """The mean over the batch."""

    @abstractmethod
    def scores(self, net: nn.Module) -> tuple[float, float]:
        """Of the validation data, and of the test data; the worst possible one if the net's output is not finite."""

    @abstractmethod
    def has_learnt(self, score: float) -> bool:
        """False where a score says that the net has stalled or diverged."""


class Digits(Problem):
    """Convolutions with ReLU and nothing else, on scikit-learn's handwritten digits (1797 images of 8 x 8); SGD, momentum 0.9.

    Args:
        depth: number of convolutions.
        channels: of each.
        batch: images.
    """

    score, higher_is_better, clip = "accuracy", True, 1.0
    NUM_VALIDATION, NUM_TEST = 300, 400

    def __init__(self, *, depth: int = 16, channels: int = 16, batch: int = 64) -> None:
        from sklearn.datasets import load_digits

        self.depth, self.channels, self.batch = depth, channels, batch
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y = ((x - x.mean()) / x.std())[order], torch.tensor(labels)[order]
        sizes = len(x) - self.NUM_VALIDATION - self.NUM_TEST, self.NUM_VALIDATION, self.NUM_TEST
        self.train, self.validation, self.test = (
            {"x": images, "y": labels} for images, labels in zip(x.split(sizes), y.split(sizes), strict=True)
        )

    def net(self) -> nn.Module:
        widths = [1] + [self.channels] * self.depth
        layers = [(nn.Conv2d(width, following, 3, padding=1), nn.ReLU()) for width, following in pairwise(widths)]
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.channels, 10)
        return nn.Sequential(*(module for layer in layers for module in layer), *head)

    def optimizer(self, net: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train["x"]), generator=generator)
            for indices in order.split(self.batch):
                if len(indices) == self.batch:
                    yield {name: tensor[indices] for name, tensor in self.train.items()}

    def loss(self, net: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch["x"]), batch["y"])

    @torch.no_grad()
    def scores(self, net: nn.Module) -> tuple[float, float]:
        return self._accuracy(net, self.validation), self._accuracy(net, self.test)

    def _accuracy(self, net: nn.Module, batch: Batch) -> float:
        outputs = net(batch["x"])
        if not outputs.isfinite().all():
            return 0.0
        return (outputs.argmax(1) == batch["y"]).float().mean().item()

    def has_learnt(self, score: float) -> bool:
        return score > CHANCE_MARGIN / 10


class Characters(Problem):
    """A post-LN transformer that reads characters of Python's standard library and says the next one; Adam.

    Args:
        layers: blocks of attention and a network of two layers with ReLU, each summed and then normalised.
        width: of them.
        heads: of the attention.
        length: characters of a sample.
        batch: samples.
        num_scored: samples of the validation data, and of the test data.
    """

    score, higher_is_better = "loss", False
    NUM_CHARACTERS = 128

    def __init__(
        self,
        *,
        layers: int = 12,
        width: int = 64,
        heads: int = 4,
        length: int = 32,
        batch: int = 8,
        num_scored: int = 96,
    ) -> None:
        self.layers, self.width, self.heads, self.length, self.batch = layers, width, heads, length, batch
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        parts = [b"".join(path.read_bytes() for path in files[number::10]) for number in range(10)]
        texts = [torch.frombuffer(bytearray(part), dtype=torch.uint8).clamp(max=127).long() for part in parts]
        self.train = torch.cat(texts[2:])  # whole files apart: eight tenths of them, and one each
        self.validation, self.test = (self._cut(text, num_scored, seed=0) for text in texts[:2])
        frequencies = torch.bincount(self.train, minlength=self.NUM_CHARACTERS).double()
        frequencies = frequencies / frequencies.sum()
        self.entropy = -torch.special.xlogy(frequencies, frequencies).sum().item()

    def net(self) -> nn.Module:
        return _Transformer(self.NUM_CHARACTERS, self.length, self.layers, self.width, self.heads)

    def optimizer(self, net: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), lr=rate, betas=(0.9, 0.98), fused=True)

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self._cut(self.train, self.batch, generator=generator)

    def loss(self, net: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(net(batch["x"]).flatten(0, 1), batch["y"].flatten())

    @torch.no_grad()
    def scores(self, net: nn.Module) -> tuple[float, float]:
        worst = math.log(self.NUM_CHARACTERS)
        found = (self.loss(net, batch).item() for batch in (self.validation, self.test))
        validation, test = (loss if math.isfinite(loss) else worst for loss in found)
        return validation, test

    def has_learnt(self, score: float) -> bool:
        """Whether it knows more than how often each character occurs: at least 0.1 nat less than the unigram entropy."""
        return score < self.entropy - 0.1

    def _cut(self, text: Tensor, num: int, *, seed: int = 0, generator: torch.Generator | None = None) -> Batch:
        generator = generator or torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - self.length - 1, (num, 1), generator=generator)
        samples = text[starts + torch.arange(self.length + 1)]
        return {"x": samples[:, :-1], "y": samples[:, 1:]}


PROBLEMS: dict[str, type[Problem]] = {"digits": Digits, "characters": Characters}


def he(net: nn.Module) -> None:
    """He's initialisation of every weight of a convolution or linear layer, for ReLU; biases are zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)


def xavier(net: nn.Module) -> None:
    """Glorot's uniform initialisation of every convolution and linear layer, the usual one of transformers; biases are zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def orthogonal(net: nn.Module) -> None:
    """What LSUV starts from: orthonormal weights of convolutions and linear layers; biases are zero."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)


START: dict[str, Callable[[nn.Module], object]] = {
    "default": lambda net: None,
    "he": he,
    "xavier": xavier,
    "orthogonal": orthogonal,
}


class _Transformer(nn.Module):
    def __init__(self, characters: int, length: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(characters, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(hidden)
        return logits


class _Block(nn.Module):
    """Attention is written out: its fused kernels cannot be differentiated twice by eager PyTorch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.first_norm(hidden + self._attention(hidden))
        output: Tensor = self.second_norm(hidden + self.narrow(F.relu(self.widen(hidden))))
        return output

    def _attention(self, hidden: Tensor) -> Tensor:
        samples, length, width = hidden.shape
        parts = self.attend(hidden).view(samples, length, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        weights = queries @ keys.transpose(-1, -2) / math.sqrt(width // self.heads)
        later = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
        mixed = weights.masked_fill(later, -math.inf).softmax(-1) @ values
        output: Tensor = self.project(mixed.transpose(1, 2).flatten(2))
        return output
