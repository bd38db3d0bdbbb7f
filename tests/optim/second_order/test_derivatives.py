"""Hessians and products with them, by every method, against ``torch.autograd.functional``; and functions that have none."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from graphopt.errors import ClosureError, ModuleError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim import Modular, Module, m
from graphopt.optim.second_order.derivatives import jacobian
from graphopt.optim.second_order.hessian_products import METHODS, hessian_matrix, hessian_product
from tests.optim.problems import Problem, booth, in_plane

TOLERANCE = {"autograd": 1e-12, "forward_over_reverse": 1e-12, "forward": 1e-4, "central": 1e-6}
STEP = {"forward": 1e-7, "central": 1e-5}


def of_three(a, b, c):
    return torch.cosh(a).sum() * b + (a.sum() - b).pow(4) + (c**2).sum() * a.prod() + torch.sin(c).sum()


def problem_of_three(dtype=torch.float64):
    return Problem(of_three, [0.5, -1.0], 0.3, [[1.0, 0.2], [-0.4, 2.0]], dtype=dtype)


def exact_hessian(problem):
    sizes, shapes = [p.numel() for p in problem.params], [p.shape for p in problem.params]

    def of_vector(vector):
        return problem.loss_of(*[v.reshape(s) for v, s in zip(vector.split(sizes), shapes, strict=True)])

    return torch.autograd.functional.hessian(of_vector, problem.vector)


@contextmanager
def unchanged(optimizer):
    """Parameters are afterwards what they were, bit for bit, and nothing is remembered but a count of no steps."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    yield
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(set(state) <= {"step"} and float(state.get("step", 0)) == 0 for state in optimizer.state.values())


class Look(Module):
    """Calls a function with the step's `Var`; the parameters stay."""

    needs_closure = True

    def __init__(self, function):
        super().__init__()
        self.function = function

    def step(self, var):
        self.result = self.function(self, var)
        var.update = [torch.zeros_like(p) for p in var.params]
        return var


def look(problem, function):
    module = Look(function)
    Modular(problem.params, module).step(problem.closure)
    return module.result


@pytest.mark.parametrize("method", METHODS)
def test_hessian(method):
    problem = problem_of_three()
    before = problem.vector
    for vectorize in (True, False):
        h = STEP.get(method, 1.0)
        matrix = look(problem, lambda module, var, h=h, v=vectorize: hessian_matrix(module, var, method, h, v))
        torch.testing.assert_close(matrix, exact_hessian(problem), rtol=0, atol=TOLERANCE[method])
        assert torch.equal(matrix, matrix.T)
    assert torch.equal(problem.vector, before)


@pytest.mark.parametrize("method", METHODS)
def test_products(method):
    """The graph is kept from product to product; parameters are in place between and afterwards, bit for bit."""
    problem = problem_of_three()
    before = problem.vector
    vectors = torch.randn(3, 7, dtype=torch.float64)

    def products(module, var):
        multiply = hessian_product(module, var, method, STEP.get(method, 1.0))
        found = [multiply(vector) for vector in vectors]
        assert torch.equal(problem.vector, before)
        assert not any(product.requires_grad for product in found)
        return torch.stack(found)

    expected = vectors @ exact_hessian(problem)
    torch.testing.assert_close(look(problem, products), expected, rtol=0, atol=10 * TOLERANCE[method])
    assert all(p.is_leaf and p.requires_grad for p in problem.params)
    problem.closure()  # no tangent is left behind
    assert all(torch.autograd.forward_ad.unpack_dual(p).tangent is None for p in problem.params)
    calls = {"autograd": [False], "forward_over_reverse": [True, *[False] * 3], "forward": [True] * 4}
    assert problem.calls[:-1] == calls.get(method, [True] * 7)


@pytest.mark.parametrize("method", ["autograd", "forward_over_reverse"])
def test_products_of_a_model(method):
    """Shared weights, layers with buffers, float32."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    model = nn.Sequential(linear, nn.Tanh(), linear, nn.LayerNorm(3), nn.Softplus())
    inputs, params = torch.randn(5, 3), list(model.parameters())

    def loss_of(weight, bias, scale, shift):
        hidden = torch.tanh(inputs @ weight.T + bias) @ weight.T + bias
        hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        return torch.log1p(torch.exp(hidden * scale + shift)).square().mean()

    problem = Problem(lambda *_: model(inputs).square().mean())
    problem.params = params
    vector = torch.randn(sum(p.numel() for p in params))
    parts = [v.reshape(p.shape) for v, p in zip(vector.split([p.numel() for p in params]), params, strict=True)]
    expected = torch.autograd.functional.hvp(loss_of, tuple(p.detach() for p in params), tuple(parts))[1]
    product = look(problem, lambda module, var: hessian_product(module, var, method, 1.0)(vector))
    torch.testing.assert_close(product, torch.cat([part.reshape(-1) for part in expected]), rtol=1e-3, atol=1e-5)


class OnlyLoops(torch.autograd.Function):
    """A cube whose derivative vmap does not know."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert float(grad.sum()) == float(grad.sum())  # a number cannot be taken out of a batch
        return 3 * x**2 * grad


class Once(torch.autograd.Function):
    """A cube that can be differentiated once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_operators_without_a_rule_of_vmap_are_computed_row_by_row():
    x = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64, requires_grad=True)
    found = jacobian(torch.stack([OnlyLoops.apply(x).sum(), x.prod()]), [x])
    torch.testing.assert_close(found, torch.tensor([[3.0, 12.0, 3.0], [-2.0, -1.0, 2.0]], dtype=torch.float64))
    problem = Problem(lambda x: OnlyLoops.apply(x).sum(), [1.0, 2.0])
    Modular(problem.params, m.Newton(reg=0.0)).step(problem.closure)
    torch.testing.assert_close(problem.vector, torch.tensor([0.5, 1.0], dtype=torch.float64))


def test_many_rows():
    x = torch.randn(300, dtype=torch.float64, requires_grad=True)
    assert torch.equal(jacobian(x**2, [x]), torch.diag(2 * x.detach()))


HESSIAN_MODULES = {
    "Newton": lambda **options: m.Newton(**options),
    "NewtonCG": lambda hessian_method="autograd": m.NewtonCG(hvp_method=hessian_method),
    "NystromSketchAndSolve": lambda hessian_method="autograd": m.NystromSketchAndSolve(2, hvp_method=hessian_method),
    "NystromPCG": lambda hessian_method="autograd": m.NystromPCG(2, hvp_method=hessian_method),
    "CubicRegularization": lambda **options: m.CubicRegularization(**options),
    "HigherOrderNewton": lambda: m.HigherOrderNewton(),
}
every_module = pytest.mark.parametrize("name", HESSIAN_MODULES)

NO_HESSIAN = {
    "linear": lambda x: 3 * x.sum(),
    "piecewise linear": lambda x: (x - 0.2).abs().sum() + torch.relu(x).sum(),
}


@every_module
@pytest.mark.parametrize("loss_of", NO_HESSIAN.values(), ids=NO_HESSIAN)
def test_functions_without_curvature(name, loss_of):
    methods = [{}] if name == "HigherOrderNewton" else [{}, {"hessian_method": "forward"}]
    for options in methods:
        problem = Problem(loss_of, [0.5, -1.0, 1.0])
        optimizer = Modular(problem.params, HESSIAN_MODULES[name](**options))
        text = rf"module 1 of 1, {name}: the second derivatives of the loss are zero, .* nothing was changed\. Use a module that"
        with unchanged(optimizer), pytest.raises(ModuleError, match=text):
            optimizer.step(problem.closure)


@every_module
def test_operators_that_cannot_be_differentiated_twice(name):
    problem = Problem(lambda x: Once.apply(x).square().sum(), [0.5, -1.0, 1.0])
    optimizer = Modular(problem.params, HESSIAN_MODULES[name]())
    text = rf"module 1 of 1, {name}: the loss cannot be differentiated so often \(a function in it is marked with @once_diff.* Use"
    with unchanged(optimizer), pytest.raises(UnsupportedError, match=text):
        optimizer.step(problem.closure)
    if name != "HigherOrderNewton":
        Modular(problem.params, HESSIAN_MODULES[name](hessian_method="central")).step(problem.closure)
        text = rf"{name}: h.*='forward_over_reverse', but an operator in the loss has no derivative along a vector"
        with pytest.raises(UnsupportedError, match=text):
            Modular(problem.params, HESSIAN_MODULES[name](hessian_method="forward_over_reverse")).step(problem.closure)


@every_module
def test_second_derivatives_that_are_not_finite(name):
    problem = Problem(lambda x: (x.abs() ** 1.5).sum() + (x**2).sum(), [0.0, 1.0])
    optimizer = Modular(problem.params, HESSIAN_MODULES[name]())
    with (
        unchanged(optimizer),
        pytest.raises(NonFiniteError, match=rf"{name}: the second derivatives of the loss hold NaN or"),
    ):
        optimizer.step(problem.closure)


@every_module
def test_behind_a_gradient_approximation(name):
    """Exact derivatives would be those of another function; differences of its gradients are right."""
    methods = ["autograd", "forward_over_reverse"] if name != "HigherOrderNewton" else [None]
    for method in methods:
        problem = in_plane(booth)
        module = HESSIAN_MODULES[name](**({} if method is None else {"hessian_method": method}))
        optimizer = Modular(problem.params, m.FDM(), module)
        with unchanged(optimizer), pytest.raises(ModuleError, match=rf"{name}: .* behind a module .* Use .*'forward'"):
            optimizer.step(problem.closure)
    if name == "HigherOrderNewton":
        return
    for method in ("forward", "central"):
        problem = in_plane(booth)
        module = HESSIAN_MODULES[name](hessian_method=method)
        optimizer = Modular(problem.params, m.FDM(), module, m.Backtracking())
        for _ in range(10):
            optimizer.step(problem.closure)
        assert problem.loss < 1e-6
        assert not any(problem.calls)


@every_module
def test_at_the_minimum_nothing_moves(name):
    problem = Problem(lambda x: ((x - 1) ** 2).sum(), [1.0, 1.0])
    Modular(problem.params, HESSIAN_MODULES[name]()).step(problem.closure)
    assert problem.vector.tolist() == [1.0, 1.0]


@every_module
def test_a_loss_without_a_graph(name):
    problem = in_plane(booth)
    problem.loss_of = lambda x: booth(*x.detach())
    with pytest.raises(
        ModuleError, match=rf"{name}: .* closure\(False\) does not require gradients; nothing was changed"
    ):
        Modular(problem.params, HESSIAN_MODULES[name]()).step(problem.closure)
    with pytest.raises(ClosureError, match=r"takes no argument"):
        Modular(problem.params, HESSIAN_MODULES[name]()).step(lambda: (problem.params[0] ** 2).sum())


def test_bfloat16_is_moved_far_enough():
    problem = Problem(lambda x: (x**2).sum(), [1.0, -2.0, 3.0], dtype=torch.bfloat16)
    for method in ("forward", "central"):
        matrix = look(problem, lambda module, var, k=method: hessian_matrix(module, var, k, 1e-3, True))
        torch.testing.assert_close(matrix, 2 * torch.eye(3), rtol=0.05, atol=0.05)


def test_names_of_methods():
    for name in set(HESSIAN_MODULES) - {"HigherOrderNewton"}:
        with pytest.raises(
            OptionError, match=rf"{name}: h.*_method='exact'; expected one of autograd, forward_over_rev"
        ):
            HESSIAN_MODULES[name](hessian_method="exact")
