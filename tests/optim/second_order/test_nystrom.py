"""Sketches of Hessians against dense linear algebra."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from graphopt.optim.core.var import Var
from graphopt.optim.second_order.nystrom import nystrom
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, in_plane, quadratic, rosenbrock, steps_until
from tests.optim.second_order.test_newton import grad_of


def with_eigenvalues(values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = rotation @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotation.T
    return (matrix + matrix.T) / 2


def sketch(matrix, rank, seed=0):
    like = torch.ones(len(matrix), dtype=torch.float64)
    vectors, values = nystrom(None, matrix.mv, like, rank, seed, Var([like]))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values)).double(), rtol=0, atol=1e-12)
    return vectors @ torch.diag(values) @ vectors.T


def test_sketch():
    """Nyström's formula; nothing lost of matrices of low rank; the absolute value of indefinite ones."""
    matrix = with_eigenvalues([50.0, 20.0, 5.0, 1.0, 0.5, 0.1])
    random = torch.randn(6, 3, generator=_generator(0), dtype=torch.float64)
    products = matrix @ random
    expected = products @ torch.linalg.solve(random.T @ products, products.T)
    torch.testing.assert_close(sketch(matrix, 3), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(sketch(matrix, 9), matrix, rtol=0, atol=1e-10)
    low = with_eigenvalues([3.0, 2.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(sketch(low, 3), low, rtol=0, atol=1e-10)
    indefinite, absolute = with_eigenvalues([3.0, -2.0, 1.0, -0.1]), with_eigenvalues([3.0, 2.0, 1.0, 0.1])
    torch.testing.assert_close(sketch(indefinite, 4), absolute, rtol=0, atol=1e-10)


def _generator(seed):
    from graphopt.optim.grad_approximation.random_directions import generators

    return generators([torch.ones(1)], seed, 0)[torch.device("cpu")]


@accepts("N3")
@pytest.mark.parametrize(("size", "condition"), [(4, 10), (8, 100)])
def test_a_full_sketch_solves_quadratics(size, condition):
    problem, _ = quadratic(size, condition, cut=3)
    optimizer = Modular(problem.params, m.NystromSketchAndSolve(size, reg=1e-9))
    for _ in range(2):
        optimizer.step(problem.closure)
    assert grad_of(problem).norm() <= 1e-6  # of the order of reg


@accepts("N3")
def test_sketch_and_solve_on_rosenbrock():
    problem = in_plane(rosenbrock)
    assert steps_until(problem, Modular(problem.params, m.NystromSketchAndSolve(2), m.StrongWolfe()), 1e-6, 30) <= 30


def test_the_step_of_a_sketch():
    """By the inverse of the whole matrix instead of U; with what ``inner`` makes of the update."""
    problem, matrix = quadratic(8, 100, cut=3)
    before, grad = problem.vector, grad_of(problem)
    module = m.NystromSketchAndSolve(3, reg=0.7, seed=5, inner=m.Mul(2.0))
    Modular(problem.params, module).step(problem.closure)
    approximate = sketch(matrix, 3, seed=5)
    expected = torch.linalg.solve(approximate + 0.7 * torch.eye(8), 2 * grad)
    torch.testing.assert_close(before - problem.vector, expected, rtol=1e-6, atol=1e-8)


@accepts("N4")
@pytest.mark.parametrize("sketch_size", [2, 8])
def test_preconditioned_gradients_solve_quadratics(sketch_size):
    problem, _ = quadratic(8, 100, cut=3)
    module = m.NystromPCG(sketch_size, maxiter=20, tol=1e-12, reg=0.0)
    Modular(problem.params, module).step(problem.closure)
    assert grad_of(problem).norm() <= 1e-9


@accepts("N4")
@pytest.mark.parametrize("method", ["forward", "forward_over_reverse"])
def test_fewer_products_than_without_a_preconditioner(method):
    """Ten large eigenvalues; the same residual."""
    values = torch.cat([torch.logspace(2, 4, 10), torch.linspace(1, 3, 40)]).tolist()
    matrix, linear = with_eigenvalues(values), torch.randn(50, dtype=torch.float64)

    def solve(module):
        problem = Problem(lambda x: 0.5 * x @ matrix @ x - linear @ x, [0.0] * 50)
        Modular(problem.params, module).step(problem.closure)
        return len(problem.calls) - 1, float(grad_of(problem).norm() / linear.norm())

    plain, residual = solve(m.NewtonCG(tol=1e-6, reg=0.0, hvp_method=method))
    fewer, other = solve(m.NystromPCG(12, tol=1e-6, reg=0.0, hvp_method=method))
    assert residual <= 2e-6
    assert other <= 2e-6
    assert fewer < 0.8 * plain


@accepts("N4")
def test_preconditioned_gradients_on_rosenbrock():
    problem = in_plane(rosenbrock)
    assert steps_until(problem, Modular(problem.params, m.NystromPCG(2), m.StrongWolfe()), 1e-6, 25) <= 25


def test_directions_are_those_of_the_seed():
    def run(seed):
        problem, _ = quadratic(8, 100)
        optimizer = Modular(problem.params, m.NystromSketchAndSolve(3, reg=1.0, seed=seed), m.LR(0.5))
        for _ in range(2):
            optimizer.step(problem.closure)
        return problem.vector

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert not torch.equal(run(None), run(None))


def test_bad_options():
    with pytest.raises(OptionError, match="NystromSketchAndSolve: rank=0; expected an integer of at least 1"):
        m.NystromSketchAndSolve(0)
    with pytest.raises(OptionError, match=r"NystromPCG: sketch_size=2\.5; expected an integer of at least 1"):
        m.NystromPCG(2.5)
    with pytest.raises(OptionError, match="NystromPCG: maxiter=0; expected an integer of at least 1 or None"):
        m.NystromPCG(2, maxiter=0)
