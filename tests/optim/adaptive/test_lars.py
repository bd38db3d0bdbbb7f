"""`LARS` against its formula."""

import torch

from graphopt.optim import m
from tests.optim.catalogue import accepts
from tests.optim.outputs import assert_equal_steps, make_tensors, outputs


@accepts("O+torch")
def test_equals_the_formula():
    """Also where the parameter, or the update, is zero: then the update stays."""
    grads, params = [make_tensors(1)], make_tensors(2)
    params[2], grads[0][3] = torch.zeros_like(params[2]), torch.zeros_like(grads[0][3])
    expected = [
        g if not p.any() or not g.any() else g * 0.02 * p.norm() / (g.norm() + 0.1)
        for g, p in zip(grads[0], params, strict=True)
    ]
    assert_equal_steps(outputs(lambda: [m.LARS(0.02, 0.1)], grads, params), [expected])
