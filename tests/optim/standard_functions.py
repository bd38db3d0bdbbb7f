"""Standard functions for unconstrained minimisation: sums of squares, with their starts and their known minima.

Every function is ``Σ r_i(x)²`` (not half of it) of a vector x in float64.

Reference: More, Garbow, Hillstrom, "Testing unconstrained optimization software", ACM Trans. Math. Softw. 7(1), 1981; the
numbers are those of its section 3.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StandardFunction:
    """A sum of squares.

    Attributes:
        number: in section 3 of the paper.
        residuals: makes of x, shape (n,), the residuals, shape (m,).
        start: where to begin.
        minima: the values of all known minima, the lowest first, to six digits; also of those at infinity.
        minimizers: points with the value ``minima[0]``, where they are known exactly.
        is_hard: whether rounding or its scale keeps methods of first order from its minimum.
    """

    name: str
    number: int
    residuals: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    minima: tuple[float, ...] = (0.0,)
    minimizers: tuple[tuple[float, ...], ...] = ()
    is_hard: bool = False

    def __call__(self, x):
        return self.residuals(x).square().sum()

    def value_and_grad(self, x):
        """Of an array, as scipy asks for them."""
        leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        loss = self(leaf)
        loss.backward()
        return loss.item(), leaf.grad.numpy()

    def hessian(self, x):
        return torch.autograd.functional.hessian(self, torch.tensor(x, dtype=torch.float64)).numpy()

    def residuals_of(self, x):
        return self.residuals(torch.tensor(x, dtype=torch.float64)).numpy()

    def jacobian_of(self, x):
        return torch.autograd.functional.jacobian(self.residuals, torch.tensor(x, dtype=torch.float64)).numpy()

    def __repr__(self):
        return self.name


FUNCTIONS: dict[str, StandardFunction] = {}


def _function(number, start, minima=(0.0,), minimizers=(), is_hard=False):
    def enter(residuals):
        name = residuals.__name__
        FUNCTIONS[name] = StandardFunction(name, number, residuals, tuple(start), minima, minimizers, is_hard)
        return residuals

    return enter


def _tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def _up_to(m):
    return torch.arange(1, m + 1, dtype=torch.float64)


@_function(1, (-1.2, 1.0), minimizers=((1.0, 1.0),))
def rosenbrock(x):
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


@_function(2, (0.5, -2.0), (0.0, 48.9842), ((5.0, 4.0),))
def freudenstein_roth(x):
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


@_function(3, (0.0, 1.0), is_hard=True)
def powell_badly_scaled(x):
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


@_function(4, (1.0, 1.0), minimizers=((1e6, 2e-6),), is_hard=True)
def brown_badly_scaled(x):
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


@_function(5, (1.0, 1.0), minimizers=((3.0, 0.5),))
def beale(x):
    return _tensor(1.5, 2.25, 2.625) - x[0] * (1 - x[1] ** _up_to(3))


@_function(6, (0.3, 0.4), (124.362,))
def jennrich_sampson(x):
    i = _up_to(10)
    return 2 + 2 * i - torch.exp(i * x[0]) - torch.exp(i * x[1])


@_function(7, (-1.0, 0.0, 0.0), minimizers=((1.0, 0.0, 0.0),))
def helical_valley(x):
    turns = torch.atan(x[1] / x[0]) / (2 * math.pi) + torch.where(x[0] > 0, 0.0, 0.5)
    return torch.stack([10 * (x[2] - 10 * turns), 10 * (torch.sqrt(x[0] ** 2 + x[1] ** 2) - 1), x[2]])


_BARD = _tensor(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)


@_function(8, (1.0, 1.0, 1.0), (8.21487e-3, 17.4286))
def bard(x):
    u = _up_to(15)
    v = 16 - u
    return _BARD - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


_GAUSS = _tensor(0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521, 0.3989)


@_function(9, (0.4, 1.0, 0.0), (1.12793e-8,))
def gaussian(x):
    t = (8 - _up_to(15)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - torch.cat([_GAUSS, _GAUSS[:-1].flip(0)])


_MEYER = _tensor(
    34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872
)  # fmt: skip


@_function(10, (0.02, 4000.0, 250.0), (87.9458,), is_hard=True)
def meyer(x):
    return x[0] * torch.exp(x[1] / (45 + 5 * _up_to(16) + x[2])) - _MEYER


@_function(12, (0.0, 10.0, 20.0), minimizers=((1.0, 10.0, 1.0), (10.0, 1.0, -1.0), (3.0, 3.0, 0.0)))
def box_3d(x):
    t = 0.1 * _up_to(10)
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


@_function(13, (3.0, -1.0, 0.0, 1.0), minimizers=((0.0,) * 4,))
def powell_singular(x):
    a, b, c, d = x
    return torch.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2])


@_function(14, (-3.0, -1.0, -3.0, -1.0), minimizers=((1.0,) * 4,))
def wood(x):
    a, b, c, d = x
    pairs = [10 * (b - a**2), 1 - a, 90**0.5 * (d - c**2), 1 - c]
    return torch.stack([*pairs, 10**0.5 * (b + d - 2), 10**-0.5 * (b - d)])


_KOWALIK_Y = _tensor(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
_KOWALIK_U = _tensor(4.0, 2.0, 1.0, 0.5, 0.25, 0.1670, 0.1250, 0.1, 0.0833, 0.0714, 0.0625)


@_function(15, (0.25, 0.39, 0.415, 0.39), (3.07505e-4, 1.02734e-3))
def kowalik_osborne(x):
    u = _KOWALIK_U
    return _KOWALIK_Y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


@_function(16, (25.0, 5.0, -5.0, -1.0), (85822.2,))
def brown_dennis(x):
    t = _up_to(20) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


@_function(18, (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), (0.0, 5.65565e-3), ((1.0, 10.0, 1.0, 5.0, 4.0, 3.0),))
def biggs_exp6(x):
    t = 0.1 * _up_to(13)
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


@_function(20, (0.0,) * 6, (2.28767e-3,))
def watson(x):
    j = torch.arange(len(x), dtype=torch.float64)
    powers = (_up_to(29) / 29)[:, None] ** j
    slopes = j[1:] * powers[:, :-1]
    inner = slopes @ x[1:] - (powers @ x) ** 2 - 1
    return torch.cat([inner, torch.stack([x[0], x[1] - x[0] ** 2 - 1])])


@_function(21, (-1.2, 1.0) * 5, minimizers=((1.0,) * 10,))
def extended_rosenbrock(x):
    return torch.cat([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])


@_function(23, _up_to(10).tolist(), (7.08765e-5,))
def penalty_1(x):
    return torch.cat([1e-5**0.5 * (x - 1), (x.square().sum() - 0.25)[None]])


@_function(24, (0.5,) * 4, (9.37629e-6,))
def penalty_2(x):
    n, scale = len(x), 1e-5**0.5
    e, y = torch.exp(x / 10), torch.exp(_up_to(n) / 10)
    middle = [scale * (e[1:] + e[:-1] - y[1:] - y[:-1]), scale * (e[1:] - math.exp(-0.1))]
    return torch.cat([(x[0] - 0.2)[None], *middle, ((n + 1 - _up_to(n)) @ x.square() - 1)[None]])


@_function(25, (1 - _up_to(10) / 10).tolist(), minimizers=((1.0,) * 10,))
def variably_dimensioned(x):
    moment = _up_to(len(x)) @ (x - 1)
    return torch.cat([x - 1, torch.stack([moment, moment**2])])


@_function(26, (0.1,) * 10, (0.0, 2.79506e-5), ((0.0,) * 10,))
def trigonometric(x):
    n = len(x)
    return n - torch.cos(x).sum() + _up_to(n) * (1 - torch.cos(x)) - torch.sin(x)


@_function(27, (0.5,) * 10, (0.0, 1.0), ((1.0,) * 10,))
def brown_almost_linear(x):
    n = len(x)
    return torch.cat([x[:-1] + x.sum() - (n + 1), (x.prod() - 1)[None]])


@_function(28, (_up_to(10) / 11 * (_up_to(10) / 11 - 1)).tolist())
def discrete_boundary_value(x):
    t = _up_to(len(x)) / (len(x) + 1)
    edge = x.new_zeros(1)
    return 2 * x - torch.cat([edge, x[:-1]]) - torch.cat([x[1:], edge]) + (x + t + 1) ** 3 / (2 * (len(x) + 1) ** 2)


@_function(30, (-1.0,) * 10)
def broyden_tridiagonal(x):
    edge = x.new_zeros(1)
    return (3 - 2 * x) * x - torch.cat([edge, x[:-1]]) - 2 * torch.cat([x[1:], edge]) + 1


@_function(31, (-1.0,) * 10)
def broyden_banded(x):
    i = torch.arange(len(x))
    gap = i[None, :] - i[:, None]
    band = ((gap != 0) & (gap >= -5) & (gap <= 1)).to(x.dtype)
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))
