"""`PSGDKron` against dense Kronecker products with numpy, and that it whitens."""

import math

import numpy as np
import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from graphopt.optim.adaptive import psgd_kron
from tests.optim.catalogue import accepts
from tests.optim.outputs import make_tensors, outputs


def product(factors):
    result = np.eye(1)
    for factor in factors:
        result = np.kron(result, factor)
    return result


def partial(covariance, shape, axis):
    """Of a covariance of all elements the matrix of one axis, summed over the others."""
    table = np.moveaxis(covariance.reshape(*shape, *shape), [axis, len(shape) + axis], [0, 1])
    rest = math.prod(shape) // shape[axis]
    return np.trace(table.reshape(shape[axis], shape[axis], rest, rest), axis1=2, axis2=3)


def learn(factors, norms, sample, lr, beta_norm, damping, diagonal):
    """One step of all factors, with covariances of all elements and exact spectral norms."""
    shape = sample.shape
    tops = [np.abs(f).max() for f in factors]
    mean = math.prod(tops) ** (1 / len(tops))
    factors = [f * mean / top for f, top in zip(factors, tops, strict=True)]
    dense, flat = product(factors), sample.reshape(-1)
    inverse = np.linalg.inv(dense)
    a = dense @ np.outer(flat, flat) @ dense.T
    noise = damping**2 * dense @ dense.T
    b = inverse.T @ inverse
    news = []
    for axis, factor in enumerate(factors):
        plus, minus = partial(a, shape, axis), partial(b, shape, axis)
        plus = plus + np.diag(np.diag(partial(noise, shape, axis)))
        if diagonal[axis]:
            plus, minus = (np.diag(np.diag(x)) for x in (plus, minus))
        size = np.linalg.norm(plus + minus, 2)
        norms[axis] = max(size, beta_norm * norms[axis] + (1 - beta_norm) * size)
        news.append(factor - lr * np.triu(plus - minus) @ factor / norms[axis])
    return news


CASES = {
    "matrix": ((3, 2), {}, [False, False]),
    "vector": ((4,), {}, [True]),
    "triangular vector": ((4,), {"min_ndim_triangular": 1}, [False]),
    "tensor": ((2, 1, 3, 2), {}, [False, False, False]),
    "one_diag": ((3, 2), {"memory_save_mode": "one_diag"}, [True, False]),
    "all_diag": ((3, 2), {"memory_save_mode": "all_diag"}, [True, True]),
    "long axis": ((2, 3), {"max_size_triangular": 2}, [False, True]),
    "number": ((), {}, [True]),
}


@accepts("O+PSGD")
@pytest.mark.parametrize(("shape", "options", "diagonal"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("into", [True, False], ids=["average", "update"])
def test_steps_of_the_factors(shape, options, diagonal, into, monkeypatch):
    """The norm in the denominator is estimated otherwise, and tested below."""
    monkeypatch.setattr(psgd_kron, "_spectral_norm", lambda matrix: torch.linalg.matrix_norm(matrix, 2))
    steps = [make_tensors(seed, [shape, shape]) for seed in range(4)]  # two of one shape are one call
    settings = {**options, "update_probability": 0.5, "max_rms": None, "damping": 0.1}
    results = outputs(lambda: [m.PSGDKron(0.8, 0.2, 0.7, momentum_into_precond_update=into, **settings)], steps)
    lengths = [n for n in shape if n != 1] or [1]
    for index in range(2):
        factors, norms, average = [np.eye(n) for n in lengths], np.zeros(len(lengths)), np.zeros(lengths)
        for step, tensors in enumerate(steps):
            update = tensors[index].numpy().reshape(lengths)
            average = 0.8 * average + 0.2 * update
            mean = average / (1 - 0.8 ** (step + 1))
            if step % 2 == 0:
                factors = learn(factors, norms, mean if into else update, 0.2, 0.7, 0.1, diagonal)
            dense = product(factors)
            expected = (dense.T @ dense @ mean.reshape(-1)).reshape(shape)
            np.testing.assert_allclose(results[step][index].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 7, 30])
def test_estimate_of_the_norm(size):
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        half = torch.randn(size, size, generator=generator) * 10.0 ** (seed * 6 - 15)
        matrix = (half.double() @ half.double().T).float()
        exact = torch.linalg.matrix_norm(matrix.double(), 2)
        estimate = psgd_kron._spectral_norm(matrix).double()
        assert 0.5 * exact <= estimate <= exact * (1 + 1e-5)
    assert psgd_kron._spectral_norm(torch.zeros(size, size)).isfinite()


@accepts("O+PSGD")
def test_gradients_of_a_quadratic_are_whitened():
    """Of ``½ <x, A x B>`` with noise x the gradients have the covariance ``B² ⊗ A²``; the updates nearly that of noise."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.diag(torch.tensor([10.0, 1.0, 0.3])), torch.tensor([[2.0, 0.9], [0.9, 0.5]])
    noise = torch.randn(400, 3, 2, generator=generator)
    steps = [[1e-4 * a @ x @ b] for x in noise]
    make = lambda: [m.PSGDKron(0.0, precond_lr, init_scale=None, max_rms=None, update_probability=1.0)]  # noqa: E731
    updates = outputs(make, [*steps, *steps[:200]])[400:]
    samples = torch.stack([u.reshape(-1) for (u,) in updates])
    covariance = samples.T @ samples / len(samples)
    values = torch.linalg.eigvalsh(covariance)
    raw = torch.stack([g.reshape(-1) for (g,) in steps]) * 1e4
    assert torch.linalg.cond(raw.T @ raw) > 1e4
    assert 0.6 < values.min()
    assert values.max() < 1.6


def precond_lr(step):
    """Long steps at first, and then short ones, behind which there is little noise."""
    return 0.5 if step < 150 else max(0.5 * 0.98 ** (step - 150), 0.002)


def test_dead_and_exploding_gradients():
    """What is 0 for ever leaves the factors finite, and what is not finite leaves them as they are."""
    param = torch.ones(3, 2, requires_grad=True)
    optimizer = Modular([param], m.PSGDKron(0.5), error_if_nonfinite=False)
    before = param.detach().clone()
    for _ in range(250):
        param.grad = torch.zeros(3, 2)
        optimizer.step()
    assert torch.equal(param, before)
    for value in (1e-8, 1e8):
        param.grad = torch.full((3, 2), value)
        optimizer.step()
        assert param.isfinite().all()
    (name,) = [name for name in optimizer.state[param] if "factors" in name]
    factors = optimizer.state[param][name].clone()
    param.grad = torch.full((3, 2), torch.nan)
    optimizer.step()
    assert torch.equal(optimizer.state[param][name], factors)
    assert factors.isfinite().all()


def test_a_step_that_would_leave_no_inverse_is_left_out():
    """A number: ``Q - Q (q² - 1) / (q² + 1)`` is 0 for large gradients, in float32."""
    grads = [[torch.full((2, 1, 2), 1e15)]] * 3
    results = outputs(lambda: [m.PSGDKron(precond_lr=1.0, max_rms=None)], grads)
    assert all(result.isfinite().all() for (result,) in results)


def test_schedule():
    """Every step at first, and then fewer, down to three in a hundred; the same steps in any other run."""
    due = psgd_kron._is_due(torch.arange(1, 6001, dtype=torch.float64), None).tolist()
    assert all(due[:501])
    assert sum(due[1500:1600]) == pytest.approx(100 / math.ceil(math.exp(1.05)), abs=2)
    assert sum(due[5000:]) == pytest.approx(1000 / math.ceil(1 / 0.03), abs=1)
    constant = psgd_kron._is_due(torch.arange(1, 10), 0.25).tolist()
    assert constant == [True, False, False, False] * 2 + [True]


def test_the_root_mean_square_is_limited():
    (update,) = outputs(lambda: [m.PSGDKron(max_rms=0.7)], [make_tensors(0, [(5, 4)])])[0]
    assert (update**2).mean().sqrt() == pytest.approx(0.7, rel=1e-5)
    for scale in (1e-3, 1e4):
        grads = [[t * scale for t in make_tensors(0, [(5, 4)])]]
        (update,) = outputs(lambda: [m.PSGDKron(precond_lr=0.0, init_scale=None, max_rms=None)], grads)[0]
        assert (update**2).mean().sqrt() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"memory_save_mode": "diag"}, "memory_save_mode='diag'; expected None, 'one_diag' or 'all_diag'"),
        ({"update_probability": 0.0}, r"update_probability=0.0; expected a number in \(0, 1\], or None for a schedule"),
        ({"max_size_triangular": -1}, "max_size_triangular=-1; expected a whole number of at least 0"),
        ({"min_ndim_triangular": 1.5}, "min_ndim_triangular=1.5; expected a whole number of at least 0"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(OptionError, match=f"PSGDKron: {text}"):
        m.PSGDKron(**options)
