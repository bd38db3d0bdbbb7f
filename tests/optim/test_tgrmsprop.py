"""TGRMSProp against its equations, in every way that it can run, and against TGLaProp without momentum."""

import doctest

import pytest
import torch

from graphopt import annotations
from graphopt.errors import OptionError
from graphopt.optim import TGLaProp, TGRMSProp, tgrmsprop
from tests.optim.training import WAYS, largest_difference, make_params, mean_square, set_gradients, shapes_for, train

pytestmark = pytest.mark.usefixtures("own_kernels")


class Reference:
    """The equations of the docstring for one parameter, in float64."""

    def __init__(self, theta, *, lr=1e-3, betas=(0.9, 0.9), eps=1e-12, wd=1e-2, graft=True):
        self.theta, self.lr, self.eps, self.wd, self.graft = theta.double().clone(), lr, eps, wd, graft
        self.betas, self.w, self.v, self.t = betas, 0.0, 0.0, 0

    def step(self, g, mean_square):
        b1, b2 = self.betas
        g = g.double()
        self.t += 1
        self.w = b1 * self.w + (1 - b1) * g**2
        change = baseline = g / (self.w / (1 - b1**self.t)).sqrt().clamp(min=self.eps)
        if mean_square is not None:
            self.v = b2 * self.v + (1 - b2) * mean_square.double()
            change = g / (self.v / (1 - b2**self.t)).sqrt().clamp(min=self.eps)
            if self.graft:
                change = change * baseline.norm() / (change.norm() + self.eps)
        self.theta = self.theta - self.lr * self.wd * self.theta - self.lr * change


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.1, "betas": (0.8, 0.7), "eps": 0.3, "wd": 0.2}], ids=["default", "odd"]
)
def test_follows_its_equations(way, graft, options):
    params = make_params(shapes_for(way))
    references = [Reference(p.detach(), graft=graft, **options) for p in params]
    named = {{"wd": "weight_decay"}.get(key, key): value for key, value in options.items()}
    optimizer = TGRMSProp(params, graft=graft, **named, **way)
    for seed in range(10 if options else 50):
        set_gradients(params, seed)
        for index, (p, reference) in enumerate(zip(params, references, strict=True)):
            if (seed + index) % 5 == 4:
                p.grad = None  # this parameter sits out, and keeps a step count of its own
            else:
                reference.step(p.grad, mean_square(p))
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12


@pytest.mark.parametrize("option", ["enforce_baseline", "default_to_baseline"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_baseline_is_debiased_rmsprop(option, way):
    params = make_params(shapes_for(way))
    references = [Reference(p.detach()) for p in params]
    optimizer = TGRMSProp(params, **{option: True}, **way)
    for seed in range(20):
        set_gradients(params, seed)
        if option != "enforce_baseline":
            annotations.clear(params)
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad, None)
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12


def test_the_baseline_is_torchs_rmsprop_but_for_the_bias():
    (ours,), (theirs,) = make_params([(4, 3)]), make_params([(4, 3)])
    optimizer = TGRMSProp([ours], enforce_baseline=True, weight_decay=0.0)
    usual = torch.optim.RMSprop([theirs], alpha=0.9, eps=0.0)
    for seed in range(10):
        set_gradients([ours], seed)
        theirs.grad = ours.grad.clone()
        usual.param_groups[0]["lr"] = 1e-3 * (1 - 0.9 ** (seed + 1)) ** 0.5
        optimizer.step()
        usual.step()
    assert largest_difference([ours], [theirs]) < 1e-12


@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize("enforce_baseline", [True, False])
def test_is_tglaprop_without_momentum(graft, enforce_baseline):
    options = {"graft": graft, "enforce_baseline": enforce_baseline, "lr": 0.1}
    ours, theirs = make_params(), make_params()
    train(TGRMSProp(ours, betas=(0.9, 0.8), **options), ours, range(30))
    train(TGLaProp(theirs, betas=(0.0, 0.9, 0.0, 0.8), **options), theirs, range(30))
    assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("betas", [0.8, (0.8,), [0.8], torch.tensor(0.8, dtype=torch.float64)], ids=str)
def test_one_beta_stands_for_two(betas):
    one, two = make_params(), make_params()
    train(TGRMSProp(one, betas=betas), one)
    train(TGRMSProp(two, betas=(0.8, 0.8)), two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("betas", [(), (0.9, 0.9, 0.9), 1.0, "0.9", None])
def test_other_betas_are_refused(betas):
    with pytest.raises(
        OptionError, match=r"TGRMSProp: betas=.*; expected beta, \(beta,\) or \(beta1, beta2\), .* below 1"
    ):
        TGRMSProp(make_params(), betas=betas)


def test_maximize_climbs():
    ours, theirs = make_params(), make_params()
    optimizer, minimizing = TGRMSProp(ours, maximize=True), TGRMSProp(theirs)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        for p in theirs:
            p.grad.neg_()
        optimizer.step()
        minimizing.step()
    assert largest_difference(ours, theirs) == 0.0


def test_state():
    params = make_params([(4, 3)])
    for options, expected in [
        ({}, {"step", "num_statistics", "exp_avg_sq", "exp_avg_per_sample_sq"}),
        ({"graft": False}, {"step", "num_statistics", "exp_avg_per_sample_sq"}),
        ({"enforce_baseline": True}, {"step", "exp_avg_sq"}),
    ]:
        optimizer = TGRMSProp(params, **options)
        train(optimizer, params)
        assert set(optimizer.state[params[0]]) == expected


def test_docstring():
    assert doctest.testmod(tgrmsprop) == (0, 8)
