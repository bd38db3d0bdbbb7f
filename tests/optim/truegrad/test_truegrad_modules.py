"""The TrueGrad modules against loops over samples, against the TG optimizers, in chains, and on transformed models."""

import copy
import io
import re

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import graphopt
from graphopt import annotations
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED
from graphopt.errors import MissingAnnotation, OptionError, StaleAnnotation
from graphopt.optim import Modular, TGAdamW, TGLaProp, TGRMSProp, m
from graphopt.optim.core.transform import Step, apply_updates, chain
from tests.optim.catalogue import accepts
from tests.optim.training import largest_difference, make_params, set_gradients, snapshot, train

MAKE = {
    "Adam": m.TrueGradAdam,
    "amsgrad": lambda **o: m.TrueGradAdam(amsgrad=True, **o),
    "LaProp": m.TrueGradLaProp,
    "RMSprop": m.TrueGradRMSprop,
    "RMSprop of inner": lambda **o: m.TrueGradRMSprop(inner=m.ClipValue(0.3), **o),
    "Shampoo": m.TrueGradShampoo,
    "Shampoo of inner": lambda **o: m.TrueGradShampoo(exponent=0.5, inner=m.ClipValue(0.3), **o),
}
every_module = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
PRECONDITIONERS = ["mean_square", "variance", "squared_mean"]


# -- the numbers: a loop over samples and elements


def samples_of(shape, seed, num=5):
    """Per-sample gradients of a mean loss, (num, *shape)."""
    return torch.randn((num, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def give(p, per_sample):
    """What backward of the mean over samples leaves behind."""
    annotations.clear([p])
    contributions = per_sample / len(per_sample)
    p.grad = contributions.sum(0)
    annotations.publish(p, (contributions**2).sum(0), len(per_sample))


def squares(per_sample, preconditioner):
    """What is averaged, element by element, from the samples themselves."""
    flat = per_sample.reshape(len(per_sample), -1)
    out = []
    for column in flat.unbind(1):
        values = column.tolist()
        mean = sum(values) / len(values)
        out.append(
            {
                "mean_square": sum(v * v for v in values) / len(values),
                "variance": sum((v - mean) ** 2 for v in values) / len(values),
                "squared_mean": mean * mean,
            }[preconditioner]
        )
    return torch.tensor(out, dtype=torch.float64).reshape(per_sample.shape[1:])


def adam(sequence, preconditioner, b1=0.9, b2=0.999, alpha=1.0, debiased=True, amsgrad=False):
    moment, square, top = 0.0, 0.0, torch.zeros(())
    for t, per_sample in enumerate(sequence, 1):
        moment = b1 * moment + (1 - b1) * per_sample.mean(0)
        square = b2 * square + (1 - b2) * squares(per_sample, preconditioner)
        top = torch.maximum(top, square) if amsgrad else square
        c1, c2 = (1 - b1**t, 1 - b2**t) if debiased else (1, 1)
        yield alpha * (moment / c1) / ((top / c2) ** 0.5 + 1e-12)


def laprop(sequence, preconditioner, b1=0.9, b2=0.99, alpha=1.0, debiased=True):
    moment, square = 0.0, 0.0
    for t, per_sample in enumerate(sequence, 1):
        square = b2 * square + (1 - b2) * squares(per_sample, preconditioner)
        c1, c2 = (1 - b1**t, 1 - b2**t) if debiased else (1, 1)
        moment = b1 * moment + (1 - b1) * per_sample.mean(0) / ((square / c2) ** 0.5 + 1e-12)
        yield alpha * moment / c1


def rmsprop(sequence, preconditioner, beta=0.99, debiased=True):
    square = 0.0
    for t, per_sample in enumerate(sequence, 1):
        square = beta * square + (1 - beta) * squares(per_sample, preconditioner)
        yield per_sample.mean(0) / ((square / (1 - beta**t if debiased else 1)) ** 0.5 + 1e-12)


def shampoo(sequence, preconditioner, beta=0.99, debiased=True, exponent=None):
    """With the factors as matrices, of which the diagonals are taken."""
    factors, total = None, 0.0
    for t, per_sample in enumerate(sequence, 1):
        mean = per_sample.mean(0)
        if preconditioner == "squared_mean":
            per_sample = mean[None]
        elif preconditioner == "variance":
            per_sample = per_sample - mean
        shape = [length for length in mean.shape if length != 1] or [1]
        numel, d, news = mean.numel(), len(shape), []
        for axis in range(d):
            moved = per_sample.reshape(len(per_sample), *shape).movedim(1 + axis, 1)
            matrices = moved.reshape(len(per_sample), shape[axis], numel // shape[axis])
            full = sum(matrix @ matrix.T for matrix in matrices) / len(per_sample)
            news.append(full.diagonal() / (numel / shape[axis]))
        factors = [beta * (f if factors else 0) + (1 - beta) * n for f, n in zip(factors or news, news, strict=True)]
        total = beta * total + (1 - beta) * news[0].mean()
        correction = 1 - beta**t if debiased else 1
        p = exponent or 1 / (2 * d)
        divisor = (total / correction) ** (0.5 - d * p)
        for axis, factor in enumerate(factors):
            divisor = divisor * (factor / correction).reshape([-1 if a == axis else 1 for a in range(d)]) ** p
        yield mean / (divisor.reshape(mean.shape) + 1e-12)


REFERENCES = [
    (m.TrueGradAdam, adam, {}, {}),
    (m.TrueGradAdam, adam, {"beta1": 0.5, "beta2": 0.8, "alpha": 2.0}, {"b1": 0.5, "b2": 0.8, "alpha": 2.0}),
    (m.TrueGradAdam, adam, {"debiased": False}, {"debiased": False}),
    (m.TrueGradAdam, adam, {"amsgrad": True, "beta2": 0.6}, {"amsgrad": True, "b2": 0.6}),
    (m.TrueGradLaProp, laprop, {}, {}),
    (m.TrueGradLaProp, laprop, {"debiased": False, "alpha": 3.0}, {"debiased": False, "alpha": 3.0}),
    (m.TrueGradRMSprop, rmsprop, {}, {}),
    (m.TrueGradRMSprop, rmsprop, {"debiased": False}, {"debiased": False}),
    (m.TrueGradShampoo, shampoo, {}, {}),
    (m.TrueGradShampoo, shampoo, {"exponent": 0.5, "beta": 0.7}, {"exponent": 0.5, "beta": 0.7}),
    (m.TrueGradShampoo, shampoo, {"debiased": False}, {"debiased": False}),
]


@accepts("T5", "T9", "T10", "T+")
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize(("module", "reference", "options", "named"), REFERENCES)
def test_equals_a_loop_over_samples(module, reference, options, named, preconditioner):
    shapes = [(), (3,), (4, 3), (2, 3, 1, 2)]
    params = make_params(shapes)
    optimizer = Modular(params, module(preconditioner=preconditioner, **options), m.LR(0.1))
    sequences = [[samples_of(shape, 10 * t + k) for t in range(4)] for k, shape in enumerate(shapes)]
    expected = [p.detach().clone() for p in params]
    for k, sequence in enumerate(sequences):
        for update in reference(sequence, preconditioner, **named):
            expected[k] = expected[k] - 0.1 * update
    for t in range(4):
        for p, sequence in zip(params, sequences, strict=True):
            give(p, sequence[t])
        optimizer.step()
    assert largest_difference(params, expected) < 1e-9 * max(1.0, max(float(e.abs().max()) for e in expected))


TG = [
    (TGAdamW, m.TrueGradAdam, {"betas": (0.9, 0.99)}, {"beta1": 0.9, "beta2": 0.99}),
    (TGLaProp, m.TrueGradLaProp, {"betas": (0.8, 0.99)}, {"beta1": 0.8, "beta2": 0.99}),
    (TGRMSProp, m.TrueGradRMSprop, {"betas": 0.9}, {"smoothing": 0.9}),
]


@accepts("T5", "T9", "T10")
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize(("tg", "module", "theirs", "ours"), TG, ids=["Adam", "LaProp", "RMSprop"])
def test_equals_the_tg_optimizers(tg, module, theirs, ours, preconditioner):
    left, right = make_params(), make_params()
    usual = tg(left, lr=0.01, graft=False, weight_decay=0.1, preconditioner=preconditioner, **theirs)
    chained = Modular(
        right, module(preconditioner=preconditioner, **ours), m.WeightDecay(0.1), m.LR(0.01), maximize=False
    )
    train(usual, left, range(20))
    train(chained, right, range(20))
    assert largest_difference(left, right) < 1e-9
    names = {name for name in usual.state[left[-2]] if name.startswith("exp_avg")}
    assert {name.split(".")[-1] for name in chained.state[right[-2]]} == names | {"step"}


@accepts("T5")
def test_adam_where_all_samples_agree():
    left, right = make_params(), make_params()
    adam, true = torch.optim.Adam(left, lr=0.01), Modular(right, m.TrueGradAdam(eps=1e-8), m.LR(0.01))
    for seed in range(10):
        set_gradients(right, seed, factor=1.0)
        for p, q in zip(left, right, strict=True):
            p.grad = q.grad.clone()
        adam.step()
        true.step()
    assert largest_difference(left, right) < 1e-9


def test_the_preconditioner_can_differ_between_groups():
    first, second, alone = (make_params([(4, 3)])[0] for _ in range(3))
    groups = [{"params": [first]}, {"params": [second], "preconditioner": "variance"}]
    optimizer = Modular(groups, m.TrueGradAdam(), m.LR(0.1))
    train(optimizer, [first], range(3))
    train(Modular([alone], m.TrueGradAdam(preconditioner="variance"), m.LR(0.1)), [alone], range(3))
    first.grad = None
    train(optimizer, [second], range(3))
    assert largest_difference([second], [alone]) < 1e-12
    assert largest_difference([second], [first]) > 1e-3


@accepts("T+")
@pytest.mark.parametrize("exponent", [None, 0.1, 0.5])
def test_shampoo_depends_neither_on_scale_nor_on_size(exponent):
    """A constant statistic gives what RMSprop gives, whatever the shape; a loss scale changes nothing."""
    for shape in [(), (5,), (4, 6), (1, 3, 1, 2)]:
        (p,), (q,), (r,) = make_params([shape]), make_params([shape]), make_params([shape])
        optimizers = [
            Modular([p], m.TrueGradShampoo(exponent=exponent), m.LR(0.1)),
            Modular([q], m.TrueGradRMSprop(), m.LR(0.1)),
            Modular([r], m.TrueGradShampoo(exponent=exponent), m.LR(0.1)),
        ]
        for t in range(3):
            grad = samples_of(shape, t, num=1)[0]
            for param, scale in ((p, 1.0), (q, 1.0), (r, 1000.0)):
                annotations.clear([param])
                param.grad = scale * grad
                annotations.publish(param, torch.full(shape, 0.7 + t, dtype=torch.float64) * scale**2, 4)
            for optimizer in optimizers:
                optimizer.step()
        assert largest_difference([p], [q]) < 1e-9
        assert largest_difference([p], [r]) < 1e-9


@accepts("T+")
def test_shampoo_with_power_a_half_is_exact_for_products():
    (p,), (q,) = make_params([(4, 6)]), make_params([(4, 6)])
    optimizers = (
        Modular([p], m.TrueGradShampoo(exponent=0.5), m.LR(0.1)),
        Modular([q], m.TrueGradRMSprop(), m.LR(0.1)),
    )
    product = torch.outer(torch.arange(1.0, 5), torch.arange(2.0, 8)).double()
    for param, optimizer in zip((p, q), optimizers, strict=True):
        param.grad = samples_of((4, 6), 0, num=1)[0]
        annotations.publish(param, product, 4)
        optimizer.step()
    assert largest_difference([p], [q]) < 1e-12


@pytest.mark.parametrize("exponent", [None, 0.5])
def test_shampoo_of_zeros_is_zero(exponent):
    params = make_params([(4, 3), (0, 4), (2,)])
    before = snapshot(params)
    optimizer = Modular(params, m.TrueGradShampoo(exponent=exponent), m.LR(0.1))
    for p in params:
        p.grad = torch.zeros_like(p)
        annotations.publish(p, torch.zeros_like(p), 4)
    optimizer.step()
    assert largest_difference(params, before) == 0
    assert all(bool(state["truegradshampoo.exp_avg_axis_sq"].isfinite().all()) for state in optimizer.state.values())


# -- in chains


CHAINS = {
    "all": lambda make: [
        m.ClipValue(0.5), make(), m.NormalizeByEMA(), m.WeightDecay(0.1), m.LR(0.05)
    ],
    "alone": lambda make: [make()],
}  # fmt: skip


@every_module
@pytest.mark.parametrize("chained", CHAINS.values(), ids=CHAINS)
def test_one_by_one_foreach_and_functional_agree(make, chained):
    runs = []
    for way in ({"foreach": False}, {"foreach": True}):
        params = make_params()
        train(Modular(params, *chained(make), **way), params)
        runs.append(params)
    params = make_params()
    values = snapshot(params)
    transform = chain(*chained(make))
    state = transform.init(values)
    for seed in range(5):
        set_gradients(params, seed)
        statistics = [annotations.get(p, SUM_GRAD_SQUARED) for p in params]
        step = Step(annotations={SUM_GRAD_SQUARED: statistics, NUM_SAMPLES: 7})
        updates, state = transform.update([p.grad for p in params], state, values, step=step)
        values = apply_updates(values, updates)
    assert largest_difference(runs[0], runs[1]) < 1e-12
    assert largest_difference(runs[0], values) < 1e-12


@every_module
def test_low_precision_parameters_have_float32_state(make):
    wide, narrow = make_params(dtype=torch.float32), make_params(dtype=torch.bfloat16)
    for p, q in zip(wide, narrow, strict=True):
        p.data.copy_(q.data)
    optimizers = Modular(wide, make(), m.LR(0.05)), Modular(narrow, make(), m.LR(0.05))
    for seed in range(3):
        set_gradients(narrow, seed)
        annotations.clear(wide)
        for p, q in zip(wide, narrow, strict=True):
            p.grad = q.grad.float()
            annotations.publish(p, annotations.get(q, SUM_GRAD_SQUARED), 7)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(wide, narrow, strict=True):
        states = [optimizer.state[param] for optimizer, param in zip(optimizers, (p, q), strict=True)]
        for name in states[0]:
            torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-6)


def test_functional_is_mapped_over_an_ensemble():
    transform = chain(m.TrueGradAdam(), m.LR(0.1))
    weights, grads = samples_of((3,), 0, num=4), samples_of((3,), 1, num=4)

    def step(weight, grad):
        given = Step(annotations={SUM_GRAD_SQUARED: [grad**2], NUM_SAMPLES: torch.tensor(7.0)})
        updates, state = transform.update([grad], transform.init([weight]), [weight], step=given)
        return apply_updates([weight], updates)[0], state.states[0]

    together, states = torch.func.vmap(step)(weights, grads)
    for i in range(4):
        alone, state = step(weights[i], grads[i])
        torch.testing.assert_close(together[i], alone)
        torch.testing.assert_close(
            states["truegradadam.exp_avg_per_sample_sq"][i], state["truegradadam.exp_avg_per_sample_sq"]
        )


@every_module
def test_state_is_saved_as_torch_saves_it(make):
    params, others = make_params(), make_params()
    optimizer, other = Modular(params, make(), m.LR(0.05)), Modular(others, make(), m.LR(0.05))
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    copied = copy.deepcopy(optimizer)
    for opt, ps in ((optimizer, params), (other, others), (copied, copied.param_groups[0]["params"])):
        train(opt, ps, range(3, 6))
    assert largest_difference(params, others) == 0
    assert largest_difference(params, copied.param_groups[0]["params"]) == 0


@every_module
def test_distributed_checkpoint_before_the_first_step(make):
    """It makes a step with zero gradients, for which there is no statistic."""
    model = nn.Linear(3, 2).double()
    before = snapshot(model.parameters())
    optimizer = Modular(model, make(), m.LR(0.1))
    saved = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, saved)
    assert largest_difference(model.parameters(), before) == 0
    train(optimizer, list(model.parameters()), range(2))


# -- errors, before anything has changed


@every_module
def test_a_missing_statistic_names_the_pass_and_changes_nothing(make):
    named = [("encoder.weight", make_params()[4]), ("encoder.bias", make_params()[2])]
    params = [p for _, p in named]
    optimizer = Modular(named, m.ClipValue(0.1), make(), m.LR(0.1))
    train(optimizer, params, [0])
    set_gradients(params, 1)
    annotations.clear(params[:1])
    before = snapshot(params), copy.deepcopy(optimizer.state_dict()["state"])
    expected = (
        r"module 2 of 3, TrueGrad\w+ needs sum_grad_squared .*1 of 2 .*encoder\.weight.*the pass TrueGrad: graphopt\.tr"
    )
    with pytest.raises(MissingAnnotation, match=re.compile(expected, re.DOTALL)):
        optimizer.step()
    assert largest_difference(params, before[0]) == 0
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)


@every_module
def test_functional_without_a_statistic(make):
    transform = chain(make())
    params = [torch.ones(3)]
    with pytest.raises(MissingAnnotation, match=r"step=Step.*SUM_GRAD_SQUARED.*the pass TrueGrad"):
        transform.update([torch.ones(3)], transform.init(params), params)


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (lambda p: annotations.publish(p, torch.zeros(3), 7), OptionError, "sum_grad_squared has shape .3,."),
        (lambda p: annotations.publish(p, torch.ones_like(p), 1), OptionError, "at least 2 samples and found 1"),
        (lambda p: p.grad.add_(1.0), StaleAnnotation, "grad"),
    ],
    ids=["shape", "one sample", "stale"],
)
def test_a_statistic_that_cannot_be_used(spoil, error, match):
    (p,) = make_params([(4, 3)])
    optimizer = Modular([("weight", p)], m.TrueGradAdam(preconditioner="variance"), m.LR(0.1))
    train(optimizer, [p], [0])
    set_gradients([p], 1)
    spoil(p)
    before = snapshot([p])
    with pytest.raises(error, match=match):
        optimizer.step()
    assert largest_difference([p], before) == 0
    assert optimizer.state[p]["step"] == 1


@every_module
def test_options_are_checked(make):
    with pytest.raises(OptionError, match="preconditioner='mean'; expected one of 'mean_square', 'variance'"):
        make(preconditioner="mean")
    with pytest.raises(OptionError, match="eps=-1"):
        make(eps=-1)


def test_a_gradient_of_zero_needs_no_statistic():
    (p,) = make_params([(4, 3)])
    optimizer = Modular([p], m.TrueGradAdam(), m.LR(0.1))
    train(optimizer, [p], range(2))
    square = optimizer.state[p]["truegradadam.exp_avg_per_sample_sq"].clone()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["truegradadam.exp_avg_per_sample_sq"], 0.999 * square)


# -- statistics of real models


@pytest.fixture(scope="module")
def model():
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    yield graphopt.transform(module, compiler="eager")
    torch._dynamo.reset()


INPUTS = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
RULES = ["Adam", "LaProp", "RMSprop", "Shampoo"]


def loss_of(model, inputs):
    return model(inputs).sin().square().sum(1).mean()


def train_model(model, module, *, micro_batches=1, scaler=None, steps=3):
    """Train from the same start; returns the parameters."""
    start = snapshot(model.parameters())
    optimizer = Modular(model.parameters(), m.ClipValue(10.0), module, m.WeightDecay(0.01), m.LR(0.05))
    for _ in range(steps):
        optimizer.zero_grad()
        for part in INPUTS.chunk(micro_batches):
            loss = loss_of(model, part) / micro_batches
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    optimizer.zero_grad()
    trained = snapshot(model.parameters())
    with torch.no_grad():
        for p, value in zip(model.parameters(), start, strict=True):
            p.copy_(value)
    return trained


def train_by_samples(model, module, steps=3):
    """The same with a backward pass for each sample, and the functional face."""
    params = snapshot(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    transform = chain(m.ClipValue(10.0), module, m.WeightDecay(0.01), m.LR(0.05))
    state = transform.init(params)
    for _ in range(steps):
        per_sample = []
        for sample in INPUTS:
            leaves = [p.clone().requires_grad_() for p in params]
            by_name = dict(zip([name.removeprefix("_orig_mod.") for name in names], leaves, strict=True))
            output = torch.func.functional_call(plain, by_name, (sample[None],))
            per_sample.append(torch.autograd.grad(output.sin().square().sum(), leaves))
        grads = [torch.stack(each).mean(0) for each in zip(*per_sample, strict=True)]
        statistics = [(torch.stack(each) / len(INPUTS)).square().sum(0) for each in zip(*per_sample, strict=True)]
        step = Step(annotations={SUM_GRAD_SQUARED: statistics, NUM_SAMPLES: len(INPUTS)})
        updates, state = transform.update(grads, state, params, step=step)
        params = apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", RULES)
def test_trains_a_transformed_model(name, model):
    expected = train_by_samples(model, MAKE[name]())
    assert largest_difference(train_model(model, MAKE[name]()), expected) < 1e-9
    assert largest_difference(train_model(model, MAKE[name](), micro_batches=2), expected) < 1e-9
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=2)
    assert largest_difference(train_model(model, MAKE[name](), scaler=scaler), expected) < 1e-9


def test_an_untransformed_model():
    plain = nn.Linear(4, 2)
    optimizer = Modular(plain, m.TrueGradAdam(), m.LR(0.1))
    plain(torch.ones(3, 4)).sum().backward()
    with pytest.raises(MissingAnnotation, match=r"(?s)'weight'.*graphopt\.transform"):
        optimizer.step()


def test_only_the_parameters_that_a_module_sees_need_a_statistic():
    params = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]
    optimizer = Modular(params, m.Split(lambda p: p.ndim == 2, m.TrueGradAdam(), m.Adam()), m.LR(0.1))
    set_gradients(params, 0)
    annotations.clear(params[1:])
    optimizer.step()
    assert not torch.equal(params[1], torch.ones(3))
    set_gradients(params, 1)
    annotations.clear(params[:1])
    before = snapshot(params)
    with pytest.raises(MissingAnnotation, match=r"TrueGradAdam needs sum_grad_squared of its parameters, but 1 of 1 "):
        optimizer.step()
    assert largest_difference(params, before) == 0
