"""Every scheduler of torch.optim.lr_scheduler does to Modular what it does to torch's own optimizers."""

import io

import pytest
import torch
from torch.optim import SGD, AdamW, lr_scheduler

from graphopt.optim import Modular, m
from tests.optim.training import largest_difference, make_params

LR = 0.05
SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.7),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, 1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 12, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.3, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.3, 4), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}
OPTIMIZERS = {
    "AdamW": (
        lambda params, lr, **o: AdamW(params, lr, weight_decay=0.1, **o),
        lambda params, lr, **o: Modular(params, m.Adam(), m.WeightDecay(0.1), m.LR(lr), **o),
    ),
    "SGD": (
        lambda params, lr, **o: SGD(params, lr, weight_decay=0.1, **o),
        lambda params, lr, **o: Modular(params, m.WeightDecay(0.1), m.LR(lr), **o),
    ),
}


def test_the_table_is_complete():
    assert set(SCHEDULERS) == set(lr_scheduler.__all__) - {"LRScheduler"}  # the base class


@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, kind, is_tensor):
    """Rates and parameters, with two groups, and a scheduler that goes on after it was saved."""
    rates, params = [], []
    for make in OPTIMIZERS[kind]:
        own = make_params([(4, 3), (5,)])
        lr = [torch.tensor(value, dtype=torch.float64) if is_tensor else value for value in (LR, 2 * LR)]
        groups = [{"params": own[:1], "lr": lr[0]}, {"params": own[1:], "lr": lr[1]}]
        options = {"foreach": False} if is_tensor else {}
        optimizer = make(groups, lr[0], **options)
        scheduler = SCHEDULERS[name](optimizer)
        seen = []
        for step in range(10):
            if step == 5:
                optimizer, scheduler = _saved_and_loaded(make, own, name, optimizer, scheduler, options)
            generator = torch.Generator().manual_seed(step)
            for p in own:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
            scheduler.step(*[float(step % 4)] * (name == "ReduceLROnPlateau"))
            seen += [float(group["lr"]) for group in optimizer.param_groups]
        rates.append(seen)
        params.append(own)
    assert rates[1] == rates[0]
    assert len(set(rates[0])) > 2
    assert largest_difference(*params) < 1e-12


def _saved_and_loaded(make, params, name, optimizer, scheduler, options):
    file = io.BytesIO()
    states = optimizer.state_dict()
    torch.save(states, file)
    file.seek(0)
    lr = [torch.zeros(()) if isinstance(group["lr"], torch.Tensor) else 0.0 for group in optimizer.param_groups]
    fresh = make([{"params": [p], "lr": rate} for p, rate in zip(params, lr, strict=True)], lr[0], **options)
    resumed = SCHEDULERS[name](fresh)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    resumed.load_state_dict(scheduler.state_dict())
    return fresh, resumed


@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_momentum_that_is_cycled(name):
    """They know it by the names of torch's SGD and Adam; an option of that name is cycled, and if there is none they say so."""
    make = {
        "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 3),
        "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 12),
    }[name]
    with pytest.raises(ValueError, match="optimizer must support momentum"):
        make(Modular(make_params([(3,)]), m.Adam(), m.LR(0.1)))
    params = make_params([(4, 3)]), make_params([(4, 3)])
    optimizers = SGD(params[0], 0.1, momentum=0.9), Modular(params[1], m.HeavyBall(0.9), m.LR(0.1))
    seen = []
    for optimizer, (p,) in zip(optimizers, params, strict=True):
        scheduler = make(optimizer)
        for _ in range(5):
            p.grad = torch.ones_like(p)
            optimizer.step()
            scheduler.step()
            seen.append([optimizer.param_groups[0][name] for name in ("lr", "momentum")])
    assert seen[:5] == seen[5:]
    assert len({momentum for _, momentum in seen}) > 2
    assert largest_difference(*params) < 1e-13


def test_stochastic_weight_averaging():
    params = make_params([(4, 3)]), make_params([(4, 3)])
    rates = []
    for make, own in zip(OPTIMIZERS["AdamW"], params, strict=True):
        optimizer = make(own, LR)
        scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
        for _ in range(4):
            own[0].grad = torch.ones_like(own[0])
            optimizer.step()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:4] == rates[4:]
    assert largest_difference(*params) < 1e-12
