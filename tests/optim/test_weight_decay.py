"""The links of a WeightDecayChain against their formulas, alone and inside every optimizer."""

import doctest

import pytest
import torch
from torch import nn

from graphopt import annotations
from graphopt.errors import OptionError
from graphopt.optim import (
    Graft,
    L1WeightDecay,
    L2WeightDecay,
    LpWeightDecay,
    OptimizerOptimizer,
    Sign,
    TGAdamW,
    TGLaProp,
    TGRMSProp,
    WeightDecay,
    WeightDecayChain,
    WeightDecayToEMA,
    WeightDecayToInit,
    truegrad_update,
    weight_decay,
)
from tests.optim.training import WAYS, largest_difference, make_params, set_gradients, shapes_for, snapshot, train


def sgd(params, lr=1.0):
    return torch.optim.SGD(params, lr=lr)


# What moves a parameter whose gradient is zero is its decay alone; lr is 0.1 in all of them.
OPTIMIZERS = {
    "TGAdamW": lambda params, **o: TGAdamW(params, lr=0.1, **o),
    "TGAdamW, baseline": lambda params, **o: TGAdamW(params, lr=0.1, enforce_baseline=True, **o),
    "TGLaProp": lambda params, **o: TGLaProp(params, lr=0.1, **o),
    "TGLaProp, baseline": lambda params, **o: TGLaProp(params, lr=0.1, enforce_baseline=True, **o),
    "TGRMSProp": lambda params, **o: TGRMSProp(params, lr=0.1, **o),
    "Graft": lambda params, **o: Graft(params, sgd(params), sgd(params), lr=0.1, **o),
    "Sign": lambda params, **o: Sign(params, sgd(params), lr=0.1, **o),
    "OptimizerOptimizer": lambda params, **o: OptimizerOptimizer(params, sgd(params, 0.1), 0.0, **o),
}

every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def still_step(optimizer, params):
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()


class ReferenceEMA:
    """θ - ema / (1 - β^t), as in the catalogue."""

    def __init__(self, beta):
        self.beta, self.ema, self.t = beta, 0.0, 0

    def __call__(self, value, theta):
        self.t += 1
        self.ema = self.beta * self.ema + (1 - self.beta) * theta
        return value - self.ema / (1 - self.beta**self.t)


# -- formulas


@every_optimizer
def test_l2_is_the_decay_of_adamw(make):
    params, plain = make_params(), make_params()
    torch_params = make_params()
    ours = make(params, weight_decay=0.2, weight_decay_cls=WeightDecayChain(L2WeightDecay()))
    default = make(plain, weight_decay=0.2)
    adamw = torch.optim.AdamW(torch_params, lr=0.1, weight_decay=0.2)
    for _ in range(3):
        still_step(ours, params)
        still_step(default, plain)
        still_step(adamw, torch_params)
    assert largest_difference(params, torch_params) < 1e-15
    assert all(torch.equal(a, b) for a, b in zip(params, plain, strict=True))


@every_optimizer
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_lp(make, power):
    params = make_params()
    expected = [p - 0.1 * 0.2 * p.abs().pow(power) * p.sign() for p in snapshot(params)]
    still_step(make(params, weight_decay=0.2, weight_decay_cls=LpWeightDecay(power)), params)
    assert largest_difference(params, expected) < 1e-15


@every_optimizer
def test_l1_of_zero_is_zero(make):
    params = [nn.Parameter(torch.tensor([0.0, -0.0, 2.0, -3.0], dtype=torch.float64))]
    still_step(make(params, weight_decay=0.5, weight_decay_cls=L1WeightDecay()), params)
    torch.testing.assert_close(params[0].detach(), torch.tensor([0.0, 0.0, 1.95, -2.95], dtype=torch.float64))


@every_optimizer
def test_to_init(make):
    params = [nn.Parameter(torch.tensor([2.0], dtype=torch.float64))]
    optimizer = make(params, weight_decay=1.0, weight_decay_cls=WeightDecayToInit())
    still_step(optimizer, params)
    assert params[0].item() == 2.0
    params[0].data.fill_(3.0)
    still_step(optimizer, params)
    assert params[0].item() == pytest.approx(2.9, abs=1e-15)


@every_optimizer
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
def test_to_ema(make, beta):
    params = make_params([(4, 3), (5,)])
    optimizer = make(params, weight_decay=2.0, weight_decay_cls=WeightDecayToEMA(beta))
    references = [(p, ReferenceEMA(beta)) for p in params]
    for _ in range(6):
        for p in params:
            p.data.add_(torch.randn_like(p))
        expected = [p.detach() - 0.2 * ema(p.detach(), p.detach()) for p, ema in references]
        still_step(optimizer, params)
        assert largest_difference(params, expected) < 1e-12


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_ema_does_not_move_a_constant_parameter(make, dtype):
    params = make_params(dtype=dtype)
    before = snapshot(params)
    optimizer = make(params, weight_decay=1.0, weight_decay_cls=WeightDecayToEMA(0.9))
    for _ in range(30):
        still_step(optimizer, params)
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@every_optimizer
def test_links_run_in_order(make):
    params = make_params([(4, 3), (5,)])
    first = snapshot(params)
    chain = WeightDecayChain(WeightDecayToInit(), L1WeightDecay())
    optimizer = make(params, weight_decay=0.5, weight_decay_cls=chain)
    still_step(optimizer, params)
    for p in params:
        p.data.add_(torch.randn_like(p))
    expected = [p.detach() - 0.05 * (p.detach() - start).sign() for p, start in zip(params, first, strict=True)]
    still_step(optimizer, params)
    assert largest_difference(params, expected) < 1e-15


@every_optimizer
def test_links_of_one_type_have_their_own_state(make):
    params = make_params([(4, 3)])
    chain = WeightDecayChain(WeightDecayToEMA(0.5), WeightDecayToEMA(0.9), L2WeightDecay())
    optimizer = make(params, weight_decay=1.0, weight_decay_cls=chain)
    first, second = ReferenceEMA(0.5), ReferenceEMA(0.9)
    for _ in range(4):
        params[0].data.add_(torch.randn_like(params[0]))
        theta = params[0].detach().clone()
        expected = theta - 0.1 * second(first(theta, theta), theta)
        still_step(optimizer, params)
        assert largest_difference(params, [expected]) < 1e-12


@every_optimizer
@pytest.mark.parametrize("decay", [None, L1WeightDecay(), WeightDecayToInit(), WeightDecayToEMA(0.5)], ids=repr)
def test_every_tensor_decays_once_per_step(make, decay):
    """What happens to a parameter does not depend on how many others there are."""
    alone, together = make_params([(3,)]), make_params([(3,)]) + make_params([(3,)] * 4 + [(2, 2)], seed=1)
    options = {"weight_decay": 0.5, "weight_decay_cls": decay}
    optimizers = make(alone, **options), make(together, **options)
    for step in range(3):
        for params, optimizer in zip((alone, together), optimizers, strict=True):
            for p in params:
                p.data.add_(0.25 * step)
            still_step(optimizer, params)
    assert torch.equal(alone[0], together[0])


@every_optimizer
def test_decay_and_step_start_from_the_same_parameter(make):
    with_decay, without, decayed = make_params(), make_params(), make_params()
    optimizer = make(with_decay, weight_decay=0.5, weight_decay_cls=L1WeightDecay())
    plain = make(without, weight_decay=0.0)
    before = snapshot(without)
    train(optimizer, with_decay, [0])
    train(plain, without, [0])
    decayed = [p.detach() - 0.05 * start.sign() for p, start in zip(without, before, strict=True)]
    assert largest_difference(with_decay, decayed) < 1e-15


@every_optimizer
def test_groups_have_their_own_weight_decay(make):
    params = make_params([(3,), (3,)])
    expected = [params[0].detach() - 0.1 * 0.5 * params[0].detach().sign(), params[1].detach().clone()]
    optimizer = make(params, weight_decay=0.0, weight_decay_cls=L1WeightDecay())
    second = {**optimizer.param_groups[0], "params": [params[1]]}
    optimizer.param_groups[0].update(params=[params[0]], weight_decay=0.5)
    optimizer.param_groups.append(second)
    still_step(optimizer, params)
    assert largest_difference(params, expected) < 1e-15


# -- how it runs


@pytest.mark.usefixtures("own_kernels")
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("graft", [True, False])
def test_every_way_of_tgadamw(way, graft):
    ours, plain = make_params(shapes_for(way)), make_params(shapes_for(way))
    options = {"lr": 0.1, "graft": graft}
    optimizer = TGAdamW(ours, weight_decay=0.5, weight_decay_cls=WeightDecayToInit(), **options, **way)
    without = TGAdamW(plain, weight_decay=0.0, **options, foreach=False)
    start = snapshot(ours)
    for seed in range(3):
        before = snapshot(ours)
        for p, q in zip(ours, plain, strict=True):
            q.data.copy_(p.data)
        set_gradients(ours, seed)
        set_gradients(plain, seed)
        optimizer.step()
        without.step()
        expected = [q.detach() - 0.05 * (old - first) for q, old, first in zip(plain, before, start, strict=True)]
        assert largest_difference(ours, expected) < 1e-12


def test_plain_decay_stays_in_the_kernel(monkeypatch):
    seen = []
    original = truegrad_update._update_param
    monkeypatch.setattr(
        truegrad_update, "_update_param", lambda tensors, *rest: (seen.append(tensors.pull), original(tensors, *rest))
    )
    for decay in (None, L2WeightDecay(), WeightDecayChain(L2WeightDecay(), L2WeightDecay()), L1WeightDecay()):
        params = make_params()
        train(TGAdamW(params, weight_decay_cls=decay), params, [0])
    assert [pull is None for pull in seen] == [True] * (len(seen) * 3 // 4) + [False] * (len(seen) // 4)


def test_low_precision_parameters_are_rounded_once():
    """A decay below half a unit of the last place counts together with a step that is below it, too."""
    (p,) = make_params([(1,)], torch.bfloat16)
    p.data.fill_(1.0)
    optimizer = TGAdamW([p], lr=2**-9 * 0.75, weight_decay=1.0, weight_decay_cls=L1WeightDecay())
    p.grad = torch.ones_like(p)
    annotations.publish(p, p.grad.float() ** 2 / 2, 2)
    optimizer.step()
    assert p.item() == 1 - 2**-8  # each alone is 0.75 of half a unit below 1, and would be lost


@every_optimizer
def test_state_is_at_least_float32(make):
    params = make_params([(4, 3)], torch.bfloat16)
    optimizer = make(params, weight_decay_cls=WeightDecayChain(WeightDecayToInit(), WeightDecayToEMA()))
    still_step(optimizer, params)
    state = optimizer.state[params[0]]
    names = {name for name in state if name.startswith("weight_decay")}
    assert names == {"weight_decay_0_init", "weight_decay_1_average", "weight_decay_1_step"}
    assert {state[name].dtype for name in names} == {torch.float32}


def test_nothing_is_remembered_of_a_step_that_fails(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(truegrad_update, "compile_flat", fail)
    truegrad_update._compile_kernels.cache_clear()
    params = make_params([(5000,)])
    set_gradients(params, 0)
    optimizer = TGAdamW(params, fused=True, weight_decay_cls=WeightDecayToEMA())
    with pytest.raises(RuntimeError, match="no compiler here"):
        optimizer.step()
    state = optimizer.state[params[0]]
    assert state["weight_decay_0_step"] == 0
    assert not state["weight_decay_0_average"].any()
    truegrad_update._compile_kernels.cache_clear()


# -- the classes


class Towards(WeightDecay):
    """A link of the user's own."""

    def __init__(self, value):
        self.value = value

    def __call__(self, values, params, states):
        return [value - self.value for value in values]


@every_optimizer
def test_own_links(make):
    params = make_params([(4, 3)])
    expected = [p - 0.05 * (p - 7.0) for p in snapshot(params)]
    still_step(make(params, weight_decay=0.5, weight_decay_cls=Towards(7.0)), params)
    assert largest_difference(params, expected) < 1e-15


def test_chains_are_unpacked():
    inner = WeightDecayChain(WeightDecayToInit(), L1WeightDecay())
    chain = WeightDecayChain(inner, WeightDecayToEMA(0.5), LpWeightDecay(3))
    assert (
        repr(chain)
        == "WeightDecayChain(WeightDecayToInit(), L1WeightDecay(), WeightDecayToEMA(0.5), LpWeightDecay(3.0))"
    )
    assert not chain.is_plain
    assert WeightDecayChain(L2WeightDecay()).is_plain
    assert not WeightDecayChain(LpWeightDecay(2)).is_plain


@pytest.mark.parametrize("wrong", [WeightDecayToInit, "l1", 0.1, [L1WeightDecay()]])
@every_optimizer
def test_an_instance_is_expected(make, wrong):
    with pytest.raises(OptionError, match=r"weight_decay_cls=.*expected an instance, as in .*WeightDecayToInit\(\)"):
        make(make_params(), weight_decay_cls=wrong)
    with pytest.raises(OptionError, match=r"WeightDecayChain: .* is no instance of WeightDecay; type for instance"):
        WeightDecayChain(wrong)


@every_optimizer
def test_it_is_no_option_of_a_group(make):
    params = make_params([(3,), (4,)])
    optimizer = make(params)
    with pytest.raises(OptionError, match="weight_decay_cls is an option of the whole optimizer, not of a group"):
        optimizer.add_param_group({"params": make_params([(3,)]), "weight_decay_cls": L1WeightDecay()})


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match=r"LpWeightDecay: power=-1; expected a number, at least 0"):
        LpWeightDecay(-1)
    with pytest.raises(OptionError, match=r"WeightDecayToEMA: beta=1\.0; expected a number, at least 0 and below 1"):
        WeightDecayToEMA(1.0)
    with pytest.raises(OptionError, match=r"WeightDecayChain: no links"):
        WeightDecayChain()


def test_docstring():
    assert doctest.testmod(weight_decay) == (0, 9)
