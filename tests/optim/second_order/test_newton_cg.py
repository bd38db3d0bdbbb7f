"""NewtonCG against Newton's method with explicit Hessians."""

import pytest
import torch

from graphopt.errors import ModuleError, OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, booth, in_plane, quadratic, rosenbrock, steps_until

METHODS = ["autograd", "forward_over_reverse", "forward", "central"]


def newton(loss_of, params):
    """The exact step."""
    x = torch.cat([p.detach().reshape(-1) for p in params])
    shapes = [p.shape for p in params]

    def of_vector(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        return loss_of(*[part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)])

    grad = torch.autograd.functional.jacobian(of_vector, x)
    return torch.linalg.solve(torch.autograd.functional.hessian(of_vector, x), grad)


def convex(a, b):
    return torch.cosh(a).sum() + (a.sum() - b).pow(4).sum() + 0.5 * (b**2).sum() + a.prod() * 0.1


@accepts("N2")
@pytest.mark.parametrize("method", METHODS)
def test_equal_to_newton(method):
    problem = Problem(convex, [0.5, -1.0], [[0.3], [1.5]])
    module = m.NewtonCG(tol=1e-14, reg=0.0, hvp_method=method, h=1e-7 if method == "forward" else 1e-5)
    optimizer = Modular(problem.params, module, m.LR(0.5))
    for _ in range(6):
        expected = problem.vector - 0.5 * newton(convex, problem.params)
        optimizer.step(problem.closure)
        atol = {"forward": 1e-4, "central": 1e-6}.get(method, 1e-9)
        torch.testing.assert_close(problem.vector, expected, rtol=0, atol=atol)


def test_equal_to_newton_where_the_hessian_is_indefinite_but_the_step_descends():
    problem = in_plane(rosenbrock)
    module = m.NewtonCG(tol=1e-14, reg=0.0, hvp_method="autograd")
    optimizer = Modular(problem.params, module, m.StrongWolfe())
    for _ in range(10):
        before, step = problem.vector, newton(lambda x: rosenbrock(*x), problem.params)
        optimizer.step(problem.closure)
        move = before - problem.vector
        size = float(move @ step / (step @ step))
        torch.testing.assert_close(move, size * step, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_quadratics_need_one_step(method):
    problem, matrix = quadratic(8, 100, cut=3)
    Modular(problem.params, m.NewtonCG(tol=1e-12, reg=0.0, hvp_method=method)).step(problem.closure)
    grad = torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params))
    assert grad.norm() < 1e-5  # differences have rounding errors
    assert len(matrix) == 8


@accepts("N2")
def test_the_example_of_seed_003():
    problem = in_plane(rosenbrock, dtype=torch.float32)
    optimizer = Modular(problem.params, m.NewtonCG(), m.StrongWolfe())
    losses = [optimizer.step(problem.closure).item() for _ in range(20)]
    assert losses[0] == pytest.approx(170.82, rel=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6


@pytest.mark.parametrize("num_tensors", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_rosenbrock(method, num_tensors):
    problem = in_plane(rosenbrock, num_tensors)
    assert steps_until(problem, Modular(problem.params, m.NewtonCG(hvp_method=method), m.StrongWolfe()), 1e-6, 25) <= 25


def saddle(x):
    return x[1] ** 2 - x[0] ** 2 + 0.05 * x[0] ** 4


@pytest.mark.parametrize("start", [[0.3, 1.0], [1e-3, 0.5], [2.0, 0.01], [1.0, 0.01], [0.7, 0.4], [0.5, 0.2]])
def test_negative_curvature_descends(start):
    problem = Problem(saddle, start)
    grad = torch.autograd.grad(saddle(*problem.params), problem.params)[0]
    hessian = torch.autograd.functional.hessian(saddle, problem.params[0].detach())
    before = problem.vector
    Modular(problem.params, m.NewtonCG(hvp_method="autograd", reg=0.0, tol=0.0), m.LR(1e-3)).step(problem.closure)
    step = (before - problem.vector) * 1e3
    # Two conjugate directions: along each the minimum, or as far as it were with the opposite curvature.
    first = grad * (grad @ grad) / (grad @ hessian @ grad).abs()
    other = torch.stack([-(hessian @ grad)[1], (hessian @ grad)[0]])
    along = other * (other @ grad) / (other @ hessian @ other)
    exact = first + along
    if grad @ hessian @ grad < 0:
        expected = first
    elif other @ hessian @ other > 0 or (exact @ grad > 0 and saddle(before - exact) < saddle(before - first + along)):
        expected = exact
    else:
        expected = first - along
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-9)
    assert step @ grad > 0
    optimizer = Modular(problem.params, m.NewtonCG(), m.StrongWolfe())
    for _ in range(30):
        optimizer.step(problem.closure)
    assert problem.loss == pytest.approx(-5.0)


@accepts("N2")
@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
def test_the_steps_of_newton_with_the_whole_matrix(method):
    """Ten of them, of two modules of the library (the tests above do not share code with it)."""
    problems = [Problem(convex, [0.5, -1.0], [[0.3], [1.5]]) for _ in range(2)]
    modules = m.NewtonCG(tol=1e-14, reg=0.0, hvp_method=method), m.Newton(reg=0.0)
    optimizers = [Modular(p.params, module, m.LR(0.5)) for p, module in zip(problems, modules, strict=True)]
    for _ in range(10):
        for problem, optimizer in zip(problems, optimizers, strict=True):
            optimizer.step(problem.closure)
        torch.testing.assert_close(problems[0].vector, problems[1].vector, rtol=0, atol=1e-8)


def test_a_warm_start_needs_fewer_products():
    def num_calls(warm_start):
        problem, _ = quadratic(8, 100)
        optimizer = Modular(problem.params, m.NewtonCG(tol=1e-3, warm_start=warm_start), m.LR(0.05))
        for _ in range(10):
            optimizer.step(problem.closure)
        return len(problem.calls)

    assert num_calls(True) < num_calls(False)


def test_how_often_the_closure_is_called():
    for method, per_product in (("autograd", 0), ("forward", 1), ("central", 2)):
        problem, _ = quadratic(4, 10)
        Modular(problem.params, m.NewtonCG(maxiter=2, tol=0.0, hvp_method=method), m.LR(0.1)).step(problem.closure)
        assert problem.calls == ([False] if method == "autograd" else [True] * (1 + 2 * per_product))


def test_autograd_needs_a_loss_with_a_graph():
    problem = in_plane(booth)
    optimizer = Modular(problem.params, m.FDM(), m.NewtonCG(hvp_method="autograd"))
    with pytest.raises(
        ModuleError, match=r"module 2 of 2, NewtonCG: hvp_method='autograd' behind a module.*'forward' or"
    ):
        optimizer.step(problem.closure)
    problem.loss_of = lambda x: booth(*x.detach())
    with pytest.raises(ModuleError, match=r"the loss of closure\(False\) does not require gradients"):
        Modular(problem.params, m.NewtonCG(hvp_method="autograd")).step(problem.closure)
    assert problem.vector.tolist() == [0.0, -8.0]


def test_parameters_that_the_loss_does_not_use():
    for method in METHODS:
        problem = Problem(lambda a, b: (a**2).sum(), [1.0, 2.0], [3.0])
        Modular(problem.params, m.NewtonCG(hvp_method=method, reg=0.0)).step(
            problem.closure if method != "autograd" else lambda backward=True, p=problem: p.loss_of(*p.params)
        )
        torch.testing.assert_close(
            problem.vector, torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64), rtol=0, atol=1e-6
        )


def test_bad_options():
    with pytest.raises(
        OptionError, match="NewtonCG: hvp_method='exact'; expected one of autograd, forward_over_reverse, forward, c"
    ):
        m.NewtonCG(hvp_method="exact")
    with pytest.raises(OptionError, match="NewtonCG: maxiter=0; expected an integer of at least 1, or None"):
        m.NewtonCG(maxiter=0)
