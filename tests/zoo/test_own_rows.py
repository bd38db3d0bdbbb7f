"""The oracle for models in which samples meet, where they do not meet, and by the equation where they do."""

import torch
from torch import nn

from tests.oracle import loop_over_samples
from tests.zoo.own_rows import own_rows


def loss(output):
    return (output + 0.3 * torch.arange(output.shape[-1])).sin().sum()


def test_is_the_loop_where_samples_do_not_meet():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.PReLU(), nn.Flatten(), nn.Linear(16, 2))
    model, x = model.double(), torch.randn(3, 2, 4, 4).double()
    expected = loop_over_samples(model, (x,), loss, reduction="sum")
    found = own_rows(model, {"input": x}, loss, 3)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.grad, expected[name].grad)
        torch.testing.assert_close(value.sum_grad_squared, expected[name].sum_grad_squared)


def test_batch_norm_by_its_equation():
    model, x = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).double(), torch.randn(3, 2).double()
    found = own_rows(model, {"input": x}, loss, 3)
    first = model[0](x)
    standard = (first - first.mean(0)) / (first.var(0, unbiased=False) + 1e-5).sqrt()
    output = standard * model[1].weight + model[1].bias
    total = loss(output)
    at_output, at_first = torch.autograd.grad(total, [output, first])
    squares = {
        "0.weight": (at_first[:, :, None] * x[:, None]).square().sum(0),
        "0.bias": at_first.square().sum(0),
        "1.weight": (at_output * standard).square().sum(0),
        "1.bias": at_output.square().sum(0),
    }
    for name, expected in squares.items():
        torch.testing.assert_close(found[name].sum_grad_squared, expected)


def test_adds_up_to_the_gradient():
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 2)).double()
    x = torch.randn(3, 2, 3, 3).double()
    found = own_rows(model, {"input": x}, loss, 3)
    loss(model(x)).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name].grad, param.grad, atol=1e-12, rtol=1e-9)
