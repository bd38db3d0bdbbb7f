"""GaLore, against the algorithm of the paper in a loop."""

import pytest
import torch
from torch import nn

from graphopt.errors import NonFiniteError, OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem
from tests.optim.training import largest_difference, make_params, set_gradients, train


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def fit(model, *modules, steps):
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(32, n, generator=generator, dtype=torch.float64) for n in (6, 8))
    optimizer, losses = Modular(model, *modules), []
    for _ in range(steps):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@accepts("P7")
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_the_algorithm_of_the_paper(shape):
    """Adam in a subspace that changes every third step, its averages being kept."""
    (param,) = make_params([shape])
    optimizer = Modular([param], m.GaLore(m.Adam(), rank=2, update_gap=3, scale=0.5), m.LR(0.1))
    weight, mean, square = param.detach().clone(), 0.0, 0.0
    for step in range(1, 9):
        set_gradients([param], step)
        gradient = param.grad if shape[0] <= shape[1] else param.grad.T
        optimizer.step()
        (basis,) = [value for key, value in optimizer.state[param].items() if key.endswith("basis")]
        if step % 3 == 1:  # vectors have no sign of their own, so that only what they span is compared
            values, vectors = torch.linalg.eigh(gradient @ gradient.T)
            first = vectors[:, values.argsort(descending=True)[:2]]
            torch.testing.assert_close(basis @ basis.T, first @ first.T, rtol=1e-9, atol=1e-9)
            used = basis.clone()
        assert torch.equal(basis, used)
        low = basis.T @ gradient
        mean = 0.9 * mean + 0.1 * low
        square = 0.999 * square + 0.001 * low**2
        direction = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        move = 0.1 * 0.5 * basis @ direction
        weight -= move if shape[0] <= shape[1] else move.T
        torch.testing.assert_close(param.detach(), weight, rtol=1e-9, atol=1e-9)


@accepts("P7")
def test_of_full_rank_it_is_the_module_inside():
    shapes = [(4, 6), (6, 4), (3,), (), (2, 3, 4), (0, 3)]
    params, others = make_params(shapes), make_params(shapes)
    train(Modular(params, m.GaLore(m.HeavyBall(), rank=4, scale=1.0), m.LR(0.1)), params)
    train(torch.optim.SGD(others, 0.1, momentum=0.9), others)
    assert largest_difference(params, others) < 1e-13


@accepts("P7")
def test_a_gradient_of_low_rank_loses_nothing():
    (param, other) = make_params([(8, 12)]) + make_params([(8, 12)])
    left, right = (torch.randn(n, 3, generator=torch.Generator().manual_seed(1)).double() for n in (8, 12))
    for p, optimizer in (
        (param, Modular([param], m.GaLore(m.LR(0.1), rank=3, scale=1.0))),
        (other, torch.optim.SGD([other], 0.1)),
    ):
        p.grad = left @ right.T
        optimizer.step()
    assert largest_difference([param], [other]) < 1e-12


@accepts("P7")
def test_state_is_of_low_rank():
    """What is no matrix, or is too small, is kept whole."""
    params = make_params([(8, 12), (12, 8), (2, 9), (5,), ()])
    optimizer = Modular(params, m.GaLore(m.Adam(), rank=2))
    train(optimizer, params)
    shapes = [
        {k.split(".")[-1]: tuple(v.shape) for k, v in optimizer.state[p].items() if not k.endswith("step")}
        for p in params
    ]
    assert shapes[0] == {"basis": (8, 2), "exp_avg": (2, 12), "exp_avg_sq": (2, 12)}
    assert shapes[1] == {"basis": (8, 2), "exp_avg": (12, 2), "exp_avg_sq": (12, 2)}
    for p, shape in zip(params[2:], shapes[2:], strict=True):
        assert shape == {"exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}


def test_ranks_of_groups():
    params = make_params([(8, 12), (8, 12)])
    optimizer = Modular([{"params": params[:1], "rank": 5}, {"params": params[1:]}], m.GaLore(m.HeavyBall()))
    train(optimizer, params)
    bases = [next(v for k, v in optimizer.state[p].items() if k.endswith("basis")) for p in params]
    assert [basis.shape[1] for basis in bases] == [5, 2]


@accepts("K6", "P7")
@pytest.mark.parametrize("rank", [None, 3])
def test_the_line_of_the_seed(rank):
    chain = m.GaLore([m.GraftModules(m.Shampoo(), m.RMSprop()), m.LR(1e-2)], rank=rank)
    losses = fit(mlp(), chain, steps=80)
    assert losses[-1] < 0.9 * losses[0]


def test_a_line_search_inside_stays_in_the_subspace():
    """And its loss is the one that is reached."""
    problem = Problem(lambda w: ((w - 1) ** 2).sum() + (w**4).sum(), torch.arange(20.0).reshape(4, 5).div(10).tolist())
    start, loss = problem.params[0].detach().clone(), problem.loss
    inside = [m.BFGS(scale_first=False), m.StrongWolfe()]
    optimizer = Modular(problem.params, m.GaLore(inside, rank=2, project_params=True, project_update=False))
    for _ in range(6):
        optimizer.step(problem.closure)
        assert problem.loss < loss
        loss = problem.loss
    assert torch.linalg.matrix_rank(problem.params[0].detach() - start, atol=1e-9) == 2


def test_parameters_that_miss_a_step_keep_what_belongs_to_them():
    params, others = make_params([(4, 6), (6, 4)]), make_params([(4, 6), (6, 4)])
    optimizer = Modular(params, m.GaLore(m.HeavyBall(), 1), m.LR(0.1))
    alone = Modular(others[1:], m.GaLore(m.HeavyBall(), 1), m.LR(0.1))
    for step in range(4):
        set_gradients(params, step), set_gradients(others, step)
        params[0].grad = None if step == 2 else params[0].grad
        optimizer.step()
        alone.step()
    assert largest_difference(params[1:], others[1:]) < 1e-13


def test_bad_input():
    for make, text in [
        (lambda: m.GaLore(m.Adam(), 0), "GaLore: rank=0; expected a whole number of at least 1, or None"),
        (lambda: m.GaLore(m.Adam(), update_gap=0), "GaLore: update_gap=0; expected a whole number of at least 1"),
        (lambda: m.GaLore(m.Adam(), scale=0.0), "GaLore: scale=0.0; expected a number in"),
    ]:
        with pytest.raises(OptionError, match=text):
            make()
    (param,) = make_params([(8, 12)])
    before = param.detach().clone()
    optimizer = Modular([param], m.GaLore(m.Adam()), error_if_nonfinite=False)
    param.grad = torch.full_like(param, float("nan"))
    with pytest.raises(NonFiniteError, match=r"GaLore: the update of a parameter of shape \(8, 12\) has NaN"):
        optimizer.step()
    assert torch.equal(param, before)
