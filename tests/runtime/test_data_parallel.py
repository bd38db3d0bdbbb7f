"""`DistributedDataParallel`, two ranks: what each holds after backward is what one process has for the joined batch."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import StaleAnnotation, UnsupportedError
from tests.oracle import from_losses
from tests.runtime import processes

WORLD = processes.WORLD
EXACT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture(scope="module")
def ranks():
    yield from processes.running()


# --- models and the definition ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.second(self.first(self.norm(x)).tanh())


class Net(nn.Module):
    def __init__(self, width=4, extra=False):
        super().__init__()
        self.table = nn.Embedding(7, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.table.weight
        self.extra = nn.Linear(width, width) if extra else None

    def forward(self, ids, use_extra=False):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        if use_extra:
            x = self.extra(x)
        return self.head(x)


def net(**options):
    torch.manual_seed(1)
    return Net(**options).double()


def batch(num, seed=0):
    return torch.randint(7, (num, 3), generator=torch.Generator().manual_seed(seed))


def sample_losses(output):
    """One number for each sample."""
    return (output * torch.arange(1, 8)).sin().sum((1, 2))


def mean_loss(model, ids, *args):
    return sample_losses(model(ids, *args)).mean()


def expected(model, parts):
    """The definition: ``parts`` are (ids, weight of each sample's loss in what ends up in ``p.grad``), over all ranks."""
    plain = graphopt.restore(copy.deepcopy(model))
    losses = (
        weight * sample_losses(plain(row[None], *args)).sum() for ids, weight, *args in parts for row in ids
    )
    return from_losses(plain, losses)


def assert_joined(model, parts, num_samples=None, **tolerance):
    reference = expected(model, parts)
    num_samples = sum(len(ids) for ids, *_ in parts) if num_samples is None else num_samples
    assert reference
    for name, param in model.named_parameters():
        if name not in reference:
            assert find(param, SUM_GRAD_SQUARED) is None, name
            continue
        for value, wanted in (
            (param.grad, reference[name].grad),
            (find(param, SUM_GRAD_SQUARED), reference[name].sum_grad_squared),
        ):
            assert value is not None, name
            torch.testing.assert_close(
                value.to(wanted.dtype), wanted, msg=lambda text, n=name: f"{n}: {text}", **(tolerance or EXACT)
            )
        count = num_samples[name] if isinstance(num_samples, dict) else num_samples
        assert find(param, NUM_SAMPLES) == count, name


def transformed(model=None, **options):
    return graphopt.transform(model or net(), compiler="aot_eager", **options)


def wrapped(model=None, **options):
    """The wrapper to call, and the model with the parameters."""
    model = transformed(model)
    return DistributedDataParallel(model, **options), model


# --- ways to wrap ------------------------------------------------------------------------------------------------------


def inside(model, **options):
    return DistributedDataParallel(transformed(model), **options)


def outside(model, **options):
    return transformed(DistributedDataParallel(model, **options))


def compiled_inside(model, **options):
    return DistributedDataParallel(torch.compile(model, backend="graphopt", options={"compiler": "aot_eager"}), **options)


def compiled_outside(model, **options):
    return torch.compile(
        DistributedDataParallel(model, **options), backend="graphopt", options={"compiler": "aot_eager"}
    )


WAYS = [inside, outside, compiled_inside, compiled_outside]


def steps(rank, wrap, options):
    """Three steps: batches of different sizes, one of them uneven between the ranks."""
    model = net()
    ddp = wrap(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, sizes in enumerate([(3, 3), (4, 2), (3, 5)]):
        parts = [batch(size, seed=10 * step + r) for r, size in enumerate(sizes)]
        mean_loss(ddp, parts[rank]).backward()
        assert_joined(model, [(ids, 1 / (len(ids) * WORLD)) for ids in parts])
        optimizer.step()
        optimizer.zero_grad(set_to_none=step == 1)
        assert all(find(param, SUM_GRAD_SQUARED) is None for param in model.parameters())


@pytest.mark.parametrize("wrap", WAYS)
def test_ways_to_wrap(ranks, wrap):
    ranks(steps, wrap, {})


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_as_bucket_view": True},
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
        {"bucket_cap_mb": 1e-4},
    ],
    ids=str,
)
def test_options_of_ddp(ranks, options):
    ranks(steps, inside, options)
