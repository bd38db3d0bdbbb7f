"""Chains of modules against every optimizer of ``torch.optim``, over all of its flags."""

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import nn

from graphopt import _compat
from graphopt.errors import UnsupportedError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts

NUM_STEPS = 50
LR = 0.02


class Case(NamedTuple):
    """Options of one of torch's optimizers, and the chain that equals it."""

    options: dict
    chain: object  # called with the learning rate
    lr: float = LR


def decayed(module, decay=0.1):
    """L2 penalty."""
    return lambda lr: [m.WeightDecay(decay), module(), m.LR(lr)]


def decoupled(module, decay=0.1):
    return lambda lr: [module(), m.WeightDecay(decay), m.LR(lr)]


def plain(module):
    return lambda lr: [module(), m.LR(lr)]


def owning(module, **options):
    """Of modules that multiply by the learning rate themselves."""
    return lambda lr: [module(lr, **options)]


BETAS = {"betas": (0.8, 0.95)}
OWN_BETAS = {"beta1": 0.8, "beta2": 0.95}

TABLE = {
    "ASGD": [
        Case({}, owning(m.ASGD)),
        Case({"lambd": 0.01, "alpha": 0.6, "t0": 10}, owning(m.ASGD, lambd=0.01, alpha=0.6, t0=10)),
        Case({"weight_decay": 0.1}, lambda lr: [m.WeightDecay(0.1), m.ASGD(lr)]),
    ],
    "Adadelta": [
        Case({}, plain(m.Adadelta), 1.0),
        Case({"rho": 0.8, "eps": 1e-4, "weight_decay": 0.1}, decayed(lambda: m.Adadelta(0.8, 1e-4)), 0.5),
    ],
    "Adafactor": [
        Case({}, owning(m.Adafactor)),
        Case(
            {"beta2_decay": -0.6, "eps": (1e-5, 0.5), "d": 1.5, "weight_decay": 0.1},
            owning(m.Adafactor, beta2_decay=-0.6, eps1=1e-5, eps2=0.5, d=1.5, weight_decay=0.1),
            0.3,
        ),
    ],
    "Adagrad": [
        Case({}, plain(m.Adagrad)),
        Case({"lr_decay": 0.1, "eps": 1e-3}, plain(lambda: m.Adagrad(0.1, eps=1e-3))),
        Case(
            {"initial_accumulator_value": 1.0, "weight_decay": 0.1},
            decayed(lambda: m.Adagrad(initial_accumulator_value=1.0)),
        ),
    ],
    "Adam": [
        Case({}, plain(m.Adam)),
        Case({**BETAS, "eps": 0.1}, plain(lambda: m.Adam(**OWN_BETAS, eps=0.1))),
        Case({"amsgrad": True, "weight_decay": 0.1, **BETAS}, decayed(lambda: m.Adam(amsgrad=True, **OWN_BETAS))),
        Case({"decoupled_weight_decay": True, "weight_decay": 0.1}, decoupled(m.Adam)),
    ],
    "AdamW": [
        Case({}, decoupled(m.Adam, 0.01)),
        Case({"amsgrad": True, "weight_decay": 0.1, **BETAS}, decoupled(lambda: m.Adam(amsgrad=True, **OWN_BETAS))),
    ],
    "Adamax": [
        Case({}, plain(m.Adamax)),
        Case({**BETAS, "eps": 0.1, "weight_decay": 0.1}, decayed(lambda: m.Adamax(**OWN_BETAS, eps=0.1))),
    ],
    "LBFGS": [
        Case(
            {"max_iter": 10, "max_eval": 100, "tolerance_grad": 0.0, "tolerance_change": 0.0, "history_size": 3},
            plain(lambda: m.LBFGS(3)),
            0.5,
        ),
        Case({"max_iter": 1}, plain(lambda: m.LBFGS(100)), 0.5),
    ],
    "Muon": [
        Case({}, decoupled(m.Muon)),
        Case(
            {"nesterov": False, "momentum": 0.8, "ns_steps": 3, "weight_decay": 0.0},
            plain(lambda: m.Muon(0.8, nesterov=False, ns_steps=3)),
        ),
        Case(
            {"adjust_lr_fn": "match_rms_adamw", "ns_coefficients": (3.0, -4.0, 2.0)},
            decoupled(lambda: m.Muon(adjust_lr_fn="match_rms_adamw", ns_coefficients=(3.0, -4.0, 2.0))),
        ),
        Case(
            {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
            lambda lr: [m.NAG(0.95, lerp=True), m.Orthogonalize(adjust_lr=True), m.LR(lr)],
        ),
        Case({}, lambda lr: [m.NAG(0.95, lerp=True), m.Orthogonalize(), *adjusted(), m.WeightDecay(0.1), m.LR(lr)]),
    ],
    "NAdam": [
        Case({}, plain(m.NAdam)),
        Case(
            {**BETAS, "eps": 0.1, "momentum_decay": 0.03, "weight_decay": 0.1},
            decayed(lambda: m.NAdam(**OWN_BETAS, eps=0.1, momentum_decay=0.03)),
        ),
        Case({"decoupled_weight_decay": True, "weight_decay": 0.1}, decoupled(m.NAdam)),
    ],
    "RAdam": [
        Case({}, plain(m.RAdam)),
        Case({**BETAS, "eps": 0.1, "weight_decay": 0.1}, decayed(lambda: m.RAdam(**OWN_BETAS, eps=0.1))),
        Case({"decoupled_weight_decay": True, "weight_decay": 0.1}, decoupled(m.RAdam)),
    ],
    "RMSprop": [
        Case({}, plain(m.RMSprop)),
        Case(
            {"alpha": 0.9, "eps": 0.1, "centered": True, "weight_decay": 0.1},
            decayed(lambda: m.RMSprop(0.9, 0.1, centered=True)),
        ),
        Case({"momentum": 0.9}, lambda lr: [m.RMSprop(), m.HeavyBall(0.9), m.LR(lr)]),
        Case(
            {"momentum": 0.8, "centered": True, "weight_decay": 0.1},
            lambda lr: [m.WeightDecay(0.1), m.RMSprop(centered=True), m.HeavyBall(0.8), m.LR(lr)],
        ),
    ],
    "Rprop": [
        Case({}, lambda lr: [m.Rprop(alpha=lr, backtrack=False)]),
        Case(
            {"etas": (0.9, 2.0), "step_sizes": (1e-3, 0.05)},
            lambda lr: [m.Rprop(2.0, 0.9, 1e-3, 0.05, alpha=lr, backtrack=False)],
        ),
    ],
    "SGD": [
        Case({}, lambda lr: [m.LR(lr)]),
        Case({"weight_decay": 0.1}, lambda lr: [m.WeightDecay(0.1), m.LR(lr)]),
        Case({"momentum": 0.9}, plain(lambda: m.HeavyBall(0.9))),
        Case({"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, decayed(lambda: m.HeavyBall(0.9, 0.3))),
        Case({"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, decayed(lambda: m.NAG(0.9))),
    ],
    "SparseAdam": [],
}
# Without rows, for a reason.
EXCEPTIONS = {"SparseAdam": "it takes sparse gradients alone, which modules refuse (below)"}
# Torch's own do not take what the flag means.
NO_COMPLEX = {"Adafactor", "Muon"}
NO_FOREACH = {"LBFGS", "Muon"}
NO_MAXIMIZE = {"LBFGS", "Muon"}
NO_DIFFERENTIABLE = {"Adafactor", "LBFGS", "Muon"}
# Those that write to what autograd has saved, or cut the graph, when they make several steps.
BREAKS_DIFFERENTIABLE = {"Adamax", "Rprop", "amsgrad", "centered", "momentum"}
NO_DIFFERENCES = {"LBFGS", "Muon"}  # of ours: one needs a closure, the other rounds to bfloat16
IGNORES_SCHEDULERS = {"Rprop"}  # torch's reads the rate in the first step only


def cases(without=(), last_only=False):
    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}-{','.join(case.options) or 'defaults'}-{index}")
            for name, cases in TABLE.items()
            for index, case in enumerate(cases)
            if not {name, *case.options} & set(without) and (not last_only or case is cases[-1])
        ],
    )


def adjusted():
    return [m.MuonAdjustLR(adjust_lr_fn="original")]


@pytest.fixture(autouse=True)
def _numbers_in_float64():
    """Torch keeps momentum products and step sizes of NAdam and ASGD in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_params(name, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 3), (2, 5)] if name == "Muon" else [(4, 3), (2, 3, 2), (3,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def set_gradients(params, step, sign=1):
    """Those of a problem with a minimum, and some noise."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = sign * (p.detach() - 0.5 + 0.3 * noise)


def train(optimizer, params, after=lambda: None, num_steps=NUM_STEPS, sign=1):
    """So many evaluations of gradients: LBFGS of torch makes several in a step."""
    steps = iter(range(num_steps))

    def closure():
        set_gradients(params, next(steps), sign)
        return torch.zeros(())

    for _ in range(num_steps // optimizer.param_groups[0].get("max_iter", 1)):
        optimizer.step(closure)
        after()
    assert next(steps, None) is None


def assert_equal(params, others, tolerance=1e-12):
    for p, q in zip(params, others, strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@accepts("O+torch")
def test_every_optimizer_of_torch_has_rows():
    optimizers = {
        name
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    assert set(TABLE) == optimizers
    assert {name for name, cases in TABLE.items() if not cases} == set(EXCEPTIONS)


def test_every_option_of_torch_is_in_a_row():
    elsewhere = {"self", "params", "lr", "foreach", "fused", "maximize", "capturable", "differentiable"}
    elsewhere.add("line_search_fn")  # of LBFGS; line searches are modules, which search in their own way
    for name, cases in TABLE.items():
        if name in EXCEPTIONS:
            continue
        options = set(inspect.signature(getattr(torch.optim, name)).parameters) - elsewhere - {"eps"}
        assert options <= set().union(*[case.options for case in cases]), name


def test_sparse_gradients_are_refused():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(UnsupportedError, match=r"its gradient is sparse .* torch\.optim\.SparseAdam"):
        Modular([p], m.Adam(), m.LR(0.1)).step()


@accepts("O1", "O6", "O9", "O11", "O+torch", "M1", "M2")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {}], ids=str)
@cases()
def test_equals_torch(name, case, way):
    params, others = make_params(name), make_params(name)
    reference_way = {} if name in NO_FOREACH else way
    train(Modular(params, case.chain(case.lr), **way), params)
    train(getattr(torch.optim, name)(others, lr=case.lr, **case.options, **reference_way), others)
    # LBFGS divides by changes of gradients, which makes rounding errors larger.
    assert_equal(params, others, 1e-8 if name == "LBFGS" else 1e-12)


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@cases(last_only=True)
def test_maximize(name, case, way):
    """For torch's own that has no such option, negative gradients."""
    params, others = make_params(name), make_params(name)
    train(Modular(params, case.chain(case.lr), maximize=True, **way), params, num_steps=8)
    flags = {} if name in NO_MAXIMIZE else {"maximize": True}
    reference = getattr(torch.optim, name)(others, lr=case.lr, **case.options, **flags)
    train(reference, others, num_steps=8, sign=1 if flags else -1)
    assert_equal(params, others)


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@cases(without=NO_COMPLEX, last_only=True)
def test_complex_parameters(name, case, way):
    params, others = make_params(name, torch.complex128), make_params(name, torch.complex128)
    train(Modular(params, case.chain(case.lr), **way), params, num_steps=8)
    train(getattr(torch.optim, name)(others, lr=case.lr, **case.options), others, num_steps=8)
    assert_equal(params, others)


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@cases(last_only=True)
def test_lr_is_a_tensor(name, case, way):
    params, others = make_params(name), make_params(name)
    train(Modular(params, case.chain(torch.tensor(case.lr)), **way), params, num_steps=8)
    train(getattr(torch.optim, name)(others, lr=case.lr, **case.options), others, num_steps=8)
    assert_equal(params, others)


@cases(last_only=True)
def test_capturable(name, case):
    """Torch's own refuse it on a CPU; the numbers are the same."""
    params, others = make_params(name), make_params(name)
    train(Modular(params, case.chain(case.lr), capturable=True), params, num_steps=8)
    train(getattr(torch.optim, name)(others, lr=case.lr, **case.options), others, num_steps=8)
    assert_equal(params, others)


@accepts("R1")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@cases(without=IGNORES_SCHEDULERS, last_only=True)
def test_lr_scheduler(name, case, way):
    results = []
    for chain in (case.chain(case.lr), None):
        params = make_params(name)
        if chain is None:
            optimizer = getattr(torch.optim, name)(params, lr=case.lr, **case.options)
        else:
            optimizer = Modular(params, chain, **way)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
        train(optimizer, params, scheduler.step, num_steps=10)
        results.append(params)
    assert_equal(*results)
    untouched = make_params(name)
    train(getattr(torch.optim, name)(untouched, lr=case.lr, **case.options), untouched, num_steps=10)
    assert any(not torch.allclose(p, q) for p, q in zip(untouched, results[0], strict=True))


def run_differentiable(optimizer_of, grads):
    """A loss behind one step for each gradient."""
    p = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.5, -0.7]], requires_grad=True).clone()
    p.grad = grads[0]
    optimizer = optimizer_of([p])
    for grad in grads:
        p.grad = grad
        optimizer.step()
    return (p**3).sum()


def make_grads():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, generator=generator).requires_grad_() for _ in range(3)]


@cases(without=NO_DIFFERENCES)
def test_differentiable(name, case):
    """The derivative of a loss by all gradients before it, against differences of torch's ordinary optimizer."""
    grads = make_grads()
    loss = run_differentiable(lambda ps: Modular(ps, case.chain(case.lr), differentiable=True), grads)
    derivatives = torch.autograd.grad(loss, grads, allow_unused=True, materialize_grads=True)

    def reference(step, index, delta):
        moved = [grad.detach().clone() for grad in grads]
        moved[step].view(-1)[index] += delta
        with torch.no_grad():
            return run_differentiable(lambda ps: getattr(torch.optim, name)(ps, lr=case.lr, **case.options), moved)

    for step, index in [(0, 0), (0, 4), (1, 1), (2, 5)]:
        difference = reference(step, index, 1e-5) - reference(step, index, -1e-5)
        torch.testing.assert_close(derivatives[step].view(-1)[index], difference / 2e-5, rtol=1e-6, atol=1e-7)


@cases(without=NO_DIFFERENTIABLE | BREAKS_DIFFERENTIABLE)
def test_differentiable_equals_torch(name, case):
    results = []
    for optimizer_of in (
        lambda ps: Modular(ps, case.chain(case.lr), differentiable=True),
        lambda ps: getattr(torch.optim, name)(ps, lr=case.lr, **case.options, differentiable=True),
    ):
        grads = make_grads()
        results.append(torch.autograd.grad(run_differentiable(optimizer_of, grads), grads))
    assert_equal(*results)


FUSED = [
    *[pytest.param(name, case, id=f"{name}-{index}") for name in ("Adam", "AdamW", "Adagrad", "SGD")
      for index, case in enumerate(TABLE[name]) if "dampening" not in case.options],
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "case"), FUSED)
def test_fused_is_the_kernel_of_torch(name, case, dtype, monkeypatch):
    """Nothing is compiled."""
    monkeypatch.setattr(_compat, "compile_kernel", None)
    params, others = make_params(name, dtype), make_params(name, dtype)
    for flags in ({}, {"maximize": True}):
        train(Modular(params, case.chain(case.lr), fused=True, **flags), params, num_steps=8)
        reference = getattr(torch.optim, name)(others, lr=case.lr, **case.options, fused=True, **flags)
        train(reference, others, num_steps=8)
    assert_equal(params, others, 1e-5 if dtype == torch.float32 else 1e-12)
