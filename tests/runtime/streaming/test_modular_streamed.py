"""Chains of modules step a streamed model as they would the one in memory; those that look at all parameters are refused."""

import math

import pytest
import torch

import graphopt
from graphopt.errors import NonFiniteError, OptionError
from graphopt.optim import Modular, Module, Rule, m
from graphopt.passes import LayerToLayer, TrueGrad
from tests.layered_models import D, N, T, scalar
from tests.runtime.streaming.sides import CLOSE, Dropped

CHAINS = {
    "AdamW": lambda: (m.Adam(), m.WeightDecay(0.01), m.LR(1e-3)),
    "norms": lambda: (m.ClipValue(0.5), m.NormalizeByEMA(0.9), m.WeightDecay(0.01), m.LR(1e-2)),
    "routes": lambda: (
        m.Freeze(lambda p: p.ndim == 1 and len(p) == 6),
        m.Split(lambda name, p: p.ndim == 2 and "head" not in name, m.Adam(), m.HeavyBall()),
        m.LR(1e-2),
    ),
    "schedules": lambda: (m.Adam(beta1=lambda step: 0.9 - 0.5**step / 2), m.LR(lambda step: 1e-2 / (1 + step))),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [("AdamW", {}), ("norms", {}), ("routes", {}), ("schedules", {}), ("norms", {"foreach": True})],
    ids=str,
)
def test_chains(pair, name, way):
    sides = pair("transformer", store="disk")
    optimizers = []

    def make(params):
        model = sides.plain if optimizers else sides.model
        optimizers.append(Modular(model, *CHAINS[name](), **way))
        return optimizers[-1]

    for _ in sides.train(make, steps=3):
        pass
    sides.assert_equal(**CLOSE)
    for optimizer in optimizers:
        assert [group["num_steps"] for group in optimizer.param_groups] == [3]
        assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("store", ["cpu", "disk"])
def test_eager_steps(pair, store):
    """Steps that are made in backward, with a schedule, which counts them once."""
    sides = pair("transformer", store=store, eager=True)
    optimizers = []

    def make(params):
        optimizers.append(Modular(params, *CHAINS["schedules"]()))
        return optimizers[-1]

    for _ in sides.train(make, steps=3):
        pass
    sides.assert_equal(**CLOSE)
    assert [optimizer.param_groups[0]["num_steps"] for optimizer in optimizers] == [3, 3]


def test_a_module_with_names_groups_and_a_scheduler(pair):
    sides = pair("transformer", store="cpu")
    optimizers = [Modular(side, *CHAINS["AdamW"]()) for side in (sides.model, sides.plain)]
    for optimizer in optimizers:
        group = optimizer.param_groups[0]
        tail = {**group, "params": group["params"][3:], "param_names": group["param_names"][3:], "beta1": 0.5}
        group["params"], group["param_names"] = group["params"][:3], group["param_names"][:3]
        optimizer.param_groups.append(tail)
    names = [group["param_names"] for group in optimizers[0].param_groups]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    for _ in range(3):
        sides.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    sides.assert_equal(**CLOSE)
    assert [group["param_names"] for group in optimizers[0].param_groups] == names


def test_statistics(pair):
    """Modules that read what a pass has computed."""
    sides = pair("transformer", before=[TrueGrad()], store="disk")
    graphopt.transform(sides.plain, [TrueGrad()], compiler="eager")
    for _ in sides.train(lambda params: Modular(params, m.TrueGradAdam(), m.LR(1e-2)), steps=2):
        pass
    sides.assert_equal(**CLOSE)


class Coupled(Rule):
    def measure(self, updates, settings):
        return {"sum": sum(u.sum() for u in updates)}

    def update(self, update, state, settings, context):
        return update * context.measured["sum"], state


class Unknown(Module):
    def step(self, var):
        return var


@pytest.mark.parametrize("module", [Coupled, Unknown])
def test_chains_that_need_all_parameters(pair, module):
    sides = pair("transformer", store="cpu")
    sides.backward()
    optimizer = Modular(sides.model, m.Adam(), module(), m.LR(0.1))
    assert not optimizer.updates_each_parameter_alone
    text = (
        rf"module 2 of 3, {module.__name__}: needs all parameters together, and a streamed model brings a few at a time"
    )
    with pytest.raises(OptionError, match=text):
        optimizer.step()


def test_gradients_that_are_not_finite_change_nothing(pair):
    """Not even the layers that come before."""
    sides = pair("transformer", store="cpu")
    sides.backward()
    params = list(sides.model.parameters())
    before = {name: value.cpu() for name, value in sides.model.state_dict().items()}
    params[-1].grad = torch.full(params[-1].shape, math.nan, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"module 1 of 3, Adam: the gradient of parameter .* holds NaN"):
        Modular(sides.model, *CHAINS["AdamW"]()).step()
    assert all(torch.equal(value.cpu(), before[name]) for name, value in sides.model.state_dict().items())


def test_resume(tmp_path):
    """A second model goes on where the first has stopped."""
    x = torch.randn(N, T, D, dtype=torch.float64)

    def build(path, resume):
        torch.manual_seed(0)
        model = Dropped().double()
        graphopt.transform(model, [LayerToLayer(store="disk", store_path=path, resume=resume)], compiler="eager")
        return model, Modular(model.parameters(), *CHAINS["schedules"]())

    def train(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            loss = scalar(model(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = build(tmp_path / "store", resume=False)
    train(model, optimizer, 2)
    graphopt.stream(model).close()
    model, optimizer = build(tmp_path / "store", resume=True)
    assert graphopt.stream(model).resume(optimizer) == 2
    assert optimizer.param_groups[0]["num_steps"] == 2
    resumed = train(model, optimizer, 2)
    graphopt.stream(model).close()
    model, optimizer = build(tmp_path / "whole", resume=False)
    assert train(model, optimizer, 4)[2:] == resumed
    graphopt.stream(model).close()
