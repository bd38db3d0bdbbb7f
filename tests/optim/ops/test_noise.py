"""Random updates: moments, shapes, seeds; and dropout."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import outputs
from tests.optim.problems import Problem
from tests.optim.training import make_params

SAMPLES = {
    "normal": (lambda **o: m.RandomSample(0.5, **o), 0.0, 0.5),
    "gaussian": (lambda **o: m.RandomSample(0.5, "gaussian", **o), 0.0, 0.5),
    "uniform": (lambda **o: m.RandomSample(2.0, "uniform", **o), 0.0, 2.0),
    "sphere": (lambda **o: m.RandomSample(2.0, "sphere", **o), 0.0, 2.0),
    "rademacher": (lambda **o: m.RandomSample(2.0, "rademacher", **o), 0.0, 2.0),
    "Randn": (lambda **o: m.Randn(**o), 0.0, 1.0),
    "Uniform": (lambda **o: m.Uniform(-1.0, 3.0, **o), 1.0, 4 / 12**0.5),
}
SIZE = 20000


def one_step(*modules, dtype=torch.float64):
    torch.manual_seed(0)
    params = make_params([(SIZE,), (), (0, 3), (2, 3)], dtype)
    for p in params:
        p.grad = torch.ones_like(p)
    seen = m.UnaryLambda(lambda updates: seen.updates.extend(updates) or updates)
    seen.updates = []
    Modular(params, *modules, seen, m.LR(0.0)).step()
    return seen.updates


@accepts("X7")
@pytest.mark.parametrize("name", SAMPLES)
def test_moments_and_shapes(name):
    make, mean, deviation = SAMPLES[name]
    updates = one_step(m.Mul(1e300), m.Mul(1e300), make())
    assert [u.shape for u in updates] == [(SIZE,), (), (0, 3), (2, 3)]
    assert updates[0].mean().item() == pytest.approx(mean, abs=0.03 * deviation)
    assert updates[0].std().item() == pytest.approx(deviation, rel=0.03)
    assert {u.dtype for u in updates} == {torch.float64}
    assert {u.dtype for u in one_step(make(), dtype=torch.bfloat16)} == {torch.float32}


def test_ranges():
    (u, *_) = one_step(m.Uniform(-1.0, 3.0))
    assert -1 <= u.min() < -0.99
    assert 2.99 < u.max() <= 3
    sphere = torch.cat([u.flatten() for u in one_step(m.RandomSample(2.0, "sphere"))])
    assert sphere.norm().item() == pytest.approx(2 * len(sphere) ** 0.5)
    assert set(one_step(m.RandomSample(2.0, "rademacher"))[0].tolist()) == {-2, 2}


@accepts("X7")
@pytest.mark.parametrize(
    "make",
    [*(row[0] for row in SAMPLES.values()), m.NoiseSign, m.Dropout],
    ids=[*map(str, SAMPLES), "NoiseSign", "Dropout"],
)
def test_seeds(make):
    """Each step draws anew, and the same sequence again with the same seed, whatever the global generator does."""
    grads = [[torch.ones(50, dtype=torch.float64)]] * 2
    one, two = outputs(lambda: [make(seed=3)], grads), outputs(lambda: [make(seed=3)], grads)
    assert torch.equal(one[0][0], two[0][0])
    assert torch.equal(one[1][0], two[1][0])
    assert not torch.equal(one[0][0], one[1][0])
    assert not torch.equal(one[0][0], outputs(lambda: [make(seed=4)], grads)[0][0])
    torch.manual_seed(7)
    first = outputs(lambda: [make()], grads)
    torch.manual_seed(7)
    again = outputs(lambda: [make()], grads)
    assert torch.equal(first[0][0], again[0][0])
    assert torch.equal(first[1][0], again[1][0])


@accepts("X10")
def test_noise_with_the_sign_of_the_update():
    grad = torch.arange(-3.0, 4.0, dtype=torch.float64)
    (step,) = outputs(lambda: [m.NoiseSign(alpha=2.0, seed=0)], [[grad]])
    assert torch.equal(step[0].sign(), grad.sign())
    (step,) = outputs(lambda: [m.NoiseSign(alpha=2.0, seed=0)], [[torch.ones(SIZE, dtype=torch.float64)]])
    assert step[0].square().mean().sqrt().item() == pytest.approx(2, rel=0.03)


@accepts("X10")
def test_dropout():
    params = make_params([(SIZE,), (3, 4), (0,), ()])
    grads = [[p.detach().clone() for p in params]]
    for p in (0.0, 0.3, 1.0):
        for graft in (False, True):
            (step,) = outputs(lambda p=p, graft=graft: [m.Dropout(p, graft, seed=0)], grads)
            kept = step[0] != 0
            assert kept.double().mean().item() == pytest.approx(1 - p, abs=0.02)
            lengths = [torch.cat([t.flatten() for t in tensors]).norm() for tensors in (grads[0], step)]
            factor = 0.0 if p == 1 else lengths[1] / lengths[0] if graft else 1.0
            if graft and p < 1:
                torch.testing.assert_close(*lengths)
                factor = (step[0][kept] / grads[0][0][kept])[0]
            torch.testing.assert_close(step[0][kept], grads[0][0][kept] * factor)


@accepts("X10")
def test_weight_dropout():
    """Loss and gradient are those of the masked function, and a line search behind it minimises that."""
    torch.manual_seed(0)
    problem = Problem(lambda x: ((x - 1) ** 2).sum(), [3.0] * 400)
    seen = []
    problem.loss_of = lambda x: seen.append(x.detach().clone()) or ((x - 1) ** 2).sum()
    loss = Modular(problem.params, m.WeightDropout(0.3), m.LR(0.5)).step(problem.closure)
    dropped = seen[0] == 0
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.08)
    assert loss.item() == pytest.approx(4 * (~dropped).sum().item() + dropped.sum().item())
    torch.testing.assert_close(
        problem.vector, torch.where(dropped, 3.0, 1.0).double()
    )  # half the gradient of 2 (x - 1)
    before = problem.vector
    seen.clear()
    Modular(problem.params, m.WeightDropout(0.5, seed=1), m.StrongWolfe()).step(problem.closure)
    masks = {tuple((x == 0).tolist()) for x in seen if bool((x == 0).any())}
    assert len(masks) == 1  # one function for the whole step
    (mask,) = masks
    assert torch.equal(problem.vector[torch.tensor(mask)], before[torch.tensor(mask)])
    kept = problem.vector.clone()
    Modular([{"params": problem.params, "p": 0.0}], m.WeightDropout(), m.LR(0.5)).step(problem.closure)
    torch.testing.assert_close(problem.vector, torch.ones_like(kept))


def test_weight_dropout_puts_the_weights_back_when_the_closure_fails():
    problem = Problem(lambda x: 1 / 0, [3.0] * 4)
    with pytest.raises(ZeroDivisionError):
        Modular(problem.params, m.WeightDropout(), m.LR(0.5)).step(problem.closure)
    assert problem.vector.tolist() == [3.0] * 4


def test_bad_input():
    for make, text in [
        (lambda: m.RandomSample(distribution="normall"), "RandomSample: distribution='normall'; expected one of"),
        (lambda: m.NoiseSign("x"), "NoiseSign: distribution='x'; expected one of"),
        (lambda: m.Uniform(1.0, 0.0), "Uniform: low=1.0 is above high=0.0; exchange them"),
        (lambda: m.Dropout(1.5), "Dropout: p=1.5; expected a number in"),
        (lambda: m.WeightDropout(-0.1), "WeightDropout: p=-0.1; expected a number in"),
    ]:
        with pytest.raises(OptionError, match=text):
            make()
