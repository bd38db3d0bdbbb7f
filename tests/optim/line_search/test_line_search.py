"""Line searches: their conditions on random functions, the base class, and what happens where no step is good."""

import math
import sys

import pytest
import torch

from graphopt.errors import ModuleError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim import LineSearch, Modular, Module, m
from graphopt.optim.core.transform import Step, apply_updates, chain
from tests.optim.catalogue import accepts
from tests.optim.problems import Exact, Problem, booth, in_plane, least_squares, quadratic, rosenbrock

SEARCHES = [m.Backtracking, m.AdaptiveBacktracking, m.StrongWolfe]


class Direction(Module):
    """An update that is no gradient."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def step(self, var):
        var.update = [torch.tensor(value, dtype=p.dtype) for value, p in zip(self.values, var.params, strict=True)]
        return var


def random_functions(num):
    """Functions of one number, smooth, bounded below, some with many minima."""
    generator = torch.Generator().manual_seed(0)
    for index in range(num):
        a, b, c, d, scale = torch.randn(5, generator=generator, dtype=torch.float64).tolist()
        scale = 4.0**scale

        def function(x, a=a, b=b, c=c, d=d, scale=scale, index=index):
            x = x * scale
            if index % 4 == 0:
                return (x - a) ** 2 * (abs(b) + 0.1) + c
            if index % 4 == 1:
                return x**4 * abs(a) + b * x**3 + c * x**2 + d * x
            if index % 4 == 2:
                return torch.sin(3 * a * x + b) + 0.05 * (x - c) ** 2
            return torch.log1p((x - a) ** 2) + 0.1 * torch.cos(5 * b * x)

        yield function


def value_and_slope(function, at):
    x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    loss = function(x)
    return loss.item(), float(torch.autograd.grad(loss, x)[0])


def search_from_zero(function, search):
    """Start, end, and the step size, in units of the gradient."""
    problem = Problem(function, 0.0)
    Modular(problem.params, search).step(problem.closure)
    start, slope = value_and_slope(function, 0.0)
    end, end_slope = value_and_slope(function, problem.params[0].item())
    return start, -slope * slope, end, -end_slope * slope, -problem.params[0].item() / slope


@accepts("L3")
def test_strong_wolfe_conditions_on_random_functions():
    failed = 0
    for function in random_functions(1000):
        start, slope, end, end_slope, size = search_from_zero(function, m.StrongWolfe(c2=0.1))
        assert end <= start
        failed += not (size > 0 and end <= start + 1e-4 * size * slope + 1e-12 and abs(end_slope) <= 0.1 * abs(slope))
    assert failed == 0


@accepts("L1")
def test_armijo_condition_on_random_functions():
    num_failed = 0
    for function in random_functions(1000):
        start, slope, end, _, size = search_from_zero(function, m.Backtracking(c=0.1, maxiter=20))
        assert size >= 0
        assert end <= start + 0.1 * size * slope + 1e-12
        num_failed += size == 0
    assert num_failed == 0


@accepts("L1", "L2")
@pytest.mark.parametrize("module", [m.Backtracking, m.AdaptiveBacktracking])
def test_booth(module):
    problem = in_plane(booth)
    optimizer = Modular(problem.params, module())
    losses = [optimizer.step(problem.closure).item() for _ in range(50)]
    assert losses == sorted(losses, reverse=True)
    assert problem.loss < 1e-6


@accepts("L2")
def test_adaptive_backtracking_finds_the_scale():
    def calls(module):
        problem = in_plane(booth)
        optimizer = Modular(problem.params, m.LR(1e-3), module)  # steps a thousand times too small
        for _ in range(400):
            if problem.loss < 1:
                break
            optimizer.step(problem.closure)
        return len(problem.calls)

    assert calls(m.AdaptiveBacktracking()) < calls(m.Backtracking()) / 3


@accepts("L2")
@pytest.mark.parametrize("target_iters", [0, 1, 3])
def test_the_first_step_of_the_next_search(target_iters):
    tried = []
    problem = Problem(lambda x: tried.append(x.item()) or x**2, 1.0)
    optimizer = Modular(problem.params, Direction(1.0), m.AdaptiveBacktracking(init=16.0, target_iters=target_iters))
    optimizer.step(problem.closure)  # 16, 8, 4, 2 lead to a loss of at least 1, and 1 to 0
    assert tried == [1.0, -15.0, -7.0, -3.0, -1.0, 0.0]
    with torch.no_grad():
        problem.params[0].fill_(100.0)
    tried.clear()
    optimizer.step(problem.closure)
    first = 2.0**target_iters
    assert tried == [100.0, 100 - first]
    tried.clear()
    optimizer.step(problem.closure)  # that was good enough, so twice as long
    assert tried == [100 - first, 100 - 3 * first]


def test_backtracking_reaches_further_after_a_failure():
    problem = Problem(lambda x: x**2, 1.0)
    optimizer = Modular(problem.params, Direction(1.0), m.Backtracking(init=1e5))
    sizes = []
    for _ in range(8):
        before = problem.params[0].item()
        optimizer.step(problem.closure)
        sizes.append(before - problem.params[0].item())
    assert sizes[0] == 0  # 1e5 / 2^9 is too long
    assert any(sizes)
    fixed = Problem(lambda x: x**2, 1.0)
    optimizer = Modular(fixed.params, Direction(1.0), m.Backtracking(init=1e5, adaptive=False))
    for _ in range(8):
        optimizer.step(fixed.closure)
    assert fixed.params[0].item() == 1


@accepts("L3")
@pytest.mark.parametrize("module", SEARCHES)
def test_a_direction_that_does_not_descend_is_not_followed(module):
    for loss_of in (lambda x: x**2, lambda x: x * 0):
        problem = Problem(loss_of, 1.0)
        loss = Modular(problem.params, Direction(-1.0), module()).step(problem.closure)
        assert loss.item() == loss_of(1.0)
        assert problem.params[0].item() == 1


@accepts("L3")
@pytest.mark.parametrize(
    "module", [lambda: m.Backtracking(try_negative=True), lambda: m.AdaptiveBacktracking(try_negative=True),
               lambda: m.StrongWolfe(plus_minus=True)]
)  # fmt: skip
def test_but_can_be_followed_backwards(module):
    problem = Problem(lambda x: x**2, 1.0)
    Modular(problem.params, Direction(-1.0), module()).step(problem.closure)
    assert 0 <= problem.params[0].item() < 1


def test_a_wall_of_infinities_is_backed_off_from():
    for module in SEARCHES:
        problem = Problem(lambda x: x - torch.log(x), 0.5)  # infinite or NaN behind 0; the update is -1
        optimizer = Modular(problem.params, Direction(-8.0), module())
        problem.params[0].data.fill_(9.0)
        optimizer.step(problem.closure)  # uphill: stays
        assert problem.params[0].item() == 9
        optimizer = Modular(problem.params, Direction(9.5), module())
        optimizer.step(problem.closure)
        assert 0 < problem.params[0].item() < 9


def test_strong_wolfe_falls_back():
    def kink(x):  # the derivative jumps from -1 to 1
        return (x - 0.3).abs()

    start, _, end, _, size = search_from_zero(kink, m.StrongWolfe(c2=0.1))
    assert size == 0
    assert end == start
    start, _, end, _, size = search_from_zero(kink, m.StrongWolfe(c2=0.1, fallback=True))
    assert size > 0
    assert end < 0.01


def test_after_a_failure_strong_wolfe_starts_with_half_the_step():
    tried = []
    problem = Problem(lambda x: tried.append(x.item()) or (x - 0.3).abs(), 0.0)
    optimizer = Modular(problem.params, m.StrongWolfe(c2=0.1))
    for expected in (1.0, 0.5, 0.25):
        tried.clear()
        optimizer.step(problem.closure)
        assert tried[1] == expected


# -- the base class


def test_exact_line_search_and_what_follows_it():
    problem, matrix = quadratic(8, 10, cut=3)
    start = [p.detach().clone() for p in problem.params]
    grads = torch.autograd.grad(problem.loss_of(*problem.params), problem.params)
    g = torch.cat(grads)
    size = float(g @ g / (g @ matrix @ g))
    Modular(problem.params, Exact(matrix), m.LR(0.5)).step(problem.closure)
    for p, before, grad in zip(problem.params, start, grads, strict=True):
        torch.testing.assert_close(p.detach(), before - 0.5 * size * grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize("module", SEARCHES)
def test_a_learning_rate_behind_scales_the_step_that_was_found(module):
    moves = []
    for lr in (1.0, 0.5):
        problem = in_plane(rosenbrock, num_tensors=2)
        start = problem.vector
        Modular(problem.params, module(), m.LR(lr)).step(problem.closure)
        moves.append(problem.vector - start)
    torch.testing.assert_close(moves[1], moves[0] / 2, rtol=1e-12, atol=0)


def test_the_loss_that_was_seen_is_the_loss_after_the_step():
    problem = Problem(lambda x: ((x - 0.123) ** 2).sum(), [0.7, -0.3, 1.1], dtype=torch.float32)
    optimizer = Modular(problem.params, m.StrongWolfe(c2=0.01))
    optimizer.step(problem.closure)
    assert problem.loss in problem.losses


def test_maxiter_keeps_the_best():
    class Wanders(LineSearch):
        def __init__(self, **options):
            super().__init__(**options)
            self.seen = []

        def search(self, update, var):
            for size in (5.0, 0.5, 3.0, 0.4, 0.3):
                self.seen.append(self.evaluate_with_slope(size, var))
            return 5.0

    problem = Problem(lambda x: x**2, 1.0)
    search = Wanders(maxiter=3)
    Modular(problem.params, Direction(1.0), search).step(problem.closure)
    assert search.seen == [(16.0, 8.0), (0.25, -1.0), (4.0, 4.0)]
    assert problem.params[0].item() == 0.5
    problem = Problem(lambda x: -(x**2), 1.0)
    Modular(problem.params, Direction(0.1), Wanders(maxiter=2)).step(problem.closure)
    assert problem.params[0].item() == 1  # none was better
    with pytest.raises(OptionError, match="Wanders: maxiter=0; expected an integer of at least 1, or None"):
        Wanders(maxiter=0)


def test_a_search_of_ones_own_that_goes_wrong():
    class Wrong(LineSearch):
        def search(self, update, var):
            self.evaluate(7.0, var)
            return self.result() if callable(self.result) else self.result

    search = Wrong()
    problem = in_plane(booth)
    optimizer = Modular(problem.params, search)
    search.result = math.nan
    with pytest.raises(NonFiniteError, match=r"module 1 of 1, Wrong: search\(\) returned nan"):
        optimizer.step(problem.closure)
    search.result = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.step(problem.closure)
    assert problem.vector.tolist() == [0.0, -8.0]
    with pytest.raises(ModuleError, match=r"evaluate\(\) was called outside of search\(\)"):
        search.evaluate(1.0, None)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: m.Backtracking(beta=1.0), r"Backtracking: beta=1\.0; expected a number in \(0, 1\)"),
        (lambda: m.Backtracking(maxiter=0), "Backtracking: maxiter=0; expected a positive integer"),
        (
            lambda: m.AdaptiveBacktracking(nplus=0.5),
            r"AdaptiveBacktracking: nplus=0\.5; expected a number in \[1, inf\)",
        ),
        (lambda: m.StrongWolfe(c1=0.5, c2=0.1), r"StrongWolfe: c1=0\.5, c2=0\.1; expected c1 < c2"),
        (lambda: m.StrongWolfe(maxzoom=0), "StrongWolfe: maxzoom=0; expected an integer of at least 1"),
    ],
)
def test_bad_options(make, text):
    with pytest.raises(OptionError, match=text):
        make()


@pytest.mark.parametrize("module", SEARCHES)
def test_a_start_that_is_not_finite(module):
    problem = Problem(lambda x: (x * math.inf).sum(), [1.0, 2.0])
    optimizer = Modular(problem.params, m.LR(1.0), module())
    for bad in (math.inf, math.nan):
        problem.loss_of = lambda x, bad=bad: (x * bad).sum()
        with pytest.raises(
            NonFiniteError, match=r"module 2 of 2, \w+: the loss is (inf|nan) at .* nothing was changed"
        ):
            optimizer.step(problem.closure)
    problem.loss_of = lambda x: (x - x.detach()).abs().sqrt().sum()  # of an infinite, or no, derivative
    with pytest.raises(NonFiniteError, match=r"the gradient of parameter 0 of group 0.*nothing was changed"):
        optimizer.step(problem.closure)
    assert problem.vector.tolist() == [1.0, 2.0]
    assert float(optimizer.state[problem.params[0]]["step"]) == 0


def test_strong_wolfe_as_a_pure_function():
    transform = chain(m.StrongWolfe(c2=0.1))
    problem = in_plane(rosenbrock)
    optimizer = Modular(problem.params, m.StrongWolfe(c2=0.1))
    params = [problem.params[0].detach().clone()]
    state = transform.init(params)

    def loss_fn(tree):
        return rosenbrock(*tree[0])

    for _ in range(5):
        leaf = params[0].clone().requires_grad_()
        grads = list(torch.autograd.grad(loss_fn([leaf]), leaf))
        before, kept = params[0].clone(), {name: value for name, value in state.states[0].items()}
        updates, new = transform.update(grads, state, params, step=Step(loss_fn=loss_fn))
        assert torch.equal(params[0], before)
        assert state.states[0] == kept
        params, state = apply_updates(params, updates), new
        optimizer.step(problem.closure)
        assert torch.equal(params[0], problem.params[0].detach())


# -- step sizes by SciPy, from a grid, and of one trial


@accepts("L4")
@pytest.mark.parametrize("options", [{}, {"method": "golden"}, {"bounds": (0.0, 3.0)}, {"bracket": (0.0, 0.1, 2.0)}])
def test_scipy_finds_the_exact_step_on_quadratics(options):
    for seed in range(3):
        problem, matrix = quadratic(4, 10, seed, cut=2)
        grads = torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params))
        before, exact = problem.vector, float(grads @ grads / (grads @ matrix @ grads))
        Modular(problem.params, m.ScipyMinimizeScalar(tol=1e-8, **options)).step(problem.closure)
        torch.testing.assert_close(problem.vector, before - exact * grads, rtol=0, atol=1e-5 * float(grads.norm()))


@accepts("L4")
def test_scipy_on_booth_with_ten_evaluations():
    problem = in_plane(booth)
    optimizer = Modular(problem.params, m.ScipyMinimizeScalar(maxiter=10))
    for number in range(50):
        calls = len(problem.calls)
        optimizer.step(problem.closure)
        assert len(problem.calls) <= calls + 11, number
    assert problem.loss < 1e-2


def test_scipy_where_there_is_no_minimum_or_no_finite_loss():
    for loss_of, direction in ((lambda x: -x, -1.0), (lambda x: 0 * x, 1.0), (lambda x: torch.sqrt(x), 1.0)):
        problem = Problem(loss_of, 1.0)
        Modular(problem.params, Direction(direction), m.ScipyMinimizeScalar(maxiter=30)).step(problem.closure)
        assert math.isfinite(problem.loss)
        assert problem.loss <= loss_of(torch.ones(()))


@accepts("L6")
def test_the_best_of_a_grid():
    for function in random_functions(40):
        grid = torch.linspace(-1, 2, 7, dtype=torch.float64)
        expected = grid[min(range(7), key=lambda i: float(function(-grid[i])))]
        problem = Problem(function, 0.0)
        Modular(problem.params, Direction(1.0), m.GridLineSearch(-1, 2, 7)).step(problem.closure)
        assert problem.params[0].item() == -expected
        assert problem.calls == [False] * 8  # with the loss before the step
    problem = Problem(lambda x: torch.log(x), 1.0)
    Modular(problem.params, Direction(1.0), m.GridLineSearch(0.5, 1.5, 3)).step(problem.closure)
    assert problem.params[0].item() == 0.5  # where the others are not finite
    problem = Problem(lambda x: torch.log(x), 1.0)
    Modular(problem.params, Direction(1.0), m.GridLineSearch(1.5, 2.5, 3)).step(problem.closure)
    assert problem.params[0].item() == 1


@accepts("L5")
@pytest.mark.parametrize("function", [booth, least_squares, rosenbrock])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_trust_region_never_goes_up(function, adaptive):
    problem = in_plane(function, 2)
    optimizer = Modular(problem.params, m.TrustRegion(adaptive=adaptive))
    losses = [optimizer.step(problem.closure).item() for _ in range(50)] + [problem.loss]
    assert losses == sorted(losses, reverse=True)
    assert problem.calls == [True, False] * 50
    if function is booth and adaptive:
        assert problem.loss < 0.1


@accepts("L5")
@pytest.mark.parametrize("options", [{}, {"adaptive": False}])
def test_a_trust_region_recovers(options):
    problem = in_plane(least_squares)
    optimizer = Modular(problem.params, m.TrustRegion(**options))
    true = problem.loss_of
    start = problem.vector
    problem.loss_of = lambda point: true(point) * (1 + 1e6 * (point.detach() != start).any())
    for _ in range(20):
        optimizer.step(problem.closure)
    assert torch.equal(problem.vector, start)
    state = optimizer.state[problem.params[0]]
    name = next(key for key in state if key.endswith(".step_size"))
    assert state[name] < 0.01
    problem.loss_of = true
    sizes = []
    for _ in range(60):
        optimizer.step(problem.closure)
        sizes.append(state[name])
    assert max(sizes) > 0.005
    assert problem.loss < (1e-6 if not options else 1e-2)


def test_the_step_sizes_of_a_trust_region():
    """By hand, on x² from 1 along 1: the loss at ``1 - a`` is ``(1 - a)²``."""
    for adaptive, backtrack, expected in (
        (False, True, [(8.0, 0.0), (4.0, 0.0), (2.0, 0.0), (1.0, 1.0), (3.0, 0.0)]),
        (True, True, [(8.0, 0.0), (4.0, 0.0), (1.0, 1.0), (3.0, 0.0), (1.5, 1.5)]),
        (False, False, [(8.0, 8.0), (4.0, 4.0)]),
    ):
        problem = Problem(lambda x: x**2, 1.0)
        module = m.TrustRegion(nplus=3.0, nminus=0.5, init=8.0, adaptive=adaptive, backtrack=backtrack)
        optimizer = Modular(problem.params, Direction(1.0), module)
        for trial, made in expected:
            tried, before = [], problem.params[0].item()
            problem.loss_of = lambda x, tried=tried: tried.append(x.item()) or x**2
            optimizer.step(problem.closure)
            assert tried[1] == pytest.approx(before - trial)
            assert before - problem.params[0].item() == pytest.approx(made)
            if made == 1.0:
                problem.params[0].data.fill_(1.0)


def test_a_trust_region_does_not_step_into_infinities():
    problem = Problem(lambda x: torch.log(x), 1.0)
    Modular(problem.params, Direction(1.0), m.TrustRegion(init=2.0, backtrack=False)).step(problem.closure)
    assert problem.params[0].item() == 1


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: m.ScipyMinimizeScalar("newton"),
            "ScipyMinimizeScalar: method='newton'; expected one of brent, golden",
        ),
        (lambda: m.ScipyMinimizeScalar(maxiter=0), "ScipyMinimizeScalar: maxiter=0; expected an integer of at least 1"),
        (lambda: m.ScipyMinimizeScalar(bounds=(1, 1)), r"ScipyMinimizeScalar: bounds=\(1, 1\); expected \(low, high\)"),
        (
            lambda: m.ScipyMinimizeScalar(bracket=(1, 1)),
            r"ScipyMinimizeScalar: bracket=\(1, 1\); expected two or three",
        ),
        (
            lambda: m.ScipyMinimizeScalar("bounded"),
            "ScipyMinimizeScalar: method='bounded', bounds=None; expected bounds",
        ),
        (lambda: m.ScipyMinimizeScalar(bracket=(0, 1), bounds=(0, 1)), "ScipyMinimizeScalar: both bracket and bounds"),
        (lambda: m.GridLineSearch(0.0, 1.0, 0), "GridLineSearch: num=0; expected an integer of at least 1"),
        (lambda: m.TrustRegion(nminus=1.0), r"TrustRegion: nminus=1\.0; expected a number in \(0, 1\)"),
    ],
)
def test_bad_options_of_these(make, text):
    with pytest.raises(OptionError, match=text):
        make()


def test_scipy_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(UnsupportedError, match=r"ScipyMinimizeScalar needs scipy.*pip install graphopt\[wrappers\]"):
        m.ScipyMinimizeScalar()


@pytest.mark.parametrize(
    ("a_init", "expected"),
    [
        ("fixed", 2.0),
        ("previous", 0.5),
        ("first-order", 0.5 * 64 / 36),
        ("quadratic", 2 * (64 - 36) / 36),
        ("quadclip", min(2.0, 1.01 * 2 * (64 - 36) / 36)),
    ],
)
def test_where_strong_wolfe_starts(a_init, expected):
    """On x² from 8; the gradient is 16, so that a step no longer than 1 is 2/16 for init = 2."""
    tried = []
    problem = Problem(lambda x: tried.append(x.item()) or x**2, 8.0)
    optimizer = Modular(problem.params, m.LR(0.25), m.StrongWolfe(init=2.0, a_init=a_init))  # the update is 4
    optimizer.step(problem.closure)
    first = tried[1]
    assert first == pytest.approx(8.0 - (8.0 if a_init == "fixed" else 2.0))
    state = optimizer.state[problem.params[0]]
    if a_init != "fixed":  # it satisfies both conditions at once
        prefix = next(key for key in state if key.endswith("prev_size")).removesuffix("prev_size")
        assert (state[f"{prefix}prev_size"], state[f"{prefix}prev_slope"], state[f"{prefix}prev_loss"]) == (
            0.5,
            -64,
            64,
        )
    problem.params[0].data.fill_(6.0)
    tried.clear()
    optimizer.step(problem.closure)  # the update is 3, the slope -36
    assert tried[1] == pytest.approx(6.0 - 3.0 * expected)


def test_directions_without_a_scale():
    """A gradient of a million: with init alone the search ends before it is near."""
    for a_init, end in (("fixed", 14.0), ("first-order", 10.0)):
        problem = Problem(lambda x: torch.exp(x) + x**2, 14.0)
        Modular(problem.params, m.StrongWolfe(c2=0.1, maxzoom=4, a_init=a_init)).step(problem.closure)
        assert (problem.params[0].item() == 14.0) is (end == 14.0)
        assert problem.loss <= math.exp(end) + 1.001 * end**2
    with pytest.raises(OptionError, match="StrongWolfe: a_init='big'; expected one of fixed, previous, first-order"):
        m.StrongWolfe(a_init="big")
