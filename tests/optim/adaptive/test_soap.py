"""`SOAP` against a reference of loops over steps, and where it must be Adam."""

import pytest
import torch

from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import make_tensors, outputs
from tests.optim.problems import in_plane, rosenbrock


def steps_of(*shapes, num_steps):
    return [make_tensors(seed, shapes) for seed in range(num_steps)]


def reference(grads, beta1=0.95, beta2=0.95, shampoo_beta=0.95, freq=10, eps=1e-8):
    """Of a matrix; the average of updates is kept in the coordinates of the parameter."""
    left = right = exp_avg = exp_avg_sq = None
    results = []
    for step, g in enumerate(grads):
        new_left, new_right = g @ g.T, g.T @ g
        if step == 0:
            left, right = (1 - shampoo_beta) * new_left, (1 - shampoo_beta) * new_right
            bases = [torch.linalg.eigh(matrix)[1].flip(1) for matrix in (left, right)]
            exp_avg, exp_avg_sq = torch.zeros_like(g), torch.zeros_like(g)
            results.append(torch.zeros_like(g))
            continue
        q, p = bases
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * (q.T @ g @ p) ** 2
        mean = q.T @ exp_avg @ p / (1 - beta1**step)
        results.append(q @ (mean / ((exp_avg_sq / (1 - beta2**step)).sqrt() + eps)) @ p.T)
        left = shampoo_beta * left + (1 - shampoo_beta) * new_left
        right = shampoo_beta * right + (1 - shampoo_beta) * new_right
        if step % freq == 0:
            orders = [torch.diag(b.T @ a @ b).argsort(descending=True) for a, b in ((left, q), (right, p))]
            exp_avg_sq = exp_avg_sq[orders[0]][:, orders[1]]
            bases = [
                torch.linalg.qr(a @ b[:, order])[0] for a, b, order in zip((left, right), (q, p), orders, strict=True)
            ]
    return results


@accepts("O3")
@pytest.mark.parametrize("freq", [1, 4, 10])
def test_matrices(freq):
    """Two of one shape, which are one call."""
    grads = steps_of((6, 4), (6, 4), num_steps=30)
    results = outputs(lambda: [m.SOAP(precond_freq=freq, merge_small=False)], grads)
    for index in range(2):
        for result, expected in zip(results, reference([g[index] for g in grads], freq=freq), strict=True):
            torch.testing.assert_close(result[index], expected, rtol=1e-8, atol=1e-8)


def test_numbers_of_the_reference():
    grads = steps_of((6, 4), num_steps=12)
    options = {"beta1": 0.8, "beta2": 0.9, "shampoo_beta": 0.7, "eps": 0.1}
    results = outputs(lambda: [m.SOAP(**options, precond_freq=3, merge_small=False, alpha=2.0)], grads)
    for (result,), expected in zip(results, reference([g for (g,) in grads], freq=3, **options), strict=True):
        torch.testing.assert_close(result, 2 * expected, rtol=1e-8, atol=1e-8)


@accepts("O3")
def test_axes_that_are_too_long_are_not_turned():
    """A block of zeros added to an axis leaves the other as it is."""
    grads = steps_of((3, 50), (50, 3), (50, 60), (2, 30, 4), (2, 2, 2), (), (1,), num_steps=13)
    results = outputs(lambda: [m.SOAP(max_dim=20, precond_freq=3, merge_small=False)], grads)
    assert all(result.isfinite().all() for step in results for result in step)
    for step, transposed in zip(
        results, outputs(lambda: [m.SOAP(max_dim=20, precond_freq=3)], [[s[0].T] for s in grads]), strict=True
    ):
        torch.testing.assert_close(step[0].T, transposed[0])
    adam = outputs(lambda: [m.Adam(0.95, 0.95)], grads)  # where no axis has a basis
    for step, expected in zip(results, adam, strict=True):
        for index in (2, 5, 6):
            torch.testing.assert_close(step[index], expected[index], rtol=1e-10, atol=1e-10)


@accepts("O3")
def test_diagonal_covariances_make_it_adam():
    """From the second step; ``eps`` is above the rounding of bases."""
    grads = [[torch.diag(g)] for (g,) in steps_of((5,), num_steps=25)]
    soap = outputs(lambda: [m.SOAP(0.9, 0.99, precond_freq=3, merge_small=False, eps=1e-5)], grads)
    adam = outputs(lambda: [m.Adam(0.9, 0.99, 1e-5)], grads[1:])
    for (ours,), (theirs,) in zip(soap[1:], adam, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@accepts("O3")
@pytest.mark.parametrize("num_tensors", [1, 2])
def test_rosenbrock(num_tensors):
    """Steps of such a length go back and forth in the valley."""
    problem = in_plane(rosenbrock, num_tensors)
    optimizer = Modular(problem.params, m.SOAP(), m.LR(0.4))
    for _ in range(50):
        optimizer.step(problem.closure)
    assert min(problem.losses) < 4
    assert problem.loss < 10


@pytest.mark.parametrize(
    ("options", "scale"),
    [({"shampoo_beta": None}, None), ({"shampoo_beta": None, "decay": 0.5}, None), ({"bias_correction": False}, 0.95)],
)
def test_other_options(options, scale):
    """Sums decayed by one half are averages, of which bases do not know the scale; and Adam's factors."""
    grads = steps_of((4, 3), num_steps=9)
    results = outputs(lambda: [m.SOAP(**options, precond_freq=2, merge_small=False, eps=0.0)], grads)
    if scale is None:
        beta = options.get("decay", 1 - 1e-12)
        expected = reference([g for (g,) in grads], shampoo_beta=beta, freq=2, eps=0.0)
        tolerance = 1e-10 if "decay" in options else 1e-3
    else:
        factors = [(1 - scale**step) ** 0.5 for step in range(9)]
        expected = [u * f for u, f in zip(reference([g for (g,) in grads], freq=2, eps=0.0), factors, strict=True)]
        tolerance = 1e-10
    for (result,), other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, rtol=tolerance, atol=tolerance)


@accepts("K5")
def test_cautious():
    """Elements that disagree with the gradient are 0; on the sphere of many shapes the loss falls."""
    shapes = [(), (1,), (1, 1), (10,), (1, 10), (10, 1), (1, 1, 10), (1, 10, 1), (10, 10), (4, 4, 4), (3, 3, 3, 3)]
    shapes += [(2,) * 7, (10, 1, 3, 1, 1)]
    grads = steps_of((3, 4), num_steps=6)
    plain = outputs(lambda: [m.SOAP()], grads)
    for (u,), (v,), (g,) in zip(plain, outputs(lambda: [m.SOAP(), m.Cautious()], grads), grads, strict=True):
        torch.testing.assert_close(v, torch.where(u * g > 0, u, 0.0))
    assert any(((u * g) < 0).any() for (u,), (g,) in zip(plain, grads, strict=True))
    params = [p.requires_grad_() for p in make_tensors(0, shapes)]
    params += [torch.zeros(2, 2).double().requires_grad_(), torch.ones(2, 2).double().requires_grad_()]
    optimizer = Modular(params, m.SOAP(), m.Cautious(), m.LR(0.2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_equal_to_torchzero():
    """With new bases in every step; torchzero follows a part of the gradient in the first, and counts it as one of Adam's.

    It computes bases in float32.
    """
    tz = pytest.importorskip("torchzero")
    grads = [g for (g,) in steps_of((4, 3), num_steps=9)]
    param = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    theirs = tz.Optimizer([param], tz.m.SOAP(precond_freq=1, debias=False))
    make = lambda: [m.SOAP(precond_freq=1, bias_correction=False, merge_small=False)]  # noqa: E731
    ours = outputs(make, [[g] for g in grads])
    for step, (g, (update,)) in enumerate(zip(grads, ours, strict=True)):
        before, param.grad = param.detach().clone(), g.clone()
        theirs.step()
        if step:
            torch.testing.assert_close(before - param.detach(), update, rtol=1e-4, atol=1e-4)
