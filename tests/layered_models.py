"""Small models with layers, of every kind of connection between them: each builder returns a module and keyword arguments.

Each model returns a scalar loss, or a tensor that the tests make one of with `scalar`. ``layers`` says how many regions `LayerToLayer`
should find, and how many of them are distinct, in float32 with ``boundaries="auto"``; ``None`` where that is not the point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import Block

N, T, D = 5, 4, 6


@dataclass(frozen=True)
class Layered:
    """A model for tests: how to make it, what is special, and how many regions are found in it."""

    build: Callable[[], tuple[nn.Module, dict[str, Any]]]
    regions: int | None = None
    distinct: int | None = None
    splits: bool = True  # all layers but the loss run in micro-batches


MODELS: dict[str, Layered] = {}


def layered(regions: int | None = None, distinct: int | None = None, splits: bool = True) -> Any:
    def register(build: Any) -> Any:
        MODELS[build.__name__] = Layered(build, regions, distinct, splits)
        return build

    return register


def scalar(output: Any) -> Tensor:
    """A loss that differs from entry to entry and from sample to sample."""
    if isinstance(output, Tensor) and output.ndim == 0:
        return output
    weight = 0.3 * torch.arange(output.shape[-1], device=output.device)
    return (output + weight).sin().square().sum()


class Stack(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, layers: list[nn.Module], vocabulary: int = 11) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, D)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def ids() -> Tensor:
    return torch.randint(0, 11, (N, T))


@layered(regions=5, distinct=3)
def transformer() -> tuple[nn.Module, dict[str, Any]]:
    return Stack([Block(D) for _ in range(3)]), {"ids": ids()}


class WithLoss(Stack):
    def forward(self, ids: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        logits = super().forward(ids)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction=reduction)


@layered(regions=5, distinct=3)
def mean_loss_inside() -> tuple[nn.Module, dict[str, Any]]:
    labels = torch.randint(0, 11, (N, T))
    labels[0, 1:] = -100
    return WithLoss([Block(D) for _ in range(3)]), {"ids": ids(), "labels": labels}


@layered()
def sum_loss_inside() -> tuple[nn.Module, dict[str, Any]]:
    return WithLoss([Block(D) for _ in range(2)]), {"ids": ids(), "labels": ids(), "reduction": "sum"}


class Squared(Stack):
    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(super().forward(ids), target)


@layered()
def squared_loss_inside() -> tuple[nn.Module, dict[str, Any]]:
    return Squared([Block(D) for _ in range(2)]), {"ids": ids(), "target": torch.randn(N, T, 11)}


class MaskedLayer(nn.Module):
    """Takes a mask that differs from sample to sample, a table that all share, and hands on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.gate = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor, memory: Tensor, *, mask: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.q(x + table) @ self.k(x + table).mT / D**0.5
        weights = scores.masked_fill(~mask[:, None, :], float("-inf")).softmax(-1)
        x = x + self.out(weights @ self.v(x))
        return x, memory * self.gate + x


class Masked(nn.Module):
    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.positions = nn.Parameter(torch.randn(T, D) / 4)
        self.layers = nn.ModuleList(MaskedLayer() for _ in range(num_layers))

    def forward(self, ids: Tensor, *, mask: Tensor) -> Tensor:
        first = x = self.embed(ids)
        memory, table = torch.zeros_like(x), torch.tanh(self.positions)
        for layer in self.layers:
            x, memory = layer(x, memory, mask=mask, table=table)
        return x + memory + first  # the first value skips all layers


@layered(regions=5, distinct=3)
def mask_table_and_skip() -> tuple[nn.Module, dict[str, Any]]:
    mask = torch.ones(N, T, dtype=torch.bool)
    mask[1, 2:] = False
    return Masked(), {"ids": ids(), "mask": mask}


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.encoder = nn.ModuleList(Block(D) for _ in range(2))
        self.decoder = nn.ModuleList(Block(D) for _ in range(2))
        self.cross = nn.ModuleList(nn.Linear(2 * D, D) for _ in range(2))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.embed(source)
        for block in self.encoder:
            memory = block(memory)
        x = self.embed(target)
        for block, cross in zip(self.decoder, self.cross, strict=True):
            x = block(x) + cross(torch.cat([x, memory.mean(1, keepdim=True).expand_as(x)], -1))
        return F.linear(x, self.embed.weight)  # tied, used three times


@layered()
def encoder_decoder() -> tuple[nn.Module, dict[str, Any]]:
    return EncoderDecoder(), {"source": ids(), "target": torch.randint(0, 11, (N, 3))}


class TiedLayers(nn.Module):
    """One layer that is used four times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Block(D)
        self.head = nn.Linear(D, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = self.inner(x)
        return self.head(x)


@layered(regions=5, distinct=3)  # the first gets an input without gradient
def one_layer_four_times() -> tuple[nn.Module, dict[str, Any]]:
    return TiedLayers(), {"x": torch.randn(N, T, D)}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.SiLU()) for _ in range(2)
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.GroupNorm(1, 2), nn.SiLU()) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for block in self.down:
            kept.append(x)
            x = F.avg_pool2d(block(x), 2)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], 1))
        return x


@layered()
def skips_of_a_u_net() -> tuple[nn.Module, dict[str, Any]]:
    return UNet(), {"x": torch.randn(N, 2, 8, 8)}


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.LeakyReLU()) for _ in range(4))
        )
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


@layered(splits=False)
def batch_norm() -> tuple[nn.Module, dict[str, Any]]:
    return Normalised(), {"x": torch.randn(N, D)}


class InPlace(nn.Module):
    """Activations in place at the beginning of a layer: they write to what the layer before has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.ReLU(inplace=True), nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.0
        for layer in self.layers:
            x = layer(x)
            x += 0.1
        return x


@layered()
def in_place() -> tuple[nn.Module, dict[str, Any]]:
    return InPlace(), {"x": torch.randn(N, D)}


@layered()
def frozen_layers() -> tuple[nn.Module, dict[str, Any]]:
    model = Stack([Block(D) for _ in range(4)])
    for block in (model.embed, model.layers[0], model.layers[2]):
        block.requires_grad_(False)
    return model, {"ids": ids()}


class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(Block(D) for _ in range(3))
        self.layers = nn.ModuleList(Block(D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for block in self.backbone:
                x = block(x)
        for block in self.layers:
            x = block(x)
        return x


@layered()
def no_grad_across_layers() -> tuple[nn.Module, dict[str, Any]]:
    return FrozenBackbone(), {"x": torch.randn(N, T, D)}


class Functional(nn.Module):
    """No modules inside: nothing to find layers by but the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(D, D) / 3 for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x + torch.tanh(x @ weight)
        return x


@layered()
def no_modules() -> tuple[nn.Module, dict[str, Any]]:
    return Functional(), {"x": torch.randn(N, D)}


@layered()
def class_token() -> tuple[nn.Module, dict[str, Any]]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, D))
            self.layers = nn.ModuleList(Block(D) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
            for block in self.layers:
                x = block(x)
            return x[:, 0]

    return Model(), {"x": torch.randn(N, T, D)}


class SecondAxis(nn.Module):
    """Time first: samples on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.LayerNorm(D)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + x.cumsum(0)
        return x
