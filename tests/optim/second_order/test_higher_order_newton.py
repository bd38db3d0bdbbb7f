"""Taylor polynomials of any order, against the functions that they are, and Newton's method."""

import sys

import pytest
import torch

from graphopt.errors import NonFiniteError, OptionError, UnsupportedError
from graphopt.optim import Modular, m
from graphopt.optim.second_order.higher_order_newton import Polynomial
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, in_plane, quadratic, rosenbrock, steps_until
from tests.optim.second_order.test_derivatives import unchanged


def quartic(a, b):
    return (a[0] ** 4 + a[1] ** 4 + b**4).sum() + a.prod() * b.sum() + 3 * b.sum() ** 3 + (a**2).sum() + 2 * b.sum()


def test_a_polynomial_is_the_function():
    """Value, gradient and Hessian of the fourth order at other points; the third one is not."""
    torch.manual_seed(0)
    problem = Problem(quartic, [0.5, -1.0], [0.3])
    for vectorize in (True, False):
        found = {}

        class Look(m.HigherOrderNewton):
            def step(self, var, found=found, vectorize=vectorize):
                found["derivatives"] = self._derivatives(var, 4, vectorize)
                return super().step(var)

        start = problem.vector
        Modular(problem.params, Look(), m.LR(0.0)).step(problem.closure)
        assert torch.equal(problem.vector, start)

        def at(x):
            return quartic(x[:2], x[2:])

        step = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
        polynomial = Polynomial(found["derivatives"])
        expected = float(at(start + step) - at(start))
        assert polynomial.value(step.numpy()) == pytest.approx(expected, rel=1e-12)
        assert Polynomial(found["derivatives"][:3]).value(step.numpy()) != pytest.approx(expected, rel=1e-3)
        gradient = torch.autograd.functional.jacobian(at, start + step)
        hessian = torch.autograd.functional.hessian(at, start + step)
        torch.testing.assert_close(torch.from_numpy(polynomial.gradient(step.numpy())), gradient)
        torch.testing.assert_close(torch.from_numpy(polynomial.hessian(step.numpy())), hessian)


@accepts("N5")
@pytest.mark.parametrize("num_tensors", [1, 2])
@pytest.mark.parametrize("method", [None, "none"])
def test_a_polynomial_needs_one_step(method, num_tensors):
    problem = in_plane(rosenbrock, num_tensors)
    Modular(problem.params, m.HigherOrderNewton(trust_method=method)).step(problem.closure)
    assert problem.loss < 2e-10


@accepts("N5")
@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 6), ({"vectorize": False}, 6), ({"order": 3}, 15), ({"trust_method": "proximal"}, 25), ({"order": 2}, 40)],
    ids=str,
)
def test_rosenbrock(options, most):
    problem = in_plane(rosenbrock)
    optimizer = Modular(problem.params, m.HigherOrderNewton(**options))
    assert steps_until(problem, optimizer, 1e-6, most) <= most
    assert problem.losses[0] == pytest.approx(170.82)


@accepts("N5")
def test_order_two_is_newton_on_quadratics():
    problem, _ = quadratic(4, 10, cut=3)
    other, _ = quadratic(4, 10, cut=3)
    Modular(problem.params, m.HigherOrderNewton(order=2, trust_method=None)).step(problem.closure)
    Modular(other.params, m.Newton(reg=0.0)).step(other.closure)
    torch.testing.assert_close(problem.vector, other.vector, rtol=0, atol=1e-9)


def test_order_one_within_bounds_goes_to_a_corner():
    problem = Problem(lambda x: 3 * x[0] - x[1], [0.0, 0.0])
    optimizer = Modular(problem.params, m.HigherOrderNewton(order=1, trust_init=0.5))
    for _ in range(2):
        optimizer.step(problem.closure)
    assert problem.vector.tolist() == pytest.approx([-1.25, 1.25])  # 0.5, then increased by 1.5


def test_bounds_and_proximal_terms():
    """The exact minima of ½ x² within a box, and with ‖s‖² / 2 r added."""
    for options, expected in (({"trust_init": 0.5}, 2.5), ({"trust_method": "proximal", "trust_init": 0.5}, 3 - 3 / 3)):
        problem = Problem(lambda x: 0.5 * x**2, [3.0])
        Modular(problem.params, m.HigherOrderNewton(order=2, **options)).step(
            lambda backward=True, p=problem: p.closure(backward).sum()
        )
        assert problem.vector.item() == pytest.approx(expected, abs=1e-6)


def test_the_loss_never_rises():
    problem = Problem(lambda x: torch.sin(5 * x[0]) + torch.exp(-x[1]) + 0.1 * (x**2).sum(), [3.0, -2.0])
    optimizer = Modular(problem.params, m.HigherOrderNewton(trust_init=4.0))
    losses = [float(optimizer.step(problem.closure)) for _ in range(12)]
    assert losses == sorted(losses, reverse=True)
    assert torch.autograd.grad(problem.loss_of(*problem.params), problem.params)[0].norm() < 1e-6


def test_differential_evolution_finds_other_minima():
    """Of a polynomial with two wells, from the top of the higher one."""

    def wells(x):
        return (x**4 - 8 * x**2 + 3 * x).sum()

    ends = []
    for options in ({}, {"de_iters": 20}, {"de_iters": 20}):
        torch.manual_seed(0)
        problem = Problem(wells, [1.5])
        optimizer = Modular(problem.params, m.HigherOrderNewton(trust_init=8.0, **options))
        for _ in range(3):
            optimizer.step(problem.closure)
        ends.append(problem.vector.item())
    assert ends[0] > 0 > ends[1]
    assert ends[1] == ends[2]


def test_a_polynomial_without_a_minimum():
    problem = Problem(lambda x: -(x**4).sum() + x.sum(), [0.1])
    optimizer = Modular(problem.params, m.HigherOrderNewton(trust_method=None))
    text = r"the polynomial of order 4 has no minimum that could be found, .*Use trust_method='bounds'"
    with unchanged(optimizer), pytest.raises(NonFiniteError, match=text):
        optimizer.step(problem.closure)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(
        UnsupportedError, match=r"HigherOrderNewton needs scipy, .* Type: pip install graphopt\[wrappers\]"
    ):
        m.HigherOrderNewton()


BAD = {
    "trust_method": ("box", "trust_method='box'; expected 'bounds', 'proximal', 'none' or None"),
    "order": (0, "order=0; expected an integer of at least 1"),
    "de_iters": (0, "de_iters=0; expected an integer of at least 1, -1 or None"),
    "maxiter": (0, "maxiter=0; expected an integer of at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name):
    value, text = BAD[name]
    with pytest.raises(OptionError, match=f"HigherOrderNewton: {text}"):
        m.HigherOrderNewton(**{name: value})
    with pytest.raises(OptionError, match=r"order=3 with trust_method=None; polynomials of odd order have no minimum"):
        m.HigherOrderNewton(order=3, trust_method=None)
