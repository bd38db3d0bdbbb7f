"""Optimizers of torch's interface as modules: their moves, options, schedulers, and states of any kind."""

import copy
import functools
import io

import pytest
import torch
from torch import nn

from graphopt.errors import OptionError, UnsupportedError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.training import largest_difference, make_params, set_gradients, snapshot, train

SHAPES = [(4, 3), (5,), ()]
INNER = {
    "Adam": (torch.optim.Adam, {}),
    "AdamW, fused": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
    "AdamW, loop": (torch.optim.AdamW, {"foreach": False, "amsgrad": True}),
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "NAdam": (torch.optim.NAdam, {}),
    "ASGD": (torch.optim.ASGD, {}),
    "Adagrad": (torch.optim.Adagrad, {"lr_decay": 0.1}),
}


@accepts("W3")
@pytest.mark.parametrize("kind", INNER)
def test_moves_are_those_of_torch(kind):
    """Of a class and of an instance."""
    cls, options = INNER[kind]
    expected = make_params(SHAPES)
    train(cls(expected, lr=0.05, **options), expected, range(20))
    for by_class in (True, False):
        params = make_params(SHAPES)
        inner = m.Wrap(cls, lr=0.05, **options) if by_class else m.Wrap(cls(params, lr=0.05, **options))
        train(Modular(params, inner), params, range(20))
        assert largest_difference(params, expected) <= 1e-10


@accepts("W3")
def test_the_row_of_the_catalogue():
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular(params, m.Wrap(torch.optim.Adam, lr=1), m.LR(0.1))
    train(optimizer, params, range(20))
    train(torch.optim.Adam(others, 0.1), others, range(20))
    assert largest_difference(params, others) <= 1e-14
    assert {name for p in params for name in optimizer.state[p]} == {
        "step",
        *[f"wrap.{name}" for name in ("step", "exp_avg", "exp_avg_sq")],
    }


@accepts("W3")
@pytest.mark.parametrize("way", ["groups", "set_param_groups", "instance"])
def test_rates_of_groups(way):
    """SGD with a rate for each group; one of them changes on the way."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    groups = [{"params": others[:2], "lr": 0.1}, {"params": others[2:], "lr": 0.2}]
    theirs = torch.optim.SGD(groups, momentum=0.9)
    if way == "groups":
        groups = [{"params": params[:2], "wrap.lr": 0.1}, {"params": params[2:], "wrap.lr": 0.2}]
        optimizer = Modular(groups, m.Wrap(torch.optim.SGD, lr=9.0, momentum=0.9))
    elif way == "set_param_groups":
        module = m.Wrap(torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer = Modular(params, module)
        train(optimizer, params, range(0))
        module.set_param_groups([{"params": params[2:], "lr": 0.2}])
    else:
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.2}]
        inner = torch.optim.SGD(groups, momentum=0.9)
        optimizer = Modular(params, m.Wrap(inner))
    for step in range(6):
        if step == 3:
            theirs.param_groups[1]["lr"] = 0.03
            if way == "groups":
                optimizer.param_groups[1]["wrap.lr"] = 0.03
            elif way == "set_param_groups":
                module.set_param_groups([{"params": params[2:], "lr": 0.03}])
            else:
                inner.param_groups[1]["lr"] = 0.03
        train(theirs, others, [step])
        train(optimizer, params, [step])
    assert largest_difference(params, others) <= 1e-12


def test_a_scheduler_of_an_instance():
    params, others = make_params(SHAPES), make_params(SHAPES)
    inner, theirs = torch.optim.Adam(params, 0.1), torch.optim.Adam(others, 0.1)
    optimizer = Modular(params, m.Wrap(inner))
    own = [torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in (inner, theirs)]
    for step in range(4):
        train(optimizer, params, [step])
        train(theirs, others, [step])
        for scheduler in own:
            scheduler.step()
    assert largest_difference(params, others) <= 1e-12
    # The other gradients, and the parameters, are as they were when it does not step them.
    set_gradients(params, 0)
    params[1].grad = None
    before, grad = snapshot(params), params[0].grad
    optimizer.step()
    assert params[0].grad is grad
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[0], before[0])


class Odd(torch.optim.Optimizer):
    """State of all kinds: numbers, lists, what belongs to no parameter, and options that it adapts itself."""

    def __init__(self, params, lr=0.1, scale=1.0):
        super().__init__(params, {"lr": lr, "scale": scale, "num_seen": 0, "history": (0.0,)})

    def step(self, closure=None):
        everything = self.state["all"]
        everything["calls"] = everything.get("calls", 0) + 1
        for group in self.param_groups:
            group["num_seen"] += 1
            group["scale"] *= 0.9
            group["history"] = (*group["history"][-2:], group["scale"])
            group.setdefault("extra", torch.zeros(()))
            group["extra"] = group["extra"] + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["number"] = state.get("number", 1.0) * 1.5
                buffers = state.setdefault("buffers", [torch.zeros_like(p), {"deep": torch.zeros_like(p)}])
                buffers[0].add_(p.grad)
                buffers[1]["deep"] += buffers[0]
                factor = group["lr"] * group["scale"] * state["number"] * everything["calls"] * float(group["extra"])
                p.data -= factor * (p.grad + 0.1 * buffers[1]["deep"] + 0.01 * sum(group["history"]) * p)


@accepts("W3")
@pytest.mark.parametrize("is_instance", [False, True])
def test_an_odd_state_from_a_file_as_a_copy_and_after_a_reset(is_instance):
    def make():
        params = make_params(SHAPES)
        return params, Modular(params, m.Wrap(Odd(params) if is_instance else Odd))

    params, optimizer = make()
    expected = make_params(SHAPES)
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save([params, optimizer.state_dict()], file)
    file.seek(0)
    values, state = torch.load(file, weights_only=True)
    others, resumed = make()
    with torch.no_grad():
        for p, value in zip(others, values, strict=True):
            p.copy_(value)
    resumed.load_state_dict(state)
    copied, copies = copy.deepcopy((optimizer, params))
    theirs = Odd(expected)
    train(theirs, expected, range(5))
    for each, own in ((optimizer, params), (resumed, others), (copied, copies)):
        train(each, own, range(3, 5))
        assert largest_difference(own, expected) <= 1e-10
        assert largest_difference(own, params) == 0
    optimizer.reset()
    fresh, new = make()
    with torch.no_grad():
        for p, q in zip(fresh, params, strict=True):
            p.copy_(q)
    train(optimizer, params, range(2))
    train(new, fresh, range(2))
    assert largest_difference(fresh, params) == 0


def test_one_that_has_stepped_before():
    """An instance keeps what it has learned."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    inner, theirs = torch.optim.Adam(params, 0.1), torch.optim.Adam(others, 0.1)
    train(inner, params, range(2))
    train(Modular(params, m.Wrap(inner)), params, range(2, 4))
    train(theirs, others, range(4))
    assert largest_difference(params, others) <= 1e-12


def test_parameters_that_come_late_or_without_gradients():
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = Modular(params[:2], m.Wrap(torch.optim.Adam, lr=0.1))
    theirs = torch.optim.Adam(others[:2], lr=0.1)
    for step in range(6):
        for each, own in ((optimizer, params), (theirs, others)):
            if step == 3:
                each.add_param_group({"params": own[2:]})
            set_gradients(own, step)
            own[step % 2].grad = None
            each.step()
    assert largest_difference(params, others) <= 1e-12


def test_behind_and_inside_other_modules():
    params = make_params(SHAPES)
    optimizer = Modular(
        params,
        m.ClipValue(0.5),
        m.Split(lambda p: p.ndim == 2, [m.Wrap(functools.partial(torch.optim.SGD, lr=0.5)), m.Mul(2.0)], m.Sign()),
        m.LR(0.1),
    )
    before = snapshot(params)
    set_gradients(params, 0)
    optimizer.step()
    expected = [0.1 * params[0].grad.clamp(-0.5, 0.5), *[0.1 * p.grad.sign() for p in params[1:]]]
    assert largest_difference(params, [p - e for p, e in zip(before, expected, strict=True)]) <= 1e-12
    assert repr(m.Wrap(torch.optim.SGD, lr=0.5)) == "Wrap(SGD, lr=0.5)"


def test_muon_takes_matrices_alone():
    params, others = ([nn.Parameter(p.detach())] for p in (make_params([(4, 3)])[0], make_params([(4, 3)])[0]))
    train(Modular(params, m.Wrap(torch.optim.Muon, lr=0.1)), params, range(3))
    train(torch.optim.Muon(others, lr=0.1), others, range(3))
    assert largest_difference(params, others) <= 1e-10


REFUSED = {
    "a number": (lambda params: m.Wrap(3), OptionError, r"Wrap\(3\); expected an optimizer, its class, or a function"),
    "no optimizer": (lambda params: m.Wrap(lambda params: 3), OptionError, "made 3; expected a torch.optim.Optimizer"),
    "a bad option": (
        lambda params: m.Wrap(torch.optim.SGD, lr=-1.0),
        OptionError,
        "SGD cannot be made: Invalid learning rate",
    ),
    "arguments": (lambda params: m.Wrap(torch.optim.SGD(params), lr=1.0), OptionError, "that is made already"),
    "LBFGS": (lambda params: m.Wrap(torch.optim.LBFGS), UnsupportedError, "LBFGS evaluates the loss within a step"),
    "a search": (
        lambda params: m.Wrap(Modular(params, m.StrongWolfe())),
        UnsupportedError,
        "Modular evaluates the loss within a step",
    ),
    "other parameters": (
        lambda params: m.Wrap(torch.optim.SGD(make_params([(2,)]))),
        OptionError,
        r"module 1 of 1, Wrap: a parameter of shape \(4, 3\) is not in SGD. Make that of the same",
    ),
}


@pytest.mark.parametrize(("make", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_means_nothing_is_refused(make, error, text):
    params = make_params(SHAPES)
    before = snapshot(params)
    with pytest.raises(error, match=text):
        train(Modular(params, make(params)), params, range(1))
    assert all(map(torch.equal, params, before))
