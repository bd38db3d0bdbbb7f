"""Models that are cut into stages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def mlp(num_layers=4, width=6):
    torch.manual_seed(1)
    hidden = [layer for _ in range(num_layers) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 3)).double()


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, scale=1.0, *, labels=None):
        hidden = []
        for layer in self.layers:
            hidden.append(x)
            x = layer(x).tanh() * scale
        loss = None if labels is None else F.mse_loss(x, labels)
        return {"loss": loss, "last": x, "hidden": hidden, "name": "several", "input": hidden[0]}
