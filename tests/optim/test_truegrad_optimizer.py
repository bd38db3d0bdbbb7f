"""What the TG optimizers share: the choice of preconditioner, and statistics of real models."""

import inspect

import pytest
import torch
from torch import nn

import graphopt
from graphopt import annotations
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED
from graphopt.errors import MissingAnnotation, OptionError
from graphopt.optim import TGAdamW, TGLaProp, TGRMSProp, clip_grad_norm_
from tests.optim import test_tgadamw, test_tglaprop, test_tgrmsprop
from tests.optim.training import (
    largest_difference,
    make_params,
    mean_square,
    set_gradients,
    shapes_for,
    snapshot,
    train,
)

pytestmark = pytest.mark.usefixtures("own_kernels")

REFERENCES = {
    TGAdamW: test_tgadamw.Reference,
    TGLaProp: test_tglaprop.Reference,
    TGRMSProp: test_tgrmsprop.Reference,
}
SQUARES = {
    "mean_square": lambda g, mean_square: mean_square,
    "variance": lambda g, mean_square: (mean_square - g**2).clamp(min=0),
    "squared_mean": lambda g, mean_square: g**2,
}
every_optimizer = pytest.mark.parametrize("cls", REFERENCES, ids=lambda cls: cls.__name__)


# -- the choice of preconditioner


@every_optimizer
@pytest.mark.parametrize("preconditioner", SQUARES)
@pytest.mark.parametrize("graft", [True, False])
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
def test_preconditioners_follow_their_equations(cls, preconditioner, graft, way):
    _compare(cls, preconditioner, graft, way)


@pytest.mark.parametrize("cls", [TGAdamW, TGRMSProp])
def test_variance_in_compiled_kernels(cls):
    _compare(cls, "variance", True, {"fused": True})


def _compare(cls, preconditioner, graft, way):
    params = make_params(shapes_for(way))
    references = [REFERENCES[cls](p.detach(), graft=graft) for p in params]
    optimizer = cls(params, graft=graft, preconditioner=preconditioner, **way)
    for seed in range(10):
        set_gradients(params, seed)
        for p, reference in zip(params, references, strict=True):
            reference.step(p.grad, SQUARES[preconditioner](p.grad, mean_square(p)))
        optimizer.step()
    assert largest_difference(params, [reference.theta for reference in references]) < 1e-12


def test_the_averages_hold_what_their_names_say():
    """Against the mean square, the variance and the mean of per-sample gradients that autograd gives one by one."""
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(4, dtype=torch.float64))
    rows = torch.stack(
        [torch.autograd.grad((x @ weight - y) ** 2, weight)[0] for x, y in zip(inputs, targets, strict=True)]
    )
    expected = {
        "mean_square": (rows**2).mean(0),
        "variance": rows.var(0, correction=0),
        "squared_mean": rows.mean(0) ** 2,
    }
    assert set(expected) == set(SQUARES)
    for preconditioner, value in expected.items():
        optimizer = TGAdamW([weight], lr=0.0, preconditioner=preconditioner, betas=(0.9, 0.75))
        weight.grad = rows.mean(0)
        annotations.publish(weight, ((rows / 6) ** 2).sum(0), 6)
        optimizer.step()
        torch.testing.assert_close(optimizer.state[weight]["exp_avg_per_sample_sq"], 0.25 * value)


@every_optimizer
@pytest.mark.parametrize("graft", [True, False])
def test_squared_mean_is_the_baseline_and_needs_no_statistic(cls, graft):
    ours, theirs = make_params(), make_params()
    optimizer = cls(ours, preconditioner="squared_mean", graft=graft)
    baseline = cls(theirs, enforce_baseline=True)
    for seed in range(50):
        for params in (ours, theirs):
            set_gradients(params, seed)
            annotations.clear(params)
        optimizer.step()
        baseline.step()
    assert largest_difference(ours, theirs) < 1e-9
    assert optimizer.state[ours[0]]["num_statistics"] == 50


def test_squared_mean_is_adamw():
    ours, theirs = make_params(), make_params()
    optimizer, adamw = TGAdamW(ours, preconditioner="squared_mean"), torch.optim.AdamW(theirs, eps=1e-12)
    for seed in range(50):
        set_gradients(ours, seed)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    assert largest_difference(ours, theirs) < 1e-9


@every_optimizer
def test_variance_needs_two_samples(cls):
    params = make_params([(3,), (4,)])
    optimizer = cls(params, preconditioner="variance")
    set_gradients(params, 0)
    annotations.publish(params[1], params[1].grad ** 2, 1)
    before = snapshot(params)
    text = (
        rf"{cls.__name__}\.step\(\), parameter 1 of group 0, shape \(4,\): preconditioner='variance' needs the gradients "
        r"of at least 2 samples and found 1 sample\. .*drop_last=True.*preconditioner='mean_square'"
    )
    with pytest.raises(OptionError, match=text):
        optimizer.step()
    assert largest_difference(params, before) == 0.0
    assert not any(optimizer.state.values())
    annotations.clear(params)
    with pytest.raises(MissingAnnotation, match="2 of 2"):
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()  # zero gradients vary by zero


def test_variance_needs_to_know_how_many_samples():
    annotations.expose()
    (p,) = make_params([(3,)])
    p.grad = torch.ones_like(p)
    p.sum_grad_squared = torch.ones_like(p)  # as BackPACK does
    with pytest.raises(OptionError, match=r"found an unknown number of samples \(num_samples was not set\)"):
        TGAdamW([p], preconditioner="variance").step()


def test_preconditioners_are_per_group():
    together = [make_params([(3, 2), (3,)], seed=seed) for seed in range(3)]
    optimizer = TGAdamW([{"params": p, "preconditioner": name} for p, name in zip(together, SQUARES, strict=True)])
    for seed in range(5):
        for params in together:
            set_gradients(params, seed)
        optimizer.step()
    for index, name in enumerate(SQUARES):
        alone = make_params([(3, 2), (3,)], seed=index)
        train(TGAdamW(alone, preconditioner=name), alone)
        assert all(torch.equal(a, b) for a, b in zip(alone, together[index], strict=True))


@every_optimizer
def test_unknown_preconditioners_are_refused(cls):
    text = rf"{cls.__name__}: preconditioner='mean'; expected one of 'mean_square', 'variance', 'squared_mean'"
    with pytest.raises(OptionError, match=text):
        cls(make_params(), preconditioner="mean")


@every_optimizer
def test_options_are_those_of_the_documentation(cls):
    """``**options`` hides the names from the signature, so the docstring of TGAdamW must have them all."""
    shared = inspect.signature(cls.__mro__[1].__init__).parameters
    names = [name for name, parameter in shared.items() if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    assert set(names) == set(inspect.signature(cls).parameters["options"].annotation.__args__[0].__annotations__)
    assert all(f"        {name}: " in TGAdamW.__doc__ for name in names)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        cls(make_params(), momentum=0.9)


# -- statistics of real models


@pytest.fixture
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    yield graphopt.transform(module, compiler="aot_eager")
    torch._dynamo.reset()


def backward(model, inputs):
    model(inputs).sin().sum().backward()


def statistics(model):
    return [annotations.get(p, SUM_GRAD_SQUARED).clone() for p in model.parameters()]


@every_optimizer
def test_a_statistic_lives_as_long_as_its_gradient(cls, model):
    """The same statistic for the same data in each step, over micro-batches the sum, and with clipping its square."""
    optimizer = cls(model.parameters(), lr=0.0)
    inputs = torch.randn(6, 4, dtype=torch.float64)
    backward(model, inputs)
    first = statistics(model)
    optimizer.step()
    optimizer.zero_grad()
    assert all(annotations.find(p, SUM_GRAD_SQUARED) is None for p in model.parameters())

    backward(model, inputs)
    torch.testing.assert_close(statistics(model), first, rtol=0, atol=0)
    optimizer.step()
    optimizer.zero_grad()

    for part in inputs.split(2):
        backward(model, part)
    torch.testing.assert_close(statistics(model), first)
    assert all(annotations.get(p, NUM_SAMPLES) == 6 for p in model.parameters())

    norm = clip_grad_norm_(model.parameters(), 0.1)
    torch.testing.assert_close(statistics(model), [(0.1 / norm) ** 2 * value for value in first], rtol=1e-4, atol=0)
    optimizer.step()
    state = [optimizer.state[p] for p in model.parameters()]
    assert all(entry["num_statistics"] == 3 for entry in state)


@pytest.mark.parametrize(
    ("cls", "preconditioner"),
    [(TGAdamW, "mean_square"), (TGLaProp, "variance"), (TGRMSProp, "squared_mean")],
)
def test_trains_a_model(cls, preconditioner, model):
    inputs = torch.randn(32, 4, dtype=torch.float64)
    targets = inputs[:, :2].sign()
    optimizer = cls(model.parameters(), lr=0.02, preconditioner=preconditioner)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# -- another provider


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # BackPACK hooks the first layer, too
@every_optimizer
def test_statistics_of_backpack(cls):
    """BackPACK assigns ``p.sum_grad_squared``: the sum over samples, without a count."""
    backpack = pytest.importorskip("backpack")
    annotations.expose()
    model = backpack.extend(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double())
    loss = backpack.extend(nn.CrossEntropyLoss())
    inputs, targets = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    optimizer = cls(model.parameters(), lr=0.1)
    references = [REFERENCES[cls](p.detach(), lr=0.1) for p in model.parameters()]
    for _ in range(3):
        expected = [torch.zeros_like(p) for p in model.parameters()]
        for row, target in zip(inputs, targets, strict=True):
            value = nn.functional.cross_entropy(model(row[None]), target[None]) / 8
            for total, grad in zip(expected, torch.autograd.grad(value, list(model.parameters())), strict=True):
                total += grad**2
        optimizer.zero_grad()
        with backpack.backpack(backpack.extensions.SumGradSquared()):
            loss(model(inputs), targets).backward()
        for p, reference, square in zip(model.parameters(), references, expected, strict=True):
            torch.testing.assert_close(annotations.get(p, SUM_GRAD_SQUARED), square, rtol=1e-4, atol=0)
            reference.step(p.grad, square)
        optimizer.step()
        assert largest_difference(model.parameters(), [reference.theta for reference in references]) < 1e-12


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (TGAdamW, {}),
        (TGAdamW, {"graft": False, "betas": (0.8, 0.95)}),
        (TGLaProp, {}),
        (TGLaProp, {"graft": False, "betas": (0.9, 0.99, 0.8, 0.95)}),
        (TGRMSProp, {}),
        (TGRMSProp, {"graft": False, "betas": (0.9, 0.8)}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_forerunners_optimizers(cls, options):
    """The package truegrad takes the same steps; with weight decay it decays N tensors N times in each."""
    truegrad = pytest.importorskip("truegrad.optim")
    for weight_decay in (0.0, 0.5):
        ours, theirs = make_params([(4, 3), (5,)]), make_params([(4, 3), (5,)])
        optimizer = cls(ours, lr=0.01, weight_decay=weight_decay, **options)
        forerunner = getattr(truegrad, cls.__name__)(theirs, lr=0.01, weight_decay=weight_decay, **options)
        for seed in range(20):
            set_gradients(ours, seed)
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad.clone()
                annotations.publish(q, mean_square(p), 1)  # it reads p.sum_grad_squared as it stands
            annotations.expose()
            optimizer.step()
            forerunner.step()
        difference = largest_difference(ours, theirs)
        assert difference > 0.01 if weight_decay else difference < 1e-11
