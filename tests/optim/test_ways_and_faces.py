"""What holds for all public modules: ways of running, faces, dtypes, and odd shapes do not change the numbers."""

import copy
import inspect

import pytest
import torch
from torch import nn

from graphopt import annotations
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED
from graphopt.errors import OptionError
from graphopt.optim import Modular, Rule
from graphopt.optim.core.module import walk
from graphopt.optim.core.transform import Step, apply_updates, chain
from tests.optim.examples import (
    EXAMPLES,
    MATRICES_ONLY,
    NAMES,
    PUBLIC,
    RESIDUALS,
    WITHOUT_EXAMPLE,
    make,
    residuals_of,
    with_rate,
)
from tests.optim.training import set_gradients

NUM_STEPS = 3
every_module = pytest.mark.parametrize("name", NAMES)


def test_table_is_complete():
    """Every public module is run below, by its defaults or by an example."""
    assert not WITHOUT_EXAMPLE
    assert set(EXAMPLES) <= set(PUBLIC)
    assert {name: type(make(name)[-1]) for name in NAMES} == PUBLIC


def make_params(name, dtype=torch.float64, *, odd=False):
    """With ``odd``, matrices that are no contiguous piece of memory, of the same values."""
    shapes = [(4, 3), (2, 5)] if name in MATRICES_ONLY else [(4, 3), (), (0, 4), (3,), (2, 5)]
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    if odd:
        params = [p.t().contiguous().t() if p.dim() == 2 else p for p in params]
        assert not params[0].is_contiguous()
    return [nn.Parameter(p) for p in params]


def loss_of(params):
    return sum(((p - 0.3) ** 2 * (1.0 + i) + torch.sin(p)).sum() for i, p in enumerate(params)) + 10


def needs_closure(modules):
    return any(module.needs_closure for module in walk(modules))


def run(name, params, **options):
    """Steps of a chain in an optimizer."""
    torch.manual_seed(0)
    modules = make(name)
    optimizer = Modular(params, with_rate(modules, 0.01), **options)

    def closure(backward=True):
        loss = residuals_of(params) if name in RESIDUALS else loss_of(params)
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    for step in range(NUM_STEPS):
        set_gradients(params, step)
        optimizer.step(closure if needs_closure(modules) else None)
    return optimizer


def run_functional(name, params):
    """The same steps by pure functions."""
    torch.manual_seed(0)
    modules = make(name)
    transform = chain(with_rate(modules, 0.01))
    params = [p.detach() for p in params]
    state = transform.init(params)
    loss_fn = residuals_of if name in RESIDUALS else loss_of
    for step in range(NUM_STEPS):
        noted = [nn.Parameter(p) for p in params]
        set_gradients(noted, step)
        notes = {key: [annotations.get(p, key) for p in noted] for key in (SUM_GRAD_SQUARED, NUM_SAMPLES)}
        if needs_closure(modules):
            grads = torch.autograd.grad(loss_of(noted), noted)  # those of residuals do not look at it
        else:
            grads = [p.grad for p in noted]
        before = copy.deepcopy((params, state))
        updates, new_state = transform.update(list(grads), state, params, step=Step(loss_fn=loss_fn, annotations=notes))
        torch.testing.assert_close((params, state), before, rtol=0, atol=0)  # nothing is written to
        params, state = apply_updates(params, updates), new_state
    return params, state


def assert_equal(params, others, tolerance):
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)


@every_module
def test_ways_of_running_and_layouts_in_memory(name):
    """Beside scalars and empty tensors."""
    params = make_params(name)
    run(name, params, foreach=False)
    for way in ({"foreach": False}, {"foreach": True}):
        odd = make_params(name, odd=True)
        run(name, odd, **way)
        assert not odd[0].is_contiguous()
        assert_equal(params, odd, 1e-12)


NO_PURE_FUNCTION = {"DirectWeightDecay": "it writes to the parameters, and says so; see its own test"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_PURE_FUNCTION])
def test_pure_functions_are_the_optimizer_bit_for_bit(name):
    params = make_params(name)
    optimizer = run(name, params, foreach=False)
    news, state = run_functional(name, make_params(name))
    assert_equal(params, news, 0)
    for p, entry in zip(params, state.states, strict=True):
        stored = {key: value for key, value in optimizer.state[p].items() if key != "step"}
        if all(isinstance(module, Rule) for module in walk(make(name))):
            assert set(stored) == set(entry)
            for key, value in stored.items():
                torch.testing.assert_close(value, entry[key], rtol=0, atol=0, msg=f"{key} differs")


@every_module
def test_state_of_bfloat16_parameters_is_float32(name):
    params = make_params(name, torch.bfloat16)
    optimizer = run(name, params)
    assert all(p.dtype == torch.bfloat16 for p in params)
    for p in params:
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not key.endswith("step"):
                assert value.dtype == torch.float32, key


# Muon and Orthogonalize: products of bfloat16, in another order. SOAP: which eigenvectors of equal eigenvalues it gets depends on
# the last bit, and with them what Adam does there.
IS_ROUNDED = {"Muon", "Orthogonalize", "SOAP"}


def is_pure(modules):
    return all(isinstance(module, Rule) and not module.reads for module in walk(modules))


def train_functional(modules, params, grads, is_ensemble=False):
    transform = chain(with_rate(modules, 0.01))
    over = torch.vmap if is_ensemble else lambda function: function
    state = over(transform.init)(params)
    for step in grads:
        updates, state = over(lambda u, s, p: transform.update(u, s, p))(step, state, params)
        params = apply_updates(params, updates)
    return params


def random_tensors(name, *leading):
    shapes = [(4, 3)] if name in MATRICES_ONLY else [(4, 3), (), (3,)]
    generator = torch.Generator().manual_seed(0)
    return [
        [torch.randn((*leading, *shape), generator=generator, dtype=torch.float64) for shape in shapes]
        for _ in range(1 + NUM_STEPS)
    ]


@pytest.mark.parametrize("name", [name for name in NAMES if is_pure(make(name))])
def test_ensemble_by_vmap(name):
    """Two models whose steps are one vectorized step."""
    params, *grads = random_tensors(name, 2)
    together = train_functional(make(name), params, grads, is_ensemble=True)
    for index in range(2):
        alone = train_functional(make(name), [p[index] for p in params], [[g[index] for g in step] for step in grads])
        assert_equal([p[index] for p in together], alone, 0.02 if name in IS_ROUNDED else 1e-12)


def numbers_of(kind):
    """Its numeric hyper-parameters, if it can be made without arguments."""
    arguments = inspect.signature(kind).parameters
    if any(a.default is a.empty and a.kind is not a.VAR_POSITIONAL for a in arguments.values()):
        return {}
    try:
        made = kind()
    except OptionError:
        return {}
    return {k: v for k, v in made.defaults.items() if k in kind.bounds and k in arguments and v is not None}


WITH_NUMBERS = [name for name in NAMES if is_pure(make(name)) and numbers_of(PUBLIC[name])]
NO_DERIVATIVE = {
    ("AccumulateMaximum", "decay"): "it starts at infinity, of which a part has no derivative",
    ("AccumulateMinimum", "decay"): "as the maximum",
    ("Adafactor", "d"): "at the default of 1 the first update of a vector is exactly at the limit",
    ("Muon", "momentum"): "bfloat16",
    ("Prodigy", "weight_decay"): "its steps are so short that differences of the loss are rounding; see its own test",
    ("SOAP", "shampoo_beta"): "bases are constants: eigenvectors have no derivative where eigenvalues are equal",
}


@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_hyper_parameters_are_tensors_that_can_be_differentiated(name):
    kind = PUBLIC[name]
    values = numbers_of(kind)
    params, *grads = random_tensors(name)

    def loss(settings):
        return sum((p**3).sum() for p in train_functional([kind(**settings)], params, grads))

    tensors = {key: torch.tensor(float(value), dtype=torch.float64) for key, value in values.items()}
    torch.testing.assert_close(loss(tensors), loss(values), rtol=1e-10, atol=1e-10)
    derivatives = torch.func.grad(loss)(tensors)
    for key, value in values.items():
        if (name, key) not in NO_DERIVATIVE:
            delta = max(abs(value), 1e-3) * 1e-5
            low = value - delta if value - delta in kind.bounds[key] else value
            difference = (loss({**values, key: value + delta}) - loss({**values, key: low})) / (value + delta - low)
            torch.testing.assert_close(
                derivatives[key], difference, rtol=1e-3, atol=1e-8, msg=lambda s, k=key: f"{k}: {s}"
            )
