"""What the catalogue asks of chains of first-order modules: losses on a function of two parameters, and equal chains."""

import pytest
import torch

from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import make_tensors, outputs
from tests.optim.problems import booth, in_plane
from tests.optim.training import largest_difference, make_params, train

# The lowest loss in 50 steps from (0, -8).
CHAINS = {
    "O8": (lambda: [m.Lion(), m.LR(1.0)], 0.0),
    "S2": (lambda: [m.ClipValue(1.0), m.LR(1.0)], 0.0),
    "S5": (lambda: [m.ClipNormByEMA(), m.LR(0.1)], 1e-5),
    "M7": (lambda: [m.HeavyBall(), m.Cautious(), m.LR(0.1)], 0.003),
}


@accepts("O8", "S2", "S5", "M7")
@pytest.mark.parametrize("name", CHAINS)
def test_booth(name):
    make, limit = CHAINS[name]
    problem = in_plane(booth)
    optimizer = Modular(problem.params, *make())
    for _ in range(50):
        optimizer.step(problem.closure)
    assert min(problem.losses) <= limit


@accepts("S2")
def test_clip_value_is_that_of_torch_bit_for_bit():
    grads = [make_tensors(1)]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads[0]]
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_value_(params, 0.3)
    (out,) = outputs(lambda: [m.ClipValue(0.3)], grads)
    assert all(torch.equal(u, p.grad) for u, p in zip(out, params, strict=True))


@accepts("S1")
@pytest.mark.parametrize("order", [1.0, 2.0, float("inf")])
def test_no_norm_is_above_the_limit(order):
    (out,) = outputs(lambda: [m.ClipNorm(0.1, order)], [make_tensors(1, dtype=torch.float32)])
    assert all(torch.linalg.vector_norm(u, order) <= 0.1 * (1 + 1e-6) for u in out)


@accepts("M11")
def test_a_mask_is_cautious_bit_for_bit():
    params, others = make_params(), make_params()
    train(Modular(params, m.HeavyBall(), m.Mul(m.UpdateGradientSignConsistency()), m.LR(0.1)), params)
    train(Modular(others, m.HeavyBall(), m.Cautious(), m.LR(0.1)), others)
    assert largest_difference(params, others) == 0


@accepts("M4")
def test_an_average_after_many_updates():
    """A running sum would have drifted by then."""
    updates = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = Modular([p], m.Averaging(4))
    for update in updates:
        p.data.zero_()
        p.grad = update.view(1)
        optimizer.step()
    assert abs(-p.item() - updates[-4:].double().mean().item()) <= 1e-6


@accepts("O1")
def test_adam_with_eps_inside_is_the_paper_before_its_correction():
    params, others = make_params(), make_params()
    train(Modular(params, m.Adam(eps=1e-8, eps_inside=True), m.LR(0.1)), params, range(20))
    train(torch.optim.Adam(others, 0.1, eps=1e-8), others, range(20))
    assert largest_difference(params, others) < 1e-4  # random gradients, some of them tiny
    rule = m.Adam(0.9, 0.99, 0.1, eps_inside=True)
    (p,), (q,) = make_params([(4, 3)]), make_params([(4, 3)])
    optimizer, mean, square = Modular([p], rule, m.LR(0.1)), torch.zeros_like(q), torch.zeros_like(q)
    for t in range(1, 21):
        train(optimizer, [p], [t])
        mean, square = 0.9 * mean + 0.1 * p.grad, 0.99 * square + 0.01 * p.grad**2
        step_size = (1 - 0.99**t) ** 0.5 / (1 - 0.9**t)
        q = q.detach() - 0.1 * step_size * mean / (square.sqrt() + 0.1)
    assert largest_difference([p], [q]) < 1e-12


@accepts("T10")
def test_truegrad_rmsprop_is_laprop_without_an_average():
    params, others = make_params(), make_params()
    train(Modular(params, m.TrueGradRMSprop(0.9), m.LR(0.1)), params, range(10))
    train(Modular(others, m.TrueGradLaProp(0.0, 0.9), m.LR(0.1)), others, range(10))
    assert largest_difference(params, others) < 1e-12


@accepts("K2", "T9")
def test_debiased_rmsprop_and_an_average_are_laprop_where_all_samples_agree():
    params, others = make_params(), make_params()
    chain = [m.RMSprop(0.99, 1e-12, debiased=True), m.EMA(0.9, debiased=True), m.LR(0.1)]
    train(Modular(params, *chain), params, range(10), factor=1.0)
    train(Modular(others, m.TrueGradLaProp(0.9, 0.99), m.LR(0.1)), others, range(10), factor=1.0)
    assert largest_difference(params, others) < 1e-10
