"""OptimizerOptimizer against its formula, by hand and over trajectories."""

import doctest
import math

import pytest
import torch
from torch import nn

from graphopt.errors import OptionError
from graphopt.optim import OptimizerOptimizer, TGAdamW, optimizer_optimizer
from tests.optim.training import largest_difference, make_params, set_gradients, snapshot, train


def quadratic(optimizer, x):
    x.grad = x.detach().clone()
    optimizer.step()


@pytest.mark.parametrize("kappa", [1.0, 0.25])
@pytest.mark.parametrize("lr", [0.1, 0.5, 1.2])
def test_learning_rates_on_a_quadratic(kappa, lr):
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = OptimizerOptimizer([x], torch.optim.SGD([x], lr=lr), learning_rate_learning_rate=kappa)
    position, alpha, previous = 1.0, lr, 0.0
    for _ in range(20):
        step = -alpha * position
        position += step
        alpha = max(alpha + kappa * step * previous, 0.0)
        previous = step
        quadratic(optimizer, x)
        assert x.item() == pytest.approx(position, abs=1e-12)
        assert optimizer.learning_rates() == pytest.approx([alpha], abs=1e-12)


def test_every_tensor_has_its_own_rate():
    """With SGD, which is asked for its step at the learned rate in the reference."""
    params = make_params()
    optimizer = OptimizerOptimizer(params, torch.optim.SGD(params, lr=0.02), 0.01)
    references = [p.detach().clone() for p in params]
    alphas, previous = [0.02] * len(params), [0.0] * len(params)
    for seed in range(10):
        set_gradients(params, seed // 3)
        optimizer.step()
        for index, p in enumerate(params):
            step = -alphas[index] * p.grad
            references[index] = references[index] + step
            alphas[index] = max(alphas[index] + 0.01 * float((step * previous[index]).sum()), 0.0)
            previous[index] = step
    assert largest_difference(params, references) < 1e-12
    assert optimizer.learning_rates() == pytest.approx(alphas, abs=1e-14)
    assert len(set(optimizer.learning_rates())) > 4


@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: torch.optim.Adam(p, lr=lr),
        lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        lambda p, lr: TGAdamW(p, lr=lr),
    ],
)
def test_is_what_the_inner_optimizer_would_do_with_the_learned_rate(make):
    params, copies = make_params(), make_params()
    optimizer = OptimizerOptimizer(params, make(params, 0.05), 0.02)
    alone = [make([q], 0.05) for q in copies]
    for seed in range(8):
        for single, alpha in zip(alone, optimizer.learning_rates(), strict=True):
            single.param_groups[0]["lr"] = alpha
        set_gradients(params, seed // 3)
        set_gradients(copies, seed // 3)
        optimizer.step()
        for single in alone:
            single.step()
    assert largest_difference(params, copies) < 1e-12
    assert max(optimizer.learning_rates()) > 0.0505


def test_a_rate_stops_at_its_limit():
    for lowest, expected in [(0.0, 0.0), (0.05, 0.05), (-math.inf, 1.9 - 1.9 * 1.71)]:
        x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = OptimizerOptimizer([x], torch.optim.SGD([x], lr=1.9), min_lr=lowest)
        for _ in range(2):  # 1, -0.9, 0.81
            quadratic(optimizer, x)
        assert optimizer.learning_rates() == pytest.approx([expected], abs=1e-12)


def test_decay_takes_the_learned_rate_and_is_no_part_of_the_step():
    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = OptimizerOptimizer([x], torch.optim.SGD([x], lr=0.5), weight_decay=0.1)
    position, alpha, previous = 1.0, 0.5, 0.0
    for _ in range(6):
        step = -alpha * position
        position = position - alpha * 0.1 * position + step
        alpha += step * previous
        previous = step
        quadratic(optimizer, x)
        assert x.item() == pytest.approx(position, abs=1e-12)


def test_schedulers_of_both_scale_the_rates():
    def run(outer, inner):
        x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        sgd = torch.optim.SGD([x], lr=0.2)
        optimizer = OptimizerOptimizer([x], sgd, learning_rate_learning_rate=0.0)
        schedulers = [
            torch.optim.lr_scheduler.LambdaLR(o, lambda t, f=f: f**t) for o, f in ((optimizer, outer), (sgd, inner))
        ]
        for _ in range(5):
            quadratic(optimizer, x)
            for scheduler in schedulers:
                scheduler.step()
        return x.item()

    expected = math.prod(1 - 0.2 * 0.5**t for t in range(5))
    assert run(0.5, 1.0) == pytest.approx(expected, rel=1e-12)
    assert run(1.0, 0.5) == pytest.approx(expected, rel=1e-12)


def test_without_a_learning_rate_inside():
    class Walk(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(0.1 * p.grad)

    x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = OptimizerOptimizer([x], Walk([x]))
    for _ in range(2):
        quadratic(optimizer, x)
    assert optimizer.learning_rates() == pytest.approx([1 + 0.1 * 0.09])


def test_a_rate_of_zero_stays():
    params = make_params()
    before = snapshot(params)
    optimizer = OptimizerOptimizer(params, torch.optim.SGD(params, lr=0.0))
    train(optimizer, params)
    assert largest_difference(params, before) == 0.0
    assert optimizer.learning_rates() == [0.0] * len(params)


def test_groups_of_the_inner_optimizer_stay():
    params = make_params()
    inner = torch.optim.SGD([{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.2}])
    optimizer = OptimizerOptimizer(params, inner)
    assert optimizer.learning_rates() == [0.1] * 3 + [0.2] * 4
    train(optimizer, params)
    assert [(len(group["params"]), group["lr"]) for group in inner.param_groups] == [(3, 0.1), (4, 0.2)]


@pytest.mark.parametrize("option", ["learning_rate_learning_rate", "min_lr"])
def test_bad_options_are_refused(option):
    params = make_params()
    with pytest.raises(OptionError, match=rf"OptimizerOptimizer: {option}=nan; expected a number"):
        OptimizerOptimizer(params, torch.optim.SGD(params), **{option: math.nan})


def test_docstring():
    assert doctest.testmod(optimizer_optimizer) == (0, 4)
