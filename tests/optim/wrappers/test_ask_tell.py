"""Nevergrad, and other optimizers that are asked and told: what they find, what is saved, and what they may look like."""

import copy
import io
import math

import numpy as np
import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim.wrappers.ask_tell import AskTellOptimizer
from graphopt.optim.wrappers.nevergrad import NevergradOptimizer
from tests.optim.catalogue import accepts

nevergrad = pytest.importorskip("nevergrad")
cma = pytest.importorskip("cma")


class Sphere:
    """Four elements in two parameters; its losses are kept."""

    def __init__(self, dtype=torch.float64):
        self.params = [torch.tensor([1.0, -2.0, 3.0], dtype=dtype), torch.tensor(0.5, dtype=dtype)]
        for p in self.params:
            p.requires_grad_()
        self.losses = []

    def closure(self, backward=True):
        assert not backward
        loss = sum((p**2).sum() for p in self.params)
        self.losses.append(float(loss))
        return loss

    @property
    def loss(self):
        with torch.no_grad():
            return float(sum((p**2).sum() for p in self.params))


def make_cma(start, low, high, seed):
    return cma.CMAEvolutionStrategy(start, 0.5, {"seed": seed % 1000 + 1, "verbose": -9})


KINDS = {
    "OnePlusOne": lambda params, **options: NevergradOptimizer(params, "OnePlusOne", 500, **options),
    "a class": lambda params, **options: NevergradOptimizer(params, nevergrad.optimizers.TwoPointsDE, 500, **options),
    "cma": lambda params, **options: AskTellOptimizer(params, make_cma, **options),
}


@accepts("E3")
@pytest.mark.parametrize(
    "options", [{}, {"lb": -4.0, "ub": 4.0}, {"mutable_sigma": True, "lb": -4.0}, {"use_init": False}], ids=str
)
def test_nevergrad_on_a_sphere(options):
    dtype = torch.float32 if options else torch.float64
    problem = Sphere(dtype)
    optimizer = NevergradOptimizer(problem.params, "OnePlusOne", 500, seed=0, **options)
    for _ in range(120):
        optimizer.step(problem.closure)
    assert optimizer.best_loss == problem.loss == min(problem.losses) < 1e-2
    assert all(p.dtype == dtype for p in problem.params)


@accepts("E+")
def test_cma_on_a_sphere():
    problem = Sphere(torch.float32)
    optimizer = AskTellOptimizer(problem.params, make_cma, seed=1)
    for _ in range(40):
        lowest = optimizer.step(problem.closure)
        assert lowest == min(problem.losses[-8:])  # a generation
    assert optimizer.best_loss == problem.loss < 1e-3


@accepts("E3", "E+")
@pytest.mark.parametrize("kind", KINDS)
def test_from_a_file_it_goes_on_as_without(kind):
    """Bit for bit, and the best so far can be had again; the same for copies."""
    left, right = Sphere(), Sphere()
    torch.manual_seed(0)
    optimizer = KINDS[kind](left.params)
    for _ in range(30):
        optimizer.step(left.closure)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = KINDS[kind](right.params, seed=5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.restore_best()
    assert right.loss == resumed.best_loss == left.loss
    copied, params = copy.deepcopy((optimizer, left.params))
    third = Sphere()
    third.params = params
    for problem, other in ((left, optimizer), (right, resumed), (third, copied)):
        problem.losses.clear()
        for _ in range(10):
            other.step(problem.closure)
    assert left.losses == right.losses == third.losses
    optimizer.reset()
    assert optimizer.best_loss == math.inf
    optimizer.step(left.closure)


def test_seeds():
    def run(manual, **options):
        torch.manual_seed(manual)
        problem = Sphere()
        optimizer = NevergradOptimizer(problem.params, "OnePlusOne", **options)
        for _ in range(5):
            optimizer.step(problem.closure)
        return problem.losses

    assert run(0) == run(0) != run(1)
    assert run(0, seed=3) == run(1, seed=3)


class Random:
    """Asks for what a generator that nobody seeds gives, so that no state can bring it back."""

    generator = np.random.default_rng(0)

    def __init__(self, start, low, high, seed):
        self.start, self.told = start, []

    def ask(self):
        return list(self.start + self.generator.normal(size=4))

    def tell(self, candidate, loss):
        self.told.append((candidate, loss))


def test_one_that_cannot_be_brought_back_starts_anew_at_the_best():
    problem, other = Sphere(), Sphere()
    optimizer = AskTellOptimizer(problem.params, Random)
    for _ in range(5):
        optimizer.step(problem.closure)
    resumed = AskTellOptimizer(other.params, Random)
    resumed.load_state_dict(optimizer.state_dict())
    resumed.step(other.closure)
    np.testing.assert_array_equal(resumed.inner.start, np.concatenate([p.detach().reshape(-1) for p in problem.params]))
    assert resumed.best_loss <= optimizer.best_loss
    assert len(resumed.inner.told) == 1


class Shape(Random):
    """A list of numbers, an array, a list of arrays, a matrix, or objects."""

    form = None

    def ask(self):
        rows = self.start - 0.1 * np.arange(1, 3)[:, None]
        return {
            "numbers": list(rows[0]),
            "array": rows[0],
            "arrays": [rows[0], rows[1]],
            "matrix": rows,
            "object": {"x": rows[0]},
            "objects": [{"x": rows[0]}, {"x": rows[1]}],
        }[self.form]


@pytest.mark.parametrize("form", ["numbers", "array", "arrays", "matrix", "object", "objects"])
def test_forms_of_candidates(form):
    problem = Sphere()
    shape = type("Adapter", (Shape,), {"form": form})
    optimizer = AskTellOptimizer(problem.params, shape, read=(lambda c: c["x"]) if "object" in form else None)
    loss = optimizer.step(problem.closure)
    several = form in ("arrays", "matrix", "objects")
    assert len(problem.losses) == 1 + several
    assert loss == min(problem.losses)
    ((_, told),) = optimizer.inner.told
    assert told == (problem.losses if several else problem.losses[0])


def test_losses_that_are_not_finite():
    """They are told as infinite; without a finite one the parameters stay; and a closure that raises changes nothing."""
    problem = Sphere()
    before = [p.detach().clone() for p in problem.params]
    optimizer = AskTellOptimizer(problem.params, Random)
    assert optimizer.step(lambda backward: torch.tensor(math.nan)) == math.inf
    assert optimizer.inner.told[0][1] == math.inf

    def broken(backward):
        raise KeyError("no")

    with pytest.raises(KeyError):
        optimizer.step(broken)
    assert all(map(torch.equal, problem.params, before))
    optimizer.step(problem.closure)
    assert optimizer.best_loss == problem.loss


class Short(Random):
    def ask(self):
        return [0.0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda p: AskTellOptimizer(p, Short),
            r"AskTellOptimizer: Short.ask\(\) returned a candidate of 1 elements for .*of 4",
        ),
        (lambda p: AskTellOptimizer(p, lambda *_: 3), r"make\(...\) returned 3, which has no ask\(\) and tell\(\)"),
        (lambda p: AskTellOptimizer(p, 3), "make=3; expected a function"),
        (lambda p: NevergradOptimizer(p, 3), "NevergradOptimizer: opt_cls=3; expected a class of nevergrad.optimizers"),
        (lambda p: NevergradOptimizer(p, "OnePlusTwo"), "opt_cls='OnePlusTwo' is none of Nevergrad's"),
        (lambda p: NevergradOptimizer(p, "OnePlusOne", 0), "budget=0; expected a whole number of at least 1"),
        (lambda p: NevergradOptimizer(p, "OnePlusOne", lb=0.0), "outside of lb=0.0, ub=None"),
    ],
)
def test_what_means_nothing_is_refused(make, text):
    problem = Sphere()
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(OptionError, match=text):
        make(problem.params).step(problem.closure)
    assert all(map(torch.equal, problem.params, before))


def test_a_state_of_another_optimizer():
    problem = Sphere()
    optimizer = NevergradOptimizer(problem.params, "OnePlusOne")
    with pytest.raises(OptionError, match="no 'search' in it; pass what NevergradOptimizer"):
        optimizer.load_state_dict(torch.optim.SGD(problem.params).state_dict())
