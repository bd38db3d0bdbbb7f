"""Several optimizers as one: like each by itself, with schedulers, files, and copies."""

import copy
import io

import pytest
import torch

from graphopt.errors import ClosureError, OptionError
from graphopt.optim import Modular, m
from graphopt.optim.wrappers import NevergradOptimizer, ScipyMinimize, SplitOptimizers
from tests.optim.catalogue import accepts
from tests.optim.training import make_params, set_gradients, snapshot

SHAPES = [(4, 3), (5,), ()]


def make(params):
    return [
        torch.optim.Adam([{"params": params[:1], "lr": 0.1}]),
        Modular(params[1:], m.HeavyBall(), m.LR(0.1)),
    ]


def train(optimizers, schedulers, params, seeds):
    for seed in seeds:
        set_gradients(params, seed)
        for each in (*optimizers, *schedulers):
            each.step()


def schedulers(optimizers):
    return [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]


@accepts("E4")
def test_it_is_each_by_itself():
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, parts = SplitOptimizers(*make(params)), make(others)
    scheduler = schedulers([optimizer])
    train([optimizer], scheduler, params, range(3))
    train(parts, schedulers(parts), others, range(3))
    assert all(map(torch.equal, params, others))
    assert set(optimizer.state) == set(params)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2]]
    with torch.no_grad():
        others = [torch.nn.Parameter(p.clone()) for p in params]
    resumed = SplitOptimizers(*make(others))
    resumed.load_state_dict(saved)
    copied, copies = copy.deepcopy((optimizer, params))
    for each, own in ((optimizer, params), (resumed, others), (copied, copies)):
        train([each], [], own, range(3, 5))
        assert all(map(torch.equal, params, own))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@accepts("E4")
def test_gradients_first_and_closures_then():
    """One evaluation for those that need gradients only; LBFGS and SciPy see their moves."""
    params = [torch.tensor(value, dtype=torch.float64).requires_grad_() for value in (3.0, 3.0, 3.0, 3.0)]
    seen = []

    def closure(backward=True):
        seen.append([float(p.detach()) for p in params])
        loss = sum((p - 1) ** 2 for p in params)
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    optimizer = SplitOptimizers(
        ScipyMinimize(params[:1], "bfgs"),
        torch.optim.SGD(params[1:2], lr=0.25),
        torch.optim.LBFGS(params[2:3], lr=0.25, max_iter=1),
        Modular(params[3:], m.LR(0.25)),
    )
    assert optimizer.step(closure).item() == 16
    assert seen[0] == [3, 3, 3, 3]
    assert seen[1] == [3, 2, 3, 2]
    assert [round(float(p.detach()), 5) for p in params] == [1, 2, 2.75, 2]
    before = snapshot(params)
    with pytest.raises(ClosureError, match="SplitOptimizers: ScipyMinimize evaluates the loss"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_what_optimizers_add_to_their_states_is_kept():
    params = make_params([(2,), (3,)])
    optimizer = SplitOptimizers(torch.optim.Adam(params[:1]), NevergradOptimizer(params[1:], "OnePlusOne", seed=0))
    for _ in range(2):
        optimizer.step(lambda backward=True: sum((p**2).sum() for p in params))
    resumed = SplitOptimizers(torch.optim.Adam(params[:1]), NevergradOptimizer(params[1:], "OnePlusOne"))
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.optimizers[1].best_loss == optimizer.optimizers[1].best_loss


def test_what_means_nothing_is_refused():
    params = make_params(SHAPES)
    with pytest.raises(OptionError, match="without optimizers"):
        SplitOptimizers()
    with pytest.raises(OptionError, match="3; expected optimizers"):
        SplitOptimizers(3)
    with pytest.raises(OptionError, match=r"a parameter of shape \(4, 3\) is in Adam and in SGD; give each"):
        SplitOptimizers(torch.optim.Adam(params), torch.optim.SGD(params[:1]))
    optimizer = SplitOptimizers(*make(params))
    with pytest.raises(OptionError, match=r"which of the optimizers is meant\? Write optimizer.optimizers\[0\]"):
        optimizer.add_param_group({"params": make_params([(2,)])})
    with pytest.raises(
        OptionError, match=r"of 1 optimizers with groups of \[3\] parameters; this one has 2 with \[1, 2\]"
    ):
        optimizer.load_state_dict(SplitOptimizers(torch.optim.Adam(params)).state_dict())
