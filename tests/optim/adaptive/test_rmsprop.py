"""`RMSprop`: its options against loops over numbers (`tests/optim/test_against_torch.py` has those of torch)."""

import math

import pytest

from graphopt.errors import OptionError
from graphopt.optim import m
from tests.optim.catalogue import accepts
from tests.optim.outputs import on_numbers

UPDATES = [1.0, -2.0, 4.0, 0.5, 3.0, -0.1, 0.0]


def rmsprop(smoothing, eps, centered, debiased, amsgrad, power, init):
    average, mean, largest, outputs = 0.0, 0.0, 0.0, []
    for step, u in enumerate(UPDATES, 1):
        new = abs(u) ** power
        average = new if init == "update" and step == 1 else smoothing * average + (1 - smoothing) * new
        mean = smoothing * mean + (1 - smoothing) * u
        value = average - mean**2 if centered else average
        largest = max(largest, value)
        if amsgrad:
            value = largest
        if debiased:
            value /= 1 - smoothing**step
        outputs.append(u / (value ** (1 / power) + eps))
    return outputs


@accepts("O9")
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("start", [{"init": "zeros"}, {"init": "update"}, {"debiased": True}], ids=str)
@pytest.mark.parametrize("kind", [{"centered": True}, {"pow": 3.0}, {}], ids=str)
def test_options(kind, start, amsgrad):
    options = {"centered": False, "debiased": False, "pow": 2.0, "init": "zeros", **kind, **start, "amsgrad": amsgrad}
    expected = rmsprop(0.8, 0.1, **{"power" if k == "pow" else k: v for k, v in options.items()})
    assert on_numbers(lambda: [m.RMSprop(0.8, 0.1, **options)], UPDATES) == pytest.approx(expected, rel=1e-12)


@accepts("O9")
def test_inner_runs_once():
    """Its result is divided, but does not enter the average of squares."""
    expected, buffer, average = [], 0.0, 0.0
    for u in UPDATES:
        buffer = 0.5 * buffer + u
        average = 0.8 * average + 0.2 * u**2
        expected.append(buffer / (math.sqrt(average) + 0.1))
    inner = lambda: [m.RMSprop(0.8, 0.1, inner=m.HeavyBall(0.5))]  # noqa: E731
    assert on_numbers(inner, UPDATES) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": 1.0}, r"RMSprop: smoothing=1.0; expected a number in \[0, 1\)"),
        ({"pow": 0}, "RMSprop: pow=0; expected a positive number"),
        ({"init": "grad"}, "RMSprop: init='grad'; expected 'zeros' or 'update'"),
        ({"init": "update", "debiased": True}, "RMSprop: debiased=True .* write init='zeros', or debiased=False"),
        ({"centered": True, "pow": 3}, "RMSprop: centered=True with pow=3; a variance needs pow=2"),
    ],
    ids=["smoothing", "pow", "init", "debiased", "centered"],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        m.RMSprop(**options)
