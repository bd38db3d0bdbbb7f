"""Hyper-parameters of any module by group, by parameter, and over time."""

import copy
import re

import pytest
import torch
from torch import nn

from graphopt.errors import OptionError
from graphopt.optim import Modular, Module, m
from tests.optim.training import largest_difference, make_params, snapshot

SHAPES = [(4, 3), (5,), (), (3,)]
WAYS = [{"foreach": False}, {"foreach": True}, {}]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, params, steps=range(5)):
    for seed in steps:
        set_grads(params, seed)
        optimizer.step()


def full_chain():
    return m.ClipValue(0.8), m.Adam(0.8, 0.95), m.NormalizeByEMA(0.9), m.WeightDecay(0.1), m.LR(0.05)


# One other value for each option of `full_chain`, by its name in a group.
OTHERS = {
    "value": 0.3,
    "beta1": 0.5,
    "beta2": 0.7,
    "adam.eps": 0.1,
    "amsgrad": True,
    "alpha": 2.0,
    "debiased": False,
    "eps_inside": True,
    "beta": 0.4,
    "normalizebyema.ord": 1.0,
    "normalizebyema.eps": 50.0,
    "max_ema_growth": None,
    "ema_init": "update",
    "weight_decay": 0.9,
    "weightdecay.ord": 3,
    "lr": 0.01,
}


def construct(option, value):
    """A chain whose modules were built with the other value."""
    chain = full_chain()
    owner, _, name = option.rpartition(".")
    for index, module in enumerate(chain):
        if name in module.defaults and owner in ("", type(module).__name__.lower()):
            return [*chain[:index], type(module)(**{**module.defaults, name: value}), *chain[index + 1 :]]
    raise AssertionError(option)


def test_every_option_has_a_name_and_a_row():
    optimizer = Modular(make_params(SHAPES), full_chain())
    assert set(optimizer.option_names) == {*OTHERS, "tensorwise"}  # which is of all parameters
    assert optimizer.option_names["adam.eps"] == "module 2 of 5, Adam"
    assert optimizer.option_names["lr"] == "module 5 of 5, LR"


@every_way
@pytest.mark.parametrize("option", OTHERS)
def test_a_groups_option_is_the_modules(option, way):
    """A group does what an optimizer of its parameters alone does whose modules were built so."""
    params, apart = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular([{"params": params[:2]}, {"params": params[2:], option: OTHERS[option]}], full_chain(), **way)
    parts = [Modular(apart[:2], full_chain(), **way), Modular(apart[2:], construct(option, OTHERS[option]), **way)]
    train(optimizer, params)
    for seed in range(5):
        set_grads(apart, seed)
        for part in parts:
            part.step()
    assert largest_difference(params, apart) < 1e-14
    plain = make_params(SHAPES)
    train(Modular(plain, full_chain(), **way), plain)
    assert largest_difference(params[2:], plain[2:]) > 1e-10


@every_way
def test_options_of_single_parameters_win(way):
    """Also those that are chosen after the first step."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    chain = full_chain()
    decay = chain[3].set_param_groups([{"params": params[0], "weight_decay": 0.7}])
    assert decay is chain[3]
    optimizer = Modular([{"params": params[:2], "weight_decay": 0.2}, {"params": params[2:]}], chain, **way)
    groups = [
        {"params": others[:1], "weight_decay": 0.7},
        {"params": others[1:2], "weight_decay": 0.2},
        {"params": others[2:]},
    ]
    reference = Modular(groups, full_chain(), **way)
    train(optimizer, params, range(3))
    train(reference, others, range(3))
    assert largest_difference(params, others) == 0.0
    chain[1].set_param_groups([{"params": [params[3]], "beta1": 0.1}])
    reference.param_groups[2]["params"] = [others[2]]
    last = {**reference.param_groups[2], "params": [others[3]], "beta1": 0.1}
    reference.param_groups.append(last)
    train(optimizer, params, range(3, 6))
    train(reference, others, range(3, 6))
    assert largest_difference(params, others) < 1e-14
    assert chain[1].settings[params[3]].beta1 == 0.1
    assert chain[1].settings[params[2]].beta1 == 0.8


def test_options_of_a_complex_parameter():
    """The parameter that the user knows is the complex one."""
    values = torch.randn(3, dtype=torch.complex128)
    params = [nn.Parameter(values.clone()) for _ in range(2)]
    chains = [[m.Adam(), m.LR(0.1)], [m.Adam(), m.LR(0.3)]]
    chains[0][1].set_param_groups([{"params": params[0], "lr": 0.3}])
    for p, chain in zip(params, chains, strict=True):
        p.grad = torch.view_as_complex(torch.ones(3, 2, dtype=torch.float64))
        Modular([p], chain).step()
    assert torch.equal(*params)
    assert not torch.equal(params[0], values)


def test_a_name_of_two_modules_is_refused_with_both_in_full():
    params = make_params(SHAPES)
    text = r"'eps' belongs to 2 modules; write 'adam.eps' or 'normalizebyema.eps'"
    with pytest.raises(OptionError, match=text):
        Modular([{"params": params, "eps": 1e-3}], full_chain())
    optimizer = Modular(params[:2], full_chain())
    with pytest.raises(OptionError, match=text):
        optimizer.add_param_group({"params": params[2:], "eps": 1e-3})
    assert len(optimizer.param_groups) == 1


def test_two_modules_of_a_class_are_numbered():
    optimizer = Modular(make_params(SHAPES), m.WeightDecay(0.1), m.Adam(), m.WeightDecay(0.2), m.LR(0.3), m.LR(0.4))
    group = optimizer.param_groups[0]
    assert (group["weightdecay.weight_decay"], group["weightdecay_2.weight_decay"]) == (0.1, 0.2)
    assert (group["lr.lr"], group["lr"]) == (0.3, 0.4)  # the last one is what schedulers see
    assert "weight_decay" not in group


def test_rates_inside_of_modules_leave_lr_to_the_group():
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular([{"params": params, "lr": 0.5}], Sum(m.LR(0.1), m.LR(0.2)))
    assert [optimizer.param_groups[0][name] for name in ("lr.lr", "lr_2.lr", "lr")] == [0.1, 0.2, 0.5]
    train(optimizer, params)
    train(torch.optim.SGD(others, 0.15), others)
    assert largest_difference(params, others) < 1e-14


class Sum(Module):
    def __init__(self, left, right):
        super().__init__({}, left=left, right=right)

    def step(self, var):
        branches = [chain[0].step(var.clone()) for chain in self.children.values()]
        var.update = [a + b for a, b in zip(*[branch.get_update() for branch in branches], strict=True)]
        return var


def test_a_chain_without_lr_is_multiplied_by_the_groups():
    params, others = make_params(SHAPES), make_params(SHAPES)
    train(Modular([{"params": params, "lr": 0.3}], m.Adam()), params)
    train(Modular(others, m.Adam(), m.LR(0.3)), others)
    assert largest_difference(params, others) < 1e-15


@pytest.mark.parametrize(
    ("module", "option", "values"),
    [
        (m.LR(lambda step: 0.1 / (1 + step)), "lr", [0.1, 0.05, 0.1 / 3]),
        (m.WeightDecay(lambda step: 0.1 * step), "weight_decay", [0.0, 0.1, 0.2]),
        (m.Adam(beta1=lambda step: 1 - 0.5 ** (step + 1)), "beta1", [0.5, 0.75, 0.875]),
        (m.ClipValue(lambda step: 0.5**step), "value", [1.0, 0.5, 0.25]),
    ],
)
def test_a_function_of_the_step_is_a_schedule(module, option, values):
    """As if somebody had set the option before each step."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular(params, copy.deepcopy(module))
    reference = Modular(others, type(module)(**module.defaults))
    for seed, value in enumerate(values):
        reference.param_groups[0][option] = value
        train(reference, others, [seed])
        train(optimizer, params, [seed])
        assert optimizer.param_groups[0][option] == pytest.approx(value)
    assert largest_difference(params, others) < 1e-15


def test_a_schedule_counts_steps_without_gradients_and_goes_on_after_loading():
    (p,) = make_params([(3,)])
    optimizer = Modular([p], m.LR(lambda step: 10.0**-step))
    optimizer.step()
    train(optimizer, [p], [0])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    resumed = Modular([p], m.LR(lambda step: 10.0**-step))
    resumed.load_state_dict(optimizer.state_dict())
    train(resumed, [p], [0])
    assert resumed.param_groups[0]["lr"] == pytest.approx(0.01)


def test_a_schedule_out_of_range_is_refused_before_anything_moves():
    (p,) = make_params([(3,)])
    optimizer = Modular([p], m.Adam(), m.LR(lambda step: 1.0 - step))
    train(optimizer, [p], range(2))
    before, state = p.detach().clone(), {name: value.clone() for name, value in optimizer.state[p].items()}
    with pytest.raises(OptionError, match=re.escape("module 2 of 2, LR: lr=-1.0; expected a number in [0, inf)")):
        train(optimizer, [p], [2])
    assert torch.equal(p, before)
    assert all(torch.equal(value, optimizer.state[p][name]) for name, value in state.items())


@every_way
def test_frozen_groups_rest(way):
    """They neither move nor count nor decay; and go on where they were."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular([{"params": params[:2]}, {"params": params[2:], "frozen": True}], full_chain(), **way)
    before = snapshot(params)
    train(optimizer, params, range(2))
    assert largest_difference(params[2:], before[2:]) == 0.0
    assert all(p not in optimizer.state for p in params[2:])
    optimizer.param_groups[1]["frozen"] = False
    train(optimizer, params, range(2, 4))
    parts = [Modular(others[:2], full_chain(), **way), Modular(others[2:], full_chain(), **way)]
    train(parts[0], others[:2], [])
    for seed in range(4):
        set_grads(others, seed)
        parts[0].step()
        if seed >= 2:
            parts[1].step()
    assert largest_difference(params, others) < 1e-14


@every_way
def test_groups_that_come_late_or_are_empty(way):
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular([{"params": []}, {"params": params[:2]}], full_chain(), **way)
    parts = [Modular(others[:2], full_chain(), **way)]
    for seed in range(4):
        if seed == 2:
            optimizer.add_param_group({"params": params[2:], "beta2": 0.5})
            parts.append(Modular([{"params": others[2:], "beta2": 0.5}], full_chain(), **way))
        set_grads(params, seed)
        set_grads(others, seed)
        for each in (optimizer, *parts):
            each.step()
    assert largest_difference(params, others) < 1e-14
    assert [group["num_steps"] for group in optimizer.param_groups] == [4, 4, 2]


def test_groups_that_are_cut_anew_by_hand():
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular([{"params": params[:2]}, {"params": params[2:], "lr": 0.3}], m.Adam(), m.LR(0.1))
    train(optimizer, params, [0])
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop(0))
    train(optimizer, params, [1])
    reference = torch.optim.Adam([{"params": others[:2]}, {"params": others[2:], "lr": 0.3}], lr=0.1)
    train(reference, others, [0])
    reference.param_groups[0]["params"].append(reference.param_groups[1]["params"].pop(0))
    train(reference, others, [1])
    assert largest_difference(params, others) < 1e-12


@every_way
@pytest.mark.parametrize("value", [0.25, torch.tensor(0.25, dtype=torch.float64), torch.tensor([0.25])], ids=str)
def test_options_that_are_tensors_are_read_at_every_step(value, way):
    """Also one that takes the place of an equal number, and is written to afterwards."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular(params, m.Adam(), m.LR(value), **way)
    reference = torch.optim.Adam(others, lr=0.25)
    train(optimizer, params, range(2))
    train(reference, others, range(2))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    train(optimizer, params, [2])
    train(reference, others, [2])
    optimizer.param_groups[0]["lr"].fill_(0.0625)
    reference.param_groups[0]["lr"] = 0.0625
    train(optimizer, params, [3])
    train(reference, others, [3])
    assert largest_difference(params, others) < 1e-12


def test_a_rate_is_differentiated_through():
    """As a tensor that requires a gradient, which is neither refused nor cut off."""

    def loss_of(lr):
        p = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True).clone()
        p.retain_grad()
        optimizer = Modular([p], m.Adam(), m.WeightDecay(0.1), m.LR(lr), differentiable=True)
        for seed in range(3):
            set_grads([p], seed)
            optimizer.step()
        return (p**2).sum()

    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(lr), lr)
    difference = (loss_of(0.1 + 1e-6) - loss_of(0.1 - 1e-6)) / 2e-6
    assert slope.item() == pytest.approx(difference.item(), rel=1e-7)


def test_a_users_module_sees_the_options_of_each_parameter():
    class Scale(Module):
        def __init__(self, factor=2.0):
            super().__init__({"factor": factor})

        def step(self, var):
            var.update = [u * self.settings[p]["factor"] for p, u in zip(var.params, var.get_update(), strict=True)]
            assert [var.settings[p]["factor"] for p in var.params] == [3.0, 2.0]
            return var

    params = make_params([(3,), (2,)])
    before = snapshot(params)
    optimizer = Modular([{"params": params[:1], "factor": 3.0}, {"params": params[1:]}], Scale())
    set_grads(params, 0)
    optimizer.step()
    for p, old, factor in zip(params, before, (3.0, 2.0), strict=True):
        torch.testing.assert_close(p.detach(), old - factor * p.grad, atol=1e-15, rtol=0)
