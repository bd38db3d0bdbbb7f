"""The gradient scaler of pure functions, against torch's."""

import copy

import pytest
import torch
from torch import nn

from graphopt.errors import OptionError
from graphopt.optim.functional import (
    SGDConfig,
    init_grad_scaler,
    init_optimizer_state,
    scale_loss,
    sgd_step,
    unscale_grads,
    update_scale,
)

BAD = {10: torch.inf, 11: -torch.inf, 2500: torch.nan}


def test_the_scale_of_4100_steps_is_that_of_torch():
    param = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], lr=0.0)
    theirs = torch.amp.GradScaler("cpu")
    ours = init_grad_scaler()
    param.grad = torch.ones(2)
    theirs.scale(param.sum())
    for step in range(4100):
        grad = torch.tensor([1.0, BAD.get(step, 2.0)])
        _, found_inf = unscale_grads([grad], ours)
        ours = update_scale(ours, found_inf)
        param.grad = grad
        theirs.unscale_(optimizer)
        theirs.update()
        assert ours["scale"].item() == theirs.get_scale(), step
        assert ours["growth_tracker"].item() == theirs._get_growth_tracker(), step
    assert ours["scale"] == 2.0**14  # three times halved, once doubled


def test_the_scale_stays_finite():
    scaler = init_grad_scaler(init_scale=2.0**127, growth_interval=1)
    scaler = update_scale(scaler, torch.tensor(0.0))
    assert scaler["scale"] == 2.0**127
    assert scaler["growth_tracker"] == 0


def test_gradients_are_divided_in_any_tree():
    scaler = init_grad_scaler(init_scale=4.0)
    loss = torch.tensor(3.0)
    assert scale_loss(loss, scaler) == 12.0
    grads = {"a": [torch.tensor([8.0, -4.0])], "none": None, "b": torch.tensor([2.0], dtype=torch.bfloat16)}
    unscaled, found_inf = unscale_grads(grads, scaler, torch.device("cpu"))
    assert unscaled["a"][0].tolist() == [2.0, -1.0]
    assert unscaled["none"] is None
    assert unscaled["b"].dtype == torch.bfloat16
    assert unscaled["b"].tolist() == [0.5]
    assert found_inf == 0
    assert grads["a"][0].tolist() == [8.0, -4.0]
    for bad in (torch.inf, -torch.inf, torch.nan):
        assert unscale_grads({"a": torch.tensor([1.0, bad])}, scaler)[1] == 1


def test_pure_and_in_place():
    scaler = init_grad_scaler()
    before = copy.deepcopy(scaler)
    new = update_scale(scaler, torch.tensor(1.0))
    assert scaler == before
    assert new["scale"] == 2.0**15
    assert update_scale(scaler, torch.tensor(1.0), inplace=True) is scaler
    assert scaler == new


def test_steps_with_overflow_are_left_out():
    """Under vmap, too: one of two models has an infinite gradient."""
    config, scaler = SGDConfig(max_lr=1.0, momentum=0.0), init_grad_scaler(init_scale=2.0)

    def step(params, grads):
        state = init_optimizer_state("sgd", params)
        grads, found_inf = unscale_grads(grads, scaler)
        params, state = sgd_step(params, grads, state, config, found_inf=found_inf)
        return params, state["step"], update_scale(scaler, found_inf)["scale"]

    params, grads = [torch.zeros(2, 2)], [torch.tensor([[2.0, 4.0], [2.0, torch.inf]])]
    news, count, scale = torch.func.vmap(step)(params, grads)
    assert news[0].tolist() == [[-1.0, -2.0], [0.0, 0.0]]
    assert count.tolist() == [1.0, 0.0]
    assert scale.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("precision", [torch.float16, "torch.float16", "float16"])
def test_precision(precision):
    assert init_grad_scaler(precision=precision)["precision"] is torch.float16


def test_defaults():
    scaler = init_grad_scaler()
    assert {name: scaler[name] for name in ("growth_factor", "backoff_factor", "growth_interval", "precision")} == {
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "precision": torch.bfloat16,
    }
    assert scaler["scale"] == 2.0**16


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_scale": 0.0}, r"init_grad_scaler\(init_scale=0.0\); expected a number above 0"),
        ({"growth_factor": 1.0}, r"growth_factor=1.0\); expected a number above 1"),
        ({"backoff_factor": 1.0}, r"backoff_factor=1.0\); expected a number in \(0, 1\)"),
        ({"growth_interval": 0}, r"growth_interval=0\); expected at least 1"),
        ({"precision": "print('evaluated')"}, r"precision=\"print\('evaluated'\)\"\): no dtype; expected one such as"),
        ({"precision": "nn"}, r"precision='nn'\): no dtype"),
    ],
)
def test_errors(options, text):
    with pytest.raises(OptionError, match=text):
        init_grad_scaler(**options)


def test_float16_gradients_are_refused():
    scaler = init_grad_scaler(init_scale=2.0)
    grads = [torch.ones(2, dtype=torch.float16)]
    with pytest.raises(OptionError, match=r"a gradient is float16, .*or pass allow_fp16=True"):
        unscale_grads(grads, scaler)
    assert unscale_grads(grads, scaler, allow_fp16=True)[0][0].tolist() == [0.5, 0.5]
