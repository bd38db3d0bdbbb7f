"""An optimizer in backward against the same optimizer after it, bit for bit, and what it refuses."""

import copy
import doctest
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt import annotations
from graphopt.errors import ClosureError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim import Modular, Module, Rule, fuse_into_backward, m
from graphopt.optim.core import in_backward


class Tied(nn.Module):
    """The first and the last layer share a weight; a layer is checkpointed, and one parameter is not used."""

    def __init__(self, use_reentrant=False):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.last.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(3))
        self.use_reentrant = use_reentrant

    def forward(self, inputs):
        hidden = self.first(inputs).tanh()
        hidden = checkpoint(lambda h: self.last(self.middle(h)).tanh(), hidden, use_reentrant=self.use_reentrant)
        return self.last(hidden)


def make_model(kind=Tied, **options):
    torch.manual_seed(0)
    return kind(**options).double()


def loss_of(model, t):
    inputs = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
    return model(inputs).sin().square().mean()


CHAINS = {
    "Adam": lambda: [m.Adam(), m.LR(0.05)],
    "amsgrad": lambda: [m.Adam(amsgrad=True), m.WeightDecay(0.1)],
    "long": lambda: [m.ClipValue(0.01), m.Adam(), m.NormalizeByEMA(), m.WeightDecay(0.1), m.LR(0.05)],
    "schedule": lambda: [m.Adam(beta1=lambda step: 1 - 1 / (step + 2)), m.LR(lambda step: 0.1 / (step + 1))],
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def train(model, optimizer, steps, scheduler=None):
    for t in steps:
        optimizer.zero_grad()
        loss_of(model, t).backward()
        if optimizer.in_backward is not None:
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(left, right, **tolerance):
    """Parameters and all states."""
    for (model, optimizer), (other, usual) in [(left, right)]:
        torch.testing.assert_close(values(model), values(other), **(tolerance or {"rtol": 0, "atol": 0}))
        saved, expected = optimizer.state_dict(), usual.state_dict()
        torch.testing.assert_close(saved["state"], expected["state"], **(tolerance or {"rtol": 0, "atol": 0}))
        assert saved["param_groups"] == expected["param_groups"]


# -- the same as ordinary steps


@every_chain
@pytest.mark.parametrize("flags", [{"foreach": False}, {"maximize": True}, {"foreach": True}], ids=str)
def test_equals_ordinary_steps(chain, flags):
    model, other = make_model(), make_model()
    optimizer, usual = fuse_into_backward(model, *chain(), **flags), Modular(other, *chain(), **flags)
    train(model, optimizer, range(5))
    train(other, usual, range(5))
    assert_same(
        (model, optimizer),
        (other, usual),
        **({"rtol": 1e-12, "atol": 1e-14} if flags.get("foreach") else {}),
    )
    assert optimizer.state[model.first.weight]["step"] == 5  # though it is used three times
    assert "step" not in optimizer.state.get(model.unused, {})


def test_equals_torchs_kernel():
    model, other = make_model(), make_model()
    optimizer = fuse_into_backward(model, m.Adam(), m.LR(0.05), fused=True)
    usual = torch.optim.Adam(other.parameters(), lr=0.05)
    for t in range(5):
        for net, opt in ((model, optimizer), (other, usual)):
            opt.zero_grad()
            loss_of(net, t).backward()
            opt.step()
    torch.testing.assert_close(values(model), values(other), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    ],
    ids=["StepLR", "OneCycleLR", "CosineAnnealingWarmRestarts"],
)
def test_schedulers(make):
    model, other = make_model(), make_model()
    optimizer = fuse_into_backward(model, m.Adam(), m.LR(0.05), foreach=False)
    usual = Modular(other, m.Adam(), m.LR(0.05), foreach=False)
    train(model, optimizer, range(5), make(optimizer))
    train(other, usual, range(5), make(usual))
    assert_same((model, optimizer), (other, usual))


def test_groups_and_a_ready_optimizer():
    models = make_model(), make_model()
    optimizers = []
    for model in models:
        groups = [
            {"params": [model.first.weight, model.unused], "lr": 0.5},
            {"params": [model.middle.weight], "beta1": 0.2},
            {"params": [model.first.bias], "frozen": True},
        ]
        optimizers.append(Modular(groups, m.Adam(), m.LR(0.05), foreach=False))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(2))  # ordinary steps, in which parameters share a count
    optimizer = fuse_into_backward(models[0], optimizers[0])
    assert optimizer is optimizers[0] is fuse_into_backward(models[0], optimizer)
    models[0].zero_grad()
    for t in range(2, 5):
        loss_of(models[0], t).backward()
        assert models[0].first.bias.grad is None  # frozen
        assert models[0].middle.bias.grad is not None  # not the optimizer's
        optimizer.step()
    train(models[1], optimizers[1], range(2, 5))
    assert_same((models[0], optimizer), (models[1], optimizers[1]))


def test_hooks_of_steps_run_once_a_step():
    model = make_model()
    optimizer = fuse_into_backward(model, m.LR(0.1))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, range(2))
    assert calls == ["before", "after"] * 2
    assert optimizer.param_groups[0]["num_steps"] == 2


# -- memory


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_never_exist_together(fused):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    most = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda _: most.append(sum(p.grad is not None for p in model.parameters())))
    make = fuse_into_backward if fused else Modular
    optimizer = make(model, m.Adam(), m.LR(0.1))
    for _ in range(2):
        model(torch.randn(3, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(most) == 2 * 12
    assert max(most) == (1 if fused else 12)


# -- saving and copying


@every_chain
def test_resumes(chain):
    model = make_model()
    optimizer = fuse_into_backward(model, *chain(), foreach=False)
    train(model, optimizer, range(3))
    other = make_model()
    other.load_state_dict(model.state_dict())
    resumed = fuse_into_backward(other, *chain(), foreach=False)
    train(other, resumed, [17])  # plans of another state
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_same((model, optimizer), (other, resumed))


@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_are_ordinary_optimizers(copying):
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    optimizer = fuse_into_backward(model, m.Adam(), m.LR(0.05), foreach=False)
    train(model, optimizer, range(2))
    other, usual = copying((model, optimizer))
    assert usual.in_backward is None
    train(model, optimizer, range(2, 4))
    train(other, usual, range(2, 4))
    assert_same((model, optimizer), (other, usual))


def test_remove():
    model, other = make_model(), make_model()
    optimizer, usual = (
        fuse_into_backward(model, m.Adam(), m.LR(0.05), foreach=False),
        Modular(other, m.Adam(), m.LR(0.05), foreach=False),
    )
    train(model, optimizer, range(2))
    optimizer.in_backward.remove()
    train(model, optimizer, range(2, 4))
    train(other, usual, range(4))
    assert_same((model, optimizer), (other, usual))


def test_distributed_checkpoint_before_the_first_step():
    model = make_model(lambda: nn.Linear(4, 2))
    before = values(model)
    optimizer = fuse_into_backward(model, m.Adam(), m.LR(0.05))
    saved = get_optimizer_state_dict(model, optimizer)
    assert "adam.exp_avg" in saved["state"]["weight"]
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)


# -- what is refused


class Whole(Module):
    def step(self, var):
        return var


class Closure(Module):
    needs_closure = True


class Norms(Rule):
    def measure(self, updates, settings):
        return {"total": sum(u.sum() for u in updates)}

    def update(self, update, state, settings, context):
        return update, state


class OwnStep(Rule):
    def step(self, var):
        return var


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Whole, "module 2 of 3, Whole: .*all parameters together"),
        (OwnStep, "module 2 of 3, OwnStep: .*all parameters together"),
        (Closure, "Closure: .*closure"),
        (Norms, "Norms: .*all gradients together"),
        (m.TrueGradAdam, "TrueGradAdam: it reads sum_grad_squared, num_samples, published when backward has ended"),
        (lambda: m.TrueGradRMSprop(inner=Norms()), r"TrueGradRMSprop: it reads"),
    ],
    ids=["module", "step", "closure", "measure", "reads", "inner"],
)
def test_chains_that_need_more_than_one_gradient(module, match):
    model = make_model()
    with pytest.raises(UnsupportedError, match=match):
        fuse_into_backward(model, m.ClipValue(1.0), module(), m.LR(0.1))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_statistics_are_published_after_the_hooks():
    """The reason why chains that read them are refused."""
    model = graphopt.transform(make_model(lambda: nn.Linear(4, 2)), compiler="eager")
    found = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: found.append(annotations.find(p, annotations.SUM_GRAD_SQUARED)))
    loss_of(model, 0).backward()
    assert found == [None, None]
    assert all(annotations.find(p, annotations.SUM_GRAD_SQUARED) is not None for p in model.parameters())
    torch._dynamo.reset()


def test_a_model_with_statistics_trains_by_other_chains():
    """And keeps no statistic of a gradient that is gone."""
    model, plain = (make_model(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))) for _ in range(2))
    transformed = graphopt.transform(model, compiler="eager")
    optimizer, usual = (
        fuse_into_backward(transformed, m.Adam(), m.LR(0.05), foreach=False),
        Modular(plain, m.Adam(), m.LR(0.05), foreach=False),
    )
    train(transformed, optimizer, range(3))
    train(plain, usual, range(3))
    torch.testing.assert_close(values(transformed), values(plain), rtol=1e-9, atol=1e-12)
    assert all(annotations.find(p, annotations.SUM_GRAD_SQUARED) is None for p in transformed.parameters())
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("fuse", "error", "match"),
    [
        (lambda model: fuse_into_backward(model), OptionError, "without modules"),
        (lambda model: fuse_into_backward(model, torch.optim.SGD(model.parameters())), OptionError, "found SGD"),
        (lambda model: fuse_into_backward(model, Modular(model, m.LR(0.1)), foreach=True), OptionError, "'foreach'"),
        (lambda model: fuse_into_backward(model, Modular(model, m.LR(0.1)), m.LR()), OptionError, "found Modular, LR"),
        (
            lambda model: fuse_into_backward(nn.Linear(2, 2), Modular(model, m.LR())),
            OptionError,
            "'first.weight'.*another",
        ),
        (lambda model: fuse_into_backward(model, m.LR(0.1), differentiable=True), UnsupportedError, "differentiable"),
    ],
    ids=["nothing", "torch", "flags", "both", "foreign", "differentiable"],
)
def test_arguments(fuse, error, match):
    model = make_model()
    with pytest.raises(error, match=match):
        fuse(model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_distributed_data_parallel():
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"DistributedDataParallel.*fully_shard"):
        fuse_into_backward(parallel, m.LR(0.1))


def test_a_closure():
    model = make_model()
    optimizer = fuse_into_backward(model, m.LR(0.1))
    with pytest.raises(ClosureError, match=r"in_backward\.remove"):
        optimizer.step(lambda: loss_of(model, 0))


def test_a_second_backward():
    model = make_model()
    optimizer = fuse_into_backward(model, m.Adam(), m.LR(0.1))
    loss_of(model, 0).backward()
    before = values(model)
    with pytest.raises(
        UnsupportedError, match=r"second gradient .* \(4 of 5 parameters .*optimizer\.step\(\) after each"
    ):
        loss_of(model, 1).backward()
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)
    optimizer.step()
    train(model, optimizer, [2])


def test_losses_over_different_parameters():
    model = make_model(lambda: nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]))
    other = make_model(lambda: nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]))
    optimizer = fuse_into_backward(model, m.Adam(), m.LR(0.1), foreach=False)
    usual = Modular(other, m.Adam(), m.LR(0.1), foreach=False)
    for net, opt in ((model, optimizer), (other, usual)):
        for layer in net:
            loss_of(layer, 0).backward()
        opt.step()
    assert_same((model, optimizer), (other, usual))


def test_reentrant_checkpoints_that_share_a_parameter():
    model = make_model(use_reentrant=True)
    fuse_into_backward(model, m.LR(0.1))
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        loss_of(model, 0).backward()


def test_nan_in_the_middle_of_backward():
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    optimizer = fuse_into_backward(model, m.Adam(), m.LR(0.1))
    model[0].bias.register_hook(lambda grad: grad * math.nan)
    before = values(model)
    with pytest.raises(
        NonFiniteError, match=r"parameter '0\.bias'.*NaN.*; [23] of 4 parameters have moved in this iteration"
    ):
        loss_of(model, 0).backward()
    after = values(model)
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[3], before[3])
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_that_no_hook_has_seen():
    model = make_model(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    model[0].weight.requires_grad_(False)
    optimizer = fuse_into_backward(model, Modular(list(model.named_parameters())[:3], m.LR(0.1)))
    model[0].weight.requires_grad_()
    optimizer.add_param_group({"params": [("late", model[2].bias)]})
    loss_of(model, 0).backward()
    with pytest.raises(
        UnsupportedError, match=r"2 of its parameters .*'0\.weight'.*; parameter 'late'.*fuse_into_backward\("
    ):
        optimizer.step()
    fuse_into_backward(model, optimizer)
    optimizer.zero_grad()
    optimizer.step()
    train(model, optimizer, [1])
    assert all(optimizer.state[p]["step"] == (1 if i in (0, 3) else 2) for i, p in enumerate(model.parameters()))


def test_gradient_scaler_fails_at_its_step():
    model = make_model()
    optimizer = fuse_into_backward(model, m.LR(0.1))
    scaler = torch.amp.GradScaler(device="cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)


def test_example():
    assert doctest.testmod(in_backward, verbose=False) == (0, 7)
