"""`WeightDecay`, `DirectWeightDecay` and `CautiousWeightDecay` against torch and loops."""

import pytest
import torch
from torch import nn

from graphopt.errors import UnsupportedError
from graphopt.optim import Modular, m
from graphopt.optim.core.transform import chain
from tests.optim.catalogue import accepts
from tests.optim.outputs import on_numbers
from tests.optim.problems import Problem, rosenbrock
from tests.optim.training import largest_difference, make_params, set_gradients, train

ORDERS = {1: torch.sign, 2: lambda p: p, 3: lambda p: p * p.abs(), 4: lambda p: p**3}


@accepts("W1")
@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_is_that_of_torch(decoupled):
    params, others = make_params(), make_params()
    modules = [m.Adam(), m.WeightDecay(0.1)] if decoupled else [m.WeightDecay(0.1), m.Adam()]
    train(Modular(params, *modules, m.LR(0.01)), params, range(20))
    train((torch.optim.AdamW if decoupled else torch.optim.Adam)(others, 0.01, weight_decay=0.1), others, range(20))
    assert largest_difference(params, others) < 1e-12


@accepts("W1")
@pytest.mark.parametrize("order", ORDERS)
def test_orders_behind_the_learning_rate(order):
    params = make_params()
    expected = [p.detach() - 0.01 * ORDERS[order](p.detach()) for p in params]
    optimizer = Modular(params, m.LR(0.5), m.WeightDecay(0.01, order))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert largest_difference(params, expected) < 1e-15
    two = nn.Parameter(torch.tensor([-2.0]))
    two.grad = torch.zeros(1)
    Modular([two], m.WeightDecay(0.1, order)).step()
    assert -2 < two.item() < 0


@accepts("W2")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_direct_weight_decay_is_weight_decay_behind_the_learning_rate(place, order, way):
    """Wherever it stands, also for complex parameters."""
    params, others = make_params(), make_params()
    modules = [m.Adam(), m.LR(0.1)]
    modules.insert(place, m.DirectWeightDecay(0.01, order))
    train(Modular(params, *modules, **way), params)
    train(Modular(others, m.Adam(), m.LR(0.1), m.WeightDecay(0.01, order)), others)
    assert largest_difference(params, others) < 1e-14
    value = nn.Parameter(torch.tensor([2.0 + 4.0j]))
    value.grad = torch.tensor([1.0 + 0.0j])
    Modular([value], m.DirectWeightDecay(0.5), m.LR(1.0)).step()
    assert value.tolist() == [0.0 + 2.0j]


@accepts("W2")
def test_direct_weight_decay_does_not_change_the_gradient_of_the_step():
    """In front of a module that evaluates the closure, too."""
    problem, other = (Problem(lambda p: rosenbrock(*p), (-1.1, 2.5)) for _ in range(2))
    Modular(problem.params, m.DirectWeightDecay(0.1), m.SophiaH(seed=0), m.LR(0.1)).step(problem.closure)
    Modular(other.params, m.SophiaH(seed=0), m.LR(0.1), m.WeightDecay(0.1)).step(other.closure)
    assert float((problem.vector - other.vector).abs().max()) < 1e-14


def test_direct_weight_decay_can_be_differentiated_through():
    decay = torch.tensor(0.1, requires_grad=True)
    start = torch.tensor([2.0, 3.0], requires_grad=True)
    param = start.clone()
    param.grad = torch.ones(2)
    optimizer = Modular([param], m.DirectWeightDecay(decay), m.LR(0.5), differentiable=True)
    optimizer.step()
    assert param.tolist() == pytest.approx([1.3, 2.2])
    by_decay, by_start = torch.autograd.grad(param.sum(), [decay, start])
    assert by_decay.item() == pytest.approx(-5.0)
    assert by_start.tolist() == pytest.approx([0.9, 0.9])


def test_direct_weight_decay_is_no_pure_function():
    transform = chain(m.DirectWeightDecay(0.1), m.LR(0.1))
    params = [torch.ones(2)]
    state = transform.init(params)
    with pytest.raises(UnsupportedError, match=r"module 1 of 2, DirectWeightDecay: .*Write WeightDecay behind LR"):
        transform.update([torch.ones(2)], state, params)
    assert params[0].tolist() == [1, 1]


@accepts("W2")
def test_direct_weight_decay_of_bfloat16_rounds_once():
    p = nn.Parameter(torch.tensor([1.0, 3.0]).bfloat16())
    p.grad = torch.zeros_like(p)
    expected = (p.detach().float() * 0.99).bfloat16()
    Modular([p], m.DirectWeightDecay(0.01), m.LR(1.0)).step()
    assert torch.equal(p.detach(), expected)


@accepts("W+cautious")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
def test_cautious_weight_decay(way):
    """The decay of AdamW in those elements that the update shrinks."""
    params = make_params()
    others = [p.detach().clone() for p in params]
    optimizer = Modular(params, m.Adam(), m.CautiousWeightDecay(0.3), m.LR(0.1), **way)
    averages = [[torch.zeros_like(p), torch.zeros_like(p)] for p in params]
    for t in range(1, 8):
        set_gradients(params, t)
        optimizer.step()
        for p, q, (mean, square) in zip(params, others, averages, strict=True):
            mean.copy_(0.9 * mean + 0.1 * p.grad)
            square.copy_(0.999 * square + 0.001 * p.grad**2)
            update = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
            for index in range(q.numel()):
                u, value = update.view(-1)[index].item(), q.view(-1)[index].item()
                q.view(-1)[index] = value - 0.1 * (u + (0.3 * value if u * value >= 0 else 0.0))
    assert largest_difference(params, others) < 1e-12


@accepts("W+cautious")
@pytest.mark.parametrize(
    ("update", "start", "end"), [(1.0, 2.0, 0.8), (-1.0, 2.0, 3.0), (0.0, 2.0, 1.8), (-1.0, -2.0, -0.8)]
)
def test_cautious_weight_decay_of_single_numbers(update, start, end):
    p = nn.Parameter(torch.tensor([start]))
    p.grad = torch.tensor([update])
    Modular([p], m.CautiousWeightDecay(0.1), m.LR(1.0)).step()
    assert p.item() == pytest.approx(end)
    assert on_numbers(lambda: [m.CautiousWeightDecay(0.1)], [update]) == [update]  # at zero
