"""Mixed precision is autocast: the loss scale keeps small gradients, and a step whose gradients overflow is skipped."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.errors import OptionError, StreamError
from graphopt.runtime.streaming.layer2layer import Layer2Layer
from graphopt.runtime.streaming.loss_scale import HALF_PRECISION
from tests.runtime.streaming.towers import BITWISE, D, N, Tower, assert_same_gradients, batch, plain_and_streamed


@pytest.fixture
def pair():
    """``pair(model, **options)``: the model as it was written, and a copy of it in `Layer2Layer`."""
    return plain_and_streamed


@pytest.fixture
def half(monkeypatch):
    """Half precision on the CPU is float16, which can overflow as on a GPU."""
    monkeypatch.setitem(HALF_PRECISION, "cpu", torch.float16)


def assert_like_autocast(plain, l2l, x, y, **tolerance):
    with torch.autocast("cpu", torch.bfloat16):
        output = plain(x)
    loss = F.mse_loss(output.float(), y)
    loss.backward()
    found = l2l.forward(x)
    assert (found.dtype, output.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(l2l.backward(x, y, F.mse_loss), loss.detach(), **tolerance)
    assert_same_gradients(plain, l2l, **tolerance)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"loss_scale": 1.0}, BITWISE),
        ({}, BITWISE),  # 128, a power of two
        ({"loss_scale": 100, "microbatch_size": 4}, {"rtol": 1e-2, "atol": 1e-3}),
    ],
)
def test_mixed_precision_is_autocast(pair, options, tolerance):
    plain, l2l = pair(
        Tower(nn.Linear(D, D), nn.Linear(D, D), nn.Sequential(nn.Linear(D, D))), mixed_precision=True, **options
    )
    x, y = batch(torch.float32)
    assert_like_autocast(plain, l2l, x, y, **tolerance)
    assert_like_autocast(plain, l2l, x, y, **tolerance)  # added to gradients that are not scaled
    assert {param.dtype for param in l2l.main_params} == {torch.float32}
    assert {param.grad.dtype for param in l2l.main_params} == {torch.float32}
    torch.optim.AdamW(l2l.main_params, lr=0.01).step()
    assert {value.dtype for value in l2l.main_model.state_dict().values()} == {torch.float32}


def test_the_loss_scale_saves_what_half_precision_would_lose(pair, half):
    x, y = batch(torch.float32)
    found = {}
    for loss_scale in (1.0, 2.0**14):
        plain, l2l = pair(Tower(), mixed_precision=True, loss_scale=loss_scale)
        l2l.forward(x)
        l2l.backward(x, y, lambda output, target: 1e-6 * F.mse_loss(output, target))
        found[loss_scale] = l2l.main_params[0].grad.load()
    (1e-6 * F.mse_loss(plain(x), y)).backward()
    assert (found[1.0] - plain.layers[0].weight.grad).norm() > 0.3 * plain.layers[0].weight.grad.norm()
    torch.testing.assert_close(found[2.0**14], plain.layers[0].weight.grad, rtol=0.05, atol=1e-10)


def test_only_what_is_in_the_model_is_scaled(pair):
    plain, l2l = pair(Tower(), mixed_precision=True, loss_scale=2.0**10)
    x, y = batch(torch.float32)
    own, weight, other_weight = (torch.ones(N, D, requires_grad=True) for _ in range(3))
    inputs = x.clone().requires_grad_()
    l2l.loss_scale = 2.0**8
    l2l.forward(inputs, scale=own)
    l2l.loss_scale = 2.0**4  # for the next one
    l2l.backward(inputs, y, lambda output, target: F.mse_loss(output * weight, target))
    expected, scale = x.clone().requires_grad_(), torch.ones(N, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = plain(expected, scale)
    F.mse_loss(output.float() * other_weight, y).backward()
    for found, wanted in ((inputs, expected), (own, scale), (weight, other_weight)):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-2, atol=1e-4)
    assert_same_gradients(plain, l2l, rtol=1e-2, atol=1e-4)

    l2l.zero_grad()
    plain.zero_grad()
    F.mse_loss(l2l.main_model(x), y).backward()  # the model by itself: no half precision, nothing is scaled
    F.mse_loss(plain(x), y).backward()
    assert_same_gradients(plain, l2l)


def test_an_overflow_makes_the_optimizer_skip_its_step(pair, half):
    _, l2l = pair(Tower(), mixed_precision=True, loss_scale=2.0**20)
    x, y = batch(torch.float32)
    optimizer = torch.optim.SGD(l2l.main_params, lr=0.1)
    before = {name: value + 0 for name, value in l2l.main_model.state_dict().items()}

    l2l.forward(x)
    with pytest.warns(RuntimeWarning, match=r"the gradients of layers\.\d\.\w+, .* are not finite: they are dropped, the next "
                      r"optimizer.step\(\) does nothing, and loss_scale=1048576.0 is now 524288.0") as caught:  # fmt: skip
        loss = l2l.backward(x, y, lambda output, target: 10 * F.mse_loss(output, target))
    assert caught[0].filename == __file__
    assert loss.isfinite()
    assert (l2l.loss_scale, l2l.num_skipped) == (2.0**19, 1)

    l2l.loss_scale = 1.0
    l2l.forward(x)
    l2l.backward(x, y, F.mse_loss)  # the same step: its gradients are not whole any more
    assert l2l.num_skipped == 2
    assert all(param.grad is None for param in l2l.main_params)
    optimizer.step()
    for name, value in l2l.main_model.state_dict().items():
        assert torch.equal(value + 0, before[name])

    l2l.forward(x)  # the next step is an ordinary one, also without l2l.zero_grad()
    l2l.backward(x, y, F.mse_loss)
    optimizer.step()
    assert l2l.num_skipped == 2
    assert all(not torch.equal(value + 0, before[name]) for name, value in l2l.main_model.state_dict().items())

    l2l.loss_scale = 2.0**20
    l2l.forward(x)
    with pytest.warns(RuntimeWarning, match="are dropped"):
        l2l.backward(x, y, lambda output, target: 10 * F.mse_loss(output, target))
    l2l.zero_grad()  # begins anew
    l2l.loss_scale = 1.0
    l2l.forward(x)
    l2l.backward(x, y, F.mse_loss)
    assert all(param.grad is not None for param in l2l.main_params)


def test_what_no_scale_can_help(pair, half):
    _, l2l = pair(Tower(), mixed_precision=True, loss_scale=2.0**-15)
    x, y = batch(torch.float32)
    l2l.forward(x)
    with pytest.warns(
        RuntimeWarning, match="and the loss is nan itself, so loss_scale=3.0517578125e-05 stays as it is"
    ):
        l2l.backward(x, y * math.nan, F.mse_loss)

    def infinite(output, target):
        return (output - output.detach()).abs().sqrt().sum()  # 0, with a gradient that is not finite

    l2l.forward(x)
    with pytest.warns(RuntimeWarning, match="loss_scale=3.0517578125e-05 is now 1.52587890625e-05"):
        l2l.backward(x, y, infinite)
    l2l.forward(x)
    with pytest.raises(StreamError, match=r"not finite with loss_scale=1.52587890625e-05 either, so half precision is not the "
                       r"reason. Look for log\(0\)"):  # fmt: skip
        l2l.backward(x, y, infinite)
    assert all(param.grad is None for param in l2l.main_params)


def test_a_loss_scale_without_effect():
    with pytest.warns(UserWarning, match=r"Layer2Layer\(loss_scale=64.0\) has no effect without mixed_precision=True"):
        Layer2Layer(Tower(), loss_scale=64.0)


def test_main_parameters_are_float32():
    with pytest.raises(
        OptionError, match=r"keeps parameters in float32 .*, and layers.0.weight is torch.float16: call model.float"
    ):
        Layer2Layer(Tower().half(), mixed_precision=True)
