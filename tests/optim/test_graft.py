"""Graft against its formula and against optimizers that it must reproduce."""

import doctest

import pytest
import torch
from torch import nn

from graphopt import annotations
from graphopt.errors import MissingAnnotation, OptionError, UnsupportedError
from graphopt.optim import Graft, TGAdamW, TGLaProp, graft
from tests.optim.training import largest_difference, make_params, set_gradients, snapshot, train


def alone(make, params, seed):
    """The step that a fresh optimizer makes from these parameters."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = make(copies)
    set_gradients(copies, seed)
    optimizer.step()
    return [q.detach() - p.detach() for p, q in zip(params, copies, strict=True)]


def test_sgd_grafted_on_itself_is_itself():
    ours, theirs = make_params(), make_params()
    optimizer = Graft(ours, torch.optim.SGD(ours, lr=0.1), torch.optim.SGD(ours, lr=1.0))
    train(optimizer, ours, range(10))
    train(torch.optim.SGD(theirs, lr=0.1), theirs, range(10))
    assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("magnitude", [torch.optim.Adam, torch.optim.SGD, TGAdamW, TGLaProp])
@pytest.mark.parametrize("direction", [torch.optim.SGD, torch.optim.Adam, TGLaProp])
def test_norm_of_one_and_direction_of_the_other(magnitude, direction):
    params = make_params()
    before = snapshot(params)
    of_magnitude = alone(lambda p: magnitude(p, lr=0.05), params, 0)
    of_direction = alone(lambda p: direction(p, lr=1.0), params, 0)
    optimizer = Graft(params, magnitude(params, lr=0.05), direction(params, lr=1.0), lr=0.7)
    train(optimizer, params, [0])
    for p, old, first, second in zip(params, before, of_magnitude, of_direction, strict=True):
        step = p.detach() - old
        expected = 0.7 * first.norm() * second / second.norm().clamp(min=1e-12)
        torch.testing.assert_close(step, expected, rtol=0, atol=1e-12)
        assert float(step.norm()) == pytest.approx(0.7 * float(first.norm()), rel=1e-6)


def test_both_keep_their_states_as_if_alone():
    """Over many steps, from a trajectory that neither of them would take."""
    params, copies = make_params(), make_params()
    make = {
        "magnitude": lambda p: torch.optim.AdamW(p, lr=0.05),
        "direction": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
    }
    optimizer = Graft(params, make["magnitude"](params), make["direction"](params))
    references = {role: f(copies) for role, f in make.items()}
    for seed in range(8):
        old = snapshot(params)
        set_gradients(params, seed)
        optimizer.step()
        steps = {}
        for role, reference in references.items():
            for q, start in zip(copies, old, strict=True):
                q.data.copy_(start)
            set_gradients(copies, seed)
            reference.step()
            steps[role] = [q.detach() - start for q, start in zip(copies, old, strict=True)]
        expected = [
            start + m.norm() * d / d.norm().clamp(min=1e-12)
            for start, m, d in zip(old, steps["magnitude"], steps["direction"], strict=True)
        ]
        assert largest_difference(params, expected) < 1e-12
        for p, q in zip(params, copies, strict=True):
            for role, reference in references.items():
                for name, value in reference.state[q].items():
                    assert torch.equal(optimizer.inner[role].state[p][name], value), name


def test_eps_bounds_the_direction():
    (p,) = make_params([(3,)])
    before = p.detach().clone()
    set_gradients([p], 0)
    gradient = p.grad.clone()
    Graft([p], torch.optim.SGD([p], lr=1.0), torch.optim.SGD([p], lr=0.1), eps=100.0).step()
    expected = before - gradient.norm() * 0.1 * gradient / 100.0
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-15)


def test_a_zero_step_is_zero():
    params = make_params()
    before = snapshot(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    Graft(params, torch.optim.SGD(params, lr=1.0), torch.optim.SGD(params, lr=1.0)).step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_low_precision_parameters_are_moved_from_where_they_were():
    (p,) = make_params([(100,)], torch.bfloat16)
    before = p.detach().clone()
    set_gradients([p], 0)
    gradient = p.grad.clone()
    Graft([p], torch.optim.SGD([p], lr=0.25), torch.optim.SGD([p], lr=1.0)).step()
    torch.testing.assert_close(p.detach().float(), (before - 0.25 * gradient).float(), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("lacking", ["magnitude", "direction"])
def test_an_error_of_one_leaves_both_as_they_were(lacking):
    params = make_params()
    other = torch.optim.SGD(params, lr=1.0, momentum=0.9)
    inner = {"magnitude": other, "direction": other, lacking: TGAdamW(params)}
    optimizer = Graft(params, **inner)
    train(optimizer, params, [0])
    set_gradients(params, 1)
    annotations.clear(params[4:5])
    before, momentum = snapshot(params), other.state[params[0]]["momentum_buffer"].clone()
    with pytest.raises(MissingAnnotation, match=r"TGAdamW\.step\(\): 1 of 7 parameters .* parameter 4 of group 0"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert torch.equal(other.state[params[0]]["momentum_buffer"], momentum)
    assert inner[lacking].state[params[0]]["step"] == 1


def test_an_error_in_the_middle_puts_the_parameters_back():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("halfway")

    params = make_params()
    set_gradients(params, 0)
    before = snapshot(params)
    with pytest.raises(RuntimeError, match="halfway"):
        Graft(params, torch.optim.SGD(params, lr=1.0), Fails(params, lr=1.0)).step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_the_same_parameters_are_expected():
    params = make_params([(3,), (4,)])
    fewer, all_of_them = torch.optim.SGD(params[:1], lr=1.0), torch.optim.SGD(params, lr=1.0)
    with pytest.raises(OptionError, match=r"Graft: 1 parameters are not in direction=SGD, .*parameter 1 of group 0"):
        Graft(params, all_of_them, fewer)
    with pytest.raises(OptionError, match=r"magnitude=SGD has 2 parameters, of which Graft has 1; .* move the others"):
        Graft(params[:1], all_of_them, fewer)
    optimizer = Graft(params, all_of_them, torch.optim.SGD(params, lr=1.0))
    more = make_params([(5,)])
    with pytest.raises(OptionError, match=r"magnitude\.add_param_group\(\.\.\.\) comes first"):
        optimizer.add_param_group({"params": more})
    assert len(optimizer.param_groups) == 1
    for inner in (optimizer.magnitude, optimizer.direction):
        inner.add_param_group({"params": more})
    with pytest.raises(OptionError, match="magnitude=SGD has 3 parameters"):
        optimizer.step()
    optimizer.add_param_group({"params": more, "lr": 0.0})
    before = snapshot(params + more)
    train(optimizer, params + more, [0])
    assert torch.equal(more[0], before[2])
    assert not torch.equal(params[0], before[0])


def test_only_optimizers_can_be_wrapped():
    params = make_params([(3,)])
    with pytest.raises(
        OptionError, match=r"Graft: direction=<class .*; expected an optimizer .* for instance direction="
    ):
        Graft(params, torch.optim.SGD(params), torch.optim.SGD)
    with pytest.raises(UnsupportedError, match=r"Graft: magnitude is a torch\.optim\.LBFGS, which evaluates the loss"):
        Graft(params, torch.optim.LBFGS(params), torch.optim.SGD(params))


def test_repr():
    params = make_params()
    assert repr(Graft(params, torch.optim.Adam(params), torch.optim.SGD(params))) == (
        "Graft(magnitude=Adam, direction=SGD, 7 parameters)"
    )


def test_docstring():
    assert doctest.testmod(graft) == (0, 7)
