"""`Modular` as an optimizer: what it takes, what it calls, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

from graphopt import annotations
from graphopt.errors import ClosureError, OptionError
from graphopt.optim import Modular, Module, m
from tests.optim.training import largest_difference, make_params, set_gradients, train

SHAPES = [(), (4, 3), (5,), (0, 4), (4, 3)]
WAYS = [{"foreach": False}, {"foreach": True}, {}]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


def adamw(params, **options):
    return Modular(params, m.Adam(), m.WeightDecay(0.1), m.LR(0.05), **options)


def reference(params, **options):
    return torch.optim.AdamW(params, 0.05, weight_decay=0.1, **options)


def test_repr_is_one_line():
    optimizer = Modular(make_params([(3,)]), m.ClipValue(0.5), m.LR(0.1))
    assert repr(optimizer) == "Modular(ClipValue(value=0.5), LR(lr=0.1))"


@pytest.mark.parametrize("form", ["generator", "module", "named", "tensors", "groups"])
def test_parameters_come_in_every_form(form):
    models = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    model = models[0]
    given = {
        "generator": model.parameters,
        "module": lambda: model,
        "named": model.named_parameters,
        "tensors": lambda: list(model.parameters()),
        "groups": lambda: [{"params": model[0].parameters()}, {"params": list(model[2].parameters())}],
    }[form]()
    optimizer = adamw(given)
    assert (optimizer.model is model) == (form == "module")
    if form in ("module", "named"):
        assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    train(optimizer, list(model.parameters()))
    train(reference(models[1].parameters()), list(models[1].parameters()))
    assert largest_difference(model.parameters(), models[1].parameters()) < 1e-13


def test_a_closure_is_called_once_with_gradients():
    """With gradients enabled, and without an argument, in chains that do not need one."""
    (p,) = make_params([(4, 3)])
    optimizer = adamw([p])
    calls = []

    def closure(*args, **kwargs):
        calls.append((args, kwargs))
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    before = p.detach().clone()
    loss = optimizer.step(closure)
    assert calls == [((), {})]
    assert loss.item() == (before**2).sum()
    (q,) = [nn.Parameter(before.clone())]
    q.grad = 2 * before
    reference([q]).step()
    assert largest_difference([p], [q]) < 1e-14


def test_a_loss_that_is_no_tensor_is_returned_as_it_is():
    (p,) = make_params([(3,)])
    assert adamw([p]).step(lambda: 1.5) == 1.5
    assert adamw([p]).step() is None


@every_way
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_parameters_without_gradient_and_empty_ones(way, dtype):
    """Those without a gradient neither move nor get a state, and count from when they have one."""
    params, others = make_params(SHAPES, dtype), make_params(SHAPES, dtype)
    optimizer, expected = adamw(params, **way), reference(others, foreach=False)
    for step in range(4):
        for own in (params, others):
            set_gradients(own, step)
            own[1 + step % 2].grad = None
            if step == 0:
                own[0].grad = None
        optimizer.step()
        if step == 0:
            assert params[0] not in optimizer.state
        if dtype in (torch.float64, torch.float32):
            expected.step()
    if dtype in (torch.float64, torch.float32):
        assert largest_difference(params, others) < 1e-13 + 1e-6 * (dtype == torch.float32)
    assert [float(optimizer.state[p]["step"]) for p in params] == [3, 2, 2, 4, 4]
    assert {p.dtype for p in params} == {dtype}
    wide = torch.promote_types(dtype, torch.float32)
    assert {optimizer.state[p]["adam.exp_avg"].dtype for p in params} == {wide}


@every_way
def test_mixed_dtypes_and_complex(way):
    """Each as torch's AdamW treats it in an optimizer of its own."""
    dtypes = [torch.float64, torch.float32, torch.complex64, torch.complex128, torch.float64]

    def make():
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(4, 2, generator=generator, dtype=dtype)) for dtype in dtypes]

    params, others = make(), make()
    optimizer, apart = adamw(params, **way), [reference([p], foreach=False) for p in others]
    for seed in range(4):
        for own in (params, others):
            generator = torch.Generator().manual_seed(seed)
            for p in own:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()
        for each in apart:
            each.step()
    for p, q in zip(params, others, strict=True):
        assert torch.allclose(p, q, atol=1e-12 if p.dtype in (torch.float64, torch.complex128) else 1e-6, rtol=0)


@every_way
def test_maximize_goes_up(way):
    params, others = make_params(SHAPES), make_params(SHAPES)
    train(adamw(params, maximize=True, **way), params)
    train(reference(others, maximize=True), others)
    assert largest_difference(params, others) < 1e-13


def test_maximize_that_comes_with_a_state_is_kept():
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = adamw(params, maximize=True)
    train(optimizer, params)
    resumed = adamw(others)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, [9])
    train(resumed, others, [9])
    assert torch.equal(optimizer.state[params[1]]["adam.exp_avg"], resumed.state[others[1]]["adam.exp_avg"])


@every_way
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none, way):
    """Clears the statistics, too; gradients that are zero still decay."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, expected = adamw(params, **way), reference(others)
    for each, own in ((optimizer, params), (expected, others)):
        train(each, own, [0])
        each.zero_grad(set_to_none=set_to_none)
        assert all(p.grad is None if set_to_none else not p.grad.any() for p in own)
        each.step()
    assert all(annotations.find(p, annotations.SUM_GRAD_SQUARED) is None for p in params)
    assert largest_difference(params, others) < 1e-13


@every_way
def test_gradients_are_left_as_they_were(way):
    params = make_params(SHAPES)
    optimizer = Modular(params, m.ClipValue(0.1), m.NormalizeByEMA(), m.WeightDecay(0.1), m.LR(0.1), **way)
    set_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(params, before, strict=True))


def test_not_contiguous_parameters():
    values = torch.randn(3, 4, dtype=torch.float64)
    params = [nn.Parameter(values.t()), nn.Parameter(torch.randn(6, 2, dtype=torch.float64)[::2])]
    others = [nn.Parameter(p.detach().clone().contiguous()) for p in params]
    train(adamw(params), params)
    train(reference(others), others)
    assert largest_difference(params, others) < 1e-13


def test_a_module_stands_once_in_one_optimizer():
    shared = m.Adam()
    params = make_params([(3,)])
    with pytest.raises(OptionError, match=r"Adam\(.*stands in the chain twice.*make one object for each place"):
        Modular(params, shared, m.LR(0.1), shared)
    Modular(params, shared, m.LR(0.1))
    with pytest.raises(OptionError, match=r"Adam\(.*belongs to another optimizer already.*make a new one"):
        Modular(params, shared, m.LR(0.1))


class Sum(Module):
    """A user's combinator of two chains."""

    def __init__(self, left, right):
        super().__init__({}, left=left, right=right)

    def step(self, var):
        branches = [var.clone() for _ in self.children]
        for branch, chain in zip(branches, self.children.values(), strict=True):
            for module in chain:
                branch = module.step(branch)
            var.update_attrs_from_clone_(branch)
        var.update = [a + b for a, b in zip(*[branch.get_update() for branch in branches], strict=True)]
        return var


def test_modules_inside_of_modules():
    """Nested twice, with a list, and options by name."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    inner = Sum([m.ClipValue(0.3), m.Adam()], Sum(m.LR(0.2), m.WeightDecay(0.1)))
    optimizer = Modular(params, [inner, [m.LR(0.5)]])
    assert optimizer.option_names["value"] == "module 1 of 2 in left= of Sum, ClipValue"
    assert optimizer.param_groups[0]["lr.lr"] == 0.2
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert set(optimizer.state_dict()["param_groups"][0]["modules"].split(",")) == {
        "sum",
        "clipvalue",
        "adam",
        "sum_2",
        "lr",
        "weightdecay",
        "lr_2",
    }
    train(optimizer, params, range(3))
    clipped = [nn.Parameter(torch.zeros_like(p)) for p in others]
    adam = torch.optim.Adam(clipped, lr=1.0)
    for seed in range(3):
        set_gradients(others, seed)
        for p, q in zip(others, clipped, strict=True):
            q.grad = p.grad.clamp(-0.3, 0.3)
            q.data.zero_()
        adam.step()
        for p, q in zip(others, clipped, strict=True):
            p.data -= 0.5 * (-q.data + 0.2 * p.grad + p.grad + 0.1 * p.data)
    assert largest_difference(params, others) < 1e-12


def test_a_users_module_as_the_guide_writes_it():
    class HeavyBall(Module):
        def __init__(self, momentum=0.9):
            super().__init__({"momentum": momentum})

        @torch.no_grad()
        def step(self, var):
            update = var.get_update()
            for p, u in zip(var.params, update, strict=True):
                state = self.state[p]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(p)
                state["velocity"].mul_(self.settings[p]["momentum"]).add_(u)
            var.update = [self.state[p]["velocity"].clone() for p in var.params]
            return var

    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular(params, HeavyBall(), m.LR(0.1))
    train(optimizer, params, range(3))
    expected = torch.optim.SGD(others, 0.1, momentum=0.9)
    train(expected, others, range(3))
    assert largest_difference(params, others) < 1e-14
    resumed = Modular(params, HeavyBall(), m.LR(0.1))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(resumed.state[params[1]]["heavyball.velocity"], expected.state[others[1]]["momentum_buffer"])
    train(resumed, params, range(3))
    train(expected, others, range(3))
    assert largest_difference(params, others) < 1e-14


def test_reset_forgets():
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = adamw(params)
    train(optimizer, params)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    optimizer.reset()
    train(optimizer, params)
    train(adamw(others), others)
    assert largest_difference(params, others) == 0.0


@every_way
def test_state_that_users_replace_is_followed(way):
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, expected = adamw(params, **way), reference(others)
    train(optimizer, params)
    train(expected, others)
    for p, q in zip(params, others, strict=True):
        optimizer.state[p]["adam.exp_avg"] = optimizer.state[p]["adam.exp_avg"].clone() * 3
        optimizer.state[p]["step"] = torch.tensor(2.0)
        expected.state[q]["exp_avg"].mul_(3)
        expected.state[q]["step"].fill_(2.0)
    train(optimizer, params)
    train(expected, others)
    assert largest_difference(params, others) < 1e-12


@every_way
def test_parameters_whose_data_is_replaced_are_followed(way):
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, expected = adamw(params, **way), reference(others)
    for each, own in ((optimizer, params), (expected, others)):
        train(each, own, range(2))
        for p in own:
            p.data = 2 * p.data
        train(each, own, range(2))
    assert largest_difference(params, others) < 1e-13


def test_a_module_that_needs_a_closure_gets_one():
    class Twice(Module):
        needs_closure = True

        def step(self, var):
            assert var.evaluate(False).item() == var.get_loss(True).item()
            var.get_update()
            return var

    (p,) = make_params([(3,)])
    optimizer = Modular([p], Twice(), m.LR(0.1))
    asked = []

    def closure(backward=True):
        asked.append(backward)
        loss = (p**2).sum()
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    before = p.detach().clone()
    assert optimizer.step(closure).item() == (before**2).sum()
    assert asked == [False, True]
    torch.testing.assert_close(p.detach(), 0.8 * before)
    now = p.detach().clone()
    with pytest.raises(ClosureError, match=r"module 1 of 2, Twice evaluates the loss.*def closure\(backward=True\)"):
        optimizer.step()
    assert torch.equal(p, now)
