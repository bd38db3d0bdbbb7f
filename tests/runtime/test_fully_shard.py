"""FSDP2 (`fully_shard`), two ranks: the shards together are what one process has for the joined batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import OptionError, StaleAnnotation, UnsupportedError
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
    report = graphopt.Report.of(model)  # equal blocks share a record
    assert {row.name for row in report.coverage} == {name for name, _ in model.named_parameters()}
    assert report.num_covered == len(report.coverage)


@pytest.mark.parametrize("order", ["shard, transform", "transform, shard"])
@pytest.mark.parametrize("reshard", [True, False])
def test_steps(ranks, reshard, order):
    ranks(steps, {"reshard_after_forward": reshard}, order, torch.optim.SGD)


# --- training loops ------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 5)])
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, ids):
        return self.head(self.blocks[0](self.table(ids)).tanh())


def small(dtype=torch.float64):
    torch.manual_seed(1)
    return Small().to(dtype)


def accumulation(rank):
    """Passes that FSDP reduces (s) and passes that it does not (n), after each of which the sharded pair is a pair."""
    plain, model = small(), transformed(shard(small()))
    for start, plan in ((0, "nns"), (100, "ss"), (200, "snns")):
        reduced, waiting = [], []
        for index, kind in enumerate(plan):
            parts = [batch(2 + (index + r) % 2, seed=start + 10 * index + r) for r in range(WORLD)]
            model.set_requires_gradient_sync(kind == "s")
            total(model(parts[rank])).backward()
            waiting += [(ids, 1 / WORLD) for ids in parts]
            if kind == "s":
                reduced, waiting = reduced + waiting, []
            if reduced:
                assert_joined(model, plain, reduced)
            else:
                assert no_statistics(model)
        model.zero_grad(set_to_none=start == 0)


def test_accumulation(ranks):
    ranks(accumulation)


def zeroed_where_a_shard_is_zero(rank):
    """Rows of a table that no sample looks up: only the other rank sees that the gradient was set to zero."""
    plain, model = small(), transformed(shard(small()))
    for seed in range(2):
        parts = [batch(2, seed=10 * seed + r).clamp(max=3) for r in range(WORLD)]  # rows 4 to 6 lie on rank 1
        total(model(parts[rank])).backward()
        assert_joined(model, plain, [(ids, 1 / WORLD) for ids in parts])
        model.zero_grad(set_to_none=False)


def test_zeroed_where_a_shard_is_zero(ranks):
    ranks(zeroed_where_a_shard_is_zero)


def clipped(rank):
    plain, model = small(), transformed(shard(small()))
    parts = [[batch(2 + r, seed=10 * step + r) for r in range(WORLD)] for step in range(2)]
    for clip in (nn.utils.clip_grad_norm_, graphopt.optim.clip_grad_norm_):
        total(model(parts[0][rank])).backward()
        norm = clip(model.parameters(), 0.1)
        c = 0.1 / (float(norm.full_tensor()) + 1e-6)
        assert_joined(model, plain, [(ids, c / WORLD) for ids in parts[0]], rtol=1e-8, atol=1e-12)
        total(model(parts[1][rank])).backward()
        both = [(ids, c / WORLD) for ids in parts[0]] + [(ids, 1 / WORLD) for ids in parts[1]]
        assert_joined(model, plain, both, rtol=1e-8, atol=1e-12)
        model.zero_grad()
    for module in (model, model.blocks[0]):
        module.set_gradient_divide_factor(1.0)
    total(model(parts[0][rank])).backward()
    assert_joined(model, plain, [(ids, 1.0) for ids in parts[0]])
    model.zero_grad()
    total(model(parts[0][rank])).backward()
    if rank == 1:
        model.head.weight.grad.to_local().add_(torch.rand(1, 5, dtype=torch.float64))
    total(model(parts[1][rank])).backward()
    with pytest.raises(StaleAnnotation, match="not a rescaling" if rank == 1 else "another rank"):
        find(model.head.weight, SUM_GRAD_SQUARED)
    assert find(model.table.weight, SUM_GRAD_SQUARED) is not None


def test_clipping_dividing_and_problems(ranks):
    ranks(clipped)


def optimized(rank, options):
    """TGAdamW on shards makes the steps that it makes on whole parameters."""
    whole, model = small(), transformed(shard(small()))
    optimizer = graphopt.optim.TGAdamW(model.parameters(), lr=0.05, **options)
    reference = graphopt.optim.TGAdamW(whole.parameters(), lr=0.05, **options)
    for step in range(3):
        parts = [batch(2 + r, seed=10 * step + r) for r in range(WORLD)]
        total(model(parts[rank])).backward()
        exact = from_losses(whole, (total(whole(row[None])) / WORLD for ids in parts for row in ids))
        for name, param in whole.named_parameters():
            param.grad = exact[name].grad
            graphopt.annotations.publish(param, exact[name].sum_grad_squared, sum(map(len, parts)))
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        for name, param in model.named_parameters():
            torch.testing.assert_close(param.full_tensor(), whole.get_parameter(name).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"graft": False}, {"foreach": False}], ids=str)
def test_tgadamw(ranks, options):
    ranks(optimized, options)


# --- options of fully_shard ------------------------------------------------------------------------------------------------


def by_columns(param):
    from torch.distributed.tensor import Shard

    return Shard(1) if param.dim() == 2 and param.shape[1] % WORLD == 0 else Shard(0)


def sharded_by_columns(rank):
    plain, model = small(), transformed(shard(small(), shard_placement_fn=by_columns))
    parts = [batch(2 + r, seed=r) for r in range(WORLD)]
    total(model(parts[rank])).backward()
    assert_joined(model, plain, [(ids, 1 / WORLD) for ids in parts])
    assert model.table.weight.placements[0].dim == 1


def test_sharded_by_columns(ranks):
    ranks(sharded_by_columns)


def mixed_precision(rank):
    """Parameters float32, computed in bfloat16: the statistic is float32 and that of the gathered model in bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    plain, model = small(torch.float32).to(torch.bfloat16), transformed(shard(small(torch.float32), mp_policy=policy))
    parts = [batch(2 + r, seed=r) for r in range(WORLD)]
    total(model(parts[rank])).backward()
    reference = from_losses(plain, (total(plain(row[None])) / WORLD for ids in parts for row in ids))
    for name, param in model.named_parameters():
        value = find(param, SUM_GRAD_SQUARED)
        assert value.dtype == torch.float32 == param.dtype
        wanted = reference[name].sum_grad_squared.float()
        # Each of the two rounds every product of a pass through 3 layers to 8 bits: at most about 6 roundings of 2**-8 in a
        # gradient, twice that in its square, on both sides.
        torch.testing.assert_close(value.full_tensor(), wanted, rtol=24 * 2**-8, atol=float(wanted.max()) * 2**-6)


def test_mixed_precision(ranks):
    ranks(mixed_precision)


def blocks_compiled(rank):
    """As torchtitan does it: each block through torch.compile, then sharded."""
    from torch.distributed.fsdp import fully_shard

    plain, model = small(), small()
    options = {"compiler": "aot_eager", "sample_axis_between_graphs": 0}  # what comes from one block enters the next
    compiled = {"backend": "graphopt", "options": options}
    model.table = torch.compile(model.table, **compiled)
    model.blocks[0] = torch.compile(model.blocks[0], **compiled)
    model.head = torch.compile(model.head, **compiled)
    fully_shard(model.blocks[0])
    fully_shard(model)
    plain_names = {name: name.replace("_orig_mod.", "") for name, _ in model.named_parameters()}
    for seed in range(2):
        parts = [batch(2 + r, seed=10 * seed + r) for r in range(WORLD)]
        total(model(parts[rank])).backward()
        reference = from_losses(plain, (total(plain(row[None])) / WORLD for ids in parts for row in ids))
        for name, param in model.named_parameters():
            found = find(param, SUM_GRAD_SQUARED).full_tensor()
            torch.testing.assert_close(found, reference[plain_names[name]].sum_grad_squared, **EXACT)
            assert find(param, NUM_SAMPLES) == 5
        model.zero_grad()


def test_blocks_compiled(ranks):
    ranks(blocks_compiled)


class Checkpointed(Small):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, ids):
        x = self.table(ids)
        return self.head(checkpoint(self.blocks[0], x, use_reentrant=self.reentrant).tanh())


def checkpointed(rank, reentrant):
    plain, model = small(), Checkpointed(reentrant).double()
    model.load_state_dict(plain.state_dict())
    transformed(shard(model))
    for seed in range(2):
        parts = [batch(2 + r, seed=10 * seed + r) for r in range(WORLD)]
        total(model(parts[rank])).backward()
        assert_joined(model, plain, [(ids, 1 / WORLD) for ids in parts])
        model.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(ranks, reentrant):
    ranks(checkpointed, reentrant)


class SequenceFirst(nn.Module):
    """(T, B, 3), from which one block and the head compute (T, B, 2)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 4)])
        self.head = nn.Linear(4, 2)

    def forward(self, x, table):
        return self.head((self.blocks[0](x) + table).tanh())


def sample_axis(rank, option):
    """The axis is known to every part: FSDP's hooks replace the tensors that go from one to the next."""
    torch.manual_seed(1)
    plain, model = SequenceFirst().double(), SequenceFirst().double()
    model.load_state_dict(plain.state_dict())
    transformed(shard(model), options={"sample_axis": option})
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(5, 4, 3, generator=generator).double(), torch.randn(5, 1, 4, generator=generator).double()
    (model(x[:, 2 * rank : 2 * rank + 2], table) ** 2).sum().backward()
    reference = from_losses(plain, ((plain(x[:, n : n + 1], table) ** 2).sum() / WORLD for n in range(4)))
    for name, param in model.named_parameters():
        found = find(param, SUM_GRAD_SQUARED).full_tensor()
        torch.testing.assert_close(found, reference[name].sum_grad_squared, msg=lambda t, n=name: f"{n}: {t}", **EXACT)
        assert find(param, NUM_SAMPLES) == 4, name


@pytest.mark.parametrize("option", [1, {"x": 1, "table": None}], ids=str)
def test_sample_axis(ranks, option):
    ranks(sample_axis, option)


def huggingface(rank):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
        attn_implementation="eager",
    )
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    plain = transformers.LlamaForCausalLM(config).double().train()
    model = transformers.LlamaForCausalLM(config).double().train()
    model.load_state_dict(plain.state_dict())
    for layer in model.model.layers:
        fully_shard(layer)
    transformed(fully_shard(model))
    parts = [torch.randint(17, (2 + r, 4), generator=torch.Generator().manual_seed(r)) for r in range(WORLD)]

    def loss(model, ids):
        return (model(ids).logits * torch.arange(17)).sin().sum()

    loss(model, parts[rank]).backward()
    reference = from_losses(plain, (loss(plain, row[None]) / WORLD for ids in parts for row in ids))
    for name, param in model.named_parameters():
        found = find(param, SUM_GRAD_SQUARED)
        assert found is not None, name
        torch.testing.assert_close(
            found.full_tensor(),
            reference[name].sum_grad_squared,
            rtol=1e-8,
            atol=1e-12,
            msg=lambda t, n=name: f"{n}: {t}",
        )
        assert find(param, NUM_SAMPLES) == 5, name


def test_huggingface(ranks):
    ranks(huggingface)


# --- what is refused -------------------------------------------------------------------------------------------------------


class OwnParameter(Small):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, ids):
        return self.head(self.blocks[0](self.table(ids) * self.scale).tanh())


def refused(rank, what):
    from torch.distributed.fsdp import FullyShardedDataParallel

    if what == "own":
        with pytest.raises(
            UnsupportedError, match=r"scale is a parameter of \w*OwnParameter itself.*module of its own"
        ):
            transformed(shard(OwnParameter().double()))
        passes = [TrueGrad(where=lambda name, parameter: name != "scale")]
        model = graphopt.transform(shard(OwnParameter().double()), passes, compiler="aot_eager")
        total(model(batch(2))).backward()
        assert [name for name, p in model.named_parameters() if find(p, SUM_GRAD_SQUARED) is None] == ["scale"]
        from torch.distributed.fsdp import fully_shard

        plain, model = OwnParameter().double(), OwnParameter().double()
        model.load_state_dict(plain.state_dict())
        model = transformed(fully_shard(model))  # the whole model, in one graph
        parts = [batch(2 + r, seed=r) for r in range(WORLD)]
        total(model(parts[rank])).backward()
        assert_joined(model, plain, [(ids, 1 / WORLD) for ids in parts])
    elif what == "fsdp1":
        with pytest.raises(UnsupportedError, match=r"FSDP1.*Use FSDP2"):
            transformed(FullyShardedDataParallel(small(torch.float32), device_id=torch.device("cpu")))
    elif what == "tensor":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (WORLD,))
        model = transformed(parallelize_module(small(), mesh, {"head": ColwiseParallel()}))
        with pytest.raises(UnsupportedError, match=r"DTensors in the graph: head\.weight"):
            model(batch(2))
    elif what == "axes":
        with pytest.raises(OptionError, match=r"names several axes.*fully_shard"):
            transformed(shard(SequenceFirst()), options={"sample_axis": {"x": 1, "table": 0}})
    elif what == "statistics":
        passes = [TrueGrad(statistics=("sum_grad_squared", "sample_grad_norm"))]
        model = graphopt.transform(shard(small()), passes, compiler="aot_eager")
        with pytest.raises(UnsupportedError, match="sample_grad_norm is not reduced over the ranks of fully_shard"):
            model(batch(2))


@pytest.mark.parametrize("what", ["own", "fsdp1", "tensor", "axes", "statistics"])
def test_refused(ranks, what):
    ranks(refused, what)


def restored(rank):
    model = transformed(shard(small()))
    graphopt.restore(model)
    assert not any("forward" in vars(module) or "_compiled_call_impl" in vars(module) for module in model.modules())
    total(model(batch(2, seed=rank))).backward()
    assert no_statistics(model)


def test_restore(ranks):
    ranks(restored)


def test_copy_while_fsdp_is_imported():
    import torch.distributed.fsdp  # noqa: F401

    clone = copy.deepcopy(transformed(small()))
    total(clone(batch(2))).backward()
    assert all(find(param, NUM_SAMPLES) == 2 for param in clone.parameters())


def test_data_parallel_is_refused():
    with pytest.raises(UnsupportedError, match=r"DataParallel.*DistributedDataParallel"):
        transformed(nn.DataParallel(small()))
