"""The parts of `Rprop` against loops over numbers, and put together again."""

import pytest

from graphopt.errors import OptionError
from graphopt.optim import m
from tests.optim.catalogue import accepts
from tests.optim.outputs import on_numbers

UPDATES = [1.0, 2.0, -1.0, -3.0, -2.0, 4.0, -4.0, 0.0, 5.0, 5.0, -1.0, 0.0, -1.0, 2.0, 2.0, 2.0]
WITHOUT_FLIPS = [1.0, 2.0, 0.5, 0.0, 3.0, 4.0, 4.0]


def sign(number):
    return (number > 0) - (number < 0)


def step_sizes(nplus, nminus, lb, ub, alpha, signs):
    size, before, sizes = alpha, 0, []
    for now in signs:
        if now * before > 0:
            size *= nplus
        elif now * before < 0:
            size *= nminus
        size, before = min(max(size, lb), ub), now
        sizes.append(size)
    return sizes


@accepts("O12")
@pytest.mark.parametrize(
    "options", [(1.2, 0.5, 1e-6, 50.0, 1.0), (2.0, 0.9, 0.3, 0.8, 0.5), (1.5, 0.5, 0.1, 9.0, 20.0)]
)
def test_step_sizes(options):
    expected = step_sizes(*options, [sign(u) for u in UPDATES])
    assert on_numbers(lambda: [m.SignConsistencyLRs(*options)], UPDATES) == pytest.approx(expected, rel=1e-14)
    scaled = [u * size for u, size in zip(UPDATES, expected, strict=True)]
    assert on_numbers(lambda: [m.ScaleLRBySignChange(*options)], UPDATES) == pytest.approx(scaled, rel=1e-14)
    of_grad = on_numbers(lambda: [m.Abs(), m.ScaleLRBySignChange(*options, use_grad=True)], UPDATES)
    assert of_grad == pytest.approx([abs(u) for u in scaled], rel=1e-14)


@accepts("O12")
@pytest.mark.parametrize(
    "chain", [lambda: [m.Sign(), m.Mul(m.SignConsistencyLRs())], lambda: [m.Sign(), m.ScaleLRBySignChange()]]
)
def test_together_they_are_rprop_where_nothing_flips(chain):
    expected = on_numbers(lambda: [m.Rprop()], WITHOUT_FLIPS)
    assert on_numbers(chain, WITHOUT_FLIPS) == expected
    assert on_numbers(lambda: [*chain(), m.BacktrackOnSignChange()], WITHOUT_FLIPS) == expected


@accepts("O12")
@pytest.mark.parametrize("backtrack", [False, True])
def test_with_constant_step_sizes_they_are_rprop(backtrack):
    """Flips included; ``lb`` and ``ub`` hold the step sizes."""
    expected = on_numbers(lambda: [m.Rprop(lb=1.0, ub=1.0, backtrack=backtrack)], UPDATES)
    assert on_numbers(lambda: [m.Sign(), m.BacktrackOnSignChange(backtrack=backtrack)], UPDATES) == expected
    chain = lambda: [m.GradSign(), m.BacktrackOnSignChange(True, backtrack)]  # noqa: E731
    assert on_numbers(lambda: [m.Sign(), *chain()], UPDATES) == expected


@accepts("O12")
def test_a_flip_takes_back_the_last_step():
    assert on_numbers(lambda: [m.BacktrackOnSignChange()], [3.0, -5.0, -7.0, 2.0, 1.0]) == [3.0, -3.0, -7.0, 7.0, 1.0]
    assert on_numbers(lambda: [m.BacktrackOnSignChange(backtrack=False)], [3.0, -5.0, 7.0]) == [3.0, 0.0, 7.0]


@accepts("O12")
def test_mask():
    assert on_numbers(lambda: [m.SignConsistencyMask()], [1.0, 2.0, -1.0, -2.0, 0.0, -3.0]) == [1, 1, 0, 1, 1, 1]
    assert on_numbers(lambda: [m.Mul(m.SignConsistencyMask())], [1e-200, -1e-200]) == [1e-200, 0.0]


@pytest.mark.parametrize("module", [m.ScaleLRBySignChange, m.SignConsistencyLRs])
def test_limits_in_the_wrong_order(module):
    with pytest.raises(OptionError, match=rf"{module.__name__}: lb=2.0 is above ub=1.0; give the smaller one as lb"):
        module(lb=2.0, ub=1.0)
