"""Newton's method against linear algebra."""

import pytest
import torch

from graphopt.errors import ModuleError, NonFiniteError, OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, in_plane, quadratic, rosenbrock, steps_until
from tests.optim.second_order.test_derivatives import exact_hessian, problem_of_three


def grad_of(problem):
    grads = torch.autograd.grad(problem.loss_of(*problem.params), problem.params)
    return torch.cat([grad.reshape(-1) for grad in grads])


def by_matrix(matrix, linear=(0.0, 0.0), start=(1.0, 1.0)):
    matrix, linear = torch.tensor(matrix, dtype=torch.float64), torch.tensor(linear, dtype=torch.float64)
    return Problem(lambda x: 0.5 * x @ matrix @ x - linear @ x, list(start))


@accepts("N1")
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("condition", [10, 100])
@pytest.mark.parametrize("options", [{}, {"vectorize": False}, {"hessian_method": "forward_over_reverse"}], ids=str)
def test_quadratics_need_one_step(size, condition, options):
    problem, _ = quadratic(size, condition, cut=3)
    Modular(problem.params, m.Newton(reg=0.0, **options)).step(problem.closure)
    assert grad_of(problem).norm() <= 1e-10


@accepts("N1")
@pytest.mark.parametrize("num_tensors", [1, 2])
def test_rosenbrock(num_tensors):
    problem = in_plane(rosenbrock, num_tensors)
    assert steps_until(problem, Modular(problem.params, m.Newton(), m.StrongWolfe()), 1e-6, 25) <= 25


@accepts("N1")
def test_along_the_lowest_eigenvector():
    """(Rows of the matrix of eigenvectors are none.)"""
    problem = by_matrix([[1.0, 3.0], [3.0, 1.5]], start=(0.3, -1.0))
    before, grad = problem.vector, grad_of(problem)
    vectors = torch.linalg.eigh(torch.tensor([[1.0, 3.0], [3.0, 1.5]], dtype=torch.float64))[1]
    lowest = vectors[:, 0] * torch.sign(vectors[:, 0] @ grad)
    Modular(problem.params, m.Newton(search_negative=True)).step(problem.closure)
    torch.testing.assert_close(before - problem.vector, lowest, rtol=0, atol=1e-12)


def test_search_negative_leaves_a_saddle_and_solves_elsewhere():
    saddle = by_matrix([[1.0, 0.0], [0.0, -1.0]], start=(0.0, 0.0))
    Modular(saddle.params, m.Newton(search_negative=True)).step(saddle.closure)
    assert saddle.vector.abs().tolist() == [0.0, 1.0]
    problem, _ = quadratic(4, 10)
    Modular(problem.params, m.Newton(reg=0.0, search_negative=True)).step(problem.closure)
    assert grad_of(problem).norm() <= 1e-10


MATRIX = torch.tensor([[2.0, 1.0, 0.5], [1.0, -1.0, 0.3], [0.5, 0.3, 4.0]], dtype=torch.float64)


def absolute(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.abs()) @ vectors.T


OPTIONS = {
    "reg": ({"reg": 0.5}, lambda H: H + 0.5 * torch.eye(3).double()),
    "indefinite": ({"reg": 0.0}, lambda H: H),
    "eig_reg": (
        {"reg": 0.1, "eig_reg": True},
        lambda H: H + (0.1 - torch.linalg.eigvalsh(H)[0]) * torch.eye(3).double(),
    ),
    "eigval_tfm": ({"reg": 0.0, "eigval_tfm": torch.abs}, absolute),
    "H_tfm": ({"reg": 0.0, "H_tfm": lambda H, g: (absolute(H), False)}, absolute),
    "H_tfm inverse": ({"reg": 0.0, "H_tfm": lambda H, g: (torch.linalg.inv(absolute(H)), True)}, absolute),
    "H_tfm update": (
        {"reg": 0.1, "H_tfm": lambda H, g: g / H.diagonal()},
        lambda H: (H + 0.1 * torch.eye(3).double()).diag().diag(),
    ),
    "central": ({"reg": 0.0, "hessian_method": "central"}, lambda H: H),
}


@pytest.mark.parametrize(("options", "expected"), OPTIONS.values(), ids=OPTIONS)
def test_options(options, expected):
    problem = by_matrix(MATRIX.tolist(), (1.0, 2.0, 3.0), (1.0, -1.0, 0.5))
    before, grad = problem.vector, grad_of(problem)
    Modular(problem.params, m.Newton(**options)).step(problem.closure)
    step = torch.linalg.solve(expected(MATRIX), grad)
    torch.testing.assert_close(before - problem.vector, step, rtol=1e-8, atol=1e-8)


def test_inner_and_what_comes_in_are_what_is_solved_for():
    steps = []
    for modules in ([m.Mul(2.0), m.Newton(reg=0.0, inner=m.Mul(3.0))], [m.Newton(reg=0.0), m.Mul(6.0)]):
        problem = problem_of_three()
        before = problem.vector
        Modular(problem.params, modules, m.LR(0.01)).step(problem.closure)
        steps.append(before - problem.vector)
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-12)
    hessian = exact_hessian(problem_of_three())
    expected = 0.06 * torch.linalg.solve(hessian, grad_of(problem_of_three()))
    torch.testing.assert_close(steps[0], expected, rtol=1e-8, atol=1e-10)


def test_singular_matrices():
    """The step of least norm."""
    problem = by_matrix([[1.0, 0.0], [0.0, 0.0]], start=(3.0, 5.0))
    Modular(problem.params, m.Newton(reg=0.0)).step(problem.closure)
    assert problem.vector.tolist() == [0.0, 5.0]
    zero = by_matrix([[1.0, 0.0], [0.0, 0.0]], (0.0, 1.0), (3.0, 5.0))
    Modular(zero.params, m.Newton(reg=0.0, eigval_tfm=torch.abs)).step(zero.closure)
    assert zero.vector.tolist() == [0.0, 5.0]


def test_float32_and_mixed_dtypes():
    torch.manual_seed(0)
    a, b = torch.nn.Parameter(torch.randn(3)), torch.nn.Parameter(torch.randn(2, dtype=torch.float64))

    def closure(backward=True):
        loss = ((a - 1) ** 2).sum().double() + ((b + 2) ** 2).sum() + a.sum().double() * b.sum() * 0.1
        if backward:
            raise AssertionError
        return loss

    Modular([a, b], m.Newton(reg=0.0)).step(closure)
    grads = torch.autograd.grad(closure(False), [a, b])
    assert all(grad.abs().max() < 1e-5 for grad in grads)
    assert (a.dtype, b.dtype) == (torch.float32, torch.float64)


def test_bad_options():
    with pytest.raises(OptionError, match=r"Newton: H_tfm=3; expected a function, or None"):
        m.Newton(H_tfm=3)
    with pytest.raises(OptionError, match=r"Newton: H_tfm with eigval_tfm or search_negative; do all of it in H_tfm"):
        m.Newton(H_tfm=lambda H, g: g, search_negative=True)
    problem = by_matrix([[1.0, 0.0], [0.0, 2.0]])
    with pytest.raises(
        OptionError, match=r"H_tfm returned a tensor of shape \(2, 2\); expected the update, shape \(2,\), or"
    ):
        Modular(problem.params, m.Newton(H_tfm=lambda H, g: H)).step(problem.closure)
    with pytest.raises(
        NonFiniteError, match=r"the solution of \(H \+ reg I\) x = u is not finite; nothing was changed"
    ):
        Modular(problem.params, m.Newton(eigval_tfm=lambda L: L * torch.nan)).step(problem.closure)
    assert problem.vector.tolist() == [1.0, 1.0]
    groups = [{"params": problem.params, "reg": 0.1}, {"params": [torch.nn.Parameter(torch.ones(1))], "reg": 0.2}]
    with pytest.raises(OptionError, match=r"reg is 0\.1 for one parameter and 0\.2 for another"):
        Modular(groups, m.Newton()).step(problem.closure)
    assert issubclass(ModuleError, RuntimeError)
