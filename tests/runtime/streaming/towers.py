"""A model for `Layer2Layer`, and the comparison with a copy of it that is trained as ever."""

import copy

import torch
from torch import nn

from graphopt.runtime.streaming.layer2layer import Layer2Layer

N, D = 10, 6
BITWISE = {"rtol": 0, "atol": 0}


class Tower(nn.Module):
    """Layers one after the other; ``scale`` enters each of them."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers or [nn.Linear(D, D) for _ in range(3)])

    def forward(self, x, scale=None):
        for layer in self.layers:
            x = layer(x) if scale is None else layer(x * scale)
            x = torch.tanh(x) if isinstance(layer, nn.Linear) else x
        return x


def plain_and_streamed(model, **options):
    """A copy of the model as it was written, and the model in `Layer2Layer`."""
    plain = copy.deepcopy(model)
    return plain, Layer2Layer(model, **{"compiler": "eager", "gpu_device": "cpu", **options})


def batch(dtype=torch.float64, n=N):
    return torch.randn(n, D, dtype=dtype), torch.randn(n, D, dtype=dtype)


def assert_same_gradients(plain, l2l, **tolerance):
    own = dict(l2l.main_model.named_parameters())
    for name, param in plain.named_parameters():
        if param.grad is None:
            assert own[name].grad is None, name
        else:
            torch.testing.assert_close(
                own[name].grad.load(), param.grad, msg=lambda text, n=name: f"{n}: {text}", **tolerance
            )
