"""Laplacian smoothing: the solution of a linear system, for every size."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts


def smoothed(grads, *arguments, **options):
    """What the module makes of gradients."""
    params = [torch.zeros_like(g, requires_grad=True) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    Modular(params, m.LaplacianSmoothing(*arguments, **options), m.LR(1.0)).step()
    return [-p.detach() for p in params]


def matrix(size, sigma):
    """``I - sigma Δ`` on a ring."""
    result = torch.eye(size, dtype=torch.float64)
    for row in range(size):
        for neighbour in (row - 1, row + 1):
            result[row, row] += sigma
            result[row, neighbour % size] -= sigma
    return result


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@accepts("H1")
@pytest.mark.parametrize("sigma", [0.0, 0.3, 1.0, 20.0])
@pytest.mark.parametrize("shape", [(1,), (), (2,), (3,), (4,), (5,), (2, 3), (4, 1, 4), (31,)], ids=str)
def test_it_solves_the_system_and_keeps_the_mean(shape, sigma):
    grad = random(*shape)
    (found,) = smoothed([grad], sigma, min_numel=1)
    residual = matrix(grad.numel(), sigma) @ found.reshape(-1) - grad.reshape(-1)
    assert float(residual.abs().max()) <= 1e-12
    assert float((found.mean() - grad.mean()).abs()) <= 1e-12
    assert found.shape == grad.shape


@accepts("H1")
def test_all_tensors_as_one_vector_and_small_ones_as_they_are():
    grads = [random(2, 3), random(3) + 1, random(0, 2), random(5)]
    whole = torch.cat([g.reshape(-1) for g in grads])
    together = smoothed(grads, 0.7, layerwise=False)
    expected = torch.linalg.solve(matrix(14, 0.7), whole)
    assert torch.allclose(torch.cat([t.reshape(-1) for t in together]), expected, rtol=0, atol=1e-12)
    apart = smoothed(grads, 0.7)
    for grad, found in zip(grads, apart, strict=True):
        if grad.numel() < 4:
            assert torch.equal(found, grad)
        else:
            exact = torch.linalg.solve(matrix(grad.numel(), 0.7), grad.reshape(-1)).reshape(grad.shape)
            assert torch.allclose(found, exact, rtol=0, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip(smoothed(grads, layerwise=False, min_numel=15), grads, strict=True))


def test_a_sequence_in_memory_does_not_matter():
    grad = random(6, 5)
    (plain,), (turned,) = smoothed([grad]), smoothed([grad.t().contiguous().t()])
    assert torch.allclose(plain, turned, rtol=0, atol=1e-14)


def test_equal_to_torchzero():
    tz = pytest.importorskip("torchzero")
    grads = [random(7), random(3, 4)]
    params = [torch.zeros_like(g, requires_grad=True) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    tz.Optimizer(params, tz.m.LaplacianSmoothing(0.6)).step()
    for p, found in zip(params, smoothed(grads, 0.6), strict=True):
        assert torch.allclose(-p.detach(), found, rtol=0, atol=1e-12)


def test_settings_of_parameters_and_bad_ones():
    grads = [random(5), random(5)]
    params = [torch.zeros_like(g, requires_grad=True) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    module = m.LaplacianSmoothing(2.0).set_param_groups([{"params": params[0], "sigma": 0.0}])
    optimizer = Modular(params, module, m.LR(1.0))
    assert optimizer.updates_each_parameter_alone
    assert not Modular(params, m.LaplacianSmoothing(layerwise=False)).updates_each_parameter_alone
    optimizer.step()
    assert torch.allclose(-params[0].detach(), grads[0], rtol=0, atol=1e-14)
    assert torch.allclose(-params[1].detach(), torch.linalg.solve(matrix(5, 2.0), grads[1]), rtol=0, atol=1e-12)
    with pytest.raises(OptionError, match=r"LaplacianSmoothing: sigma=-1\.0; expected a number in \[0, inf\)"):
        m.LaplacianSmoothing(-1.0)
