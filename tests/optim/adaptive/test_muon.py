"""`Muon` and its parts against singular value decompositions (`tests/optim/test_against_torch.py` has Muon of torch)."""

import pytest
import torch
from torch import nn

from graphopt.errors import OptionError, UnsupportedError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import noise_like, outputs
from tests.optim.training import set_gradients

SHAPES = [(6, 4), (3, 7), (4, 4), (5, 2, 3)]


def grads(shapes=SHAPES, seed=0):
    return [noise_like(torch.empty(shape, dtype=torch.float64), seed + i) for i, shape in enumerate(shapes)]


def apply(module, tensors):
    (result,) = outputs(lambda: [module], [tensors])
    return result


def polar(tensor):
    """The orthogonal factor, by an eigendecomposition of the smaller Gram matrix."""
    matrix = tensor.reshape(len(tensor), -1)
    is_wide = matrix.shape[0] < matrix.shape[1]
    matrix = matrix.T if is_wide else matrix
    values, vectors = torch.linalg.eigh(matrix.T @ matrix)
    result = matrix @ vectors @ torch.diag(values**-0.5) @ vectors.T
    return (result.T if is_wide else result).reshape(tensor.shape)


@accepts("O4", "O13")
def test_svd_gives_the_polar_factor():
    for result, tensor in zip(apply(m.Orthogonalize(method="svd"), grads()), grads(), strict=True):
        torch.testing.assert_close(result, polar(tensor), rtol=1e-10, atol=1e-10)


@accepts("O4")
def test_newton_schulz_brings_singular_values_near_one():
    for result in apply(m.Orthogonalize(), grads()):
        values = torch.linalg.svdvals(result.flatten(1))
        assert ((values > 0.6) & (values < 1.3)).all()


def test_zeros_stay_zeros():
    for method in ("svd", "newton-schulz"):
        (zeros,) = apply(m.Orthogonalize(method=method), [torch.zeros(4, 3, dtype=torch.float64)])
        assert not zeros.any()


def test_missing_rank_stays_missing():
    """A matrix of rank one becomes a product of unit vectors; bfloat16 makes noise of what is missing."""
    left, right = grads([(4, 1), (1, 3)])
    (single,) = apply(m.Orthogonalize(method="svd"), [left @ right])
    torch.testing.assert_close(single, left / left.norm() @ right / right.norm(), rtol=1e-9, atol=1e-9)


@accepts("O4", "O13")
@pytest.mark.parametrize("module", [m.Orthogonalize, m.MuonAdjustLR, m.DualNormCorrection])
def test_vectors_stay(module):
    vectors = grads([(), (5,), (4, 3)])
    results = apply(module(), vectors)
    assert torch.equal(results[0], vectors[0])
    assert torch.equal(results[1], vectors[1])
    assert not torch.allclose(results[2], vectors[2])


@accepts("O13")
@pytest.mark.parametrize(
    ("adjust_lr_fn", "factors"),
    [
        ("match_rms_adamw", [0.2 * 6**0.5, 0.2 * 7**0.5, 0.4, 0.2 * 6**0.5]),
        ("original", [1.5**0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_adjusted_by_shape(adjust_lr_fn, factors):
    results = apply(m.MuonAdjustLR(2.0, adjust_lr_fn=adjust_lr_fn), grads())
    for result, tensor, factor in zip(results, grads(), factors, strict=True):
        torch.testing.assert_close(result, tensor * 2.0 * factor)


@accepts("O13")
@pytest.mark.parametrize(
    "make",
    [
        lambda: [m.Orthogonalize(method="svd", dual_norm_correction=True)],
        lambda: [m.Orthogonalize(method="svd"), m.DualNormCorrection()],
        lambda: [m.Muon(0.0, method="svd", dual_norm_correction=True, adjust_lr_fn="original")],
    ],
    ids=["option", "module", "muon"],
)
def test_dual_norm_is_the_sum_of_singular_values(make):
    (results,) = outputs(make, [grads([(3, 7), (4, 4)])])
    for result, tensor in zip(results, grads([(3, 7), (4, 4)]), strict=True):
        torch.testing.assert_close(result, polar(tensor) * torch.linalg.svdvals(tensor).sum())


def test_muon_is_its_parts():
    muon = lambda: [m.Muon(0.8, adjust_lr_fn="match_rms_adamw")]  # noqa: E731
    parts = lambda: [m.NAG(0.8, lerp=True), m.Orthogonalize(), m.MuonAdjustLR()]  # noqa: E731
    steps = [grads(seed=10 * i) for i in range(3)]
    for ours, theirs in zip(outputs(muon, steps), outputs(parts, steps), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@accepts("O4")
def test_chain_of_parts_against_torch():
    """Behind `Split`, with Adam for the others; on a model whose gradients depend on its parameters."""
    torch.manual_seed(0)
    parts = m.LerpModules(m.Identity(), m.EMA(0.95), 0.95), m.Orthogonalize(adjust_lr=True), m.LR(0.02)
    models = [nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = Modular(models[0], m.Split(lambda p: p.ndim >= 2, list(parts), [m.Adam(), m.LR(0.01)]))
    matrices = [p for p in models[1].parameters() if p.ndim >= 2]
    others = [p for p in models[1].parameters() if p.ndim < 2]
    muon = torch.optim.Muon(matrices, 0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam(others, 0.01)
    before = [p.detach().clone() for p in matrices]
    inputs, targets = torch.randn(32, 6), torch.randn(32, 3)
    for _ in range(20):
        for model, optimizers in zip(models, ([ours], [muon, adam]), strict=True):
            model.zero_grad()
            nn.functional.mse_loss(model(inputs), targets).backward()
            for optimizer in optimizers:
                optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)
    assert all((p - b).abs().max() > 0.05 for p, b in zip(matrices, before, strict=True))


def test_muon_refuses_vectors():
    params = [nn.Parameter(g) for g in grads([(4, 3), (3,)])]
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    message = r"module 1 of 2, Muon: a parameter of shape \(3,\) is no matrix.*m\.Split"
    with pytest.raises(UnsupportedError, match=message):
        Modular(params, m.Muon(), m.LR(0.1)).step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    optimizer = Modular(params, m.Split(lambda p: p.ndim >= 2, m.Muon(), m.Adam()), m.LR(0.1))
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: m.Orthogonalize(method="qr"), "Orthogonalize: method='qr'; expected 'newton-schulz' or 'svd'"),
        (lambda: m.Muon(ns_steps=0), "Muon: ns_steps=0; expected a positive whole number"),
        (lambda: m.Muon(ns_coefficients=(1.0,)), r"Muon: ns_coefficients=\(1.0,\); expected three numbers"),
        (lambda: m.MuonAdjustLR(adjust_lr_fn="x"), "MuonAdjustLR: adjust_lr_fn='x'; expected 'original' or"),
        (lambda: m.Muon(adjust_lr_fn="x"), "Muon: adjust_lr_fn='x'; expected 'original' or"),
    ],
    ids=["method", "ns_steps", "ns_coefficients", "part", "adjust_lr_fn"],
)
def test_bad_options(make, message):
    with pytest.raises(OptionError, match=message):
        make()
