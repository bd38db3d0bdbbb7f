"""`HeavyBall` and `NAG` against `torch.optim.SGD`, and their options against loops over numbers."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.training import largest_difference, make_params, train

WAYS = [{"foreach": False}, {"foreach": True}, {}]


@accepts("M1", "M2")
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (m.HeavyBall, {"momentum": 0.9}),
        (m.HeavyBall, {"momentum": 0.8, "dampening": 0.3}),
        (m.NAG, {"momentum": 0.9, "nesterov": True}),
    ],
    ids=["heavy_ball", "dampened", "nag"],
)
def test_equals_sgd_of_torch(module, options, decay, way):
    params, others = make_params(), make_params()
    own = {name: value for name, value in options.items() if name != "nesterov"}
    chain = [m.WeightDecay(decay)] * bool(decay) + [module(**own), m.LR(0.1)]
    optimizer = Modular(params, *chain, **way)
    reference = torch.optim.SGD(others, 0.1, weight_decay=decay, **options)
    train(optimizer, params, range(8))
    train(reference, others, range(8))
    assert largest_difference(params, others) < 1e-14
    name = f"{module.__name__.lower()}.momentum_buffer"
    buffers = [
        [o.state[p][n] for p in ps] for o, ps, n in [(optimizer, params, name), (reference, others, "momentum_buffer")]
    ]
    assert largest_difference(*buffers) < 1e-14


UPDATES = [1.0, -2.0, 4.0, 0.5, 3.0]


def heavy_ball(mu, damp, debiased, lerp):
    buffer, outputs = 0.0, []
    for step, u in enumerate(UPDATES, 1):
        if lerp:
            buffer = mu * buffer + (1 - mu) * (1 - damp) * u
        else:
            buffer = mu * buffer + (u if step == 1 else (1 - damp) * u)
        outputs.append(buffer / (1 - mu**step) if debiased else buffer)
    return outputs


def nag(mu, damp, lerp):
    buffer, outputs = 0.0, []
    for u in UPDATES:
        if lerp:
            buffer = mu * buffer + (1 - mu) * u
            outputs.append((1 - mu) * u + mu * (1 - damp) * buffer)
        else:
            velocity = mu * (buffer + u)
            outputs.append(u + (1 - damp) * velocity)
            buffer = velocity
    return outputs


def run(module, updates=UPDATES):
    """What a module makes of a sequence of gradients of one number."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = Modular([p], module)
    outputs = []
    for u in updates:
        before = p.item()
        p.grad = torch.tensor([u], dtype=torch.float64)
        optimizer.step()
        outputs.append(before - p.item())
    return outputs


@accepts("M1", "M2")
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("lerp", [False, True])
def test_options(lerp, debiased):
    assert run(m.HeavyBall(0.7, 0.2, debiased=debiased, lerp=lerp)) == pytest.approx(
        heavy_ball(0.7, 0.2, debiased, lerp)
    )
    if not debiased:
        assert run(m.NAG(0.7, 0.2, lerp=lerp)) == pytest.approx(nag(0.7, 0.2, lerp))


def test_lerp_of_nag_is_the_momentum_of_muon():
    """`torch.optim.Muon`: the buffer is an average, the update lies between the gradient and it."""
    buffer, expected = torch.zeros(()), []
    for u in UPDATES:
        buffer = buffer.lerp(torch.tensor(u), 1 - 0.95)
        expected.append(torch.tensor(u).lerp(buffer, 0.95).item())
    assert run(m.NAG(0.95, lerp=True)) == pytest.approx(expected)


@pytest.mark.parametrize("module", [m.HeavyBall, m.NAG])
def test_momentum_out_of_range(module):
    with pytest.raises(OptionError, match=f"{module.__name__}: momentum=1.0; expected a number in"):
        module(1.0)
