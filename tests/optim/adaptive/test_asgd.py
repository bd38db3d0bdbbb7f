"""`ASGD`: its average of parameters (`tests/optim/test_against_torch.py` has the rest)."""

import pytest
import torch

from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.training import largest_difference, make_params, train


@accepts("O+torch")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("t0", [0, 3, 100])
def test_average_is_that_of_torch(t0, way):
    params, others = make_params(), make_params()
    optimizer = Modular(params, m.ASGD(0.1, 0.01, t0=t0), **way)
    reference = torch.optim.ASGD(others, 0.1, 0.01, t0=t0)
    train(optimizer, params, range(8))
    train(reference, others, range(8))
    averages = [optimizer.state[p]["asgd.ax"] for p in params]
    assert largest_difference(averages, [reference.state[p]["ax"] for p in others]) < 1e-7  # its numbers are float32
    assert (largest_difference(averages, params) > 1e-3) == (t0 < 100)
