"""What each method with a matrix makes of a pair, by dense algebra in numpy, and what its authors prove of it."""

import numpy as np
import pytest
import torch

from graphopt.optim import Modular, m
from graphopt.optim.core.context import Settings
from tests.optim.catalogue import accepts
from tests.optim.problems import Exact, in_plane, quadratic, rosenbrock, steps_until


def spd(size, seed):
    return quadratic(size, 20, seed)[1].numpy()


class Pair:
    """A pair of a quadratic with the Hessian A, after a step along H g, or along anything (``free``)."""

    def __init__(self, seed=0, size=4, free=False, symmetric=True):
        random = np.random.default_rng(seed)
        self.A, self.H = spd(size, seed), spd(size, seed + 100) / 10
        if not symmetric:
            self.H = self.H + 0.1 * random.normal(size=(size, size))
        self.g_prev, free_step = random.normal(size=size), random.normal(size=size)
        self.s = free_step if free else -0.3 * self.H @ self.g_prev
        self.y = self.A @ self.s
        self.g = self.g_prev + self.y
        self.p_prev = random.normal(size=size)

    def update(self, module, matrix=None, state=None):
        """The next matrix, by a module."""
        tensor = torch.from_numpy
        p_prev, s = tensor(self.p_prev), tensor(self.s)
        args = (s, tensor(self.y), p_prev + s, tensor(self.g), p_prev, tensor(self.g_prev))
        state = {} if state is None else state
        change = module.update_B if type(module) is m.PSB else module.update_H
        return change(tensor(self.H if matrix is None else matrix), *args, state, Settings(module.defaults)).numpy()


def dfp(pair):
    H, s, y = pair.H, pair.s, pair.y
    return H + np.outer(s, s) / (s @ y) - np.outer(H @ y, H @ y) / (y @ H @ y)


def bfgs(pair):
    left = np.eye(len(pair.s)) - np.outer(pair.s, pair.y) / (pair.s @ pair.y)
    return left @ pair.H @ left.T + np.outer(pair.s, pair.s) / (pair.s @ pair.y)


def hoshino(pair):
    sy, yHy = pair.s @ pair.y, pair.y @ pair.H @ pair.y
    return (yHy * dfp(pair) + sy * bfgs(pair)) / (sy + yHy)


def sr1(pair):
    z = pair.s - pair.H @ pair.y
    return pair.H + np.outer(z, z) / (z @ pair.y)


def broyden_good(pair):
    """By the formula for the Hessian."""
    B = np.linalg.inv(pair.H)
    return np.linalg.inv(B + np.outer(pair.y - B @ pair.s, pair.s) / (pair.s @ pair.s))


def broyden_bad(pair):
    """The least change, row by row, by least squares."""
    return pair.H + np.stack([np.linalg.lstsq(pair.y[None], r[None], rcond=None)[0] for r in pair.s - pair.H @ pair.y])


def rank_one(choose_c):
    def update(pair):
        c = choose_c(pair)
        return np.array(
            [
                [pair.H[i, j] + (pair.s - pair.H @ pair.y)[i] * c[j] / (c @ pair.y) for j in range(len(c))]
                for i in range(len(c))
            ]
        )

    return update


ORACLES = {
    "BFGS": bfgs,
    "DFP": dfp,
    "SR1": sr1,
    "FletcherVMM": bfgs,
    "Horisho": hoshino,
    "BroydenGood": broyden_good,
    "BroydenBad": broyden_bad,
    "Greenstadt1": rank_one(lambda pair: pair.g_prev),
    "Greenstadt2": rank_one(lambda pair: pair.H @ pair.H @ pair.y),
    "ColumnUpdatingMethod": rank_one(lambda pair: np.abs(pair.y) == np.abs(pair.y).max()),
    "ThomasOptimalMethod": rank_one(lambda pair: pair.H.T @ ((1 + np.linalg.norm(pair.s) / 2) * pair.s)),
    "McCormick": rank_one(lambda pair: pair.s),
    "Pearson": rank_one(lambda pair: pair.y @ pair.H),
}
SYMMETRIC = ["BFGS", "DFP", "SR1", "FletcherVMM", "Horisho"]


@accepts("Q1", "Q2", "Q3", "Q4", "Q5", "Q9", "Q10", "Q11", "Q12", "Q13", "Q14", "Q15", "Q16")
@pytest.mark.parametrize("name", ORACLES)
def test_matrices(name):
    for seed, scale in ((0, 1.0), (1, 1.0), (2, 1e-7)):  # short steps teach no less
        pair = Pair(seed, free=True, symmetric=name in SYMMETRIC)
        pair.s, pair.y = scale * pair.s, scale * pair.y
        kept = pair.H.copy()
        np.testing.assert_allclose(pair.update(getattr(m, name)()), ORACLES[name](pair), rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(pair.H, kept)


@accepts("Q8")
def test_psb_changes_as_little_as_possible():
    """Of all symmetric changes E with E s = r the one of least norm, by least squares over their elements."""
    pair = Pair(free=True)
    rows, columns = np.triu_indices(4)
    basis = np.zeros((10, 4, 4))
    for k, (i, j) in enumerate(zip(rows, columns, strict=True)):
        basis[k, i, j] = basis[k, j, i] = 1 / np.sqrt(1 + (i != j))
    weights = np.linalg.lstsq((basis @ pair.s).T, pair.y - pair.H @ pair.s, rcond=None)[0]
    new = pair.update(m.PSB())
    np.testing.assert_allclose(new, pair.H + np.tensordot(weights, basis, 1), rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(new, new.T)
    problem, _ = quadratic(6, 10)
    optimizer = Modular(problem.params, m.PSB(init_scale=1.0, scale_first=False), m.LR(1.0))
    for _ in range(30):
        optimizer.step(problem.closure)
    assert torch.autograd.grad(problem.loss_of(*problem.params), problem.params)[0].norm() < 1e-8


@accepts("Q14")
def test_matrix_of_thomas():
    pair = Pair(free=True)
    before = spd(4, 7)
    state = {"R": torch.from_numpy(before)}
    pair.update(m.ThomasOptimalMethod(), state=state)
    s, length, identity = pair.s, np.linalg.norm(pair.s), np.eye(4)
    d = (before + length / 2 * identity) @ s
    expected = (1 + length) * (length * identity + before - np.outer(d, d) / (d @ s))
    np.testing.assert_allclose(state["R"].numpy(), expected, rtol=1e-12)


@accepts("Q17")
def test_matrices_of_the_projected_newton_raphson_method():
    module, state = m.ProjectedNewtonRaphson(), {}
    pairs = [Pair(0, free=True), Pair(0, free=True), Pair(0, free=True)]
    H = R = pairs[0].H
    for index, pair in enumerate(pairs):
        pair.s = np.random.default_rng(index).normal(size=4)
        pair.y = pair.A @ pair.s
        Hy = H @ pair.y
        R = R + np.outer(pair.s - R @ pair.y, Hy) / (pair.y @ Hy)
        new = pair.update(module, H, state)
        H = H - np.outer(Hy, Hy) / (pair.y @ Hy)
        np.testing.assert_allclose(new, H, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state["R"].numpy(), R, rtol=1e-9)
        for old in pairs[: index + 1]:
            np.testing.assert_allclose(H @ old.y, 0, atol=1e-9)
            np.testing.assert_allclose(R @ old.y, old.s, rtol=1e-8, atol=1e-9)
    last = Pair(0, free=True)  # the fourth pair of four elements: nothing is left of H
    new = last.update(module, H, state)
    np.testing.assert_allclose(new @ last.A, np.eye(4), atol=1e-8)
    never = m.ProjectedNewtonRaphson(reset_interval=None)
    np.testing.assert_allclose(last.update(never, H, {"num_pairs": 9, "R": torch.from_numpy(R)}), 0, atol=1e-8)


def scale_and_share(switch, pair):
    """γ and θ as in the paper, with ε by the inverse of H."""
    sigma, tau = pair.s @ pair.y, pair.y @ pair.H @ pair.y
    epsilon = pair.s @ np.linalg.inv(pair.H) @ pair.s
    if isinstance(switch, tuple):
        return switch[0] * epsilon / sigma + (1 - switch[0]) * sigma / tau, switch[1]
    if switch == 2:
        return np.sqrt(epsilon / tau), 1 / (1 + np.sqrt(tau * epsilon) / sigma)
    if switch == 4:
        return np.sqrt(epsilon / tau), 0.5
    if epsilon <= sigma:
        return epsilon / sigma, 0.0
    if sigma >= tau:
        return sigma / tau, 1.0
    return 1.0, sigma * ((epsilon if switch == 1 else tau) - sigma) / (epsilon * tau - sigma**2)


SWITCHES = [1, 2, 3, 4, (1, 1), (0, 1), (1, 0), (0.3, 0.6)]


@accepts("Q7")
@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_self_scaling(switch):
    branches = set()
    for seed, scale in ((0, 1.0), (1, 1.0), (2, 0.03), (3, 100.0)):
        pair = Pair(seed)
        epsilon, tau = pair.s @ np.linalg.inv(pair.H) @ pair.s, pair.y @ pair.H @ pair.y
        pair.H = pair.H * (scale * np.sqrt(epsilon / tau))  # at 1 the last case of the rules 1 and 3
        gamma, theta = scale_and_share(switch, pair)
        branches.add(theta if theta in (0, 1) else "between")
        H, s, y = pair.H, pair.s, pair.y
        sigma, tau = s @ y, y @ H @ y
        v = np.sqrt(tau) * (s / sigma - H @ y / tau)
        expected = gamma * (H - np.outer(H @ y, H @ y) / tau + theta * np.outer(v, v)) + np.outer(s, s) / sigma
        new = pair.update(m.SSVM(switch))
        np.testing.assert_allclose(new, expected, rtol=1e-7, atol=1e-9)

        def condition(H, A=pair.A):
            values = np.linalg.eigvals(H @ A).real
            return values.max() / values.min()

        assert condition(new) <= condition(H) * (1 + 1e-9)  # which is what the method is for
    assert switch not in (1, 3) or branches == {0.0, 1.0, "between"}
    problem = in_plane(rosenbrock)
    optimizer = Modular(problem.params, m.SSVM(switch), m.StrongWolfe())
    for _ in range(20):
        optimizer.step(problem.closure)
    assert problem.vector.isfinite().all()


@accepts("Q4")
def test_fletcher_is_bfgs():
    ends = []
    for module in (m.FletcherVMM(), m.BFGS()):
        problem = in_plane(rosenbrock)
        optimizer = Modular(problem.params, module, m.StrongWolfe())
        for _ in range(30):
            optimizer.step(problem.closure)
        ends.append(problem.vector)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-8)


@accepts("Q4")
def test_eigenvalues_do_not_overshoot_with_the_switch_of_fletcher():
    """Those of A^½ H A^½ become nearer to 1, each from its side, whatever the step (theorem 2 of his paper)."""
    pair = Pair(5, size=5, free=True)
    root = np.linalg.cholesky(pair.A)
    H, random = pair.H, np.random.default_rng(0)
    used = set()
    for _ in range(12):
        pair.s = random.normal(size=5)
        pair.y = pair.A @ pair.s
        used.add(pair.s @ pair.y >= pair.y @ H @ pair.y)
        new = pair.update(m.FletcherVMM(switch=True), H)
        before, after = (np.linalg.eigvalsh(root.T @ matrix @ root) for matrix in (H, new))
        assert ((after >= np.minimum(before, 1) - 1e-9) & (after <= np.maximum(before, 1) + 1e-9)).all()
        H = new
    assert used == {True, False}


@accepts("Q5", "Q6")
@pytest.mark.parametrize("num_tensors", [1, 2])
def test_gradient_correction(num_tensors):
    """The gradient where a step of another length along the same line would have ended: at the minimum there."""
    problem, matrix = quadratic(4, 10, cut=2 if num_tensors == 2 else None)
    optimizer = Modular(problem.params, m.GradientCorrection(), m.LR(0.03))
    points, moves, grads = [], [], []
    for _ in range(4):
        points.append(problem.vector)
        problem.closure()
        grads.append(torch.cat([p.grad for p in problem.params]))
        optimizer.step()
        moves.append((points[-1] - problem.vector) / 0.03)
    torch.testing.assert_close(moves[0], grads[0])
    for index in range(1, 4):
        s = points[index] - points[index - 1]
        best = points[index] - s * (s @ grads[index]) / (s @ matrix @ s)
        gradient = matrix @ best + (grads[0] - matrix @ points[0])
        torch.testing.assert_close(moves[index], gradient, rtol=1e-8, atol=1e-8)
    problem, matrix = quadratic(4, 10)
    optimizer = Modular(problem.params, m.Horisho(init_scale=1.0, inner=m.GradientCorrection()), Exact(matrix))
    for _ in range(4):
        optimizer.step(problem.closure)
    assert torch.autograd.grad(problem.loss_of(*problem.params), problem.params)[0].norm() < 1e-8
    problem = in_plane(rosenbrock)
    optimizer = Modular(problem.params, m.Horisho(inner=m.GradientCorrection()), m.StrongWolfe())
    assert steps_until(problem, optimizer, 1e-6, 60) <= 60
    pair = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = Modular([pair], m.GradientCorrection(), m.LR(0.1))
    for _ in range(3):  # a line without a minimum
        pair.grad = -pair.detach()
        before = pair.detach().clone()
        optimizer.step()
        torch.testing.assert_close(pair.detach(), 1.1 * before)
