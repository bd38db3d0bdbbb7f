"""`Shampoo` against its definition with numpy, and what its matrices share with SOAP."""

import numpy as np
import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from graphopt.optim.adaptive import kronecker
from graphopt.optim.core.transform import chain
from tests.optim.catalogue import accepts
from tests.optim.outputs import make_tensors, outputs
from tests.optim.problems import booth, in_plane

NUM_STEPS = 5


def steps_of(*shapes, num_steps=NUM_STEPS):
    return [make_tensors(seed, shapes) for seed in range(num_steps)]


def inverse_root(matrix, order):
    """By singular values, the pseudoinverse where they are 0."""
    left, values, right = np.linalg.svd(matrix)
    is_zero = values <= values.max() * 1e-14 * len(values)
    return left @ np.diag(np.where(is_zero, 0, np.where(is_zero, 1, values) ** (-1 / order))) @ right


def reference(grads, *, freq=1, beta=None, decay=1.0, order=None, max_dim=2000, momentum=0.0):
    """The definition, for tensors whose axes are not merged."""
    shape = grads[0].shape
    axes = [axis for axis, length in enumerate(shape) if 1 < length <= max_dim]
    matrices = {axis: np.eye(shape[axis]) for axis in axes}
    roots, results, buffer = {}, [], np.zeros(shape)
    for step, grad in enumerate(g.numpy() for g in grads):
        buffer = momentum * buffer + grad
        result = buffer
        for axis in axes:
            flat = np.moveaxis(grad, axis, 0).reshape(shape[axis], -1)
            old = matrices[axis] * decay
            matrices[axis] = old + flat @ flat.T if beta is None else beta * old + (1 - beta) * flat @ flat.T
            if step % freq == 0:
                roots[axis] = inverse_root(matrices[axis], 2 * len(axes) if order is None else order)
            result = np.moveaxis(np.tensordot(roots[axis], result, (1, axis)), 0, axis)
        results.append(torch.from_numpy(result))
    return results


def check(grads, make, tolerance=1e-12, **options):
    results = outputs(lambda: [make()], grads)
    for index in range(len(grads[0])):
        for result, expected in zip(results, reference([g[index] for g in grads], **options), strict=True):
            torch.testing.assert_close(result[index], expected, rtol=tolerance, atol=tolerance)


@accepts("O2")
def test_matrices_are_multiplied_by_fourth_roots():
    check(steps_of((3, 4)), lambda: m.Shampoo(1, merge_small=False))


@accepts("O2")
def test_axes_that_are_too_long_are_left_out():
    """With the power of the axes that are left."""
    shapes = (3, 50), (50, 3), (20, 21), (2, 30, 4)
    check(steps_of(*shapes), lambda: m.Shampoo(1, merge_small=False, max_dim=20), max_dim=20)
    for results in outputs(lambda: [m.Shampoo(max_dim=20), m.LR(0.1)], steps_of((3, 50), (50, 3), (50, 60))):
        assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"update_freq": 2}, {"freq": 2}),
        ({"beta": 0.7}, {"beta": 0.7}),
        ({"decay": 0.5}, {"decay": 0.5}),
        ({"exp_override": 3.0}, {"order": 3.0}),
        ({"inner": m.HeavyBall(0.5)}, {"momentum": 0.5}),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options(options, expected):
    shapes = (3, 4), (5,), (2, 3, 4), (1, 6), (3, 4)  # two of one shape are one call
    settings = {"update_freq": 1, "merge_small": False, **options}
    check(steps_of(*shapes), lambda: m.Shampoo(**settings), **expected)


def test_merged_axes():
    """Neighbours but the first are one axis up to ``max_dim``; the numbers are those of the tensor in that shape."""
    cases = {
        (3, 4): (3, 4),
        (1, 8, 2, 1, 3): (8, 6),
        (2, 3, 2, 2): (2, 12),
        (2, 5, 50, 2, 2): (2, 5, 50, 4),
        (1, 1): (),
    }
    for shape, merged in cases.items():
        assert kronecker.merge(shape, 12) == merged
        tall = [[g[0].reshape(merged)] for g in steps_of(shape)]
        results = outputs(lambda: [m.Shampoo(2, max_dim=12)], steps_of(shape))
        flat = outputs(lambda: [m.Shampoo(2, max_dim=12, merge_small=False)], tall)
        for (result,), (expected,) in zip(results, flat, strict=True):
            torch.testing.assert_close(result.reshape(merged), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [None, 0.9])
def test_without_matrices_it_is_adagrad(beta):
    """Scalars, long vectors, and vectors that shall not have any."""
    grads = steps_of((), (1,), (7,), (9,))
    module = m.Shampoo(1, beta, max_dim=8, precondition_1d=False, adagrad_eps=0.01)
    total = [torch.zeros_like(g) for g in grads[0]]
    for results, step in zip(outputs(lambda: [module], grads), grads, strict=True):
        for index, (result, g) in enumerate(zip(results, step, strict=True)):
            total[index] = total[index] + g**2 if beta is None else beta * total[index] + (1 - beta) * g**2
            torch.testing.assert_close(result, g / (total[index].sqrt() + 0.01))


@accepts("O2")
def test_grafted_on_a_plane():
    problem = in_plane(booth, 2)
    optimizer = Modular(problem.params, m.GraftModules(m.Shampoo(), m.RMSprop()), m.LR(4.0))
    for _ in range(50):
        optimizer.step(problem.closure)
    assert problem.loss < 0.02


def test_tensors_of_one_shape_are_one_call():
    grads = steps_of((3, 4), (3, 4), (3, 4), (2, 5))
    together = outputs(lambda: [m.Shampoo(2, max_dim=8)], grads)
    for index in range(4):
        alone = outputs(lambda: [m.Shampoo(2, max_dim=8)], [[step[index]] for step in grads])
        for step, (expected,) in zip(together, alone, strict=True):
            torch.testing.assert_close(step[index], expected, rtol=1e-12, atol=1e-12)


def test_derivative_by_the_decay():
    """Exact, although matrices that start as the identity have equal eigenvalues, of which `torch.linalg.eigh` has none."""
    grads = steps_of((4, 3), num_steps=3)

    def loss(beta):
        transform = chain(m.Shampoo(1, beta, merge_small=False, exp_override=torch.tensor(3.0)))
        state, total = transform.init(grads[0]), 0.0
        for step in grads:
            updates, state = transform.update(step, state, step)
            total = total + (updates[0] ** 3).sum()
        return total

    beta, delta = torch.tensor(0.9, dtype=torch.float64), 1e-6
    difference = (loss(beta + delta) - loss(beta - delta)) / (2 * delta)
    torch.testing.assert_close(torch.func.grad(loss)(beta), difference, rtol=1e-6, atol=0)
    betas = torch.stack([beta, beta - 0.1])
    both = torch.func.vmap(torch.func.grad(loss))(betas)
    torch.testing.assert_close(both[0], difference, rtol=1e-6, atol=0)


def test_power_by_gradcheck():
    torch.manual_seed(0)
    half = torch.randn(4, 4, dtype=torch.float64)
    exponent = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    matrix = (half @ half.T).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, p: kronecker.power((a + a.T) / 2, p), (matrix, exponent))


@pytest.mark.parametrize("make", [lambda: m.Shampoo(1, 0.0), lambda: m.SOAP(precond_freq=1)], ids=["Shampoo", "SOAP"])
def test_what_is_singular_or_not_finite_does_not_raise(make):
    """An average that forgets at once is singular; with pseudoinverses the update is its polar factor."""
    grads = [[torch.zeros(3, 4)], *steps_of((3, 4)), [torch.full((3, 4), 1e-30)], [torch.full((3, 4), torch.nan)]]
    grads = [[g.float() for g in step] for step in grads]
    results = outputs(lambda: [make()], [*grads, grads[1]], error_if_nonfinite=False)
    assert not results[0][0].any()
    assert all(result.isfinite().all() for (result,) in results[:-2])
    if type(make()) is m.Shampoo:
        torch.testing.assert_close(torch.linalg.svdvals(results[3][0]), torch.ones(3), rtol=1e-5, atol=0)


def test_eigenvalues_that_do_not_converge(monkeypatch):
    """Once: float64 helps. Always: the diagonal is used."""
    real, matrix = torch.linalg.eigh, torch.tensor([[4.0, 1.0], [1.0, 1.0]])
    calls = []

    def fails(a):
        calls.append(a.dtype)
        if len(calls) <= num_failures:
            raise torch.linalg.LinAlgError("did not converge")
        return real(a)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    num_failures = 1
    values, vectors = kronecker.eigh(matrix)
    torch.testing.assert_close(vectors * values @ vectors.T, matrix, rtol=1e-5, atol=1e-5)
    assert calls == [torch.float32, torch.float64]
    calls.clear()
    num_failures = 2
    torch.testing.assert_close(kronecker.power(matrix, -0.5), torch.diag(torch.tensor([0.5, 1.0])))


@pytest.mark.parametrize("make", [m.Shampoo, m.SOAP])
@pytest.mark.parametrize("value", [0, 1.5, True, None])
def test_bad_options(make, value):
    interval = "update_freq" if make is m.Shampoo else "precond_freq"
    for name in (interval, "max_dim"):
        with pytest.raises(OptionError, match=f"{name}={value!r}; expected a positive whole number"):
            make(**{name: value})


def test_equal_to_torchzero():
    tz = pytest.importorskip("torchzero")
    grads = [g for (g,) in steps_of((3, 4))]
    param = torch.zeros(3, 4, dtype=torch.float64, requires_grad=True)
    theirs = tz.Optimizer([param], tz.m.Shampoo(reg=0.0, precond_freq=2, merge_small=False))
    for g, (ours,) in zip(grads, outputs(lambda: [m.Shampoo(2, merge_small=False)], [[g] for g in grads]), strict=True):
        before, param.grad = param.detach().clone(), g.clone()
        theirs.step()
        torch.testing.assert_close(before - param.detach(), ours, rtol=1e-12, atol=1e-12)
