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
    losses = (weight * sample_losses(plain(row[None], *args)).sum() for ids, weight, *args in parts for row in ids)
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
    return DistributedDataParallel(
        torch.compile(model, backend="graphopt", options={"compiler": "aot_eager"}), **options
    )


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


# --- accumulation ------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.extra = nn.Linear(4, 4)

    def forward(self, x, use_extra=False):
        x = self.first(x).tanh()
        if use_extra:
            x = self.extra(x)
        return self.second(x)


def small(dtype=torch.float64):
    torch.manual_seed(1)
    return Small().to(dtype)


def rows(num, seed, dtype=torch.float64):
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def total(output):
    return (output * torch.tensor([1.0, 2.0])).sin().sum()


def expected_small(plain, parts):
    return from_losses(plain, (weight * total(plain(row[None], *args)) for x, weight, *args in parts for row in x))


def assert_small(model, parts, **tolerance):
    assert_small_of(model, graphopt.restore(copy.deepcopy(model)), parts, **tolerance)


def assert_small_of(model, plain, parts, **tolerance):
    reference = expected_small(plain, parts)
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
        used = sum(len(x) for x, _, *args in parts if not name.startswith("extra") or args == [True])
        assert find(param, NUM_SAMPLES) == used, name


def used_by_all(model):
    """`extra` frozen: DDP without find_unused_parameters wants every trainable parameter to be used."""
    model.extra.requires_grad_(False)
    return model


def micro_batches(rank, plan, wrap, options):
    """``plan``: for each backward, whether DDP averages. Checked after every backward."""
    model = used_by_all(small())
    ddp = wrap(model, **options)
    for start in (0, 100):
        reduced, local = [], []  # what p.grad holds: averaged already, and of this rank alone
        for index, averages in enumerate(plan):
            parts = [rows(2 + (index + r) % 2, seed=start + 10 * index + r) for r in range(WORLD)]
            with contextlib.nullcontext() if averages else ddp.no_sync():
                total(ddp(parts[rank])).backward()
            local.append(parts)
            if averages:
                reduced += [(x, 1 / WORLD) for each in local for x in each]
                local = []
            assert_small(model, reduced + [(each[rank], 1.0) for each in local])
        model.zero_grad(set_to_none=start == 0)


@pytest.mark.parametrize(
    "plan",
    [(False, False, True), (True, True), (True, False, False, True), (False, True, False, True, True)],
    ids=lambda plan: "".join("s" if averages else "n" for averages in plan),
)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=["copies", "views"])
def test_accumulation(ranks, plan, options):
    ranks(micro_batches, plan, inside, options)


def test_accumulation_static_graph(ranks):  # the first pass must average: torch's own assertion fails otherwise
    ranks(micro_batches, (True, False, True, True), inside, {"static_graph": True})


def test_accumulation_transformed_outside(ranks):
    ranks(micro_batches, (False, True, True), outside, {})


def forward_of_one_kind_backward_of_another(rank):
    """DDP averages in the first backward after a forward outside no_sync(), whichever forward that belongs to."""
    model = used_by_all(small())
    ddp = wrap = inside(model)
    parts = [[rows(2, seed=10 * index + r) for r in range(WORLD)] for index in range(2)]
    first = total(ddp(parts[0][rank]))
    with wrap.no_sync():
        second = total(ddp(parts[1][rank]))
    second.backward()
    assert_small(model, [(x, 1 / WORLD) for x in parts[1]])
    first.backward()
    assert_small(model, [(x, 1 / WORLD) for x in parts[1]] + [(parts[0][rank], 1.0)])


def test_forward_of_one_kind_backward_of_another(ranks):
    ranks(forward_of_one_kind_backward_of_another)


def rescaled_between(rank, clip):
    """Clipping between an average and a local pass, and after it; the same on all ranks."""
    model = used_by_all(small())
    ddp = inside(model)
    parts = [[rows(2, seed=10 * index + r) for r in range(WORLD)] for index in range(3)]
    total(ddp(parts[0][rank])).backward()
    norm = clip(model.parameters(), 0.1)
    c = 0.1 / (norm + 1e-6)
    assert_small(model, [(x, c / WORLD) for x in parts[0]], rtol=1e-6, atol=1e-9)
    with ddp.no_sync():
        total(ddp(parts[1][rank])).backward()
    for param in model.parameters():
        if param.grad is not None:
            param.grad.mul_(0.25)
    local = [(x, 0.25 * c / WORLD) for x in parts[0]] + [(parts[1][rank], 0.25)]
    if rank == 0:  # whether it was read in between makes no difference
        assert_small(model, local, rtol=1e-6, atol=1e-9)
    total(ddp(parts[2][rank])).backward()
    reduced = [(x, 0.25 * c / WORLD) for x in parts[0]] + [(x, 0.25 / WORLD) for x in parts[1]]
    assert_small(model, reduced + [(x, 1 / WORLD) for x in parts[2]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, graphopt.optim.clip_grad_norm_], ids=["torch", "graphopt"])
def test_clip_grad_norm(ranks, clip):
    ranks(rescaled_between, clip)


def scaled_loss(rank):
    model = used_by_all(small(torch.float32))
    ddp = inside(model)
    optimizer = graphopt.optim.TGAdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(2):
        parts = [rows(2 + r, seed=10 * step + r, dtype=torch.float32) for r in range(WORLD)]
        scaler.scale(total(ddp(parts[rank]))).backward()
        assert_small(model, [(x, scaler.get_scale() / WORLD) for x in parts], rtol=1e-5, atol=1e-3)
        scaler.unscale_(optimizer)
        assert_small(model, [(x, 1 / WORLD) for x in parts], rtol=1e-5, atol=1e-6)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    weights = torch.cat([param.detach().flatten() for param in model.parameters()])
    return weights.tolist()


def test_grad_scaler_and_optimizer(ranks):
    first, second = ranks(scaled_loss)
    assert first == second


# --- ranks that differ ---------------------------------------------------------------------------------------------------


def only_one_rank_uses(rank, zeros):
    model = small()
    ddp = inside(model, find_unused_parameters=True)
    for step, users in enumerate([(True, False), (False, False), (False, True), (True, True), (True, False)]):
        parts = [(rows(2 + r, seed=10 * step + r), 1 / WORLD, users[r]) for r in range(WORLD)]
        total(ddp(parts[rank][0], parts[rank][2])).backward()
        if any(users):
            assert_small(model, parts)
        else:
            assert find(model.extra.weight, SUM_GRAD_SQUARED) is None
        model.zero_grad(set_to_none=not zeros)


@pytest.mark.parametrize("zeros", [False, True], ids=["None", "zeros"])
def test_parameter_that_one_rank_uses(ranks, zeros):
    ranks(only_one_rank_uses, zeros)


def accumulated_on_one_rank(rank):
    """`extra` is used by rank 0 only, averaged, and then by rank 1 only, on top."""
    model = small()
    ddp = inside(model, find_unused_parameters=True)
    parts = []
    for step, users in enumerate([(True, False), (False, True), (False, False)]):
        new = [(rows(2 + r, seed=10 * step + r), 1 / WORLD, users[r]) for r in range(WORLD)]
        total(ddp(new[rank][0], new[rank][2])).backward()
        parts += new
        assert_small(model, parts)


def test_accumulation_on_one_rank(ranks):
    ranks(accumulated_on_one_rank)


def stale_on_one_rank(rank):
    """A rank with a problem keeps nobody waiting, and all of them learn of it."""
    model = used_by_all(small())
    ddp = inside(model)
    with ddp.no_sync():
        total(ddp(rows(2, seed=rank))).backward()
    if rank == 1:
        model.first.weight.grad.add_(torch.randn(4, 3))
    total(ddp(rows(2, seed=rank))).backward()
    with pytest.raises(
        StaleAnnotation, match="not a rescaling" if rank == 1 else "another rank has no valid statistic"
    ):
        find(model.first.weight, SUM_GRAD_SQUARED)
    assert find(model.second.weight, SUM_GRAD_SQUARED) is not None
    model.zero_grad()
    parts = [rows(2, seed=r) for r in range(WORLD)]
    total(ddp(parts[rank])).backward()
    assert_small(model, [(x, 1 / WORLD) for x in parts])


def test_problem_on_one_rank(ranks):
    ranks(stale_on_one_rank)


def uncaptured_on_one_rank(rank):
    model = used_by_all(small())
    ddp = inside(model)
    total(ddp(rows(2, seed=rank))).backward()
    model.zero_grad()
    if rank == 1:
        torch.compiler.set_stance("force_eager")
    try:
        with contextlib.suppress(graphopt.errors.UncapturedCall):
            loss = total(ddp(rows(2, seed=rank))) if rank == 0 else _eager(ddp, rows(2, seed=rank))
        loss.backward()
    finally:
        torch.compiler.set_stance("default")
    with pytest.raises(StaleAnnotation, match=r"1 of 2 ranks computed the gradient .* outside any captured graph"):
        find(model.first.weight, SUM_GRAD_SQUARED)


def _eager(ddp, x):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return total(ddp(x))


def test_uncaptured_on_one_rank(ranks):
    ranks(uncaptured_on_one_rank)


# --- hooks, other gradients, other wrappers ------------------------------------------------------------------------------


def compressed(rank, name):
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    model = used_by_all(small(torch.float32))
    ddp = inside(model)
    ddp.register_comm_hook(None, getattr(default_hooks, name))
    parts = [rows(2 + r, seed=r, dtype=torch.float32) for r in range(WORLD)]
    total(ddp(parts[rank])).backward()
    plain = graphopt.restore(copy.deepcopy(model))
    reference = expected_small(plain, [(x, 1 / WORLD) for x in parts])
    for key, param in model.named_parameters():
        if key in reference:
            torch.testing.assert_close(param.grad, reference[key].grad, rtol=2e-2, atol=1e-2)
            value = find(param, SUM_GRAD_SQUARED)
            torch.testing.assert_close(value, reference[key].sum_grad_squared, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["allreduce_hook", "fp16_compress_hook"]
)  # DDP has the one for bfloat16 only with NCCL
def test_averaging_hooks(ranks, name):
    ranks(compressed, name)


def _sums(state, bucket):
    work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Wide(nn.Module):
    """Larger than DDP's first bucket, 1 MiB."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 600)
        self.others = nn.ModuleList(nn.Linear(600, 600) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for layer in self.others:
            x = layer(x).tanh()
        return x


def refused(rank, what):
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

    model = used_by_all(small())
    ddp = inside(model)
    if what == "hook":
        ddp.register_comm_hook(None, _sums)
        with pytest.raises(UnsupportedError, match=r"communication hook _sums.*bf16_compress_hook"):
            ddp(rows(2, seed=rank))
    elif what == "noop":
        ddp.register_comm_hook(None, noop_hook)
        with pytest.raises(UnsupportedError, match="communication hook noop_hook"):
            ddp(rows(2, seed=rank))
    elif what == "join":
        with ddp.join(), pytest.raises(UnsupportedError, match=r"join\(\) context.*same number of batches"):
            ddp(rows(2, seed=rank))
    elif what == "split":
        wide = Wide()
        compiled = torch.compile(DistributedDataParallel(wide, bucket_cap_mb=1.2), backend="graphopt")
        with pytest.raises(Exception, match=r"Set torch\._dynamo\.config\.optimize_ddp = False"):
            compiled(rows(2, seed=rank, dtype=torch.float32))
        torch._dynamo.reset()
        ddp = DistributedDataParallel(transformed(wide), bucket_cap_mb=1.2)
        assert ddp(rows(2, seed=rank, dtype=torch.float32)).shape == (2, 600)
        assert len(graphopt.records(wide)) == 1


@pytest.mark.parametrize("what", ["hook", "noop", "join", "split"])
def test_refused(ranks, what):
    ranks(refused, what)


def other_gradients(rank):
    """autograd.grad reaches no AccumulateGrad: DDP goes on waiting, and so must the statistics."""
    model = used_by_all(small())
    ddp = inside(model)
    x = rows(2, seed=rank).requires_grad_()
    parts = [rows(2 + r, seed=10 + r) for r in range(WORLD)]
    (saliency,) = torch.autograd.grad(total(ddp(x)), [x])
    assert saliency.shape == x.shape
    assert all(find(param, SUM_GRAD_SQUARED) is None for param in model.parameters())
    total(ddp(parts[rank])).backward()
    assert_small(model, [(part, 1 / WORLD) for part in parts])
    torch.autograd.grad(total(ddp(x)), [x])
    assert_small(model, [(part, 1 / WORLD) for part in parts])


def test_autograd_grad(ranks):
    ranks(other_gradients)


def wrapped_anew(rank):
    """A second DDP around the same model, after the first is gone; and the model by itself."""
    model = used_by_all(small())
    parts = [rows(2 + r, seed=r) for r in range(WORLD)]
    for _ in range(2):
        ddp = inside(model)
        total(ddp(parts[rank])).backward()
        assert_small(model, [(x, 1 / WORLD) for x in parts])
        model.zero_grad()
    total(model(parts[rank])).backward()
    assert_small(model, [(parts[rank], 1.0)])


def test_wrapped_anew(ranks):
    ranks(wrapped_anew)


# --- activation checkpointing ----------------------------------------------------------------------------------------------


class Checkpointed(Small):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=self.reentrant)
        return checkpoint(self.second, x, use_reentrant=self.reentrant)


def checkpointed(rank, reentrant, static_graph):
    plain, model = small(), Checkpointed(reentrant).double()
    model.load_state_dict(plain.state_dict())
    ddp = inside(used_by_all(model), static_graph=static_graph)
    for seed in range(2):
        parts = [rows(2 + r, seed=10 * seed + r) for r in range(WORLD)]
        total(ddp(parts[rank].requires_grad_())).backward()
        assert_small_of(model, used_by_all(plain), [(x.detach(), 1 / WORLD) for x in parts])
        model.zero_grad()


@pytest.mark.parametrize("static_graph", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(ranks, reentrant, static_graph):
    ranks(checkpointed, reentrant, static_graph)


class EagerAround(nn.Module):
    """A transformed module inside a reentrant checkpoint that runs as it is written: a backward pass within a backward pass."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.head = transformed(Head().double())
        self.checkpoints = True

    def forward(self, x):
        return self.head(checkpoint(self.inner, x, use_reentrant=True) if self.checkpoints else self.inner(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x.tanh())


def nested_pass(rank, static_graph):
    torch.manual_seed(2)
    model = EagerAround(used_by_all(transformed(small())))
    plain = graphopt.restore(copy.deepcopy(model))
    graphopt.restore(plain.inner)
    graphopt.restore(plain.head)
    plain.checkpoints = False
    ddp = DistributedDataParallel(model, static_graph=static_graph)
    for seed in range(3):
        parts = [rows(2 + r, seed=10 * seed + r) for r in range(WORLD)]
        if seed == 1:
            with ddp.no_sync():
                total(ddp(parts[rank].requires_grad_())).backward()
            assert_small_of(model, plain, [(parts[rank].detach(), 1.0)])
            first = [(x.detach(), 1 / WORLD) for x in parts]
            continue
        total(ddp(parts[rank].requires_grad_())).backward()
        assert_small_of(model, plain, [(x.detach(), 1 / WORLD) for x in parts] + (first if seed == 2 else []))
        model.zero_grad()


@pytest.mark.parametrize("static_graph", [False, True])
def test_backward_within_backward(ranks, static_graph):
    ranks(nested_pass, static_graph)
