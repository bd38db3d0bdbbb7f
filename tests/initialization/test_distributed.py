"""Two ranks, each with its own part of every batch, learn the scales of one process that has the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
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
    return [(torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))) for _ in range(num)]


def part_of(batch, rank):
    return tuple(tensor[4 * rank : 4 * rank + 4] for tensor in batch)


def joined(data):
    """What the ranks have together; their halves for the look-ahead step are not those of the joined batch."""
    return [tuple(torch.cat(pair) for pair in zip(part_of(b, 0), part_of(b, 1), strict=True)) for b in data]


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


def wrapped(rank, norm, gamma):
    model = DistributedDataParallel(net())
    scales = wrapper_steps(model, [part_of(batch, rank) for batch in batches()], norm, gamma)
    loss_fn(model, part_of(batches()[0], rank)).backward()  # DDP reduces again
    return scales, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(("norm", "gamma"), [(1, 0.0), (2, 0.0), (1, 1e9)])
def test_wrapper(ranks, norm, gamma):
    (first, grads), (second, others) = ranks(wrapped, norm, gamma)
    assert first == second
    assert first == pytest.approx(wrapper_steps(net(), batches(), norm, gamma), rel=1e-10)
    torch.testing.assert_close(grads, others, rtol=0, atol=0)


def learned(rank, options):
    model = DistributedDataParallel(net())
    data = [part_of(batch, rank) for batch in batches()]
    return graphopt.learn_init(model, loss_fn, data, **options).scales


OPTIONS = {
    "constraint": {"gamma": 0.0},
    "look-ahead": {"gamma": 1e9, "overlap": "none"},
    "accumulated": {"gamma": 0.0, "optimizer": "sgd", "accumulate": 2},
    "compiled": {"gamma": 0.0, "compiler": "aot_eager"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_learn_init(ranks, name):
    options = {"steps": STEPS, "lr": 0.01, "compiler": "eager", "progress": False, **OPTIONS[name]}
    first, second = ranks(learned, options)
    assert first == second
    assert first == pytest.approx(graphopt.learn_init(net(), loss_fn, batches(), **options).scales, rel=1e-9)
