"""`Adagrad`: its options against loops over numbers (`tests/optim/test_against_torch.py` has those of torch)."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import on_numbers
from tests.optim.training import make_params, train

UPDATES = [1.0, -2.0, 4.0, 0.5, 3.0]


@accepts("O6")
@pytest.mark.parametrize("use_sqrt", [False, True])
@pytest.mark.parametrize("power", [1, 2, 3.5])
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_options(momentum, power, use_sqrt):
    total, buffer, expected = 0.3, 0.0, []
    for step, u in enumerate(UPDATES):
        total += abs(u) ** power
        buffer = (momentum or 0.0) * buffer + u
        divisor = total ** (1 / power) if use_sqrt else total
        expected.append(2.0 / (1 + step * 0.1) * buffer / (divisor + 0.01))
    inner = None if momentum is None else m.HeavyBall(momentum)
    module = m.Adagrad(0.1, 0.3, 0.01, alpha=2.0, pow=power, use_sqrt=use_sqrt, inner=inner)
    assert on_numbers(lambda: [module], UPDATES) == pytest.approx(expected, rel=1e-12)


def test_torch_kernel_is_not_taken_with_inner():
    """It is found by the names of modules, and knows nothing of what is inside of them."""
    params, others = make_params(), make_params()
    train(Modular(params, m.Adagrad(inner=m.HeavyBall(0.9)), m.LR(0.1)), params)
    train(Modular(others, m.Adagrad(inner=m.HeavyBall(0.9)), m.LR(0.1), foreach=False), others)
    plain = make_params()
    train(Modular(plain, m.Adagrad(), m.LR(0.1)), plain)
    for p, q, r in zip(params, others, plain, strict=True):
        torch.testing.assert_close(p, q)
        assert not p.numel() or not torch.allclose(p, r)


def test_bad_power():
    with pytest.raises(OptionError, match="Adagrad: pow=-1; expected a positive number"):
        m.Adagrad(pow=-1)
