"""`Modular` over parameters that are spread over two processes does what it does in one."""

import io

import pytest
import torch
from torch import nn

from graphopt.errors import NonFiniteError, UnsupportedError
from graphopt.optim import Modular, m
from tests.optim.core.test_every_module import build
from tests.optim.examples import NAMES, PUBLIC, with_rate
from tests.optim.training import largest_difference, make_params, set_gradients, train
from tests.runtime import processes

SHAPES = [(4, 3), (5,), (4, 3), (1,)]  # all but the first and the third cannot be shared evenly
CHAINS = {
    "Adam": lambda: (m.ClipValue(0.8), m.Adam(amsgrad=True), m.WeightDecay(0.1), m.LR(0.05)),
    "norms": lambda: (m.NormalizeByEMA(0.9, max_ema_growth=1.01), m.WeightDecay(0.1), m.LR(0.05)),
    "largest": lambda: (m.NormalizeByEMA(0.9, ord=float("inf")), m.LR(0.05)),
    "norms of the first order": lambda: (m.NormalizeByEMA(0.9, ord=1.0, ema_init="update"), m.LR(0.05)),
}
WAYS = [{}, {"foreach": True}, {"foreach": False}]


@pytest.fixture(scope="module")
def ranks():
    yield from processes.running()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_sharded_parameters(ranks, name, way):
    assert max(ranks(_difference, name, way)) < 1e-12


def _difference(rank, name, way):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (processes.WORLD,))
    whole = make_params(SHAPES)
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    optimizers = [Modular(params, *CHAINS[name](), **way) for params in (whole, sharded)]
    for seed in range(4):
        set_gradients(whole, seed)
        for p, q in zip(whole, sharded, strict=True):
            q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for p in sharded:
        for name, value in optimizers[1].state[p].items():
            assert name == "step" or isinstance(value, DTensor) or value.dim() == 0, name
    assert largest_difference(whole, make_params(SHAPES)) > 0.01
    return largest_difference(whole, [q.full_tensor() for q in sharded])


@pytest.mark.parametrize("name", CHAINS)
def test_fully_shard(ranks, name):
    """With a checkpoint between, written by two processes and read by them, before the first step of the second optimizer."""
    assert max(ranks(_train_fully_sharded, name)) < 1e-10


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def _train_fully_sharded(rank, name):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (processes.WORLD,))
    data = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = data[4 * rank : 4 * rank + 4]
    plain, sharded, resumed = _model(), fully_shard(_model(), mesh=mesh), fully_shard(_model(), mesh=mesh)
    optimizers = [Modular(model, *CHAINS[name]()) for model in (plain, sharded, resumed)]
    before = [p.full_tensor() for p in resumed.parameters()]
    template = get_optimizer_state_dict(resumed, optimizers[2])
    assert largest_difference(before, [p.full_tensor() for p in resumed.parameters()]) == 0.0

    def steps(model, optimizer, batch, number):
        for _ in range(number):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

    steps(plain, optimizers[0], data, 3)
    steps(sharded, optimizers[1], mine, 3)
    saved = get_optimizer_state_dict(sharded, optimizers[1])
    assert {name: set(state) for name, state in saved["state"].items()} == {
        name: set(state) for name, state in template["state"].items()
    }
    file = io.BytesIO()
    torch.save(optimizers[1].state_dict(), file)
    with torch.no_grad():
        for p, q in zip(resumed.parameters(), sharded.parameters(), strict=True):
            p.copy_(q)
    set_optimizer_state_dict(resumed, optimizers[2], saved)
    steps(plain, optimizers[0], data, 2)
    steps(resumed, optimizers[2], mine, 2)
    assert largest_difference(plain.parameters(), _model().parameters()) > 0.01
    return largest_difference(plain.parameters(), [p.full_tensor() for p in resumed.parameters()])


TOLERANCE = {"Muon": 0.05, "Orthogonalize": 0.05}  # their products are in bfloat16, and add up in another order


def test_every_module(ranks):
    """Those without a closure or a statistic; in one call, since tensors are small and modules many."""
    (found, others) = ranks(_differences, NAMES)
    assert found == others
    refused = {name for name, value in found.items() if value is None}
    assert {"SOAP", "Shampoo", "BFGS"} <= refused <= {name for name in NAMES if not PUBLIC[name].takes_sharded}
    assert {
        name: value for name, value in found.items() if value is not None and not value < TOLERANCE.get(name, 1e-12)
    } == {}
    assert len(found) > 80


def _differences(rank, names):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (processes.WORLD,))
    found = {}
    for name in names:
        whole = make_params([(4, 3), (1,)])
        sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
        optimizers = [Modular(params, with_rate(build(name), 0.05)) for params in (whole, sharded)]
        if any(entry.module.needs_closure or entry.module.reads for entry in optimizers[0]._named):
            continue
        for seed in range(2):
            set_gradients(whole, seed)
            for p, q in zip(whole, sharded, strict=True):
                q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
            optimizers[0].step()
            if PUBLIC[name].takes_sharded:
                optimizers[1].step()
                continue
            with pytest.raises(UnsupportedError, match=f"{name}: .* is a DTensor, spread over processes"):
                optimizers[1].step()
        if not PUBLIC[name].takes_sharded:
            found[name] = None
            continue
        gathered = [q.full_tensor().nan_to_num() for q in sharded]
        found[name] = largest_difference([p.nan_to_num() for p in whole], gathered)
    return found


def test_gradients_that_are_not_finite(ranks):
    """All processes raise, also those whose parts are finite: they would wait for the others."""
    assert sorted(ranks(_refuse_nan)) == [
        "module 1 of 2, Adam: the gradient of a parameter, in the part of another process, holds NaN or infinities; nothing",
        "module 1 of 2, Adam: the gradient of parameter 1 of group 0, shape (5,) holds NaN or infinities; nothing",
    ]


def _refuse_nan(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (processes.WORLD,))
    whole = make_params(SHAPES, torch.float32)
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    set_gradients(whole, 0)
    whole[1].grad[0] = float("nan")
    optimizer = Modular(params, m.Adam(), m.LR(0.1))
    for p, q in zip(params, whole, strict=True):
        p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
    with pytest.raises(NonFiniteError) as error:
        optimizer.step()
    assert largest_difference(whole, [p.full_tensor() for p in params]) == 0.0
    params[1].grad = distribute_tensor(torch.full((5,), 3e38), mesh, [Shard(0)])  # whose sum is infinite
    optimizer.step()
    return str(error.value).partition(" was changed")[0]


def test_data_parallel(ranks):
    """DistributedDataParallel's gradients are views of its buckets, which a step must leave alone."""
    assert max(ranks(_train_data_parallel)) < 1e-12


def _train_data_parallel(rank):
    plain = _model()
    parallel = nn.parallel.DistributedDataParallel(_model(), gradient_as_bucket_view=True)
    data = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for model, batch in ((plain, data), (parallel, data[4 * rank : 4 * rank + 4])):
        optimizer = Modular(model.parameters(), *CHAINS["Adam"]())
        for _ in range(3):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
    return largest_difference(plain.parameters(), parallel.parameters())


def test_zero_redundancy(ranks):
    """ZeroRedundancyOptimizer makes the optimizer of each process's share."""
    assert max(ranks(_train_with_zero)) < 1e-12


class AdamLike(Modular):
    """A chain as a class whose arguments are those of an optimizer."""

    def __init__(self, params, **options):
        super().__init__(params, *CHAINS["Adam"](), **options)


def _train_with_zero(rank):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    plain, parallel = make_params(SHAPES), make_params(SHAPES)
    optimizer = ZeroRedundancyOptimizer(parallel, AdamLike)
    train(optimizer, parallel)
    train(AdamLike(plain), plain)
    return largest_difference(plain, parallel)
