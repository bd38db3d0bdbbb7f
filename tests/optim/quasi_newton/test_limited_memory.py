"""LBFGS, LSR1 and OnlineLBFGS against dense matrices, torch and each other."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from graphopt.errors import ModuleError, OptionError
from graphopt.optim import Modular, m
from graphopt.optim.core.transform import Step, chain
from tests.optim.catalogue import accepts
from tests.optim.problems import Exact, Problem, booth, in_plane, quadratic, rosenbrock, steps_until
from tests.optim.standard_functions import FUNCTIONS

LIMITED = [m.LBFGS, m.LSR1, m.OnlineLBFGS]


def points_and_grads(optimizer, problem, num):
    """Where every step began, the gradient there, and what was subtracted."""
    rows = []
    for _ in range(num):
        problem.closure()
        x, g = problem.vector, torch.cat([p.grad.reshape(-1) for p in problem.params]).clone()
        optimizer.step(problem.closure)
        rows.append((x.numpy(), g.numpy(), (x - problem.vector).numpy()))
    return rows


def inverse_hessian(pairs):
    """Of BFGS, by its formula and in full."""
    s, y = pairs[-1]
    H = np.eye(len(s)) * (s @ y) / (y @ y)
    for s, y in pairs:
        left = np.eye(len(s)) - np.outer(s, y) / (s @ y)
        H = left @ H @ left.T + np.outer(s, s) / (s @ y)
    return H


def extended(size=8):
    function = FUNCTIONS["extended_rosenbrock"]
    return Problem(function, list(function.start[:size]))


@accepts("Q18")
@pytest.mark.parametrize("history", [1, 2, 3, 5, 30])
def test_lbfgs_is_bfgs_of_the_last_pairs(history):
    """Also where the buffer has grown, and has gone round several times."""
    problem = extended()
    optimizer = Modular(problem.params, m.LBFGS(history, tol=1e-10), m.LR(0.1))
    rows = points_and_grads(optimizer, problem, 25)
    pairs, used = [], 0
    for (x, g, _), (next_x, next_g, move) in pairwise(rows):
        s, y = next_x - x, next_g - g
        if s @ y > 1e-10:
            pairs = [*pairs, (s, y)][-history:]
            used += 1
        if pairs:
            np.testing.assert_allclose(move / 0.1, inverse_hessian(pairs) @ next_g, rtol=1e-7, atol=1e-9)
    assert used > 12


@accepts("Q18")
@pytest.mark.parametrize("history", [4, 100])
def test_lbfgs_is_that_of_torch(history):
    ours, theirs = extended(), extended()
    optimizer = Modular(ours.params, m.LBFGS(history), m.LR(0.1))
    reference = torch.optim.LBFGS(theirs.params, lr=0.1, max_iter=1, history_size=history, tolerance_grad=0)
    for _ in range(20):
        optimizer.step(ours.closure)
        reference.step(theirs.closure)
        torch.testing.assert_close(ours.vector, theirs.vector, rtol=1e-10, atol=1e-10)


def test_lbfgs_in_float32_is_as_close_as_that_of_torch():
    """Inner products that are differences of older ones lose no more than those of the vectors."""
    exact, single = extended(10), Problem(FUNCTIONS["extended_rosenbrock"], [-1.2, 1.0] * 5, dtype=torch.float32)
    other = Problem(FUNCTIONS["extended_rosenbrock"], [-1.2, 1.0] * 5, dtype=torch.float32)
    long = Modular(exact.params, m.LBFGS(10), m.LR(0.05))
    short = Modular(single.params, m.LBFGS(10), m.LR(0.05))
    reference = torch.optim.LBFGS(other.params, lr=0.05, max_iter=1, history_size=10, tolerance_grad=0)
    for _ in range(60):
        long.step(exact.closure)
        short.step(single.closure)
        reference.step(other.closure)
    ours, theirs = ((p.vector.double() - exact.vector).abs().max() for p in (single, other))
    assert ours < 4 * theirs + 1e-5


def test_damping_keeps_the_curvature_in_bounds():
    """Along x the curvature is 200, along y it is negative."""
    for start, direction in (([1.0, 0.0], 0), ([0.0, 0.1], 1)):
        problem = Problem(lambda x: 100 * x[0] ** 2 - x[1] ** 2, start)
        module = m.LBFGS(damping=True, init_damping=0.9, eigval_bounds=(0.5, 50.0), scale_first=False)
        optimizer = Modular(problem.params, module, m.LR(1e-4))
        rows = points_and_grads(optimizer, problem, 2)
        s, y = rows[1][0] - rows[0][0], rows[1][1] - rows[0][1]
        u = (s @ y) / (s @ s)
        tau = min(0.9, 0.5 / (1 - u) if u < 0.5 else 49 / (u - 1))
        damped = tau * y + (1 - tau) * s
        np.testing.assert_allclose((s @ damped) / (s @ s), (50.0, 0.5)[direction], rtol=1e-6)
        np.testing.assert_allclose(
            rows[1][2] / 1e-4, inverse_hessian([(s, damped)]) @ rows[1][1], rtol=1e-7, atol=1e-10
        )
    # and inside of the bounds y is damped by the largest allowed part
    problem = Problem(lambda x: (x**2).sum(), [1.0, 0.5])
    optimizer = Modular(problem.params, m.LBFGS(damping=True, init_damping=0.5, scale_first=False), m.LR(0.1))
    rows = points_and_grads(optimizer, problem, 2)
    np.testing.assert_allclose(rows[1][2] / 0.1, rows[1][1] / 1.5, rtol=1e-9)  # curvature 2, damped to 1.5


def test_update_freq_and_tol_reset():
    problem = in_plane(booth)
    optimizer = Modular(problem.params, m.LBFGS(update_freq=2), m.LR(0.05))
    rows = points_and_grads(optimizer, problem, 6)
    pairs = [(rows[i][0] - rows[i - 1][0], rows[i][1] - rows[i - 1][1]) for i in (1, 3)]
    np.testing.assert_allclose(rows[4][2] / 0.05, inverse_hessian(pairs) @ rows[4][1], rtol=1e-8, atol=1e-10)
    for reset in (False, True):
        problem = Problem(lambda x: (x**2).sum(), [1.0, 0.5])
        optimizer = Modular(problem.params, m.LBFGS(tol_reset=reset, scale_first=False), m.LR(0.1))
        points_and_grads(optimizer, problem, 2)
        optimizer.param_groups[0]["lr"] = 0.0
        points_and_grads(optimizer, problem, 1)
        (_, _, move), grad = points_and_grads(optimizer, problem, 1)[0], problem.vector * 2
        assert not move.any()
        optimizer.param_groups[0]["lr"] = 1.0  # y is 0 after a step of length 0
        _, _, move = points_and_grads(optimizer, problem, 1)[0]
        np.testing.assert_allclose(move, grad if reset else grad / 2, rtol=1e-9)


@accepts("Q18", "Q19", "Q20")
@pytest.mark.parametrize("module", LIMITED)
@pytest.mark.parametrize(("size", "condition"), [(4, 100), (8, 10)])
def test_quadratics_end(module, size, condition):
    problem, matrix = quadratic(size, condition, cut=2)
    optimizer = Modular(problem.params, module(100), Exact(matrix))
    start = torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params)).norm()
    for _ in range(size):
        optimizer.step(problem.closure)
    assert torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params)).norm() <= 1e-8 * start


@accepts("Q18", "Q19", "Q20")
@pytest.mark.parametrize("module", LIMITED)
def test_rosenbrock(module):
    gate = 70 if module is m.LSR1 else 50
    problem = in_plane(rosenbrock, 2)
    assert steps_until(problem, Modular(problem.params, module(), m.StrongWolfe()), 1e-6, gate) <= gate


@accepts("Q19")
@pytest.mark.parametrize("function", [booth, rosenbrock])
def test_lsr1_is_sr1(function):
    ours, theirs = in_plane(function, 2), in_plane(function)
    lr = 0.05 if function is booth else 0.002
    optimizer = Modular(ours.params, m.LSR1(100, scale_second=False), m.LR(lr))
    reference = Modular(theirs.params, m.SR1(init_scale=1.0, tol=1e-8), m.LR(lr))
    for _ in range(8):
        optimizer.step(ours.closure)
        reference.step(theirs.closure)
        torch.testing.assert_close(ours.vector, theirs.vector, rtol=1e-9, atol=1e-9)


def test_lsr1_of_the_last_pairs():
    """The dense formula from the identity on, over the pairs that are kept; parallel ones are skipped."""
    problem = extended()
    optimizer = Modular(problem.params, m.LSR1(3), m.LR(1e-3))
    rows = points_and_grads(optimizer, problem, 12)
    pairs = []

    def inverse(of):
        H = np.eye(len(of[0][0])) if of else np.eye(8)
        for s, y in of:
            w = s - H @ y
            if abs(w @ y) > 1e-8 * np.linalg.norm(w) * np.linalg.norm(y):
                H = H + np.outer(w, w) / (w @ y)
        return H

    for index in range(1, len(rows)):
        s, y = rows[index][0] - rows[index - 1][0], rows[index][1] - rows[index - 1][1]
        pairs = [*pairs, (s, y)][-3:]
        expected = inverse(pairs) @ rows[index][1]
        if index == 1:
            expected = expected / max(1.0, abs(expected).sum())
        np.testing.assert_allclose(rows[index][2] / 1e-3, expected, rtol=1e-6, atol=1e-8)


def test_lsr1_skips_pairs_and_begins_again():
    """On a sphere the second pair says nothing new: ``w`` is 0 and is not divided by."""
    problem = Problem(lambda x: (x**2).sum(), [1.0, 0.5])
    optimizer = Modular(problem.params, m.LSR1(scale_first=False, scale_second=False), m.LR(0.1))
    for _ in range(4):
        optimizer.step(problem.closure)
    assert optimizer.state[problem.params[0]]["lsr1.num_pairs"] == 1
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(problem.closure)
    optimizer.step(problem.closure)  # it did not move
    assert "lsr1.pairs" not in optimizer.state[problem.params[0]]


@accepts("Q20")
@pytest.mark.parametrize("history", [3, 10])
@pytest.mark.parametrize("function", [booth, rosenbrock])
def test_online_lbfgs_of_one_function_is_lbfgs_bit_for_bit(function, history):
    ours, theirs = in_plane(function, 2), in_plane(function, 2)
    optimizer = Modular(ours.params, m.OnlineLBFGS(history), m.LR(0.05))
    reference = Modular(theirs.params, m.LBFGS(history), m.LR(0.05))
    for number in range(12):
        optimizer.step(ours.closure)
        reference.step(theirs.closure)
        assert torch.equal(ours.vector, theirs.vector)
        assert len(ours.calls) == 1 + 2 * number
    assert set(ours.calls) == {True}


@pytest.mark.parametrize(
    "options", [{}, {"damping": True}, {"grads_beta": 0.5, "params_beta": 0.3}, {"concat_params": False}]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_online_lbfgs_with_options(options, when):
    ours, theirs = in_plane(booth, 2), in_plane(booth, 2)
    optimizer = Modular(ours.params, m.OnlineLBFGS(sample_grads=when, **options), m.LR(0.05))
    reference = Modular(theirs.params, m.LBFGS(**options), m.LR(0.05))
    for _ in range(12):
        optimizer.step(ours.closure)
        reference.step(theirs.closure)
        torch.testing.assert_close(ours.vector, theirs.vector, rtol=1e-10, atol=1e-10)


@accepts("Q20")
@pytest.mark.parametrize("when", ["before", "after"])
def test_online_lbfgs_takes_no_noise_for_curvature(when):
    """Least squares of one row at a time: with one row, ``⟨s, y⟩`` is never negative."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    targets = rows @ torch.arange(4.0, dtype=torch.float64) + torch.randn(40, generator=generator, dtype=torch.float64)
    fractions = []
    for module in (m.OnlineLBFGS(100, tol=0.0, sample_grads=when), m.LBFGS(100, tol=0.0)):
        x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        optimizer = Modular([x], module, m.LR(0.01))
        for step in range(40):

            def closure(backward=True, step=step, x=x, optimizer=optimizer):
                loss = (rows[step] @ x - targets[step]) ** 2
                if backward:
                    optimizer.zero_grad()
                    loss.backward()
                return loss

            optimizer.step(closure)
        state = optimizer.state[x]
        name = next(key.rpartition(".")[0] for key in state if key.endswith(".num_pairs"))
        fractions.append(state[f"{name}.num_pairs"] / state[f"{name}.num_pairs_seen"])
    assert fractions[0] == 1
    assert fractions[1] < 0.9


def test_online_lbfgs_learns_from_the_closure_behind_other_modules():
    ours, theirs = in_plane(booth), in_plane(booth)
    optimizer = Modular(ours.params, m.Mul(0.5), m.OnlineLBFGS(), m.LR(0.05))
    reference = Modular(theirs.params, m.OnlineLBFGS(), m.LR(0.05))
    for number in range(3):
        moves = []
        for problem, made in ((ours, optimizer), (theirs, reference)):
            before = problem.vector
            made.step(problem.closure)
            moves.append(before - problem.vector)
        if number:  # the first is shortened to length 1
            torch.testing.assert_close(moves[0] * 2, moves[1])
        ours.params[0].data.copy_(theirs.params[0].data)


def test_after_needs_somebody_who_calls_it():
    transform = chain(m.OnlineLBFGS(sample_grads="after"), m.LR(0.1))
    params = [torch.tensor([0.0, -8.0], dtype=torch.float64)]
    state = transform.init(params)
    grads = [torch.tensor([1.0, 2.0], dtype=torch.float64)]
    step = Step(loss_fn=lambda tree: booth(*tree[0]))
    _, state = transform.update(grads, state, params, step=step)
    with pytest.raises(ModuleError, match=r"OnlineLBFGS: sample_grads='after' .* write sample_grads='before'"):
        transform.update(grads, state, params, step=step)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: m.LSR1(0), "LSR1: history_size=0; expected an integer of at least 1"),
        (lambda: m.LSR1(tol=-1.0), r"LSR1: tol=-1\.0; expected a number in \[0, inf\)"),
        (lambda: m.LBFGS(True), "LBFGS: history_size=True; expected an integer of at least 1"),
        (lambda: m.LBFGS(init_damping=2.0), r"LBFGS: init_damping=2\.0; expected a number in \[0, 1\]"),
        (lambda: m.LBFGS(eigval_bounds=(2, 50)), r"LBFGS: eigval_bounds=\(2, 50\); expected \(low, high\) with 0 < low < 1"),
        (lambda: m.LBFGS(eigval_bounds=0.5), r"LBFGS: eigval_bounds=0\.5; expected \(low, high\)"),
        (lambda: m.OnlineLBFGS(sample_grads="now"), "OnlineLBFGS: sample_grads='now'; expected 'before' or 'after'"),
    ],
)  # fmt: skip
def test_bad_options(make, text):
    with pytest.raises(OptionError, match=text):
        make()
