"""Two ranks, each with its own part of every batch, learn the scales of one process that has the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.errors import OptionError
from tests.runtime import processes

STEPS = 4


@pytest.fixture(scope="module")
def ranks():
    yield from processes.running()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def batches(num=20):
    torch.manual_seed(1)
    return [(torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))) for _ in range(num)]


def part_of(batch, rank, pieces=1):
    """What a rank gets of a batch: its half of each piece, so that the pieces of all ranks are those of the batch."""
    return tuple(torch.cat([piece.chunk(2)[rank] for piece in tensor.chunk(pieces)]) for tensor in batch)


def wrapper_steps(model, data, norm, gamma):
    with graphopt.GradInitWrapper(model) as ginit:
        optimizer = torch.optim.Adam(ginit.parameters(), lr=0.01)
        for batch in data[:STEPS]:
            loss = ginit.grad_loss(loss_fn(model, batch), norm, gamma=gamma)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ginit.clamp_scales()
        return [scale.item() for scale in ginit.parameters()]


def wrapped(rank, norm, gamma, compiler):
    model = DistributedDataParallel(net() if compiler is None else graphopt.transform(net(), compiler=compiler))
    scales = wrapper_steps(model, [part_of(batch, rank) for batch in batches()], norm, gamma)
    loss_fn(model, part_of(batches()[0], rank)).backward()  # DDP reduces again
    return scales, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("norm", "gamma", "compiler"), [(1, 0.0, None), (2, 0.0, None), (1, 1e9, None), (2, 0.0, "aot_eager")]
)
def test_wrapper(ranks, norm, gamma, compiler):
    (first, grads), (second, others) = ranks(wrapped, norm, gamma, compiler)
    assert first == second
    assert first == pytest.approx(wrapper_steps(net(), batches(), norm, gamma), rel=1e-10)
    torch.testing.assert_close(grads, others, rtol=0, atol=0)


def learned(rank, options, pieces=1):
    model = DistributedDataParallel(net())
    data = [part_of(batch, rank, pieces) for batch in batches()]
    result = graphopt.learn_init(model, loss_fn, data, **options)
    loss_fn(model, data[0]).backward()  # DDP reduces again
    return result.scales, [p.grad.clone() for p in model.parameters()], [step.loss for step in result.trajectory]


OPTIONS = {
    "constraint": {"gamma": 0.0},
    "look-ahead": {"gamma": 1e9},
    "thirds": {"gamma": 1e9, "optimizer": "sgd", "overlap": "thirds"},
    "no overlap": {"gamma": 12.0, "overlap": "none"},
    "accumulated": {"gamma": 0.0, "optimizer": "sgd", "accumulate": 2},
    "compiled": {"gamma": 0.0, "compiler": "aot_eager"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_learn_init(ranks, name):
    options = {"steps": STEPS, "lr": 0.01, "compiler": "eager", "progress": False, **OPTIONS[name]}
    (first, grads, losses), (second, others, _) = ranks(learned, options, 3 if name == "thirds" else 2)
    assert first == second
    torch.testing.assert_close(grads, others, rtol=0, atol=0)
    alone = graphopt.learn_init(net(), loss_fn, batches(), **options)
    assert first == pytest.approx(alone.scales, rel=1e-9)
    assert losses == pytest.approx([step.loss for step in alone.trajectory], rel=1e-9)


@pytest.mark.parametrize("options", [{"method": "metainit", "steps": 2}, {"method": "lsuv"}])
def test_other_methods_agree(ranks, options):
    (first, *_), (second, *_) = ranks(learned, {**options, "progress": False})
    assert first == second
    assert first["0.weight"] != 1


class Forked(nn.Module):
    """What one rank uses, the other may not."""

    def __init__(self):
        super().__init__()
        self.first, self.extra, self.unused = nn.Linear(6, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, use_extra):
        x = self.first(x).tanh()
        return self.extra(x) if use_extra else x


def forked():
    torch.manual_seed(0)
    return Forked().double()


def forked_loss(model, batch):
    x, y, use_extra = batch
    return F.cross_entropy(model(x, use_extra), y)


def forked_batches(rank):
    return [(*part_of(batch, rank), rank == 0) for batch in batches(8)]


def learned_forked(rank, options):
    model = DistributedDataParallel(forked(), find_unused_parameters=True)
    return graphopt.learn_init(model, forked_loss, forked_batches(rank), **options)


@pytest.mark.parametrize("gamma", [0.0, 1e9])
def test_parameters_that_one_rank_does_not_use(ranks, gamma):
    options = {"gamma": gamma, "overlap": "none", "steps": 3, "lr": 0.01, "compiler": "eager", "progress": False}
    first, second = ranks(learned_forked, options)
    assert first.scales == second.scales
    both = [batch for pair in zip(forked_batches(0), forked_batches(1), strict=True) for batch in pair]
    alone = graphopt.learn_init(forked(), forked_loss, both, accumulate=2, **options)
    assert first.scales == pytest.approx(alone.scales, rel=1e-9)
    assert (
        first.left_alone
        == alone.left_alone
        == dict.fromkeys(["unused.weight", "unused.bias"], "no gradient reaches it")
    )


def wrapped_forked(rank, model, steps, norm, gamma):
    """``steps`` are batches of which the mean loss is taken; the gradients of two add up before the scales change."""
    model = DistributedDataParallel(model, find_unused_parameters=True) if rank is not None else model
    with graphopt.GradInitWrapper(model) as ginit:
        optimizer = torch.optim.SGD(ginit.parameters(), lr=0.01)
        for number, batches in enumerate(steps):
            loss = torch.stack([forked_loss(model, batch) for batch in batches]).mean()
            (loss if norm is None else ginit.grad_loss(loss, norm, gamma=gamma)).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        return {name: scale.item() for name, scale in ginit.named_parameters()}


def wrapped_forked_rank(rank, norm, gamma):
    return wrapped_forked(rank, forked(), [[batch] for batch in forked_batches(rank)], norm, gamma)


@pytest.mark.parametrize(("norm", "gamma"), [(1, 0.0), (2, 0.0), (1, 1e9), (None, 0.0)])
def test_wrapper_where_one_rank_uses_less(ranks, norm, gamma):
    first, second = ranks(wrapped_forked_rank, norm, gamma)
    assert first == second
    both = list(zip(forked_batches(0), forked_batches(1), strict=True))
    alone = wrapped_forked(None, forked(), both, norm, gamma)
    assert first == pytest.approx(alone, rel=1e-10)
    assert alone["extra.weight"] != 1
    assert alone["unused.weight"] == 1


def sharded(rank):
    model = fully_shard(net())
    with pytest.raises(OptionError, match=r"Sequential is sharded: learn its initialisation before fully_shard"):
        graphopt.GradInitWrapper(model)


def test_sharded_models_are_refused(ranks):
    ranks(sharded)
