"""SAM and ASAM: the gradient uphill, the loss here, and nothing left of the way."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.errors import ClosureError, NonFiniteError, OptionError
from graphopt.optim import Modular, m
from graphopt.optim.core.transform import Step, apply_updates, chain
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, booth, in_plane, rosenbrock, steps_until

KINDS = {"SAM": (m.SAM, {"rho": 0.3}), "ASAM": (m.ASAM, {"rho": 0.3, "eta": 0.05})}
every_kind = pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)


def uphill(params, grads, rho, eta=None):
    """ε by the formula, one vector of numbers."""
    sizes = [1.0 if eta is None else abs(p) + eta for p in params]
    length = sum((t * g) ** 2 for t, g in zip(sizes, grads, strict=True)) ** 0.5
    return [rho * t * t * g / length if length else 0.0 for t, g in zip(sizes, grads, strict=True)]


def gradient(x, y):
    return [-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)]


@accepts("H+SAM")
@every_kind
@pytest.mark.parametrize("num_tensors", [1, 2])
def test_the_gradient_is_that_uphill_and_the_loss_that_here(kind, options, num_tensors):
    problem = in_plane(rosenbrock, num_tensors)
    optimizer = Modular(problem.params, kind(**options), m.LR(1e-4))
    point = [-1.1, 2.5]
    for _ in range(5):
        loss = optimizer.step(problem.closure)
        assert float(loss) == pytest.approx(rosenbrock(*point), rel=1e-12)
        move = uphill(point, gradient(*point), **options)
        slope = gradient(*[a + b for a, b in zip(point, move, strict=True)])
        point = [a - 1e-4 * b for a, b in zip(point, slope, strict=True)]
        assert problem.vector.tolist() == pytest.approx(point, rel=1e-12)
    assert problem.calls == [True] * 10


@accepts("H+SAM")
@every_kind
def test_as_torch_does_it_by_hand_on_a_network(kind, options):
    """With Adam behind, in float32, against loops over parameters and torch's Adam."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    model, other = make(), make()
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 1, dtype=torch.float64)
    optimizer = Modular(model, kind(**options), m.Adam(), m.LR(0.01))
    reference = torch.optim.Adam(other.parameters(), 0.01)

    def closure(backward=True):
        loss = F.mse_loss(model(x), y)
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    for _ in range(8):
        returned = optimizer.step(closure)
        params = list(other.parameters())
        loss = F.mse_loss(other(x), y)
        grads = torch.autograd.grad(loss, params)
        flat = [n for t in params for n in t.detach().reshape(-1).tolist()]
        move = uphill(flat, [n for t in grads for n in t.reshape(-1).tolist()], **options)
        starts = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p in params:
                p += torch.tensor(move[: p.numel()], dtype=torch.float64).reshape(p.shape)
                move = move[p.numel() :]
        reference.zero_grad()
        F.mse_loss(other(x), y).backward()
        with torch.no_grad():
            for p, start in zip(params, starts, strict=True):
                p.copy_(start)
        reference.step()
        assert float(returned) == pytest.approx(loss.item(), rel=1e-10)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-6, atol=1e-8)


@accepts("H+SAM")
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_come_back_bit_for_bit(kind, options, dtype):
    start = torch.randn(7, generator=torch.Generator().manual_seed(0)).to(dtype)
    problem = Problem(lambda p: (p.float() ** 4).sum(), start.tolist(), dtype=dtype)
    optimizer = Modular(problem.params, kind(**options), m.LR(0.0))
    for _ in range(50):
        optimizer.step(problem.closure)
    assert torch.equal(problem.params[0].detach(), start)


@accepts("H+SAM")
def test_asam_does_not_depend_on_the_scale_of_layers():
    """Of ``a b x`` with a ten times and b a tenth: the same step of the product, where SAM makes another one."""

    def products(kind):
        found = []
        for factor in (1.0, 10.0):
            problem = Problem(lambda a, b: (a * b - 1) ** 4, 2.0 * factor, 1.5 / factor)
            Modular(problem.params, kind, m.LR(0.0)).step(problem.closure)
            a, b = problem.params
            found.append([(a * a.grad).item(), (b * b.grad).item()])
            kind = type(kind)(**kind.defaults)
        return found

    first, second = products(m.ASAM(0.2, 0.0))
    assert first == pytest.approx(second, rel=1e-10)
    first, second = products(m.SAM(0.2))
    assert first != pytest.approx(second, rel=1e-2)


@accepts("H+SAM")
def test_it_prefers_flat_minima():
    """Of two equally deep ones, coming from the sharp one."""

    def valley(x):
        return -torch.exp(-((x - 1) ** 2) / 0.005) - torch.exp(-((x + 1) ** 2) / 0.5)

    ends = []
    for modules in ([], [m.SAM(0.3)]):
        problem = Problem(valley, 0.96)
        optimizer = Modular(problem.params, *modules, m.LR(0.002))
        for _ in range(300):
            optimizer.step(problem.closure)
        ends.append(problem.params[0].item())
    assert ends[0] == pytest.approx(1, abs=0.01)
    assert abs(ends[1] - 1) > 0.05


@every_kind
def test_where_the_gradient_is_zero(kind, options):
    problem = Problem(lambda x, y: (x**2).sum() + 0 * y, [0.0, 0.0], 1.0)
    optimizer = Modular(problem.params, kind(**options), m.LR(0.1))
    assert float(optimizer.step(problem.closure)) == 0
    assert problem.vector.tolist() == [0.0, 0.0, 1.0]
    assert all(bool((p.grad == 0).all()) for p in problem.params)


def test_each_parameter_may_have_its_own_length():
    seen = []
    problem = Problem(lambda x, y: seen.append((x.item(), y.item())) or 3 * x + 4 * y, 1.0, 1.0)
    module = m.SAM(0.1).set_param_groups([{"params": problem.params[1], "rho": 0.0}])
    Modular(problem.params, module, m.LR(0.0)).step(problem.closure)
    assert seen == [(1.0, 1.0), (pytest.approx(1.06), 1.0)]


@every_kind
def test_line_searches_and_newton_methods_behind(kind, options):
    for modules in ([m.Backtracking()], [m.NewtonCG(hvp_method="forward"), m.Backtracking()]):
        problem = in_plane(booth)
        optimizer = Modular(problem.params, kind(rho=0.01), *modules)
        assert steps_until(problem, optimizer, 0.01, 100) <= 100


def test_on_approximated_gradients():
    problem = in_plane(booth)
    optimizer = Modular(problem.params, m.FDM(), m.SAM(0.1), m.LR(0.02))
    optimizer.step(problem.closure)
    other = in_plane(booth)
    Modular(other.params, m.SAM(0.1), m.LR(0.02)).step(other.closure)
    assert torch.allclose(problem.vector, other.vector, rtol=1e-6)
    assert set(problem.calls) == {False}


@every_kind
def test_as_a_pure_function(kind, options):
    transform = chain(kind(**options), m.LR(0.01))
    params = [torch.tensor(0.0, dtype=torch.float64), torch.tensor(-8.0, dtype=torch.float64)]
    updates, _ = transform.update(params, transform.init(params), params, step=Step(loss_fn=lambda tree: booth(*tree)))
    problem = in_plane(booth, 2)
    Modular(problem.params, kind(**options), m.LR(0.01), foreach=False).step(problem.closure)
    assert torch.equal(torch.stack(apply_updates(params, updates)), problem.vector)


# -- bad input


@every_kind
def test_losses_and_gradients_that_are_not_finite(kind, options):
    calls = []

    def loss_of(x):
        calls.append(1)
        return (x * (torch.nan if len(calls) in bad else 1.0)).sum()

    for bad, text in (({1}, r"SAM: the loss is nan.*nothing was changed"), ({2}, "SAM: the gradient of .* holds NaN")):
        calls.clear()
        problem = Problem(loss_of, [1.0, 2.0])
        optimizer = Modular(problem.params, kind(**options), m.LR(0.1))
        with pytest.raises(NonFiniteError, match=text):
            optimizer.step(problem.closure)
        assert problem.vector.tolist() == [1.0, 2.0]
        assert len(calls) == max(bad)


def test_an_error_uphill_leaves_the_parameters():
    problem = in_plane(booth)
    before = problem.vector

    def closure(backward=True):
        if problem.calls:
            raise KeyboardInterrupt
        return problem.closure(backward)

    with pytest.raises(KeyboardInterrupt):
        Modular(problem.params, m.SAM(), m.LR(0.1)).step(closure)
    assert torch.equal(problem.vector, before)


def test_wrong_use():
    param = torch.tensor([1.0], requires_grad=True)
    with pytest.raises(ClosureError, match=r"SAM evaluates the loss, so step\(\) needs a closure"):
        Modular([param], m.SAM()).step()
    with pytest.raises(
        OptionError, match="SAM makes an update of its own, so that module 1 of 2, Adam would be in vain"
    ):
        Modular([param], m.Adam(), m.SAM())
    with pytest.raises(OptionError, match=r"ASAM: eta=-0\.1; expected a number in \[0, inf\)"):
        m.ASAM(eta=-0.1)
