"""FSDP2 (`fully_shard`), two ranks: the shards together are what one process has for the joined batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import StaleAnnotation, UnsupportedError
from graphopt.passes import TrueGrad
from tests.oracle import from_losses
from tests.runtime import processes

WORLD = processes.WORLD
EXACT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture(scope="module")
def ranks():
    yield from processes.running()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.single = nn.Parameter(torch.rand(1))  # fewer elements than ranks

    def forward(self, x):
        return x + self.single * self.second(self.first(self.norm(x)).tanh())


class Net(nn.Module):
    """Widths that two ranks cannot share evenly."""

    def __init__(self, width=5):
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def net(dtype=torch.float64):
    torch.manual_seed(1)
    return Net().to(dtype)


def batch(num, seed=0):
    return torch.randint(7, (num, 3), generator=torch.Generator().manual_seed(seed))


def total(output):
    return (output * torch.arange(1, 4)).sin().sum()


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def transformed(model, **options):
    return graphopt.transform(model, compiler="aot_eager", **options)


def assert_joined(model, plain, parts, num_samples=None, scale=1.0, **tolerance):
    """``plain``: an unsharded copy with the same values; ``parts``: (ids, weight of the loss in the gradient), over ranks."""
    reference = from_losses(plain, (weight * total(plain(row[None])) for ids, weight in parts for row in ids))
    num_samples = sum(len(ids) for ids, _ in parts) if num_samples is None else num_samples
    for name, param in model.named_parameters():
        value = find(param, SUM_GRAD_SQUARED)
        assert value is not None, name
        assert type(value) is type(param), name
        assert value.device_mesh == param.device_mesh
        assert value.placements == param.placements
        assert value.to_local().shape == param.to_local().shape, name
        assert param.sum_grad_squared is value
        for found, wanted in (
            (param.grad, reference[name].grad * scale),
            (value, reference[name].sum_grad_squared * scale**2),
        ):
            torch.testing.assert_close(
                found.full_tensor().to(wanted.dtype),
                wanted,
                msg=lambda text, n=name: f"{n}: {text}",
                **(tolerance or EXACT),
            )
        assert find(param, NUM_SAMPLES) == num_samples, name


def no_statistics(model):
    """A rank whose shard is empty learns in the next backward pass that the gradient was set to zero."""
    return all(find(param, SUM_GRAD_SQUARED) is None for param in model.parameters() if param.to_local().numel())


def load(plain, model):
    """The values of the sharded model, in an unsharded one."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            plain.get_parameter(name).copy_(param.full_tensor())


def steps(rank, options, order, optimizer_class):
    plain, model = net(), net()
    if order == "shard, transform":
        model = transformed(shard(model, **options))
    else:
        model = shard(transformed(model), **options)
    optimizer = optimizer_class(model.parameters(), lr=0.01)
    for step, sizes in enumerate([(3, 3), (4, 2), (3, 5)]):
        parts = [batch(size, seed=10 * step + r) for r, size in enumerate(sizes)]
        total(model(parts[rank])).backward()
        assert_joined(model, plain, [(ids, 1 / WORLD) for ids in parts])
        optimizer.step()
        optimizer.zero_grad(set_to_none=step == 1)
        assert no_statistics(model)
        load(plain, model)
    names = {name for record in graphopt.records(model) for row in record.coverage for name in [row.name]}
    assert names == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("order", ["shard, transform", "transform, shard"])
@pytest.mark.parametrize("reshard", [True, False])
def test_steps(ranks, reshard, order):
    ranks(steps, {"reshard_after_forward": reshard}, order, torch.optim.SGD)
