"""Functions to minimise, closures of them that count how they are called, and an exact line search."""

import torch

from graphopt.optim import LineSearch


def rosenbrock(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def booth(x, y):
    return (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2


def least_squares(x, y):
    return (2 * x + 3 * y - 5) ** 2 + (5 * x - 2 * y - 3) ** 2


STARTS = {rosenbrock: (-1.1, 2.5), booth: (0.0, -8.0), least_squares: (-0.9, 0.0)}


class Problem:
    """Parameters and a closure.

    Attributes:
        calls: the values of ``backward`` that the closure was called with.
        losses: what it returned.
    """

    def __init__(self, loss_of, *values, dtype=torch.float64):
        self.params = [torch.tensor(value, dtype=dtype).requires_grad_() for value in values]
        self.loss_of, self.calls, self.losses = loss_of, [], []

    def closure(self, backward=True):
        self.calls.append(backward)
        loss = self.loss_of(*self.params)
        if backward:
            for param in self.params:
                param.grad = None
            loss.backward()
        self.losses.append(loss.item())
        return loss

    @property
    def loss(self):
        with torch.no_grad():
            return float(self.loss_of(*self.params))

    @property
    def vector(self):
        return torch.cat([param.detach().reshape(-1) for param in self.params])


def in_plane(function, num_tensors=1, dtype=torch.float64):
    """A function of x and y, in one tensor or two."""
    start = STARTS[function]
    if num_tensors == 2:
        return Problem(function, *start, dtype=dtype)
    return Problem(lambda point: function(*point), start, dtype=dtype)


def quadratic(size, condition, seed=0, cut=None):
    """½ xᵀAx - bᵀx with eigenvalues from 1 to ``condition``, and A; x in two tensors if ``cut``."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = rotation @ torch.diag(torch.logspace(0, 1, size, base=condition, dtype=torch.float64)) @ rotation.T
    matrix = (matrix + matrix.T) / 2
    linear, start = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss_of(*parts):
        x = torch.cat([part.reshape(-1) for part in parts])
        return 0.5 * x @ matrix @ x - linear @ x

    parts = [start] if cut is None else [start[:cut], start[cut:]]
    return Problem(loss_of, *[part.tolist() for part in parts]), matrix


class Exact(LineSearch):
    """The minimum of a quadratic along the update."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = matrix

    def search(self, update, var):
        d = torch.cat([u.reshape(-1) for u in update])
        g = torch.cat([g.reshape(-1) for g in var.grads])
        curvature = d @ self.matrix @ d
        return float(g @ d / curvature) if curvature > 0 else 0.0


def steps_until(problem, optimizer, below, most):
    """How many steps it takes."""
    for number in range(1, most + 1):
        optimizer.step(problem.closure)
        if problem.loss < below:
            return number
    return most + 1
