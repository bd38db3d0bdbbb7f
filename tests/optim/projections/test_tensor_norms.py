"""Modules that rescale tensors."""

import torch

from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, in_plane, rosenbrock
from tests.optim.training import largest_difference, make_params, set_gradients

SHAPES = [(3, 4), (), (5,), (0, 2), (2, 2)]


def after_a_step(*modules):
    params = make_params(SHAPES)
    set_gradients(params, 1)
    params[-1].grad.zero_()
    Modular(params, *modules).step()
    return params


@accepts("P6")
def test_twice_the_norm_is_twice_the_tensor():
    """Zeros stay zeros."""
    assert largest_difference(after_a_step(m.TensorNormsProjection(m.Mul(2.0))), after_a_step(m.Mul(2.0))) < 1e-14
    unmoved = make_params(SHAPES)[-1]
    found = after_a_step(m.TensorNormsProjection(m.Fill(2.0)))
    assert torch.equal(found[-1], unmoved)


@accepts("P6")
def test_what_the_modules_see():
    """`Fill` gives all the same norm; a schedule-free sign is a step of one for each tensor."""
    starts, found = make_params(SHAPES), after_a_step(m.TensorNormsProjection(m.Fill(2.0)))
    set_gradients(starts, 1)
    for start, end in zip(starts[:3], found, strict=False):
        torch.testing.assert_close(start - end, 2 * start.grad / start.grad.norm())
    found = after_a_step(m.TensorNormsProjection(m.Params()))  # the norms of the parameters
    for start, end in zip(starts[:3], found, strict=False):
        torch.testing.assert_close(start - end, start.grad / start.grad.norm() * start.norm())


@accepts("C11")
def test_a_line_search_inside_reaches_the_same_point():
    """In two tensors, along the update; the modules in front make one of their own."""
    ends = []
    for search in (lambda: m.TensorNormsProjection(m.StrongWolfe(), project_params=True), m.StrongWolfe):
        problem = in_plane(rosenbrock, 2)
        optimizer = Modular(problem.params, m.HeavyBall(0.5), search())
        for _ in range(5):
            optimizer.step(problem.closure)
        ends.append(problem.vector)
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_lengths_of_the_parameters():
    """Without the update, their directions stay and the loss is minimised by their lengths."""
    problem = Problem(lambda a, b: ((a - 3) ** 2).sum() + ((b + 1) ** 2).sum(), [3.0, 4.0], [-1.0, -2.0, 0.0])
    inside = [m.BFGS(scale_first=False), m.StrongWolfe()]
    optimizer = Modular(problem.params, m.TensorNormsProjection(inside, project_params=True, project_update=False))
    for _ in range(10):
        optimizer.step(problem.closure)
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([3.0, 4.0], [-1.0, -2.0, 0.0]))
    torch.testing.assert_close(problem.params[0].detach(), a * 3 * a.sum() / (a @ a), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(problem.params[1].detach(), -b * b.sum() / (b @ b), rtol=1e-6, atol=1e-6)
