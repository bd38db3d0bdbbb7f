"""Samples that a model puts into another order: exact for permutations, refused by name for everything else."""

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.passes import TrueGrad
from tests.models import double, smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, train_step


class Reordered(nn.Module):
    """``how(x)`` gives an index; the samples come back unless ``stay``."""

    def __init__(self, how, *, back=True, residual=False, tied=False):
        super().__init__()
        self.how, self.back, self.residual, self.tied = how, back, residual, tied
        self.before, self.inside, self.after = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.recurrent = nn.GRU(3, 3, batch_first=True)
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x):
        index = self.how(x)
        x = torch.tanh(self.before(x))
        y = x[index] if self.tied else x.index_select(0, index)
        y = torch.tanh(self.inside(y) + y.new_zeros(y.shape[0], 1, 3) + self.shift)
        y = self.recurrent(y)[0]
        if self.tied:
            y = self.before(y)
        if self.back:
            y = y[index.argsort()]
        if self.residual:
            y = y + x
        return self.after(y)


def build(how, **options):
    torch.manual_seed(3)
    return double(Reordered(how, **options), (torch.randn(4, 5, 3),))


FIXED = torch.tensor([2, 0, 3, 1])
PERMUTATIONS = {
    "randperm": lambda x: torch.randperm(x.shape[0]),
    "argsort": lambda x: x[:, 0, 0].argsort(descending=True),
    "sort": lambda x: x[:, 0, 0].sort()[1],
}


def expected_of(model, inputs):
    """Each sample by itself: the order then does not matter."""
    return loop_over_samples(model, inputs, smooth, reduction="sum")


@pytest.mark.parametrize("options", [{}, {"back": False}, {"residual": True}])
@pytest.mark.parametrize("how", PERMUTATIONS)
def test_permutations(how, options):
    model, inputs = build(PERMUTATIONS[how], **options)
    expected = expected_of(model, inputs)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    train_step(model, inputs)
    assert_statistics(model, expected, 4)


@pytest.mark.parametrize("length", [4, 3])
def test_an_index_that_is_given_is_checked_when_it_runs(length):
    model, inputs = build(lambda x: (x.shape[0] - 1 - torch.arange(x.shape[0])) * 1, back=False)
    expected = expected_of(model, (inputs[0][:length],))
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    train_step(model, (inputs[0][:length],))
    assert_statistics(model, expected, length)


def test_an_index_that_repeats_samples_is_refused_when_it_runs():
    model, inputs = build(lambda x: (torch.arange(x.shape[0]) // 2) * 2, back=False)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=r"names some of them several times, at .*test_reordering\.py"):
        train_step(model, inputs)
    assert all(param.grad is None for param in model.parameters())


def test_samples_in_two_orders_do_not_meet():
    model, inputs = build(PERMUTATIONS["randperm"], back=False, residual=True)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=r"(?s)after\.weight: it meets samples that no axis tells apart"):
        train_step(model, inputs)


def test_a_parameter_in_two_orders_is_refused():
    model, inputs = build(PERMUTATIONS["randperm"], tied=True)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=r"(?s)before\.weight: it meets the samples in several orders"):
        train_step(model, inputs)


def test_norms_would_be_in_another_order():
    model, inputs = build(PERMUTATIONS["argsort"])
    graphopt.transform(model, [TrueGrad(statistics="sample_grad_norm")], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=r"(?s)inside\.weight: it meets the samples in another order"):
        train_step(model, inputs)
