"""`Rprop` against a loop over numbers; without ``backtrack`` see `tests/optim/test_against_torch.py`."""

import pytest

from graphopt.errors import OptionError
from graphopt.optim import m
from tests.optim.catalogue import accepts
from tests.optim.outputs import on_numbers

# Growth, two flips in a row, zeros before and after a flip.
UPDATES = [1.0, 2.0, -1.0, -3.0, -2.0, 4.0, -4.0, 0.0, 5.0, 5.0, -1.0, 0.0, -1.0, 2.0, 2.0, 2.0]


def sign(number):
    return (number > 0) - (number < 0)


def rprop(nplus, nminus, lb, ub, alpha, backtrack):
    """Each branch of the algorithm, spelled out."""
    size, before, move, outputs = min(max(alpha, lb), ub), 0, 0.0, []
    for u in UPDATES:
        if sign(u) * before > 0:
            size = min(size * nplus, ub)
            move, before = sign(u) * size, sign(u)
        elif sign(u) * before < 0:
            size = max(size * nminus, lb)
            move, before = (-move if backtrack else 0.0), 0  # the size stays in the step that follows
        else:
            move, before = sign(u) * size, sign(u)
        outputs.append(move)
    return outputs


@accepts("O11")
@pytest.mark.parametrize("backtrack", [False, True])
@pytest.mark.parametrize("limits", [(1e-6, 50.0), (0.2, 1.0), (0.6, 0.7)], ids=str)
@pytest.mark.parametrize("factors", [(1.2, 0.5), (2.0, 0.9), (1.0, 1.0)], ids=str)
def test_every_branch(factors, limits, backtrack):
    module = m.Rprop(*factors, *limits, alpha=0.5, backtrack=backtrack)
    expected = rprop(*factors, *limits, 0.5, backtrack)
    assert on_numbers(lambda: [module], UPDATES) == pytest.approx(expected, rel=1e-12)


def test_step_taken_back():
    """The parameter is where it was before the step that overshot."""
    first, second, third = on_numbers(lambda: [m.Rprop()], [1.0, 1.0, -1.0])
    assert (first, second, third) == (1.0, 1.2, -1.2)


def test_products_that_underflow_keep_their_sign():
    assert on_numbers(lambda: [m.Rprop()], [1e-200, 1e-200]) == [1.0, 1.2]


def test_limits_in_the_wrong_order():
    with pytest.raises(OptionError, match=r"Rprop: lb=2.0 is above ub=1.0; give the smaller one as lb"):
        m.Rprop(lb=2.0, ub=1.0)
