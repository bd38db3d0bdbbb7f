"""Optimizers of parameters that are spread over two processes do what they do in one."""

import pytest
from torch import nn

from graphopt import annotations
from graphopt.optim import L1WeightDecay, WeightDecayChain, WeightDecayToEMA, WeightDecayToInit
from tests.optim.test_optimizers import MAKE
from tests.optim.training import largest_difference, make_params, set_gradients
from tests.runtime import processes

SHAPES = [(4, 3), (5,), (4, 3), (1,)]  # the last three cannot be shared evenly
DECAYS = {
    "plain": None,
    "chain": WeightDecayChain(WeightDecayToEMA(0.9), WeightDecayToInit(), L1WeightDecay()),
}


@pytest.fixture(scope="module")
def ranks():
    yield from processes.running()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", MAKE)
def test_sharded_parameters(ranks, name, decay):
    assert max(ranks(_difference, name, decay)) < 1e-12


def _difference(rank, name, decay):
    """The largest difference between sharded and whole parameters after a few steps."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (processes.WORLD,))
    whole = make_params(SHAPES)
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    before = make_params(SHAPES)
    optimizers = [MAKE[name](params, weight_decay=0.1, weight_decay_cls=DECAYS[decay]) for params in (whole, sharded)]
    for seed in range(4):
        set_gradients(whole, seed)
        for p, q in zip(whole, sharded, strict=True):
            q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
            statistic = distribute_tensor(annotations.get(p, annotations.SUM_GRAD_SQUARED), mesh, [Shard(0)])
            annotations.publish(q, statistic, 7)
        for optimizer in optimizers:
            optimizer.step()
    assert largest_difference(whole, before) > 0.01
    return largest_difference(whole, [q.full_tensor() for q in sharded])
