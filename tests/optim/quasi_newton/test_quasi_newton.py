"""Quasi-Newton methods: the secant equation, finite termination, and torch's own L-BFGS."""

from typing import NamedTuple

import pytest
import torch

from graphopt.errors import OptionError, UnsupportedError
from graphopt.optim import Modular, Module, QuasiNewtonH, m
from graphopt.optim.core.transform import Step, apply_updates, chain
from tests.optim.catalogue import accepts
from tests.optim.problems import Exact, Problem, booth, in_plane, least_squares, quadratic, rosenbrock, steps_until


class Case(NamedTuple):
    """What a method must achieve.

    Attributes:
        gate: the most steps on the Rosenbrock function with a line search.
        options: the options for that.
        ends: whether exact line searches end on quadratics in as many steps as there are elements.
        learns: what is then the inverse Hessian.
        unit_steps: as many steps of length 1, for each element, end on quadratics; ``None`` if no theory says so.
    """

    gate: int
    options: dict | None = None
    ends: bool = False
    learns: str | None = None
    unit_steps: int | None = None


DENSE = {
    "BFGS": Case(50, ends=True, learns="H"),
    "DFP": Case(75, ends=True, learns="H"),
    "SR1": Case(80, ends=True, learns="H"),
    "FletcherVMM": Case(50, ends=True, learns="H"),
    "Horisho": Case(60, ends=True, learns="H"),
    "SSVM": Case(170, ends=True),
    "PSB": Case(60),
    "BroydenGood": Case(100, unit_steps=2),
    # Of these three H is often of no use in a plane that is curved so differently; an H of the wrong scale is forgotten sooner.
    "BroydenBad": Case(90, {"init_scale": 1.0}, unit_steps=2),
    "Greenstadt1": Case(100, unit_steps=2),
    "Greenstadt2": Case(60, {"init_scale": 1.0}, unit_steps=2),
    "ColumnUpdatingMethod": Case(200, unit_steps=2),
    "ThomasOptimalMethod": Case(110, unit_steps=2),
    "McCormick": Case(60, ends=True, learns="H"),
    "Pearson": Case(85, ends=True, learns="H"),
    "ProjectedNewtonRaphson": Case(60, ends=True, learns="R"),
}
CASES = {**DENSE, "LBFGS": Case(50, ends=True)}
EVERY = [getattr(m, name) for name in CASES]
QUADRATICS = [(4, 10), (4, 100), (8, 10), (8, 100)]
SHAPES = [(), (1,), (1, 1), (10,), (1, 10), (10, 1), (10, 10), (4, 4, 4), (3, 3, 3, 3), (2,), (10, 1, 3, 1, 1)]


class Double(Module):
    def step(self, var):
        var.update = [2 * u for u in var.get_update()]
        return var


def state_of(optimizer, name):
    return optimizer.state[optimizer.param_groups[0]["params"][0]][name]


def norm_of_gradient(problem):
    return torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params)).norm()


@accepts("Q1", "Q2", "Q3", "Q5", "Q7", "Q15", "Q16", "Q17")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.ends])
def test_quadratics_end_in_as_many_steps_as_there_are_elements(name):
    options = {"history_size": 100} if name == "LBFGS" else {"init_scale": 1.0}
    for size, condition in QUADRATICS:
        problem, matrix = quadratic(size, condition, cut=2)
        optimizer = Modular(problem.params, getattr(m, name)(**options), Exact(matrix))
        start = norm_of_gradient(problem)
        for _ in range(size):
            optimizer.step(problem.closure)
        assert norm_of_gradient(problem) <= 1e-8 * start
        learns = CASES[name].learns
        if learns:
            optimizer.step(problem.closure)  # which sees the last pair
            identity = state_of(optimizer, f"{name.lower()}.{learns}") @ matrix
            assert (identity - torch.eye(size)).abs().max() < 1e-8


@accepts("Q9", "Q10", "Q11", "Q12", "Q13", "Q14")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.unit_steps])
def test_steps_of_length_one_end_on_quadratics(name):
    """Gay, "Some convergence properties of Broyden's method", 1979."""
    for size in (3, 4, 6):
        problem, _ = quadratic(size, 10)
        optimizer = Modular(problem.params, getattr(m, name)(init_scale=1.0, scale_first=False), m.LR(1.0))
        start = norm_of_gradient(problem)
        for _ in range(CASES[name].unit_steps * size):
            optimizer.step(problem.closure)
        assert norm_of_gradient(problem) <= 1e-8 * start


@accepts("Q3")
def test_sr1_needs_no_line_search():
    problem, matrix = quadratic(4, 10)
    optimizer = Modular(problem.params, m.SR1(init_scale=1.0, scale_first=False), m.LR(0.05))
    for _ in range(6):
        optimizer.step(problem.closure)
    inverse = state_of(optimizer, "sr1.H")
    assert (inverse @ matrix - torch.eye(4)).abs().max() < 1e-8


@accepts("Q1", "Q2", "Q3", "Q4", "Q5", "Q7", "Q8", "Q9", "Q10", "Q11", "Q12", "Q13", "Q14", "Q15", "Q16", "Q17")
@pytest.mark.parametrize("name", DENSE)
def test_secant_equation(name):
    module = getattr(m, name)
    errors = []
    kind = "update_B" if name == "PSB" else "update_H"
    update = getattr(module, kind)

    class Watched(module):
        pass

    def watch(self, matrix, s, y, *rest):
        new = update(self, matrix, s, y, *rest)
        learned = rest[4]["R"] if name == "ProjectedNewtonRaphson" else new
        if new is not matrix:
            error = new @ s - y if name == "PSB" else learned @ y - s
            errors.append(float(error.norm() / (y if name == "PSB" else s).norm()))
            assert name != "PSB" or (new - new.T).abs().max() <= 1e-12 * new.abs().max()
            assert name != "ColumnUpdatingMethod" or int(((new - matrix) != 0).any(0).sum()) == 1
        return new

    setattr(Watched, kind, watch)
    problem = in_plane(rosenbrock)
    optimizer = Modular(problem.params, Watched(), m.Backtracking())
    for _ in range(15):
        optimizer.step(problem.closure)
    assert len(errors) >= 5
    assert max(errors) < 1e-10


@accepts("Q1", "Q2", "Q3", "Q4", "Q5", "Q7", "Q8", "Q9", "Q10", "Q11", "Q12", "Q13", "Q14", "Q15", "Q16", "Q17")
@pytest.mark.parametrize("name", CASES)
def test_rosenbrock(name):
    problem = in_plane(rosenbrock, 2)
    gate, options = CASES[name].gate, CASES[name].options or {}
    assert (
        steps_until(problem, Modular(problem.params, getattr(m, name)(**options), m.StrongWolfe()), 1e-6, gate) <= gate
    )


@accepts("Q1", "Q2", "Q3", "Q4", "Q5", "Q7", "Q8", "Q9", "Q10", "Q11", "Q12", "Q13", "Q14", "Q15", "Q16", "Q17")
@pytest.mark.parametrize("module", EVERY)
def test_least_squares_and_spheres(module):
    problem = in_plane(least_squares)
    optimizer = Modular(problem.params, module(scale_first=False), m.StrongWolfe())
    assert steps_until(problem, optimizer, 1e-10, 50) <= 50
    shapes = SHAPES if module is m.LBFGS else SHAPES[:7]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).tolist() for shape in shapes] + [[[0.0] * 2] * 2]
    problem = Problem(lambda *ps: sum((p**2).sum() for p in ps), *values, dtype=torch.float32)
    optimizer = Modular(problem.params, module(scale_first=False), m.StrongWolfe())
    assert steps_until(problem, optimizer, 1e-20, 10) <= 10
    for _ in range(3):  # and at the minimum nothing breaks
        optimizer.step(problem.closure)
    assert problem.loss < 1e-20


def test_lbfgs_is_that_of_torch():
    for function, lr in ((booth, 0.1), (rosenbrock, 0.05)):
        ours, theirs = in_plane(function, 2), in_plane(function, 2)
        optimizer = Modular(ours.params, m.LBFGS(100), m.LR(lr))
        reference = torch.optim.LBFGS(theirs.params, lr=lr, max_iter=1, history_size=100, tolerance_grad=0)
        for _ in range(20):
            optimizer.step(ours.closure)
            reference.step(theirs.closure)
            torch.testing.assert_close(ours.vector, theirs.vector, rtol=1e-10, atol=1e-10)
    assert set(ours.calls) == {True}
    assert len(ours.calls) == 20


@pytest.mark.parametrize("module", [m.BFGS, m.PSB, m.LBFGS])
def test_no_closure_is_needed_and_history_is_bounded(module):
    problem = in_plane(booth)
    optimizer = Modular(problem.params, module(), m.LR(0.05))
    for _ in range(14):
        problem.closure()
        optimizer.step()
    if module is m.LBFGS:
        assert state_of(optimizer, "lbfgs.pairs").shape == (10, 2, 2)
    reference = in_plane(booth)
    optimizer = Modular(reference.params, module(), m.LR(0.05))
    for _ in range(14):
        optimizer.step(reference.closure)
    assert torch.equal(problem.vector, reference.vector)


@accepts("Q1", "Q2", "Q3", "Q4", "Q5", "Q7", "Q8", "Q9", "Q10", "Q11", "Q12", "Q13", "Q14", "Q15", "Q16", "Q17")
@pytest.mark.parametrize("module", EVERY)
def test_inner_is_applied_once_before_the_product_and_nothing_is_learned_from_it(module):
    moves = []
    for options in ({}, {"inner": Double()}):
        problem = in_plane(booth)
        optimizer = Modular(problem.params, module(scale_first=False, **options), m.LR(0.0))
        for point in ([0.0, -8.0], [1.0, -5.0], [0.5, -3.0]):
            problem.params[0].data = torch.tensor(point, dtype=torch.float64)
            problem.closure()
            optimizer.param_groups[0]["lr"] = 1.0
            optimizer.step()
        moves.append(problem.vector - torch.tensor(point, dtype=torch.float64))
    torch.testing.assert_close(moves[1], 2 * moves[0], rtol=1e-12, atol=1e-14)


def test_bfgs_again_on_the_base():
    class Again(QuasiNewtonH):
        def update_H(self, H, s, y, p, g, p_prev, g_prev, state, settings):
            if s.dot(y) <= settings["tol"]:
                return H
            left = torch.eye(len(s), dtype=s.dtype) - torch.outer(s, y) / s.dot(y)
            return left @ H @ left.T + torch.outer(s, s) / s.dot(y)

    ends = []
    for module in (m.BFGS, Again):
        problem = in_plane(rosenbrock)
        optimizer = Modular(problem.params, module(), m.StrongWolfe())
        for _ in range(20):
            optimizer.step(problem.closure)
        ends.append(problem.vector)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_the_base_hands_over_what_it_says():
    seen = []

    class Watch(QuasiNewtonH):
        def update_H(self, H, s, y, p, g, p_prev, g_prev, state, settings):
            state["num_seen"] = state.get("num_seen", 0) + 1
            seen.append((s, y, p, g, p_prev, g_prev, state["num_seen"]))
            return H

    problem = in_plane(booth, 2)
    optimizer = Modular(problem.params, Watch(update_freq=2, reset_interval=4), m.LR(0.01))
    points, grads = [], []
    for _ in range(9):
        problem.closure()
        points.append(problem.vector)
        grads.append(torch.cat([p.grad.reshape(-1) for p in problem.params]).clone())
        optimizer.step()
    assert [row[-1] for row in seen] == [1, 2, 1, 2]  # forgotten with H
    for row, index in zip(seen, (1, 3, 5, 7), strict=True):
        expected = (points[index] - points[index - 1], grads[index] - grads[index - 1], points[index], grads[index])
        for value, wanted in zip(row[:6], (*expected, points[index - 1], grads[index - 1]), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


def test_options_of_the_base():
    def first_moves(num, **options):
        problem = in_plane(booth)
        optimizer = Modular(problem.params, m.BFGS(**options), m.LR(0.01))
        moves = []
        for _ in range(num):
            before = problem.vector
            problem.closure()
            grad = problem.params[0].grad.clone()
            optimizer.step()
            moves.append(((before - problem.vector) / 0.01, grad))
        return moves

    move, grad = first_moves(1)[0]
    torch.testing.assert_close(move, grad / grad.abs().sum())
    move, grad = first_moves(1, scale_first=False)[0]
    torch.testing.assert_close(move, grad)
    move, grad = first_moves(1, scale_first=False, init_scale=0.5)[0]
    torch.testing.assert_close(move, grad / 2)
    (plain, _), (short, _) = first_moves(2)[1], first_moves(2, scale_second=True)[1]
    torch.testing.assert_close(short, plain / plain.abs().sum().clamp(min=1))
    (move, grad) = first_moves(4, reset_interval=3)[3]  # H begins anew
    torch.testing.assert_close(move, grad / grad.abs().sum())
    (move, grad) = first_moves(3, beta=0.999999, init_scale=1.0)[2]  # H hardly changes
    torch.testing.assert_close(move, grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tol_reset", [True, False])
def test_a_step_that_goes_nowhere_teaches_nothing(tol_reset):
    """As after a line search in vain, even if the next gradient is another one, of other samples."""
    problem = in_plane(booth)
    optimizer = Modular(problem.params, m.ColumnUpdatingMethod(tol_reset=tol_reset), m.LR(0.1))
    for index in range(4):
        problem.closure()
        if index == 3:
            kept = state_of(optimizer, "columnupdatingmethod.H")
            problem.params[0].grad.add_(1.0)
        optimizer.param_groups[0]["lr"] = 0.0 if index == 2 else 0.1
        optimizer.step()
    assert state_of(optimizer, "columnupdatingmethod.num_since_reset") == (0 if tol_reset else 3)
    learned = torch.eye(2, dtype=torch.float64) if tol_reset else kept
    assert torch.equal(state_of(optimizer, "columnupdatingmethod.H"), learned)


def test_parameters_apart():
    def run(**options):
        problem, _ = quadratic(4, 10, cut=2)
        optimizer = Modular(problem.params, m.BFGS(**options), m.LR(0.1))
        for _ in range(5):
            optimizer.step(problem.closure)
        return optimizer, problem

    optimizer, problem = run(concat_params=False)
    assert [tuple(optimizer.state[p]["bfgs.H"].shape) for p in problem.params] == [(2, 2), (2, 2)]
    optimizer, problem = run()
    assert ["bfgs.H" in optimizer.state[p] for p in problem.params] == [True, False]


def test_added_parameters_start_anew_and_reset_forgets():
    problem, _ = quadratic(4, 10, cut=2)
    optimizer = Modular(problem.params[:1], m.BFGS(), m.LR(0.1))
    problem.closure()
    optimizer.step()
    optimizer.add_param_group({"params": problem.params[1:]})
    for _ in range(2):
        problem.closure()
        optimizer.step()
    assert state_of(optimizer, "bfgs.H").shape == (4, 4)
    optimizer.modules[0].reset()
    assert not [name for name in optimizer.state[problem.params[0]] if name.startswith("bfgs")]
    optimizer.step()
    assert state_of(optimizer, "bfgs.num_since_reset") == 0


def test_bfgs_as_a_pure_function():
    transform = chain(m.BFGS(), m.StrongWolfe())
    problem = in_plane(rosenbrock)
    optimizer = Modular(problem.params, m.BFGS(), m.StrongWolfe())
    params = {"w": problem.params[0].detach().clone()}
    state = transform.init(params)
    for _ in range(8):
        leaf = params["w"].clone().requires_grad_()
        grads = {"w": torch.autograd.grad(rosenbrock(*leaf), leaf)[0]}
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.states[0].items()}
        before = params["w"].clone()
        updates, new = transform.update(grads, state, params, step=Step(loss_fn=lambda tree: rosenbrock(*tree["w"])))
        assert torch.equal(params["w"], before)
        assert list(state.states[0]) == list(kept)
        assert all(torch.equal(torch.as_tensor(kept[k]), torch.as_tensor(v)) for k, v in state.states[0].items())
        params, state = apply_updates(params, updates), new
        optimizer.step(problem.closure)
        assert torch.equal(params["w"], problem.params[0].detach())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: m.BFGS(init_scale="big"), r"BFGS: init_scale='big'; expected a positive number, or 'auto'"),
        (lambda: m.SR1(reset_interval=0), r"SR1: reset_interval=0; expected a positive integer, None, or 'auto'"),
        (lambda: m.DFP(update_freq=0), r"DFP: update_freq=0; expected an integer of at least 1"),
        (lambda: m.SSVM(5), r"SSVM: switch=5; expected 1, 2, 3, 4, or two numbers \(φ, θ\) in \[0, 1\]"),
        (lambda: m.SSVM((0.5, 1.5)), r"SSVM: switch=\(0\.5, 1\.5\); expected"),
        (lambda: m.SSVM(True), r"SSVM: switch=True; expected"),
        (lambda: m.GradientCorrection(tol=-1.0), r"GradientCorrection: tol=-1\.0; expected a number in \[0, inf\)"),
        (
            lambda: m.ProjectedGradientMethod(reset_interval=0),
            r"ProjectedGradientMethod: reset_interval=0; expected a posi",
        ),
        (lambda: m.LBFGS(0), r"LBFGS: history_size=0; expected an integer of at least 1"),
        (lambda: m.LBFGS(z_beta=1.0), r"LBFGS: z_beta=1\.0; expected a number in \[0, 1\)"),
    ],
)
def test_bad_options(make, text):
    with pytest.raises(OptionError, match=text):
        make()


def test_averages_of_lbfgs():
    problem = in_plane(booth)
    optimizer = Modular(
        problem.params, m.LBFGS(params_beta=0.5, grads_beta=0.25, z_beta=0.5, scale_first=False), m.LR(0.01)
    )
    p_avg = g_avg = z_avg = pair = None
    for _ in range(2):
        problem.closure()
        p, g = problem.vector, problem.params[0].grad.clone()
        old_p, old_g = p_avg, g_avg
        p_avg = p if p_avg is None else 0.5 * p_avg + 0.5 * p
        g_avg = g if g_avg is None else 0.25 * g_avg + 0.75 * g
        if old_p is not None:
            pair = (p_avg - old_p, g_avg - old_g)
        z = g
        if pair is not None:
            s, y = pair
            left = torch.eye(2, dtype=torch.float64) - torch.outer(s, y) / s.dot(y)
            z = (left @ (s.dot(y) / y.dot(y) * left.T) + torch.outer(s, s) / s.dot(y)) @ g
        z_avg = z if z_avg is None else 0.5 * z_avg + 0.5 * z
        optimizer.step()
        torch.testing.assert_close((p - problem.vector) / 0.01, z_avg, rtol=1e-8, atol=1e-8)


def test_a_matrix_that_does_not_fit_in_memory():
    p = torch.nn.Parameter(torch.zeros(2_000_000))
    p.grad = torch.ones_like(p)
    with pytest.raises(
        UnsupportedError, match=r"BFGS: a matrix of 2,000,000 x 2,000,000 elements \(16,000 GB\).*m\.LBFGS"
    ):
        Modular([p], m.BFGS(), m.LR(0.1)).step()
    assert not p.any()
