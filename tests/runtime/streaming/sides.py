"""How both sides of a pair are trained and compared, and a model that draws random numbers."""

import functools

from torch import nn
from torch.optim import SGD

from tests.layered_models import D

CLOSE = {"atol": 1e-11, "rtol": 1e-9}
MOMENTUM = functools.partial(
    SGD, lr=1e-2, momentum=0.9
)  # Adam would make a step of what is left of a gradient that is zero


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Dropout(0.4)) for _ in range(3))
        self.attention = nn.MultiheadAttention(D, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.attention(x, x, x, need_weights=False)[0]
