"""`ScheduleFree` against the algorithm in a loop, and its averages."""

import copy

import pytest
import torch
from torch import nn

from graphopt.errors import ModuleError, OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.training import largest_difference, make_params, set_gradients, snapshot, train


def rate(step):
    """A warm-up and then a decay: the largest so far counts for the weights."""
    return 0.1 * min(1, (step + 1) / 5) * (1 if step < 8 else 0.3)


def reference(params, direction, beta, r, power, num_steps=12):
    """y, and x, after equations 2 to 4 with the weights of the authors' program."""
    z, x, y = ([p.detach().clone() for p in params] for _ in range(3))
    memories, total, largest = [{} for _ in params], 0.0, 0.0
    for t in range(1, num_steps + 1):
        noted = [nn.Parameter(value) for value in y]
        set_gradients(noted, t)
        lr = rate(t - 1)
        largest = max(largest, lr)
        weight = t**r * largest**power
        total += weight
        c = weight / total
        for i, memory in enumerate(memories):
            z[i] = z[i] - lr * direction(noted[i].grad, noted[i].detach(), memory, t)
            x[i] = (1 - c) * x[i] + c * z[i]
            y[i] = (1 - beta) * z[i] + beta * x[i]
    return y, x


def sgd(g, y, memory, t):
    return g


def adamw(g, y, memory, t):
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    return g / ((memory["v"] / (1 - 0.999**t)).sqrt() + 1e-8) + 0.1 * y


BASES = {"sgd": (sgd, list), "adamw": (adamw, lambda: [m.Adam(beta1=0.0), m.WeightDecay(0.1)])}


@accepts("O+ScheduleFree")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("beta", "r", "power"), [(0.9, 0.0, 2.0), (0.5, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 2.0, 2.0)])
def test_equals_the_algorithm(beta, r, power, base, way):
    params = make_params()
    direction, modules = BASES[base]
    optimizer = Modular(params, *modules(), m.ScheduleFree(rate, beta, r=r, weight_lr_power=power), **way)
    y, x = reference(params, direction, beta, r, power)
    train(optimizer, params, range(1, 13))
    assert largest_difference(params, y) < 1e-12
    before = snapshot(params)
    with m.ScheduleFree.averaged(optimizer):
        assert largest_difference(params, x) < 1e-12
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@accepts("O+ScheduleFree")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_averages_come_and_go_bit_for_bit(dtype):
    """Also after an error inside; training goes on as if nothing had been."""
    params = [nn.Parameter(torch.randn(4, 3).to(dtype)), nn.Parameter(torch.randn(5).to(dtype))]
    other = copy.deepcopy(params)
    pairs = [(ps, Modular(ps, m.ScheduleFree(0.1))) for ps in (params, other)]
    (_, optimizer), _ = pairs
    with m.ScheduleFree.averaged(optimizer):  # before the first step
        assert all(torch.equal(p, q) for p, q in zip(params, other, strict=True))
    for seed in range(4):
        for ps, each in pairs:
            generator = torch.Generator().manual_seed(seed)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            each.step()
        with pytest.raises(KeyError):
            fail_inside(optimizer, params[0], other[0], is_first=seed == 0)
        for p, q in zip(params, other, strict=True):
            assert torch.equal(p, q)
            assert p.requires_grad


def fail_inside(optimizer, param, other, is_first):
    with m.ScheduleFree.averaged(optimizer):
        assert torch.is_grad_enabled()
        assert is_first == torch.equal(param, other)
        raise KeyError


@accepts("O+ScheduleFree")
def test_the_average_is_better_than_the_last_point():
    """On a noisy quadratic, without a schedule."""
    p = nn.Parameter(torch.full((20,), 3.0, dtype=torch.float64))
    optimizer = Modular([p], m.ScheduleFree(0.5, 0.9))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        p.grad = p.detach() + torch.randn(20, generator=generator, dtype=torch.float64)
        optimizer.step()
    plain = float((p.detach() ** 2).sum())
    with m.ScheduleFree.averaged(optimizer):
        assert float((p.detach() ** 2).sum()) < plain / 2


def test_a_rate_of_zero_moves_nothing():
    params = make_params()
    before = snapshot(params)
    optimizer = Modular(params, m.ScheduleFree(0.0))
    train(optimizer, params, range(2))
    assert largest_difference(params, before) == 0


def test_only_parameters_that_have_stepped():
    """And those of several modules in a split."""
    params = make_params([(3, 2), (4,), (5,)])
    split = m.Split(lambda p: p.dim() == 2, m.ScheduleFree(0.1), m.ScheduleFree(0.2))
    optimizer = Modular(params, split)
    set_gradients(params, 0)
    params[2].grad = None
    before = snapshot(params)
    optimizer.step()
    with m.ScheduleFree.averaged(optimizer):
        assert torch.equal(params[2], before[2])
        for p, q, lr in zip(params[:2], before, (0.1, 0.2), strict=False):
            torch.testing.assert_close(p.detach(), q - lr * p.grad)


def test_optimizers_without_averages():
    params = make_params([(3, 2)])
    with (
        pytest.raises(OptionError, match=r"no ScheduleFree in Modular\(LR\(lr=0.1\)\); pass the Modular that has one"),
        m.ScheduleFree.averaged(Modular(params, m.LR(0.1))),
    ):
        pass
    optimizer = Modular(params, m.VectorProjection(m.ScheduleFree(0.1)))
    train(optimizer, params, range(2))
    with pytest.raises(ModuleError, match="inside of a projection"), m.ScheduleFree.averaged(optimizer):
        pass
