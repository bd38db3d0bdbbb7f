"""Modules in another space: nothing is lost on the way, and their state is kept with the parameters."""

import copy

import pytest
import torch

from graphopt.annotations import SUM_GRAD_SQUARED
from graphopt.errors import MissingAnnotation, OptionError
from graphopt.optim import Modular, Module, Projection, m
from graphopt.optim.core.transform import Step, apply_updates, chain
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, in_plane, quadratic, rosenbrock

ROTATION = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]


class Rotated(Projection):
    """Of a parameter with two elements."""

    def project(self, tensors, var, current):
        return [ROTATION @ tensor for tensor in tensors]

    def unproject(self, tensors, var, current):
        return [ROTATION.T @ tensor for tensor in tensors]


class Identity(Module):
    def step(self, var):
        return var


MAKE = {
    "vector": m.VectorProjection,
    "blocks": lambda modules, **options: m.BlockPartition(modules, 4, **options),
    "blocks of one": lambda modules, **options: m.BlockPartition(modules, 1, **options),
    "batched": lambda modules, **options: m.BlockPartition(modules, 4, batched=True, **options),
    "tensor": lambda modules, **options: m.TensorizeProjection(modules, 3, **options),
    "one side": lambda modules, **options: m.TensorizeProjection(modules, 100, **options),
    "one row": lambda modules, **options: m.BlockPartition(modules, 100, batched=True, **options),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def many(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (4,), (), (0, 2), (2, 1, 2)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    problem = Problem(lambda *ps: sum((p**2 * (1 + p.numel())).sum() + p.sum() for p in ps), *[0.0] * len(shapes))
    problem.params = [value.requires_grad_() for value in values]
    return problem


def train(problem, *modules, steps=4):
    optimizer = Modular(problem.params, *modules)
    for _ in range(steps):
        optimizer.step(problem.closure)
    return [p.detach().clone() for p in problem.params]


@accepts("C11", "P3", "P5")
@every
@pytest.mark.parametrize(
    "options", [{}, {"project_params": True}, {"project_grad": True}, {"project_update": False, "project_grad": True}]
)
def test_element_wise_modules_do_the_same_inside(make, options):
    chain_of = [m.Adam(), m.WeightDecay(0.1), m.LR(0.05)]
    expected = train(many(), *copy.deepcopy(chain_of))
    found = train(many(), make(chain_of, **options))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(train(many(), make(Identity(), **options), m.LR(0.1)), train(many(), m.LR(0.1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@accepts("C11")
@every
def test_line_searches_inside_reach_the_same_point(make):
    options = [m.BFGS(), m.StrongWolfe()]
    expected = train(many(), *copy.deepcopy(options), steps=6)
    found = train(many(), make(options, project_params=True), steps=6)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_rotation_changes_nothing_for_what_is_invariant():
    for modules in (
        [m.StrongWolfe()],
        [m.BFGS(scale_first=False), m.StrongWolfe()],
        [m.NewtonCG(hvp_method="central"), m.Backtracking()],
    ):
        ends = []
        for inside in (False, True):
            problem = in_plane(rosenbrock)
            own = copy.deepcopy(modules)
            train(problem, *([Rotated(own, project_params=True)] if inside else own), steps=5)
            ends.append(problem.vector)
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)


def test_gradient_approximations_inside():
    problem = in_plane(rosenbrock)
    approximated = Rotated(
        [m.FDM(formula="central4"), m.BFGS(scale_first=False), m.StrongWolfe()],
        project_params=True,
        project_update=False,
    )
    reference = in_plane(rosenbrock)
    train(problem, m.FDM(formula="central4"), m.BFGS(scale_first=False), m.StrongWolfe(), steps=5)
    train(reference, approximated, steps=5)
    torch.testing.assert_close(problem.vector, reference.vector, rtol=1e-5, atol=1e-5)


@accepts("P3")
def test_vector_projection_and_concatenated_bfgs():
    ends = []
    for make in (lambda: m.VectorProjection(m.BFGS()), m.BFGS):
        problem, _ = quadratic(6, 10, cut=2)
        train(problem, make(), m.LR(0.1), steps=10)
        ends.append(problem.vector)
    assert torch.equal(*ends)


@accepts("P5")
def test_bfgs_of_each_block():
    scales = [1.0, 5.0, 2.0, 30.0, 3.0]
    factors = torch.tensor(scales, dtype=torch.float64)
    problem = Problem(lambda x: (factors * (x - 1) ** 2).sum(), [0.5, -1.0, 2.0, 0.0, 3.0])
    start = problem.vector
    blocks = m.BlockPartition(m.BFGS(concat_params=False, scale_first=False), 2)
    train(problem, blocks, m.LR(0.01), steps=12)
    alone = []
    for piece, scale in zip(start.split(2), factors.split(2), strict=True):
        part = Problem(lambda x, scale=scale: (scale * (x - 1) ** 2).sum(), piece.tolist())
        train(part, m.BFGS(scale_first=False), m.LR(0.01), steps=12)
        alone.append(part.vector)
    torch.testing.assert_close(problem.vector, torch.cat(alone), rtol=0, atol=1e-8)


class Shapes(Module):
    def step(self, var):
        self.seen = [tuple(update.shape) for update in var.get_update()]
        self.sides = [update.clone() for update in var.get_update()]
        return var


@accepts("P4")
@pytest.mark.parametrize("max_side", [2, 4, 7])
def test_tensors_of_equal_sides(max_side):
    """Any number of elements, in the fewest and shortest axes; the rest are zeros."""
    for num in [*range(1, 70), 81, 82, 125, 126, 343, 344, 500]:
        vector, inside = torch.arange(1.0, num + 1, dtype=torch.float64), Shapes()
        param = torch.zeros(num, dtype=torch.float64, requires_grad=True)
        param.grad = vector
        Modular([param], m.TensorizeProjection(inside, max_side)).step()
        assert torch.equal(param.detach(), -vector)
        (shape,) = inside.seen
        axes = len(shape)
        if num > max_side:
            assert max(shape) == min(shape) <= max_side
            assert max_side ** (axes - 1) < num
            assert (shape[0] - 1) ** axes < num <= shape[0] ** axes
        else:
            assert shape == (num,)
        assert inside.sides[0].sum() == vector.sum()


@accepts("P4")
def test_shampoo_in_a_tensor():
    problem = many()
    before = problem.loss
    train(problem, m.TensorizeProjection(m.Shampoo(merge_small=False, update_freq=1), 4), m.LR(0.1), steps=10)
    assert problem.loss < before


@accepts("P5")
def test_rows_of_blocks():
    """The number of elements is not a multiple."""
    inside, param = Shapes(), torch.zeros(7, dtype=torch.float64, requires_grad=True)
    param.grad = torch.arange(7, dtype=torch.float64)
    Modular([param], m.BlockPartition(inside, 3, batched=True)).step()
    assert inside.sides[0].tolist() == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
    assert torch.equal(param.detach(), -param.grad)


def test_parameters_that_miss_a_step_keep_what_belongs_to_them():
    problem, other = many(), many()
    params, alone = problem.params[:2], other.params[1:2]
    optimizer = Modular(params, m.BlockPartition(m.HeavyBall(), 2), m.LR(0.1))
    expected = Modular(alone, m.HeavyBall(), m.LR(0.1))
    for step in range(4):
        problem.closure(), other.closure()
        params[0].grad = None if step == 2 else params[0].grad
        optimizer.step()
        expected.step()
    torch.testing.assert_close(params[1], alone[0], rtol=0, atol=1e-15)


def test_parameters_of_several_dtypes():
    params = [torch.ones(3, dtype=dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    optimizer = Modular(params, m.VectorProjection([m.Adam(), m.LR(0.1)]))
    for _ in range(2):
        optimizer.zero_grad()
        sum((p.double() ** 2).sum() for p in params).backward()
        optimizer.step()
    assert [p.dtype for p in params] == [torch.bfloat16, torch.float32, torch.float64]
    assert all(bool((p < 0.9).all()) for p in params)


def test_state_is_kept_with_the_owners_and_their_settings_hold():
    problem = many()
    first, second = problem.params[:2]
    optimizer = Modular(
        [{"params": [first]}, {"params": [second], "beta1": 0.0}],
        m.BlockPartition(m.Adam(), 4),
        m.LR(0.1),
    )
    problem.closure()
    optimizer.step()
    assert sum(name.endswith("exp_avg") for name in optimizer.state[first]) == 4
    assert sum(name.endswith("exp_avg") for name in optimizer.state[second]) == 1
    averages = [value for name, value in optimizer.state[second].items() if name.endswith("exp_avg")]
    assert torch.equal(averages[0], second.grad)


def test_reset():
    problem = many()
    adam = m.Adam()
    outer = m.VectorProjection([m.BlockPartition([adam, m.LR(0.1)], 3)])
    optimizer = Modular(problem.params, outer)
    problem.closure()
    optimizer.step()
    entry = optimizer.state[problem.params[0]]
    assert len(entry) > 1
    outer.reset()
    assert list(entry) == ["step"]
    optimizer.step()
    assert len(entry) > 1
    optimizer.reset()
    optimizer.step()
    assert float(optimizer.state[problem.params[0]]["step"]) == 1


def test_a_closure_that_fails_inside_leaves_the_parameters():
    problem = in_plane(rosenbrock)
    optimizer = Modular(problem.params, Rotated([m.StrongWolfe()], project_params=True))
    optimizer.step(problem.closure)
    before, usual = problem.vector, problem.loss_of
    problem.loss_of = lambda x: usual(x) if torch.equal(x.detach(), before) else 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.step(problem.closure)
    assert torch.equal(problem.vector, before)


def test_as_a_pure_function():
    for modules in ([m.BFGS(), m.StrongWolfe()], [m.Adam(), m.LR(0.1)]):
        problem, _ = quadratic(5, 10, cut=2)
        inside = m.VectorProjection(modules, project_params=True)
        transform = chain(copy.deepcopy(inside))
        params = [p.detach().clone() for p in problem.params]
        optimizer = Modular(problem.params, inside)
        state = transform.init(params)
        assert state.states == [{}, {}]
        for _ in range(4):
            leaves = [p.clone().requires_grad_() for p in params]
            grads = list(torch.autograd.grad(problem.loss_of(*leaves), leaves))
            updates, state = transform.update(
                grads, state, params, step=Step(loss_fn=lambda ps, loss_of=problem.loss_of: loss_of(*ps))
            )
            params = apply_updates(params, updates)
            optimizer.step(problem.closure)
            torch.testing.assert_close(torch.cat(params), problem.vector, rtol=1e-13, atol=1e-13)


def test_bad_options_and_annotations():
    with pytest.raises(
        OptionError,
        match=r"VectorProjection: StrongWolfe inside evaluates.*write VectorProjection\(\.\.\., project_par",
    ):
        m.VectorProjection([m.BFGS(), m.StrongWolfe()])
    with pytest.raises(OptionError, match="project_update, project_params and project_grad are all False"):
        m.VectorProjection(m.Adam(), project_update=False)
    with pytest.raises(OptionError, match="BlockPartition: max_size=0; expected an integer of at least 1"):
        m.BlockPartition(m.Adam(), 0)
    with pytest.raises(OptionError, match="TensorizeProjection: max_side=1; expected a whole number of at least 2"):
        m.TensorizeProjection(m.Adam(), 1)
    from graphopt import annotations

    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    annotations.publish(param, torch.ones(2), 1)
    optimizer = Modular([param], m.VectorProjection(m.TrueGradAdam()))
    with pytest.raises(MissingAnnotation, match=rf"VectorProjection: a module inside reads {SUM_GRAD_SQUARED.name}"):
        optimizer.step()
