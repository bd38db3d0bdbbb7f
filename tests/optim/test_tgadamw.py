"""TGAdamW against its equations, against torch.optim.AdamW, and against what users of torch.optim expect."""

import copy
import doctest
import io
import itertools
import math
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from graphopt import annotations
from graphopt.annotations import SUM_GRAD_SQUARED
from graphopt.errors import MissingAnnotation, OptionError, StaleAnnotation, UnsupportedError
from graphopt.optim import TGAdamW, tgadamw, truegrad_update
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

    def __init__(self, theta, *, lr=1e-3, betas=(0.9, 0.999, 0.999), eps=1e-12, wd=1e-2, graft=True, maximize=False):
        self.theta, self.m, self.v, self.w = theta.double().clone(), 0.0, 0.0, 0.0
        self.lr, self.betas, self.eps, self.wd, self.graft, self.maximize = lr, betas, eps, wd, graft, maximize
        self.t = 0

    def step(self, g, mean_square):
        g, mean_square = g.double(), mean_square.double()
        b1, b2, b3 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * (-g if self.maximize else g)
        self.v = b3 * self.v + (1 - b3) * mean_square
        self.w = b2 * self.w + (1 - b2) * g**2
        u = self.m / (self.v / (1 - b3**self.t)).sqrt().clamp(min=self.eps)
        b = self.m / (self.w / (1 - b2**self.t)).sqrt().clamp(min=self.eps)
        factor = b.norm() / (u.norm() + self.eps) if self.graft else 1.0
        self.theta = self.theta - self.lr * self.wd * self.theta - self.lr / (1 - b1**self.t) * u * factor


# -- the numbers


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"lr": 0.1, "betas": (0.8, 0.9, 0.7), "eps": 0.3, "wd": 0.2}], ids=["default", "odd"]
)
def test_follows_its_equations(way, graft, options):
    params = make_params(shapes_for(way))
    references = [Reference(p.detach(), graft=graft, **options) for p in params]
    named = {{"wd": "weight_decay"}.get(key, key): value for key, value in options.items()}
    optimizer = TGAdamW(params, graft=graft, **named, **way)
    for seed in range(10 if options else 50):
        set_gradients(params, seed)
        for index, (p, reference) in enumerate(zip(params, references, strict=True)):
            if (seed + index) % 5 == 4:
                p.grad = None  # this parameter sits out, and keeps a step count of its own
            else:
                reference.step(p.grad, mean_square(p))
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_maximize(way):
    ours, theirs = make_params(shapes_for(way)), make_params(shapes_for(way))
    optimizer, minimizing = TGAdamW(ours, maximize=True, **way), TGAdamW(theirs, foreach=False)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        for p in theirs:
            p.grad.neg_()  # the statistic does not mind
        optimizer.step()
        minimizing.step()
    assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_parameters_are_updated_in_float32(way, dtype):
    params = make_params(shapes_for(way), dtype)
    optimizer = TGAdamW(params, lr=0.05, **way)
    for seed in range(3):
        references = [Reference(p.detach(), lr=0.05) for p in params]
        for p, reference in zip(params, references, strict=True):
            if state := optimizer.state[p]:
                reference.m, reference.v, reference.w = (
                    state[k].double() for k in ("exp_avg", "exp_avg_per_sample_sq", "exp_avg_sq")
                )
            reference.t = seed
        set_gradients(params, seed)
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad, mean_square(p))
        optimizer.step()
        tolerance = torch.finfo(dtype).eps
        for p, reference in zip(params, references, strict=True):
            torch.testing.assert_close(p.detach().double(), reference.theta, rtol=tolerance, atol=1e-6)
    for p, (name, value) in itertools.product(params, optimizer.state[params[0]].items()):
        assert optimizer.state[p][name].dtype == value.dtype == torch.float32, name


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("graft", [True, False])
def test_equals_adamw_where_all_samples_agree(way, graft):
    ours, theirs = make_params(shapes_for(way)), make_params(shapes_for(way))
    optimizer = TGAdamW(ours, graft=graft, **way)
    adamw = torch.optim.AdamW(theirs, eps=1e-12)
    for seed in range(50):
        set_gradients(ours, seed, factor=1.0)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    assert largest_difference(ours, theirs) < 1e-9


@pytest.mark.parametrize(
    ("option", "way"),
    [*itertools.product(["enforce_baseline", "default_to_baseline"], [{}, *WAYS]), ("default_to_adam", {})],
    ids=str,
)
def test_baseline_is_adamw(option, way):
    ours, theirs = make_params(), make_params()
    optimizer = TGAdamW(ours, eps=1e-8, maximize=True, **{option: True}, **way)
    adamw = torch.optim.AdamW(theirs, maximize=True)
    for seed in range(50):
        set_gradients(ours, seed)
        if option != "enforce_baseline":
            annotations.clear(ours)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    assert largest_difference(ours, theirs) < 1e-12
    assert all(optimizer.state[p]["step"] == 50 for p in ours)
    assert ("exp_avg_per_sample_sq" in optimizer.state[ours[0]]) == (option != "enforce_baseline")


def test_baseline_of_bfloat16_parameters_keeps_float32_moments():
    (p,), (q,) = make_params([(20, 5)], torch.bfloat16), make_params([(20, 5)], torch.bfloat16)
    optimizer, usual = TGAdamW([p], enforce_baseline=True), TGAdamW([q])
    for seed in range(5):
        set_gradients([p], seed)
        set_gradients([q], seed, factor=1.0)
        optimizer.step()
        usual.step()
    torch.testing.assert_close(p, q)
    assert optimizer.state[p]["exp_avg"].dtype == torch.float32


def test_default_to_baseline_is_for_the_parameters_that_lack_the_statistic():
    with_statistic, without = make_params([(4, 3), (4, 3)])
    reference = Reference(with_statistic.detach())
    (theirs,) = make_params([(4, 3)], seed=1)
    theirs.data.copy_(without.data)
    optimizer, adamw = (
        TGAdamW([with_statistic, without], default_to_baseline=True),
        torch.optim.AdamW([theirs], eps=1e-12),
    )
    for seed in range(10):
        set_gradients([with_statistic, without], seed)
        annotations.clear([without])
        theirs.grad = without.grad.clone()
        reference.step(with_statistic.grad, mean_square(with_statistic))
        optimizer.step()
        adamw.step()
    assert largest_difference([with_statistic, without], [reference.theta, theirs]) < 1e-12


def test_late_statistics_are_debiased_by_their_own_count():
    (p,) = make_params([(4, 3)])
    optimizer = TGAdamW([p], graft=False, weight_decay=0.0, default_to_baseline=True, betas=(0.0, 0.999))
    for seed in range(20):
        set_gradients([p], seed)
        annotations.clear([p])
        optimizer.step()
    before = p.detach().clone()
    set_gradients([p], 99)
    expected = before - 1e-3 * p.grad / mean_square(p).sqrt()
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
    assert optimizer.state[p]["num_statistics"] == 1


def test_grafting_can_be_switched_on_later():
    (p,) = make_params([(4, 3)])
    optimizer = TGAdamW([p], graft=False, weight_decay=0.0, betas=(0.0, 0.999))
    train(optimizer, [p])
    assert "exp_avg_sq" not in optimizer.state[p]
    optimizer.param_groups[0]["graft"] = True
    before = p.detach().clone()
    train(optimizer, [p], [99])
    assert float((p.detach() - before).norm()) == pytest.approx(
        1e-3 * math.sqrt(12), rel=1e-9
    )  # |g| / √g² for each entry


@pytest.mark.parametrize("graft", [True, False])
def test_large_tensors_are_updated_block_by_block(graft, monkeypatch):
    monkeypatch.setattr(truegrad_update, "_BLOCK", 16)
    params = make_params([(7, 19), (33,), (3, 5, 7)])
    references = [Reference(p.detach(), graft=graft) for p in params]
    optimizer = TGAdamW(params, graft=graft, foreach=False)
    for seed in range(5):
        set_gradients(params, seed)
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad, mean_square(p))
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12


# -- the scale of the statistic


def per_sample_training(batch, graft, steps=20):
    inputs, targets = torch.randn(len(batch), 5, dtype=torch.float64), batch
    inputs = torch.linspace(-1, 1, 5, dtype=torch.float64) * targets[:, None] + 1
    weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = TGAdamW([weight], lr=0.1, graft=graft, weight_decay=0.0)
    steps_taken = []
    for _ in range(steps):
        before = weight.detach().clone()
        residual = (inputs @ weight.detach() - targets).sin()
        contributions = residual[:, None] * inputs / len(batch)
        optimizer.zero_grad()
        weight.grad = contributions.sum(0)
        annotations.publish(weight, (contributions**2).sum(0), len(batch))
        optimizer.step()
        steps_taken.append(weight.detach() - before)
    return weight.detach(), steps_taken


@pytest.mark.parametrize("graft", [True, False])
def test_repeating_the_batch_changes_nothing(graft):
    batch = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once, _ = per_sample_training(batch, graft)
    thrice, _ = per_sample_training(batch.repeat(3), graft)
    torch.testing.assert_close(once, thrice, rtol=0, atol=1e-12)


def test_without_grafting_the_first_step_is_at_most_adams():
    batch = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, steps = per_sample_training(batch, graft=False, steps=1)
    assert float(steps[0].abs().max()) <= 0.1 * (1 + 1e-12)
    assert float(steps[0].abs().min()) < 0.09


@pytest.mark.parametrize("graft", [True, False])
def test_scaling_the_loss_changes_nothing(graft):
    plain, scaled = make_params(), make_params()
    optimizers = TGAdamW(plain, graft=graft, eps=0.0), TGAdamW(scaled, graft=graft, eps=0.0)
    for seed in range(5):
        set_gradients(plain, seed)
        set_gradients(scaled, seed)
        for p in scaled:
            p.grad.mul_(1024.0)  # the statistic follows by itself
        for optimizer in optimizers:
            optimizer.step()
    assert largest_difference(plain, scaled) < 1e-12


def test_a_statistic_assigned_without_a_count_is_used_as_it_stands():
    annotations.expose()
    ours, theirs = make_params([(4, 3)]), make_params([(4, 3)])
    optimizer, adamw = TGAdamW(ours, graft=False), torch.optim.AdamW(theirs, eps=1e-12)
    set_gradients(ours, 0)
    annotations.clear(ours)
    theirs[0].grad = ours[0].grad.clone()
    ours[0].sum_grad_squared = ours[0].grad ** 2
    optimizer.step()
    adamw.step()
    assert largest_difference(ours, theirs) < 1e-12


# -- options


def test_two_betas_stand_for_three():
    two, three = make_params(), make_params()
    train(TGAdamW(two, betas=(0.9, 0.99)), two)
    train(TGAdamW(three, betas=(0.9, 0.99, 0.99)), three)
    assert all(torch.equal(a, b) for a, b in zip(two, three, strict=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"betas": (0.9,)}, r"betas=\(0.9,\); expected \(beta1, beta2\) or \(beta1, beta2, beta3\)"),
        ({"betas": (0.9, 0.9, 0.9, 0.9)}, "betas="),
        ({"betas": (0.9, 1.0)}, "below 1"),
        ({"lr": -1.0}, "lr=-1.0; expected a number or a one-element tensor, at least 0"),
        ({"lr": torch.ones(2)}, "one-element"),
        ({"eps": -1.0}, "eps=-1.0; expected a number, at least 0"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"capturable": True}, "capturable=True is not supported.*Capture forward and backward only"),
        ({"differentiable": True}, r"differentiable=True is not supported.*graphopt\.optim\.functional"),
        ({"fused": True, "foreach": True}, "fused=True and foreach=True exclude each other"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(OptionError, match=text):
        TGAdamW(make_params(), **options)
    params = make_params()
    optimizer = TGAdamW(params)
    with pytest.raises(OptionError, match=text):
        optimizer.add_param_group({"params": make_params(), **options})
    assert len(optimizer.param_groups) == 1


def test_every_option_is_per_group():
    options = [
        {},
        {"graft": False},
        {"enforce_baseline": True},
        {"lr": 0.5},
        {"betas": (0.1, 0.2)},
        {"eps": 0.5},
        {"weight_decay": 0.7},
    ]
    options += [{"maximize": True}, {"foreach": False}, {"foreach": True}, {"fused": True}]
    together = [make_params([(3, 2), (3,)], seed=seed) for seed in range(len(options))]
    optimizer = TGAdamW([{"params": p, **o} for p, o in zip(together, options, strict=True)])
    alone = [make_params([(3, 2), (3,)], seed=seed) for seed in range(len(options))]
    for seed in range(5):
        for params in together:
            set_gradients(params, seed)
        optimizer.step()
    for params, option, other in zip(alone, options, together, strict=True):
        train(TGAdamW(params, **option), params)
        assert all(torch.equal(a, b) for a, b in zip(params, other, strict=True)), option


def test_graft_of_one_group_affects_only_that_group():
    results = []
    for graft in (True, False):
        first, second = make_params([(4, 3)]), make_params([(4, 3)], seed=1)
        train(TGAdamW([{"params": first}, {"params": second, "graft": graft}]), first + second)
        results.append((first[0].detach(), second[0].detach()))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_weight_decays_once_per_parameter_and_step(way):
    params = make_params([(3,)] * 5 + [(5000,)])
    before = snapshot(params)
    optimizer = TGAdamW(params, lr=0.1, weight_decay=0.1, **way)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert largest_difference(params, [0.99**2 * p for p in before]) < 1e-12


def test_a_tensor_is_a_learning_rate():
    number, tensor = make_params(), make_params()
    train(TGAdamW(number, lr=0.25), number)
    train(TGAdamW(tensor, lr=torch.tensor(0.25)), tensor)
    assert largest_difference(number, tensor) == 0.0


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.5**t),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),  # moves beta1 as well
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ],
)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_learning_rate_schedulers(make_scheduler, lr):
    if isinstance(lr, Tensor):
        lr = lr.clone()
    (p,) = make_params([(4, 3)])
    reference = Reference(p.detach())
    optimizer = TGAdamW([p], lr=lr)
    scheduler = make_scheduler(optimizer)
    rates = set()
    for seed in range(8):
        group = optimizer.param_groups[0]
        reference.lr, reference.betas = float(group["lr"]), group["betas"]
        rates.add(reference.lr)
        set_gradients([p], seed)
        reference_t = reference.t
        reference.step(p.grad, mean_square(p))
        optimizer.step()
        assert reference.t == reference_t + 1
        scheduler.step(1.0) if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else scheduler.step()
    assert len(rates) > 2
    assert largest_difference([p], [reference.theta]) < 1e-9  # a tensor rate is a float32


# -- errors, and nothing half done


def test_missing_statistic_names_the_parameter_and_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = TGAdamW(model.named_parameters())
    params = list(model.parameters())
    set_gradients(params, 0)
    annotations.clear(params[2:3])
    before = snapshot(params)
    text = (
        r"TGAdamW\.step\(\): 1 of 4 parameters with a gradient have no sum_grad_squared: "
        r"parameter '1\.weight', shape \(1, 2\)\."
        r"[\s\S]*graphopt\.transform\(model\)[\s\S]*Nothing was changed[\s\S]*default_to_baseline=True"
    )
    with pytest.raises(MissingAnnotation, match=text):
        optimizer.step()
    assert largest_difference(params, before) == 0.0
    assert not any(optimizer.state.values())
    annotations.clear(params)
    with pytest.raises(
        MissingAnnotation, match=r"4 of 4 .*'0\.weight'.*; parameter '0\.bias', shape \(2,\); .*'1\.bias'"
    ):
        optimizer.step()


def test_missing_statistic_names_the_place_of_an_unnamed_parameter():
    params = make_params([(3,), (4,), (2,)])
    optimizer = TGAdamW([{"params": params[:1]}, {"params": params[1:]}])
    set_gradients(params, 0)
    annotations.clear(params[2:])
    with pytest.raises(MissingAnnotation, match=r"parameter 1 of group 1, shape \(2,\)"):
        optimizer.step()


def test_many_missing_statistics_are_listed_in_part():
    params = make_params([(1,)] * 30)
    set_gradients(params, 0)
    annotations.clear(params)
    with pytest.raises(MissingAnnotation, match=r"30 of 30 .*parameter 9 of group 0, shape \(1,\); \.\.\.\."):
        TGAdamW(params).step()


def test_a_gradient_changed_by_other_than_rescaling_is_named():
    params = make_params([(4, 3), (5,)])
    optimizer = TGAdamW(params)
    set_gradients(params, 0)
    params[1].grad.add_(1.0)
    before = snapshot(params)
    with pytest.raises(
        StaleAnnotation, match=r"TGAdamW\.step\(\), parameter 1 of group 0, shape \(5,\): p\.grad .* not a rescaling"
    ):
        optimizer.step()
    assert largest_difference(params, before) == 0.0


def test_a_statistic_of_the_wrong_shape_is_refused():
    params = make_params([(4, 3)])
    params[0].grad = torch.ones_like(params[0])
    annotations.publish(params[0], torch.ones(4), 1)
    with pytest.raises(
        OptionError, match=r"parameter 0 of group 0, shape \(4, 3\): sum_grad_squared has shape \(4,\) on cpu"
    ):
        TGAdamW(params).step()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = TGAdamW(embedding.named_parameters(), enforce_baseline=True)
    embedding(torch.tensor([1])).sum().backward()
    before = snapshot(embedding.parameters())
    with pytest.raises(
        UnsupportedError, match=r"gradient of parameter 'weight', shape \(5, 2\) is sparse .*sparse=False"
    ):
        optimizer.step()
    assert largest_difference(embedding.parameters(), before) == 0.0


def test_complex_parameters_are_refused():
    complex_param = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(UnsupportedError, match=r"shape \(3,\) is complex \(torch.complex64\).*view_as_real"):
        TGAdamW([("a", nn.Parameter(torch.zeros(2))), ("b", complex_param)])
    with pytest.raises(UnsupportedError, match="view_as_real"):
        TGAdamW([{"params": complex_param}])


def test_parameters_without_gradient_are_left_alone():
    params = make_params([(3,), (4,)])
    optimizer = TGAdamW(params)
    before = snapshot(params)
    set_gradients(params[:1], 0)
    optimizer.step()
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[0], before[0])
    assert list(optimizer.state_dict()["state"]) == [0]


# -- the life of a statistic


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_statistics(set_to_none):
    params = make_params()
    optimizer = TGAdamW(params)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(annotations.find(p, SUM_GRAD_SQUARED) is None for p in params)
    optimizer.step()  # nothing to do, or a zero gradient whose statistic is zero


def test_stepping_twice_uses_the_same_pair_twice():
    (p,) = make_params([(4, 3)])
    reference = Reference(p.detach())
    optimizer = TGAdamW([p])
    set_gradients([p], 0)
    for _ in range(2):
        reference.step(p.grad, mean_square(p))
        optimizer.step()
    assert largest_difference([p], [reference.theta]) < 1e-12


def test_unused_parameters_with_zero_gradients_decay_as_in_adam():
    ours, theirs = make_params([(4, 3)]), make_params([(4, 3)])
    optimizer, adamw = TGAdamW(ours), torch.optim.AdamW(theirs, eps=1e-12)
    for seed in range(6):
        if seed % 2:
            optimizer.zero_grad(set_to_none=False)
        else:
            set_gradients(ours, seed, factor=1.0)
        theirs[0].grad = ours[0].grad.clone()
        optimizer.step()
        adamw.step()
    assert largest_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("explicit_unscale", [True, False])
@pytest.mark.parametrize("way", [{}, {"fused": True}], ids=str)
def test_gradient_scaler(explicit_unscale, way):
    shapes = [(4, 3), (5,), (5000,)]
    plain, scaled = make_params(shapes), make_params(shapes)
    optimizers = TGAdamW(plain, graft=False, **way), TGAdamW(scaled, graft=False, **way)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=2)
    for seed in range(6):
        set_gradients(plain, seed)
        set_gradients(scaled, seed)
        scale = float(scaler.scale(torch.ones(())))
        annotations.clear(scaled)
        for p, q in zip(plain, scaled, strict=True):  # what a backward of the scaled loss leaves behind
            q.grad.mul_(scale)
            annotations.publish(q, annotations.get(p, SUM_GRAD_SQUARED) * scale**2, 7)
        if seed == 3:
            scaled[0].grad[0, 0] = math.inf
            annotations.publish(scaled[0], torch.full_like(scaled[0], math.inf), 7)
        else:
            optimizers[0].step()
        if explicit_unscale:
            scaler.unscale_(optimizers[1])
        scaler.step(optimizers[1])
        scaler.update()
    assert largest_difference(plain, scaled) < 1e-6


def test_closure_runs_once_with_gradients_and_its_loss_is_returned():
    (p,) = make_params([(4, 3)])
    optimizer = TGAdamW([p])
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        annotations.publish(p, p.grad**2, 1)
        calls.append(loss.requires_grad)
        return loss

    before = p.detach().clone()
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == (before**2).sum()
    assert not torch.equal(p, before)


def test_hooks_fire():
    params = make_params()
    optimizer = TGAdamW(params)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(optimizer, params, [0])
    assert seen == ["before", "after"]


# -- state


def test_state_names_and_shapes():
    params = make_params([(4, 3), (5000,)])
    optimizer = TGAdamW(params)
    train(optimizer, params)
    for p in params:
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq", "exp_avg_per_sample_sq", "num_statistics"}
        assert all(state[name].shape == p.shape for name in ("exp_avg", "exp_avg_sq", "exp_avg_per_sample_sq"))
        assert state["step"] == state["num_statistics"] == 5
        assert all(not value.requires_grad for value in state.values())
    lean = TGAdamW(params, graft=False)
    train(lean, params)
    assert "exp_avg_sq" not in lean.state[params[0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"graft": False}, {"enforce_baseline": True}, {"fused": True}], ids=str)
def test_resumes_from_a_file_as_if_never_stopped(dtype, options):
    shapes = [(), (4, 3), (5000,)]
    params = make_params(shapes, dtype)
    optimizer = TGAdamW(params, lr=0.1, **options)
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": snapshot(params)}, file)
    train(optimizer, params, range(3, 6))

    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed_params = [nn.Parameter(p) for p in loaded["params"]]
    resumed = TGAdamW(resumed_params, lr=1.0)
    resumed.load_state_dict(loaded["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.1
    train(resumed, resumed_params, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))
    for p, q in zip(params, resumed_params, strict=True):
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][name])
            assert value.dtype == resumed.state[q][name].dtype


def test_loaded_state_is_a_copy_and_hooks_see_it():
    params = make_params([(4, 3)], torch.bfloat16)
    optimizer, other = TGAdamW(params), TGAdamW(make_params([(4, 3)], torch.bfloat16))
    train(optimizer, params)
    seen = []
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(o.state[o.param_groups[0]["params"][0]]["exp_avg"].dtype)
    )
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    assert seen == [torch.float32]
    assert len(other._optimizer_load_state_dict_post_hooks) == 1
    (theirs,) = other.state.values()
    assert theirs["exp_avg"].data_ptr() != saved["state"][0]["exp_avg"].data_ptr()
    assert torch.equal(theirs["exp_avg"], saved["state"][0]["exp_avg"])


def test_continues_from_the_state_of_adamw():
    params = make_params([(4, 3), (5,)])
    adamw = torch.optim.AdamW(params, betas=(0.8, 0.9), lr=0.1)
    for seed in range(4):
        set_gradients(params, seed)
        adamw.step()
    optimizer = TGAdamW(params)
    optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.param_groups[0]["graft"] is True
    before = snapshot(params)
    train(optimizer, params, [7])
    assert optimizer.state[params[0]]["step"] == 5
    assert optimizer.state[params[0]]["num_statistics"] == 1
    assert 0 < largest_difference(params, before) < 1


def test_copies_and_pickles():
    model = nn.Linear(3, 2).double()
    optimizer = TGAdamW(model.named_parameters(), lr=0.1)
    train(optimizer, list(model.parameters()))
    for other_model, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert other.param_groups[0]["params"][0] is other_model.weight
        train(other, list(other_model.parameters()), [5])
        other.zero_grad()
    train(optimizer, list(model.parameters()), [5])
    assert largest_difference(model.parameters(), other_model.parameters()) == 0.0


def test_unpickles_groups_that_lack_options():
    params = make_params()
    optimizer = TGAdamW(params)
    state = optimizer.__getstate__()
    for option in (
        "graft",
        "default_to_baseline",
        "enforce_baseline",
        "maximize",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
    ):
        del state["param_groups"][0][option]
    optimizer.__setstate__(state)
    train(optimizer, params)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("options", [{}, {"default_to_baseline": True}, {"graft": False}], ids=str)
def test_distributed_checkpoint_before_the_first_step(lr, options):
    if isinstance(lr, Tensor):
        lr = lr.clone()
    models = [nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0][1].bias.requires_grad_(False)
    models[1][1].bias.requires_grad_(False)
    optimizers = [TGAdamW((p for p in m.parameters() if p.requires_grad), lr=lr, **options) for m in models]
    params = [[p for p in m.parameters() if p.requires_grad] for m in models]
    train(optimizers[0], params[0])
    before = snapshot(params[1])

    fresh = get_optimizer_state_dict(models[1], optimizers[1])  # steps once with zero gradients
    saved = get_optimizer_state_dict(models[0], optimizers[0])
    assert largest_difference(params[1], before) == 0.0
    assert all(p.grad is None for p in params[1])
    assert {name: set(entry) for name, entry in fresh["state"].items()} == {
        name: set(entry) for name, entry in saved["state"].items()
    }
    assert set(fresh["state"]["0.weight"]) >= {"step", "exp_avg", "exp_avg_per_sample_sq"}

    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], optimizers[1], saved)
    for optimizer, p in zip(optimizers, params, strict=True):
        train(optimizer, p, [9])
    assert largest_difference(*params) == 0.0


# -- layouts


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_layouts(way):
    def strange():
        values = torch.linspace(-1, 1, 8192, dtype=torch.float64)
        return [
            nn.Parameter(values.reshape(4, 32, 8, 8).to(memory_format=torch.channels_last)),
            nn.Parameter(values.clone().reshape(128, 64).t()),
            nn.Parameter(values.clone().reshape(128, 64)[:, ::2]),  # gaps: no flat view
            nn.Parameter(values[:6].clone().reshape(2, 3).t()),
        ]

    params = strange()
    references = [Reference(p.detach()) for p in params]
    optimizer = TGAdamW(params, **way)
    for seed in range(3):
        set_gradients(params, seed)  # gradients and statistics are contiguous here, unlike the parameters
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad, mean_square(p))
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12


# -- compiled kernels


def test_compiled_equals_eager():
    shapes = [(97, 50), (4097,), (64, 64, 3)]
    for graft, dtype, tolerance in [
        (True, torch.float64, 1e-12),
        (False, torch.float64, 1e-12),
        (True, torch.float32, 1e-5),
    ]:
        eager, compiled = make_params(shapes, dtype), make_params(shapes, dtype)
        train(TGAdamW(eager, graft=graft, foreach=False), eager)
        train(TGAdamW(compiled, graft=graft, fused=True), compiled)
        assert 0 <= largest_difference(eager, compiled) < tolerance


def test_nothing_is_compiled_twice():
    params = make_params([(5000,), (100, 70)])
    optimizer = TGAdamW(params, lr=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(optimizer, params, [0])
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(optimizer, params, range(1, 4))
        scheduler.step()
        optimizer.param_groups[0].update(betas=(0.5, 0.6, 0.7), eps=1e-3, weight_decay=0.5)
        params += make_params([(4097,), (3, 2000), (9, 9, 99), (2**20,), (1500000,), (1,), (2, 2)], seed=1)
        optimizer.add_param_group({"params": params[2:], "lr": 0.3})
        train(optimizer, params, range(4, 7))
        others = make_params([(6000,)])
        train(TGAdamW(others, fused=True, betas=(0.0, 0.1)), others)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames


def test_large_models_are_compiled_unasked(monkeypatch):
    calls = []
    original = truegrad_update._run_compiled
    monkeypatch.setattr(
        truegrad_update, "_run_compiled", lambda batch, kernels: (calls.append(len(batch)), original(batch, kernels))
    )
    params = make_params([(5000,), (5000,), (7,)])
    optimizer = TGAdamW(params)
    train(optimizer, params, [0])
    assert calls == []
    monkeypatch.setattr(truegrad_update, "_COMPILE_FROM", 10_000)
    train(optimizer, params, [1])
    assert calls == [2]
    optimizer.param_groups[0]["foreach"] = False
    train(optimizer, params, [2])
    assert calls == [2]


def test_without_a_compiler(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(truegrad_update, "compile_flat", fail)
    monkeypatch.setattr(truegrad_update, "_COMPILE_FROM", 0)
    truegrad_update._compile_kernels.cache_clear()
    params = make_params([(5000,), (7,)])
    reference = Reference(params[0].detach())
    set_gradients(params, 0)
    before = snapshot(params)
    fused = TGAdamW(params, fused=True)
    with pytest.raises(RuntimeError, match="no compiler here"):
        fused.step()
    assert largest_difference(params, before) == 0.0
    assert all(state["step"] == 0 for state in fused.state.values())
    reference.step(params[0].grad, mean_square(params[0]))
    text = r"runs uncompiled, .* \(RuntimeError: no compiler here\)\. Pass foreach=True .* or fused=True"
    with pytest.warns(UserWarning, match=text):
        TGAdamW(params).step()
    assert largest_difference(params[:1], [reference.theta]) < 1e-12
    truegrad_update._compile_kernels.cache_clear()


def test_step_inside_torch_compile():
    params = make_params([(4, 3)])
    optimizer = TGAdamW(params)
    reference = Reference(params[0].detach())
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(3):
        set_gradients(params, seed)
        reference.step(params[0].grad, mean_square(params[0]))
        step()
    assert largest_difference(params, [reference.theta]) < 1e-12


def test_docstring():
    assert doctest.testmod(tgadamw) == (0, 8)
    assert re.search(r"scale of the statistic", TGAdamW.__doc__)
