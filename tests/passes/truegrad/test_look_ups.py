"""Look-ups in every wording: tables, bags, experts; each parameter against the loop over samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.passes import TrueGrad
from graphopt.pipeline import Status
from tests.models import double, smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, check, train_step
from tests.passes.truegrad.formulas import formula

N = 4
IDS, OTHERS = torch.randint(0, 7, (N, 5)), torch.randint(0, 7, (N, 5))
FLAT = torch.randint(0, 7, (N,))


def bag(**options):
    return lambda ids, w: F.embedding_bag(ids, w, **options)


CLOSED = {
    "bag, sum": formula(bag(mode="sum"), IDS, w=(7, 3)),
    "bag, mean": formula(bag(mode="mean"), IDS, w=(7, 3)),
    "bag, max": formula(bag(mode="max"), IDS, w=(7, 3)),
    "bag, sum, padding": formula(bag(mode="sum", padding_idx=1), IDS, w=(7, 3)),
    "bag, mean, padding": formula(bag(mode="mean", padding_idx=1), IDS, w=(7, 3)),
    "bag, max, padding": formula(bag(mode="max", padding_idx=1), IDS, w=(7, 3)),
    "bag, all padding": formula(bag(mode="max", padding_idx=1), torch.tensor([[1, 1], [1, 2], [3, 3], [1, 1]]), w=(7, 3)),
    "bag, weighted": formula(
        lambda ids, s, w: F.embedding_bag(ids, w, mode="sum", per_sample_weights=s), IDS, torch.randn(N, 5).double(), w=(7, 3)
    ),
    "bag, learned weights": formula(
        lambda ids, w, s: F.embedding_bag(ids, w, mode="sum", per_sample_weights=s[ids]), IDS, w=(7, 3), s=(7,)
    ),
    "bag, offsets of equal bags": formula(
        lambda ids, w: F.embedding_bag(ids.view(-1), w, torch.arange(0, ids.numel(), 5)), IDS, w=(7, 3)
    ),
    "bag, several of one sample": formula(
        lambda ids, w: F.embedding_bag(ids.view(-1, 2), w).view(-1, 2, 3), torch.randint(0, 7, (N, 4)), w=(7, 3)
    ),
    "bag, limited norm": formula(lambda ids, b: b(ids), IDS, b=lambda: nn.EmbeddingBag(7, 3, max_norm=1.0)),
    "embedding, limited norm": formula(lambda ids, e: e(ids), IDS, e=lambda: nn.Embedding(7, 3, max_norm=1.0)),
    "index_select": formula(lambda ids, w: w.index_select(0, ids), FLAT, w=(7, 3)),
    "index_select, flattened": formula(
        lambda ids, w: w.index_select(0, ids.flatten()).view(*ids.shape, -1), IDS, w=(7, 3)
    ),
    "index_select, columns": formula(lambda ids, w: w.index_select(1, ids).t(), FLAT, w=(3, 7)),
    "rows": formula(lambda ids, w: w[ids], IDS, w=(7, 3)),
    "rows from the end": formula(lambda ids, w: w[ids - 7], IDS, w=(7, 3)),
    "numbers": formula(lambda ids, w: w[ids], IDS, w=(7,)),
    "columns": formula(lambda ids, w: w[:, ids].movedim(0, -1), IDS, w=(3, 7)),
    "pairs": formula(lambda ids, others, w: w[ids, others], IDS, OTHERS, w=(7, 7, 3)),
    "pairs around an axis": formula(lambda ids, others, w: w[ids, :, others], IDS, OTHERS, w=(7, 3, 7)),
    "rows of positions": formula(lambda ids, w: w[torch.arange(5), ids], IDS, w=(5, 7, 3)),
    "a slice of rows": formula(lambda ids, w: w[1:][ids], IDS.clamp(max=5), w=(7, 3)),
    "gather": formula(lambda ids, w: w.gather(0, ids.flatten()).view_as(ids), IDS, w=(7,)),
    "take": formula(lambda ids, w: w.take(ids), IDS, w=(7,)),
    "one_hot": formula(lambda ids, w: F.one_hot(ids, 7).to(w.dtype) @ w, IDS, w=(7, 3)),
}  # fmt: skip
BATCHED = {
    "bag of a computed table": formula(lambda ids, w: F.embedding_bag(ids, w.exp(), mode="mean"), IDS, w=(7, 3)),
    "bag of a computed table, max": formula(lambda ids, w: F.embedding_bag(ids, w.exp(), mode="max"), IDS, w=(7, 3)),
    "two look-ups": formula(lambda ids, w: w[ids] * w[(ids + 1) % 7], IDS, w=(7, 3)),
    "two embeddings": formula(lambda ids, w: F.embedding(ids, w) * F.embedding((ids + 1) % 7, w), IDS, w=(7, 3)),
    "two kinds of look-up": formula(lambda ids, w: F.embedding(ids, w) * w[(ids + 1) % 7], IDS, w=(7, 3)),
    "a table that is a projection": formula(lambda ids, w: torch.tanh(w[ids]) @ w.t(), IDS, w=(7, 3)),
    "a low-rank table": formula(lambda ids, a, b: F.embedding(ids, a @ b), IDS, a=(7, 2), b=(2, 3)),
    "a low-rank table, flattened": formula(
        lambda ids, a, b: F.embedding(ids.t().flatten(), a @ b).view(5, -1, 3).transpose(0, 1), IDS, a=(7, 2), b=(2, 3)
    ),
    "a table of two parts": formula(lambda ids, a, b: F.embedding(ids, torch.cat([a, b])), IDS, a=(4, 3), b=(3, 3)),
    "rows of a computed table": formula(lambda ids, w: w.tanh()[ids], IDS, w=(7, 3)),
    "gather from an expanded parameter": formula(
        lambda ids, w: w.expand(ids.shape[0], -1, -1).gather(1, ids.unsqueeze(-1).expand(-1, -1, 3)), IDS, w=(1, 7, 3)
    ),
    "take_along_dim": formula(lambda ids, w: torch.take_along_dim(w, ids.unsqueeze(-1), 1), IDS, w=(1, 7, 3)),
    "take from a matrix": formula(lambda ids, w: torch.take(w, ids), IDS, w=(7, 3)),
    "positions": formula(lambda x, w: x + w[torch.arange(x.shape[1])], torch.randn(N, 5, 3), w=(7, 3)),
    "relative positions": formula(
        lambda x, w: x + w[(torch.arange(5)[:, None] - torch.arange(5)).abs()].permute(2, 0, 1), torch.randn(N, 3, 5, 5), w=(7, 3)
    ),
}  # fmt: skip
SPARSE = "its gradient is sparse.*sparse=False"
SCALED = "scales gradients by how often a row occurs.*scale_grad_by_freq=False"
REFUSED = {
    "sparse": (lambda: nn.Embedding(7, 3, sparse=True), SPARSE),
    "scaled": (lambda: nn.Embedding(7, 3, scale_grad_by_freq=True), SCALED),
    "sparse bag": (lambda: nn.EmbeddingBag(7, 3, sparse=True), SPARSE),
    "scaled bag": (lambda: nn.EmbeddingBag(7, 3, scale_grad_by_freq=True), SCALED),
}


class Mixture(nn.Module):
    """A mixture of experts, as models write it: each position goes to two of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate, self.out = nn.Linear(3, 4), nn.Linear(3, 2)
        self.inward, self.outward = nn.Parameter(torch.randn(4, 3, 5)), nn.Parameter(torch.randn(4, 5, 3))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        probabilities = self.gate(rows).softmax(-1)
        weights, experts = probabilities.topk(2, -1)
        mixed = getattr(self, self.kind)(rows, probabilities, weights, experts)
        return self.out(mixed.view(x.shape))

    def _experts(self, rows: Tensor, experts: Tensor) -> Tensor:
        hidden = torch.tanh(torch.bmm(rows.unsqueeze(1), self.inward[experts]))
        return torch.bmm(hidden, self.outward[experts]).squeeze(1)

    def batched(self, rows: Tensor, probabilities: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """As ``batched_mm`` of transformers."""
        tokens = torch.arange(rows.shape[0]).unsqueeze(1).expand(-1, 2).reshape(-1)
        mixed = self._experts(rows[tokens], experts.reshape(-1)) * weights.reshape(-1, 1)
        return mixed.view(rows.shape[0], 2, -1).sum(1)

    def added(self, rows: Tensor, probabilities: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        tokens = torch.arange(rows.shape[0]).unsqueeze(1).expand(-1, 2).reshape(-1)
        mixed = self._experts(rows[tokens], experts.reshape(-1)) * weights.reshape(-1, 1)
        return torch.zeros_like(rows).index_add_(0, tokens, mixed)

    def repeated(self, rows: Tensor, probabilities: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        mixed = self._experts(rows.repeat_interleave(2, 0), experts.reshape(-1))
        return (mixed.view(rows.shape[0], 2, -1) * weights.unsqueeze(-1)).sum(1)

    def dense(self, rows: Tensor, probabilities: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        share = torch.zeros_like(probabilities).scatter(1, experts, weights)
        hidden = torch.tanh(torch.einsum("td,edh->teh", rows, self.inward))
        return (torch.einsum("teh,ehd->ted", hidden, self.outward) * share.unsqueeze(-1)).sum(1)

    def one_by_one(self, rows: Tensor, probabilities: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        share = torch.zeros_like(probabilities).scatter(1, experts, weights)
        mixed = torch.zeros_like(rows)
        for expert in range(4):
            mixed += share[:, expert, None] * (torch.tanh(rows @ self.inward[expert]) @ self.outward[expert])
        return mixed


@pytest.mark.parametrize("form", CLOSED.values(), ids=CLOSED)
def test_closed_forms(form):
    module, inputs = form()
    model = check(module, inputs)
    assert statuses(model) == {Status.EXACT}


@pytest.mark.parametrize("form", BATCHED.values(), ids=BATCHED)
def test_batched_forms(form):
    module, inputs = form()
    check(module, inputs)


@pytest.mark.parametrize("kind", ["batched", "added", "repeated", "dense", "one_by_one"])
def test_mixture_of_experts(kind):
    torch.manual_seed(0)
    model = check(Mixture(kind), (torch.randn(N, 5, 3),))
    assert statuses(model) == {Status.EXACT}


@pytest.mark.parametrize(
    "form", [CLOSED["bag, mean, padding"], CLOSED["columns"], BATCHED["a low-rank table, flattened"]]
)
def test_another_number_of_samples_does_not_recompile(form):
    module, (ids, *_) = form()
    model, _ = double(module, ())
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    for num in (4, 5, 3):
        batch = (torch.randint(0, 7, (num, *ids.shape[1:])),)
        plain, _ = double(form()[0], ())
        expected = loop_over_samples(plain, batch, smooth, reduction="sum")
        with torch._dynamo.config.patch(error_on_recompile=num != 4):
            train_step(model, batch)
        assert_statistics(model, expected, num)


@pytest.mark.parametrize(("build", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(build, why):
    model = graphopt.transform(build(), [TrueGrad()], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=rf"weight: .*{why}"):
        model(IDS)


def test_bags_of_different_lengths_are_refused_with_the_fix():
    model = graphopt.transform(nn.EmbeddingBag(7, 3), [TrueGrad()], compiler="aot_eager")
    with pytest.raises(
        UnsupportedError, match=r"bags of different lengths \(offsets\).*matrix of indices.*padding_idx"
    ):
        model(IDS.flatten(), torch.tensor([0, 3, 11]))


def statuses(model):
    return {row.status for record in graphopt.records(model) for row in record.coverage}


@pytest.mark.slow
def test_inductor():
    torch.manual_seed(0)
    check(Mixture("batched"), (torch.randn(N, 5, 3),), compiler="inductor")
    torch._dynamo.reset()
    module, inputs = CLOSED["bag, max, padding"]()
    check(module, inputs, compiler="inductor")
