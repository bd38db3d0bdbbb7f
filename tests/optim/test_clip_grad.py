"""clip_grad_norm_ against torch's, and the statistic that follows."""

import doctest
import importlib
import math

import pytest
import torch
from torch import nn

from graphopt import annotations
from graphopt.annotations import SUM_GRAD_SQUARED
from graphopt.errors import StaleAnnotation
from graphopt.optim import TGAdamW, clip_grad_norm_


def make():
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in [(), (3,), (40, 5)]
    ]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        annotations.publish(p, p.grad**2 * 3, 5)
    return params


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_scales_the_statistic_with_the_square(norm_type, foreach, max_norm):
    params, plain = make(), make()
    before = [annotations.get(p, SUM_GRAD_SQUARED).clone() for p in params]
    norm = clip_grad_norm_(iter(params), max_norm, norm_type, foreach=foreach)
    assert norm == torch.nn.utils.clip_grad_norm_(plain, max_norm, norm_type, foreach=foreach)
    c = min(1.0, float(max_norm / (norm + 1e-6)))
    for p, q, statistic in zip(params, plain, before, strict=True):
        assert torch.equal(p.grad, q.grad)
        torch.testing.assert_close(annotations.get(p, SUM_GRAD_SQUARED), statistic * c**2, rtol=1e-12, atol=0)


def test_one_tensor_and_parameters_without_statistic_or_gradient():
    params = make()
    annotations.clear(params[:1])
    clip_grad_norm_(params[2], 0.1)
    assert float(params[2].grad.norm()) == pytest.approx(0.1, rel=1e-4)
    params[1].grad = None
    clip_grad_norm_(params, 0.01)
    assert annotations.find(params[0], SUM_GRAD_SQUARED) is None
    assert annotations.find(params[1], SUM_GRAD_SQUARED) is None
    clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0)


def test_step_after_clipping_equals_training_on_the_clipped_loss():
    clipped, by_torch, expected = make(), make(), make()
    norm = clip_grad_norm_(clipped, 0.5)
    torch.nn.utils.clip_grad_norm_(by_torch, 0.5)  # nobody tells the statistic; it is noticed in step()
    c = float(0.5 / (norm + 1e-6))
    for p in expected:
        statistic = annotations.get(p, SUM_GRAD_SQUARED)
        annotations.clear([p])
        p.grad.mul_(c)
        annotations.publish(p, statistic * c**2, 5)
    for params in (clipped, by_torch, expected):
        TGAdamW(params, graft=False, eps=1e-2).step()
    for p, q, r in zip(clipped, by_torch, expected, strict=True):
        torch.testing.assert_close(p, r, rtol=0, atol=1e-12)
        torch.testing.assert_close(q, r, rtol=0, atol=1e-12)


def test_errors():
    params = make()
    params[0].grad.fill_(math.inf)
    before = params[1].grad.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert torch.equal(params[1].grad, before)
    params = make()
    params[1].grad += 1
    with pytest.raises(StaleAnnotation, match="not a rescaling"):
        clip_grad_norm_(params, 1.0)


def test_docstring():
    assert doctest.testmod(importlib.import_module("graphopt.optim.clip_grad")).failed == 0
