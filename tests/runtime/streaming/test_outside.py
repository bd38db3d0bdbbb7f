"""Parameters of a streamed model that are read where nobody loads them: refused by name, and nothing is changed."""

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import StreamError, UncapturedParameter
from tests.layered_models import D, N


class Hidden(nn.Module):
    """A layer whose forward Dynamo does not see."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)

    @torch.compiler.disable
    def forward(self, x):
        return self.inner(x)


class Layers(nn.Module):
    """Two layers that are captured, and one that may not be."""

    def __init__(self, last):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh()) for _ in range(2))
        self.last, self.unused = last, nn.Linear(D, D)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x) + 1.0


@pytest.fixture
def hidden(pair):
    return pair(Layers(Hidden()), {"x": torch.randn(N, D)}, store="cpu")


def test_gradients_to_a_husk(hidden):
    for _ in range(2):
        with pytest.raises(StreamError, match=r"last\.inner\.weight, last\.inner\.bias would be read as NaN.*disable"):
            hidden.model(**hidden.kwargs)
    hidden.assert_equal(atol=0, rtol=0)


def test_no_gradients(hidden):
    with (
        torch.no_grad(),
        pytest.warns(UncapturedParameter, match=r"returned NaN.*last\.inner\.weight, last\.inner\.bias"),
    ):
        hidden.model(**hidden.kwargs)


def test_unused_parameters_are_no_reason(pair, recwarn):
    sides = pair(Layers(nn.Identity()), {"x": torch.randn(N, D)}, store="cpu")
    sides.backward()
    with torch.no_grad():
        sides.model(**sides.kwargs)
    sides.assert_gradients_equal()
    assert not recwarn.list


def test_a_penalty_on_weights(pair):
    sides = pair(Layers(nn.Linear(D, D)), {"x": torch.randn(N, D)}, store="cpu")
    sides.backward()
    name, param = next(iter(sides.model.named_parameters()))
    with pytest.raises(StreamError, match=rf"the loss depends on {name} outside.*weight_decay"):
        (sides.model(**sides.kwargs).sum() + param.square().sum()).backward()
    sides.model.zero_grad()
    sides.plain.zero_grad()
    sides.backward()
    value = graphopt.stream(sides.model).value(name).load().requires_grad_()
    value.square().sum().backward()
    param.grad.add_(value.grad)
    next(sides.plain.parameters()).square().sum().backward()
    sides.assert_gradients_equal()
