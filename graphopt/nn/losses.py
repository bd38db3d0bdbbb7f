"""Losses that own parameters."""

from __future__ import annotations

from torch import nn

from graphopt.nn.composite import adopts_children
from graphopt.nn.mirror import Mirror


@adopts_children
class AdaptiveLogSoftmaxWithLoss(Mirror, nn.AdaptiveLogSoftmaxWithLoss):
    """`torch.nn.AdaptiveLogSoftmaxWithLoss`; its shapes depend on the targets, so training it is refused by name."""

    num_axes = 2


if hasattr(nn, "LinearCrossEntropyLoss"):  # torch 2.13

    @adopts_children
    class LinearCrossEntropyLoss(Mirror, nn.LinearCrossEntropyLoss):
        """`torch.nn.LinearCrossEntropyLoss`."""

        num_axes = 2
