"""`MARSCorrection` against loops."""

import pytest
import torch

from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import assert_equal_steps, make_tensors, outputs
from tests.optim.training import largest_difference, make_params, set_gradients, train


@accepts("O+MARS")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("max_norm", [None, 1.0, 3.0])
def test_corrected_gradients(max_norm, way):
    grads = [make_tensors(seed) for seed in range(3)]
    got = outputs(lambda: [m.MARSCorrection(0.8, 0.3, max_norm)], grads, **way)
    for step, out in enumerate(got):
        for now, before, c in zip(grads[step], grads[max(step - 1, 0)], out, strict=True):
            expected = now + 0.3 * 0.8 / (1 - 0.8) * (now - before)
            if max_norm is not None and expected.norm() > max_norm:
                expected = expected / expected.norm() * max_norm
            torch.testing.assert_close(c, expected, rtol=1e-12, atol=1e-12)


@accepts("O+MARS")
def test_mars_adamw_and_lion():
    """Algorithms 2 and 3 of the paper, in its approximate version."""
    for name in ("adamw", "lion"):
        params = make_params()
        others = [p.detach().clone() for p in params]
        memory = [{"g": None, "m": torch.zeros_like(p), "v": torch.zeros_like(p)} for p in params]
        rule = m.Adam(0.95, 0.99) if name == "adamw" else m.Lion(0.95, 0.95)
        optimizer = Modular(params, m.MARSCorrection(0.95), rule, m.WeightDecay(0.1), m.LR(0.01))
        for t in range(1, 11):
            set_gradients(params, t)
            for p, q, state in zip(params, others, memory, strict=True):
                g = p.grad
                c = g if state["g"] is None else g + 0.025 * 0.95 / (1 - 0.95) * (g - state["g"])
                c = c / max(1.0, c.norm())
                state["g"] = g
                state["m"] = 0.95 * state["m"] + 0.05 * c
                state["v"] = 0.99 * state["v"] + 0.01 * c * c
                update = state["m"].sign()
                if name == "adamw":
                    update = state["m"] / (1 - 0.95**t) / ((state["v"] / (1 - 0.99**t)).sqrt() + 1e-8)
                q -= 0.01 * (update + 0.1 * q)
            optimizer.step()
        assert largest_difference(params, others) < 1e-12


def test_one_norm_of_all_tensors_is_that_of_one_long_tensor():
    grads = [make_tensors(seed) for seed in range(3)]
    joined = [[torch.cat([g.flatten() for g in step])] for step in grads]
    got = outputs(lambda: [m.MARSCorrection(0.8, 0.3, tensorwise=False)], grads)
    wanted = outputs(lambda: [m.MARSCorrection(0.8, 0.3)], joined)
    assert_equal_steps([[torch.cat([u.flatten() for u in step])] for step in got], wanted)


def test_equal_to_torchzero():
    torchzero = pytest.importorskip("torchzero")
    params, others = make_params(), make_params()
    train(Modular(params, m.MARSCorrection(0.95, tensorwise=False), m.LR(0.1)), params)
    train(torchzero.Optimizer(others, torchzero.m.MARSCorrection(0.95), torchzero.m.LR(0.1)), others)
    assert largest_difference(params, others) < 1e-12
