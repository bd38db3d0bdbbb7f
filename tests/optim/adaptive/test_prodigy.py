"""`Prodigy` against algorithm 4 of the paper in a loop over one long vector."""

import pytest
import torch

from graphopt.optim import Modular, m
from graphopt.optim.core.transform import apply_updates, chain
from tests.optim.catalogue import accepts
from tests.optim.outputs import make_tensors
from tests.optim.training import make_params, set_gradients, train


def vector(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


class Reference:
    """With the factors ``1 - β3`` of the paper."""

    def __init__(self, x, b1=0.9, b2=0.999, b3=None, eps=1e-8, wd=0.0, d0=1e-6, d_coef=1.0, debiased=False):
        self.x, self.x0, self.d, self.t = x.clone(), x.clone(), d0, 0
        self.m, self.v, self.s, self.r = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x), 0.0
        self.b1, self.b2, self.b3, self.eps, self.wd = b1, b2, b2**0.5 if b3 is None else b3, eps, wd
        self.d_coef, self.debiased = d_coef, debiased

    def step(self, g, gamma):
        self.t += 1
        if self.debiased:
            gamma *= (1 - self.b2**self.t) ** 0.5 / (1 - self.b1**self.t)
        d, b1, b2, b3 = self.d, self.b1, self.b2, self.b3
        self.m = b1 * self.m + (1 - b1) * d * g
        self.v = b2 * self.v + (1 - b2) * d**2 * g**2
        self.r = b3 * self.r + (1 - b3) * gamma * d**2 * float(g @ (self.x0 - self.x))
        self.s = b3 * self.s + (1 - b3) * gamma * d**2 * g
        self.x = self.x - gamma * d * (self.m / (self.v.sqrt() + d * self.eps) + self.wd * self.x)
        if self.s.any():
            self.d = max(d, self.d_coef * self.r / float(self.s.abs().sum()))


CASES = [
    {},
    {"beta1": 0.5, "beta2": 0.9, "beta3": 0.7, "eps": 0.1, "weight_decay": 0.2, "d0": 0.01, "d_coef": 2.0},
    {"debiased": True, "d0": 1e-3, "eps": 1e-3},
]
NAMES = {"beta1": "b1", "beta2": "b2", "beta3": "b3", "weight_decay": "wd"}


@accepts("O+Prodigy")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_equals_the_paper(options):
    """With a learning rate that changes, on a problem whose scale must be found."""
    params = make_params()
    optimizer = Modular(params, m.Prodigy(lr=lambda step: 1 / (1 + 0.02 * step), **options))
    reference = Reference(vector(params), **{NAMES.get(key, key): value for key, value in options.items()})
    for step in range(60):
        for p in params:
            p.grad = p.detach() - 7.0
        reference.step(reference.x - 7.0, 1 / (1 + 0.02 * step))
        optimizer.step()
        torch.testing.assert_close(vector(params), reference.x, rtol=1e-9, atol=1e-12)
    assert reference.d > 10 * options.get("d0", 1e-6)  # it has been found
    for p in params:
        if p.numel():
            assert float(optimizer.state[p]["prodigy.d"]) == pytest.approx(reference.d, rel=1e-9)


@accepts("O+Prodigy")
def test_finds_its_learning_rate():
    for scale in (1e-2, 1e3):
        p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
        goal = scale * torch.linspace(-1, 1, 5, dtype=torch.float64)
        optimizer = Modular([p], m.Prodigy())
        for _ in range(250):
            p.grad = (p.detach() - goal).sign()
            optimizer.step()
        assert (p.detach() - goal).abs().max() < 0.3 * scale


def test_gradients_of_zero():
    params = make_params()
    for p in params:
        p.grad = torch.zeros_like(p)
    before = vector(params)
    optimizer = Modular(params, m.Prodigy())
    optimizer.step()
    optimizer.step()
    assert torch.equal(vector(params), before)


def test_a_parameter_that_joins_later_has_the_estimate_of_the_others():
    params = make_params([(4,), (3,)])
    optimizer = Modular(params[:1], m.Prodigy(d0=0.1))
    train(optimizer, params[:1], range(4))
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, params, range(4, 5))
    first, second = (float(optimizer.state[p]["prodigy.d"]) for p in params)
    assert first == second >= 0.1


def test_derivative_by_the_weight_decay():
    """At a step size at which differences of the loss are more than rounding."""
    params, grads = make_tensors(0), [make_tensors(seed) for seed in (1, 2)]

    def loss(decay):
        transform = chain(m.Prodigy(d0=0.1, weight_decay=decay))
        values, state = params, transform.init(params)
        for step in grads:
            updates, state = transform.update(step, state, values)
            values = apply_updates(values, updates)
        return sum((p**3).sum() for p in values)

    derivative = torch.func.grad(loss)(torch.tensor(0.3, dtype=torch.float64))
    torch.testing.assert_close(derivative, (loss(0.3001) - loss(0.2999)) / 2e-4, rtol=1e-6, atol=1e-9)


def test_in_float32_it_does_not_lose_the_first_estimate():
    params = make_params(dtype=torch.float32)
    optimizer = Modular(params, m.Prodigy())
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    optimizer.step()
    for p, q in zip(params, before, strict=True):
        if p.numel():
            moved = (p.detach() - q).abs()
            assert 0 < float(moved.max()) < 1e-5
