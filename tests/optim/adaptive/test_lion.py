"""`Lion` against its five lines, bit for bit."""

import pytest
import torch

from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.training import make_params, set_gradients


@accepts("O8")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
def test_equals_reference(way):
    params = make_params()
    others = [p.detach().clone() for p in params]
    averages = [torch.zeros_like(p) for p in params]
    optimizer = Modular(params, m.Lion(), m.WeightDecay(0.1), m.LR(0.01), **way)
    for step in range(50):
        set_gradients(params, step)
        optimizer.step()
        for p, q, average in zip(params, others, averages, strict=True):
            update = torch.sign(0.9 * average + (1 - 0.9) * p.grad)
            average.copy_(0.99 * average + (1 - 0.99) * p.grad)
            q.sub_(0.01 * (update + 0.1 * q))
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-14, atol=1e-14)  # of the decay; signs are the same
