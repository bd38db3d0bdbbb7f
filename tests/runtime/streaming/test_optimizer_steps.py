"""Optimizers step a streamed model as they would the one in memory; those that may look at several parameters are refused."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

import graphopt
from graphopt.errors import OptionError
from graphopt.optim import TGAdamW
from graphopt.passes import TrueGrad
from tests.layered_models import scalar
from tests.runtime.streaming.sides import CLOSE

OPTIMIZERS = {
    "SGD": lambda params: SGD(params, lr=0.1),
    "SGD with momentum": lambda params: SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda params: Adam(params, lr=1e-2, amsgrad=True),
    "AdamW fused": lambda params: AdamW(params, lr=1e-2, fused=True),
    "AdamW foreach": lambda params: AdamW(params, lr=1e-2, foreach=True, maximize=True),
    "RMSprop": lambda params: RMSprop(params, lr=1e-2, momentum=0.5),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(pair, name, store):
    sides = pair("transformer", store=store)
    for _ in sides.train(OPTIMIZERS[name], steps=3):
        pass
    sides.assert_equal(**CLOSE)


def test_truegrad_optimizer(pair):
    sides = pair("transformer", before=[TrueGrad()], store="disk")
    graphopt.transform(sides.plain, [TrueGrad()], compiler="eager")
    for _ in sides.train(functools.partial(TGAdamW, lr=1e-2), steps=3):
        pass
    sides.assert_equal(**CLOSE)


def test_groups_and_a_scheduler(pair):
    sides = pair("transformer", store="disk")

    def make(params):
        params = list(params)
        optimizer = AdamW([{"params": params[:3], "lr": 1e-3}, {"params": params[3:-2]}], lr=1e-2)
        return optimizer

    optimizers = make(sides.model.parameters()), make(sides.plain.parameters())
    schedulers = [torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3) for optimizer in optimizers]
    for _ in range(3):
        sides.backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    sides.assert_equal(**CLOSE)


def test_closure(pair):
    sides = pair("transformer", store="cpu")
    losses = []
    for side in (sides.model, sides.plain):
        optimizer = AdamW(side.parameters(), lr=1e-2)

        def closure(side=side, optimizer=optimizer):
            optimizer.zero_grad()
            loss = scalar(side(**sides.kwargs))
            loss.backward()
            return loss

        losses.append([optimizer.step(closure).item() for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    sides.assert_equal(**CLOSE)


def test_accumulation_and_clipping(pair):
    sides = pair("transformer", store="disk", microbatch_size=2)
    optimizers = [AdamW(side.parameters(), lr=1e-2) for side in (sides.model, sides.plain)]
    for _ in range(2):
        sides.backward()
        sides.backward(0.5)
        norms = [nn.utils.clip_grad_norm_(side.parameters(), 0.3) for side in (sides.model, sides.plain)]
        torch.testing.assert_close(*norms, **CLOSE)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    sides.assert_equal(**CLOSE)


def test_clipping_rescales_the_statistic(pair):
    sides = pair("transformer", before=[TrueGrad()], store="disk")
    sides.backward()
    before = [param.sum_grad_squared.cpu() for param in sides.model.parameters()]
    nn.utils.clip_grad_norm_(sides.model.parameters(), 1e-2)
    norm = nn.utils.get_total_norm([param.grad for param in sides.plain.parameters()])
    for param, square in zip(sides.model.parameters(), before, strict=True):
        torch.testing.assert_close(
            param.sum_grad_squared.cpu(), square * (1e-2 / (norm + 1e-6)) ** 2, atol=0, rtol=1e-6
        )


def test_grad_scaler(pair):
    sides = pair("transformer", store="disk")
    optimizers = [AdamW(side.parameters(), lr=1e-2) for side in (sides.model, sides.plain)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for side, optimizer, scaler in zip((sides.model, sides.plain), optimizers, scalers, strict=True):
        scaler.scale(scalar(side(**sides.kwargs))).backward()
        scaler.step(optimizer)
        scaler.update()
    sides.assert_equal(**CLOSE)


def test_unknown_optimizers(pair):
    sides = pair("transformer", store="cpu")
    sides.backward()
    with pytest.raises(OptionError, match="LBFGS is not known to update each parameter by itself"):
        torch.optim.LBFGS(sides.model.parameters()).step(lambda: torch.zeros(()))

    class Own(torch.optim.Optimizer):
        updates_each_parameter_alone = True

        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.sub_(group["lr"] * param.grad)

    Own(sides.model.parameters()).step()
    SGD(sides.plain.parameters(), lr=0.1).step()
    sides.assert_equal(**CLOSE)


def test_a_failing_step_changes_nothing(pair):
    """On disk a step that fails on the way is as if it had not begun."""
    sides = pair("transformer", store="disk")
    for _ in sides.train(functools.partial(AdamW, lr=1e-2), steps=1):
        pass

    class Fails(SGD):
        updates_each_parameter_alone = True

        def step(self, closure=None):
            if any(param.shape == (11,) for group in self.param_groups for param in group["params"]):
                raise ZeroDivisionError("on purpose")
            return SGD.step.__wrapped__(self)

    values = {name: value.cpu() for name, value in sides.model.state_dict().items()}
    sides.backward()
    with pytest.raises(ZeroDivisionError):
        Fails(sides.model.parameters(), lr=1.0).step()
    for name, value in sides.model.state_dict().items():
        assert torch.equal(value.cpu(), values[name]), name
