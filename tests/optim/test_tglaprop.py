"""TGLaProp against its equations, in every way that it can run."""

import doctest

import pytest
import torch

from graphopt import annotations
from graphopt.errors import OptionError
from graphopt.optim import TGLaProp, tglaprop
from tests.optim.training import (
    WAYS,
    largest_difference,
    make_params,
    mean_square,
    set_gradients,
    shapes_for,
    snapshot,
    train,
)

pytestmark = pytest.mark.usefixtures("own_kernels")


class Reference:
    """The equations of the docstring for one parameter, in float64."""

    def __init__(self, theta, *, lr=1e-3, betas=(0.9, 0.99), eps=1e-12, wd=1e-2, graft=True):
        self.theta, self.lr, self.eps, self.wd, self.graft = theta.double().clone(), lr, eps, wd, graft
        self.betas = betas if len(betas) == 4 else betas * 2
        self.w, self.b, self.v, self.u, self.t, self.k = 0.0, 0.0, 0.0, 0.0, 0, 0

    def step(self, g, mean_square):
        b1, b2, b3, b4 = self.betas
        g = g.double()
        self.t += 1
        self.w = b2 * self.w + (1 - b2) * g**2
        self.b = b1 * self.b + (1 - b1) * g / (self.w / (1 - b2**self.t)).sqrt().clamp(min=self.eps)
        change = baseline = self.b / (1 - b1**self.t)
        if mean_square is not None:
            self.k += 1
            self.v = b4 * self.v + (1 - b4) * mean_square.double()
            self.u = b3 * self.u + (1 - b3) * g / (self.v / (1 - b4**self.k)).sqrt().clamp(min=self.eps)
            change = self.u / (1 - b3**self.k)
            if self.graft:
                change = change * baseline.norm() / (change.norm() + self.eps)
        self.theta = self.theta - self.lr * self.wd * self.theta - self.lr * change


ODD = {"lr": 0.1, "betas": (0.8, 0.9, 0.6, 0.7), "eps": 0.3, "wd": 0.2}


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize("options", [{}, ODD], ids=["default", "odd"])
def test_follows_its_equations(way, graft, options):
    params = make_params(shapes_for(way))
    references = [Reference(p.detach(), graft=graft, **options) for p in params]
    named = {{"wd": "weight_decay"}.get(key, key): value for key, value in options.items()}
    optimizer = TGLaProp(params, graft=graft, **named, **way)
    for seed in range(10 if options else 50):
        set_gradients(params, seed)
        for index, (p, reference) in enumerate(zip(params, references, strict=True)):
            if (seed + index) % 5 == 4:
                p.grad = None  # this parameter sits out, and keeps a step count of its own
            else:
                reference.step(p.grad, mean_square(p))
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12


@pytest.mark.parametrize("option", ["enforce_baseline", "default_to_baseline", "default_to_adam"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_baseline_is_laprop(option, way):
    params = make_params(shapes_for(way))
    references = [Reference(p.detach()) for p in params]
    optimizer = TGLaProp(params, **{option: True}, **way)
    for seed in range(20):
        set_gradients(params, seed)
        if option != "enforce_baseline":
            annotations.clear(params)
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad, None)
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12
    expected = {"step", "exp_avg_sq", "exp_avg_normalized"}
    if option != "enforce_baseline":
        expected |= {"exp_avg_per_sample_sq", "exp_avg_per_sample_normalized", "num_statistics"}
        assert all(optimizer.state[p]["num_statistics"] == 0 for p in params)
    assert set(optimizer.state[params[0]]) == expected


def test_mixes_with_and_without_statistic():
    params = make_params([(4, 3), (4, 3), (5,)])
    references = [Reference(p.detach()) for p in params]
    optimizer = TGLaProp(params, default_to_baseline=True)
    for seed in range(12):
        set_gradients(params, seed)
        without = params[seed % 3]
        annotations.clear([without])
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad, None if p is without else mean_square(p))
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12


def test_low_precision_parameters_are_updated_in_float32():
    (param,) = make_params([(40, 5)], torch.bfloat16)
    optimizer = TGLaProp([param], lr=0.05)
    reference = Reference(param.detach(), lr=0.05)
    for seed in range(5):
        reference.theta = param.detach().double()
        set_gradients([param], seed)
        reference.step(param.grad, mean_square(param))
        optimizer.step()
        torch.testing.assert_close(param.detach().double(), reference.theta, rtol=2**-8, atol=1e-6)


def test_two_betas_stand_for_four():
    two, four = make_params(), make_params()
    train(TGLaProp(two, betas=(0.8, 0.95)), two)
    train(TGLaProp(four, betas=(0.8, 0.95, 0.8, 0.95)), four)
    assert all(torch.equal(a, b) for a, b in zip(two, four, strict=True))


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.9, 0.9), 0.9, (0.9, 1.0), (-0.1, 0.9)])
def test_other_betas_are_refused(betas):
    text = r"TGLaProp: betas=.*; expected \(beta1, beta2\) or \(beta1, beta2, beta3, beta4\), for momentum .* below 1"
    with pytest.raises(OptionError, match=text):
        TGLaProp(make_params(), betas=betas)


def test_without_grafting_there_is_no_state_of_the_baseline():
    params = make_params()
    optimizer = TGLaProp(params, graft=False)
    train(optimizer, params)
    expected = {"step", "num_statistics", "exp_avg_per_sample_sq", "exp_avg_per_sample_normalized"}
    assert set(optimizer.state[params[0]]) == expected


def test_grafting_can_be_switched_on_later():
    (p,) = make_params([(4, 3)])
    optimizer = TGLaProp([p], graft=False, weight_decay=0.0)
    train(optimizer, [p])
    optimizer.param_groups[0]["graft"] = True
    set_gradients([p], 4)
    before = p.detach().clone()
    optimizer.step()
    # As if the gradient had always been this one: the baseline's step is its sign.
    assert float((p.detach() - before).norm()) == pytest.approx(1e-3 * 12**0.5, rel=1e-9)


@pytest.mark.parametrize("graft", [True, False])
def test_graft_of_one_group_affects_only_that_group(graft):
    first, second = make_params([(4, 3)]), make_params([(4, 3)], seed=1)
    alone = make_params([(4, 3)])
    train(TGLaProp([{"params": first}, {"params": second, "graft": graft}]), first + second)
    optimizer = TGLaProp(alone)
    for seed in range(5):
        set_gradients(first + second, seed)
        alone[0].grad = first[0].grad.clone()
        annotations.publish(alone[0], mean_square(first[0]) / 7, 7)
        optimizer.step()
    assert torch.equal(alone[0], first[0])


def test_maximize_climbs():
    ours, theirs = make_params(), make_params()
    optimizer, minimizing = TGLaProp(ours, maximize=True), TGLaProp(theirs)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        for p in theirs:
            p.grad.neg_()
        optimizer.step()
        minimizing.step()
    assert largest_difference(ours, theirs) == 0.0


def test_nothing_is_compiled_twice():
    params = make_params([(5000,), (100, 70)])
    optimizer = TGLaProp(params, lr=0.1, fused=True)
    train(optimizer, params, [0])
    before = snapshot(params)
    with torch._dynamo.config.patch(error_on_recompile=True):
        optimizer.param_groups[0].update(lr=0.3, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.5)
        params += make_params([(4097,), (3, 2000), (9, 9, 99)], seed=1)
        optimizer.add_param_group({"params": params[2:], "lr": 0.2})
        train(optimizer, params, range(1, 4))
    assert largest_difference(params[:2], before) > 0


def test_docstring():
    assert doctest.testmod(tglaprop) == (0, 8)
