"""Sign against its formula."""

import doctest

import pytest
import torch

from graphopt.optim import Sign, TGAdamW, sign
from tests.optim.training import largest_difference, make_params, set_gradients, snapshot, train


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_sgd_is_signsgd(dtype):
    params = make_params(dtype=dtype)
    optimizer = Sign(params, torch.optim.SGD(params, lr=1.0), lr=0.01, graft_to_self=False)
    for seed in range(5):
        set_gradients(params, seed)
        expected = [p.detach() - 0.01 * p.grad.sign() for p in params]
        optimizer.step()
        assert all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_grafted_keeps_the_norm(lr):
    params = make_params()
    optimizer = Sign(params, torch.optim.SGD(params, lr=0.1), lr=lr)
    for seed in range(5):
        before = snapshot(params)
        set_gradients(params, seed)
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            step, base = p.detach() - old, -0.1 * p.grad
            assert float(step.norm()) == pytest.approx(lr * float(base.norm()), rel=1e-12)
            torch.testing.assert_close(step, lr * base.sign() * base.norm() / max(p.numel(), 1) ** 0.5)


def test_zeros_have_no_sign():
    params = make_params([(4,), (3,)])
    before = snapshot(params)
    params[0].grad = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    params[1].grad = torch.zeros_like(params[1])
    Sign(params, torch.optim.SGD(params, lr=0.5)).step()
    assert largest_difference(params, [before[0] - 0.5 * params[0].grad, before[1]]) < 1e-15


def test_base_keeps_its_state_as_if_alone():
    params, copies = make_params(), make_params()
    base, alone = TGAdamW(params, lr=0.05), TGAdamW(copies, lr=0.05)
    optimizer = Sign(params, base, graft_to_self=False, lr=0.01)
    for seed in range(6):
        before = snapshot(params)
        for p, q in zip(params, copies, strict=True):
            q.data.copy_(p.data)
        set_gradients(params, seed)
        set_gradients(copies, seed)
        optimizer.step()
        alone.step()
        expected = [old + 0.01 * (q.detach() - old).sign() for q, old in zip(copies, before, strict=True)]
        assert largest_difference(params, expected) == 0.0
        for p, q in zip(params, copies, strict=True):
            assert all(torch.equal(base.state[p][name], value) for name, value in alone.state[q].items())


def test_groups_may_differ():
    params = make_params([(4,), (4,)])
    sgd = torch.optim.SGD(params, lr=0.1)
    optimizer = Sign([{"params": params[:1]}, {"params": params[1:], "graft_to_self": False, "lr": 0.5}], sgd)
    before = snapshot(params)
    train(optimizer, params, [0])
    steps = [p.detach() - old for p, old in zip(params, before, strict=True)]
    assert float(steps[0].norm()) == pytest.approx(0.1 * float(params[0].grad.norm()), rel=1e-12)
    torch.testing.assert_close(steps[1].abs(), torch.full_like(steps[1], 0.5))


def test_docstring():
    assert doctest.testmod(sign) == (0, 5)
