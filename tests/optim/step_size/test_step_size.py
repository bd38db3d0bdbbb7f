"""Step sizes: fixed under another name, random, growing, Polyak's, Barzilai's and Borwein's."""

import pytest
import torch
from torch import nn

from graphopt.errors import ClosureError, OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import on_numbers
from tests.optim.problems import Problem, quadratic
from tests.optim.training import largest_difference, make_params, train

# ----------------------------------------------------------------------------------------------------------------------
# Polyak


def half_square(*params):
    return sum(0.5 * (p**2).sum() for p in params)


def polyak_step(loss_of, *values, modules=(), **options):
    problem = Problem(loss_of, *values)
    optimizer = Modular(problem.params, *modules, m.PolyakStepSize(**options))
    optimizer.step(problem.closure)
    return problem


@accepts("R2")
def test_polyak_on_half_a_square():
    assert polyak_step(half_square, (3.0, 4.0)).vector.tolist() == pytest.approx([1.5, 2.0])
    assert polyak_step(half_square, (3.0,), (4.0,)).vector.tolist() == pytest.approx([1.5, 2.0])
    assert polyak_step(half_square, (3.0, 4.0), alpha=2.0).vector.tolist() == pytest.approx([0.0, 0.0])
    assert polyak_step(half_square, (3.0, 4.0), max=0.1).vector.tolist() == pytest.approx([2.7, 3.6])
    assert polyak_step(half_square, (3.0, 4.0), min_obj_value=5.0).vector.tolist() == pytest.approx([2.1, 2.8])


@accepts("R2")
def test_polyak_of_each_tensor_uses_its_own_product():
    found = polyak_step(half_square, (3.0, 4.0), (1.0,), parameterwise=True).vector
    assert found.tolist() == pytest.approx([3 - 3 * 13 / 25, 4 - 4 * 13 / 25, 1 - 13])


@accepts("R2")
def test_polyak_of_an_update_that_is_not_the_gradient():
    modules = lambda: [m.Mul(2.0)]  # noqa: E731
    assert polyak_step(half_square, (3.0, 4.0), modules=modules()).vector.tolist() == pytest.approx([1.5, 2.0])
    own = polyak_step(half_square, (3.0, 4.0), modules=modules(), use_grad=False)
    assert own.vector.tolist() == pytest.approx([2.25, 3.0])


@accepts("R2")
@pytest.mark.parametrize("options", [{}, {"parameterwise": True}, {"use_grad": False}], ids=str)
def test_polyak_does_not_move_without_descent(options):
    """At the minimum; below the least value that was given; uphill; where the quotient is no number."""
    assert polyak_step(half_square, (0.0, 0.0), **options).vector.tolist() == [0, 0]
    assert polyak_step(half_square, (3.0, 4.0), min_obj_value=13.0, **options).vector.tolist() == [3, 4]
    shifted = lambda p: half_square(p) + 1.0  # noqa: E731
    assert polyak_step(shifted, (1e-170, 0.0), **options).vector.tolist() == [1e-170, 0]
    if options.get("use_grad", True):
        assert polyak_step(half_square, (3.0, 4.0), modules=[m.Negate()], **options).vector.tolist() == [3, 4]


def test_polyak_needs_a_closure():
    params = make_params([(3,)])
    with pytest.raises(ClosureError, match="PolyakStepSize evaluates the loss"):
        train(Modular(params, m.PolyakStepSize()), params)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@accepts("R3")
def test_warmup():
    expected = [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert on_numbers(lambda: [m.Warmup(0, 1, 4)], [1.0] * 7) == pytest.approx(expected, abs=1e-15)
    assert on_numbers(lambda: [m.Warmup(0.5, 0.1, 2), m.LR(2.0)], [1.0] * 4) == pytest.approx([1.0, 0.6, 0.2, 0.2])
    assert on_numbers(lambda: [m.Warmup()], [1.0])[0] == pytest.approx(1e-5)


@accepts("R4")
def test_step_size_does_not_clash_with_the_learning_rate():
    params, others = make_params(), make_params()
    optimizer = Modular(params, m.StepSize(0.5), m.StepSize(3.0, "boost"), m.LR(0.1))
    assert {"step_size", "boost", "lr"} <= set(optimizer.option_names)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    expected = torch.optim.SGD(others, 0.15)
    train(optimizer, params, [0])
    train(expected, others, [0])
    scheduler.step()
    optimizer.param_groups[0]["boost"] = 6.0
    expected.param_groups[0]["lr"] = 0.03
    train(optimizer, params, [1])
    train(expected, others, [1])
    assert largest_difference(params, others) < 1e-14


@pytest.mark.parametrize("key", ["lr", "", "a b", 1])
def test_keys_that_are_none(key):
    with pytest.raises(OptionError, match=r"StepSize: key=.*; expected a name such as 'step_size'"):
        m.StepSize(key=key)


def test_a_step_size_under_another_key_is_checked():
    with pytest.raises(OptionError, match=r"StepSize: boost=-1; expected a number in \[0, inf\)"):
        m.StepSize(-1, "boost")


@accepts("R4")
def test_random_step_sizes():
    """Uniform, new in every step, and repeated with a seed, whatever else is drawn."""
    updates = [1.0] * 300
    runs = [on_numbers(lambda: [m.RandomStepSize(0.5, 2.0, seed=3)], updates) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 300
    assert 0.5 <= min(runs[0]) < 0.55
    assert 1.95 < max(runs[0]) < 2.0
    assert on_numbers(lambda: [m.RandomStepSize(0.5, 2.0, seed=4)], updates) != runs[0]
    torch.manual_seed(0)
    first = on_numbers(lambda: [m.RandomStepSize()], updates[:5])
    torch.manual_seed(0)
    assert on_numbers(lambda: [m.RandomStepSize()], updates[:5]) == first
    assert 0 <= min(first)
    assert max(first) < 1


@accepts("R4")
@pytest.mark.parametrize("parameterwise", [False, True])
def test_random_step_sizes_of_all_tensors_or_each(parameterwise):
    params = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    Modular(params, m.RandomStepSize(parameterwise=parameterwise)).step()
    assert len({p[0].item() for p in params}) == (3 if parameterwise else 1)
    assert all((p == p[0]).all() for p in params)


def test_random_step_sizes_in_the_wrong_order():
    with pytest.raises(OptionError, match=r"RandomStepSize: low=2.0 is above high=1.0; give the smaller one as low"):
        m.RandomStepSize(2.0)


# ----------------------------------------------------------------------------------------------------------------------
# Barzilai and Borwein


def formula(kind, s, y):
    ss, sy, yy = (float(value) for value in (s @ s, s @ y, y @ y))
    return {"long": ss / sy, "short": sy / yy, "geom": (ss / yy) ** 0.5}[kind]


@accepts("R+BB")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("cut", [None, 3])
@pytest.mark.parametrize("kind", ["long", "short", "geom"])
def test_barzilai_borwein(kind, cut, way):
    """All tensors as one, with quotients of a matrix; a quadratic is solved."""
    problem, matrix = quadratic(6, 20.0, cut=cut)
    optimizer = Modular(problem.params, m.BarzilaiBorwein(kind), **way)
    x = problem.vector
    linear = matrix @ x - torch.cat(torch.autograd.grad(problem.loss_of(*problem.params), problem.params))
    before = None
    for step in range(60):
        grad = matrix @ x - linear
        size = (
            1 / max(1.0, float(grad.abs().sum())) if before is None else formula(kind, x - before[0], grad - before[1])
        )
        before, x = (x, grad), x - size * grad
        for p in problem.params:
            p.grad = None
        problem.loss_of(*problem.params).backward()
        optimizer.step()
        if step < 12:  # later, small differences of rounding are large
            torch.testing.assert_close(problem.vector, x, rtol=1e-8, atol=1e-8)
    solution = torch.linalg.solve(matrix, linear)
    torch.testing.assert_close(problem.vector, solution, rtol=1e-6, atol=1e-6)


@accepts("R+BB")
def test_barzilai_borwein_of_each_tensor():
    """Each is solved as if it were alone, by one step with its own curvature."""
    params = [nn.Parameter(torch.full((size,), 5.0, dtype=torch.float64)) for size in (1, 4, 2)]
    optimizer = Modular(params, m.BarzilaiBorwein(parameterwise=True))
    for _ in range(2):
        for curvature, p in enumerate(params, 1):
            p.grad = curvature * p.detach()
        optimizer.step()
    assert largest_difference(params, [torch.zeros_like(p) for p in params]) < 1e-12
    sizes = [optimizer.state[p]["barzilaiborwein.step_size"].item() for p in params]
    assert sizes == pytest.approx([1, 1 / 2, 1 / 3])


@accepts("R+BB")
@pytest.mark.parametrize("parameterwise", [False, True])
def test_barzilai_borwein_without_curvature_and_with_a_limit(parameterwise):
    """Gradients that do not change, or fall along the step, say nothing: the last step size is kept."""
    make = lambda **o: [m.BarzilaiBorwein(parameterwise=parameterwise, **o)]  # noqa: E731
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Modular([p], *make())
    moves = []
    for grad in (4.0, 4.0, 6.0, 2.0):
        before = p.item()
        p.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
        moves.append((before - p.item()) / grad)
    # The changes of x are -1, -1, -1.5; of gradients 0, +2, -4: curvature only in the last.
    assert moves == pytest.approx([1 / 4, 1 / 4, 1 / 4, 1.5 / 4])
    q = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Modular([q], *make(max=0.3))
    for grad in (4.0, 3.9):
        before = q.item()
        q.grad = torch.tensor([grad], dtype=torch.float64)
        optimizer.step()
    assert (before - q.item()) / 3.9 == pytest.approx(0.3)


def test_bad_options_of_barzilai_borwein():
    with pytest.raises(OptionError, match="BarzilaiBorwein: type='middle'; expected one of long, short, geom"):
        m.BarzilaiBorwein("middle")
    with pytest.raises(OptionError, match="for some parameters, but"):
        Modular([{"params": make_params([(3,)]), "parameterwise": True}], m.BarzilaiBorwein())


@accepts("R1")
def test_the_learning_rate():
    """A group's own, and that of a scheduler (C1, C4 and C10 of the catalogue are with their modules)."""
    first, second = make_params([(3,), (3,)])
    optimizer = Modular([{"params": [first], "lr": 1.0}, {"params": [second]}], m.LR(0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    for factor in (1.0, 0.1, 0.01):
        before = [p.detach().clone() for p in (first, second)]
        for p in (first, second):
            p.grad = torch.ones_like(p)
        optimizer.step()
        scheduler.step()
        moves = [(q - p.detach()).mean().item() for p, q in zip((first, second), before, strict=True)]
        assert moves == pytest.approx([factor, 0.1 * factor])
