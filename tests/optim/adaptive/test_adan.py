"""`Adan` against the authors' program, step by step on numbers, and torchzero."""

import math

import pytest
import torch

from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import on_numbers
from tests.optim.training import largest_difference, make_params, train

UPDATES = [1.0, -2.0, 4.0, 0.5, 3.0, 0.0, -1.0]


@accepts("O+Adan")
@pytest.mark.parametrize(
    ("b1", "b2", "b3", "eps"), [(0.98, 0.92, 0.99, 1e-8), (0.5, 0.7, 0.0, 0.1), (0.9, 0.0, 0.8, 0.2)]
)
def test_equals_a_loop(b1, b2, b3, eps):
    mean = change = square = 0.0
    before, expected = UPDATES[0], []
    for t, u in enumerate(UPDATES, 1):
        d, before = u - before, u
        mean, change, square = (
            b1 * mean + (1 - b1) * u,
            b2 * change + (1 - b2) * d,
            b3 * square + (1 - b3) * (u + b2 * d) ** 2,
        )
        numerator = mean / (1 - b1**t) + b2 * change / (1 - b2**t)
        expected.append(numerator / (math.sqrt(square / (1 - b3**t)) + eps))
    assert on_numbers(lambda: [m.Adan(b1, b2, b3, eps)], UPDATES) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@accepts("O+Adan")
def test_constant_gradients_are_steps_of_one():
    assert on_numbers(lambda: [m.Adan()], [3.0] * 4) == pytest.approx([1.0] * 4)


def test_equal_to_torchzero():
    torchzero = pytest.importorskip("torchzero")
    params, others = make_params(), make_params()
    train(Modular(params, m.Adan(0.9, 0.8, 0.95), m.LR(0.1)), params)
    train(torchzero.Optimizer(others, torchzero.m.Adan(0.9, 0.8, 0.95), torchzero.m.LR(0.1)), others)
    assert largest_difference(params, others) < 1e-10
    assert all(p.isfinite().all() for p in params)
    assert isinstance(params[0], torch.nn.Parameter)
