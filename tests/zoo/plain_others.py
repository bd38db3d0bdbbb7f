"""Tables, sets, graphs and shared weights, in torch alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import case, rows

FAMILY = "plain torch, others"


@case(FAMILY, rows(6, name="input"))
def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@case(FAMILY, rows(6, name="input"), mixes=True)
def mlp_with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


class _Recommender(nn.Module):
    """Bags of categories and numbers, and the products of every two of them (DLRM)."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(11, 4, mode=mode) for mode in ("sum", "mean"))
        self.bottom = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, numbers: Tensor, first: Tensor, second: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        each = torch.stack([dense, self.bags[0](first), self.bags[1](second)], dim=1)
        left, right = torch.triu_indices(3, 3, offset=1).unbind()
        products = (each @ each.transpose(1, 2))[:, left, right]
        return self.top(torch.cat([dense, products], dim=1))


def _categories(num: int) -> dict[str, Any]:
    return {
        "numbers": torch.randn(num, 5),
        "first": torch.randint(0, 11, (num, 3)),
        "second": torch.randint(0, 11, (num, 2)),
    }


@case(FAMILY, _categories)
def recommender() -> nn.Module:
    return _Recommender()


class _DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(3, 8), nn.ELU(), nn.Linear(8, 6))
        self.together = nn.Sequential(nn.Linear(6, 8), nn.ELU(), nn.Linear(8, 2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.together((self.each(x) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@case(FAMILY, lambda num: {"x": torch.randn(num, 5, 3), "mask": (torch.rand(num, 5) < 0.8).float() + 0.1})
def deep_sets() -> nn.Module:
    return _DeepSets()


class _GraphAttention(nn.Module):
    """Dense graphs: an adjacency matrix for each sample, and a learned slope."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.source, self.target = nn.Linear(3, 6), nn.Linear(6, 1, bias=False), nn.Linear(6, 1)
        self.temperature, self.head = nn.Parameter(torch.tensor(0.5)), nn.Linear(6, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = self.values(x)
        scores = F.leaky_relu(self.source(x) + self.target(x).transpose(1, 2), 0.2) / self.temperature
        weights = scores.masked_fill(adjacency == 0, -1e9).softmax(-1)
        return self.head(F.elu(weights @ x).mean(1))


def _graphs(num: int) -> dict[str, Any]:
    return {"x": torch.randn(num, 5, 3), "adjacency": ((torch.rand(num, 5, 5) < 0.5) | torch.eye(5).bool()).float()}


@case(FAMILY, _graphs)
def graph_attention() -> nn.Module:
    return _GraphAttention()


class _NeuralODE(nn.Module):
    """Euler steps: one network at every time."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.log_step = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        for time in range(3):
            x = x + self.log_step.exp() * self.field(F.pad(x, (0, 1), value=float(time)))
        return x


@case(FAMILY, rows(4), fallback=("field.*.weight",))
def neural_ode() -> nn.Module:
    return _NeuralODE()


class _HyperNetwork(nn.Module):
    """A small network without samples makes the weights of the one with samples."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.maker = nn.Parameter(torch.randn(3)), nn.Linear(3, 20)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.maker(self.code).view(5, 4)))


@case(FAMILY, rows(4), fallback=("maker.weight",))
def hyper_network() -> nn.Module:
    return _HyperNetwork()


class _MixtureOfExperts(nn.Module):
    """The two best experts of each row, by index_select and scatter."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.inward, self.outward = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)  # (N, 2)
        hidden = torch.relu(torch.einsum("nd,nkde->nke", x, self.inward[chosen]))
        each = torch.einsum("nke,nked->nkd", hidden, self.outward[chosen])
        return x + (weights[..., None] * each).sum(1)


@case(FAMILY, rows(4))
def experts_by_index() -> nn.Module:
    return _MixtureOfExperts()


class _Quantised(nn.Module):
    """The nearest entry of a codebook, with the straight-through gradient (VQ-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(5, 3), nn.Embedding(7, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        distances = (z.detach()[:, None] - self.codes.weight.detach()).square().sum(-1)
        code = self.codes(distances.argmin(-1))
        return self.decoder(z + (code - z).detach()), code - z.detach()


@case(FAMILY, rows(5), tuple)
def vector_quantiser() -> nn.Module:
    return _Quantised()
