"""Lazy modules: they become graphopt's when the first input tells their sizes."""

from __future__ import annotations

from torch import nn

from graphopt.nn import layers
from graphopt.nn.mirror import Mirror


class LazyLinear(Mirror, nn.LazyLinear):
    """`torch.nn.LazyLinear`."""

    cls_to_become = layers.Linear


class LazyConv1d(Mirror, nn.LazyConv1d):  # type: ignore[misc]  # torch's own bases disagree
    """`torch.nn.LazyConv1d`."""

    cls_to_become = layers.Conv1d


class LazyConv2d(Mirror, nn.LazyConv2d):  # type: ignore[misc]  # torch's own bases disagree
    """`torch.nn.LazyConv2d`."""

    cls_to_become = layers.Conv2d


class LazyConv3d(Mirror, nn.LazyConv3d):  # type: ignore[misc]  # torch's own bases disagree
    """`torch.nn.LazyConv3d`."""

    cls_to_become = layers.Conv3d


class LazyConvTranspose1d(Mirror, nn.LazyConvTranspose1d):  # type: ignore[misc]  # torch's own bases disagree
    """`torch.nn.LazyConvTranspose1d`."""

    cls_to_become = layers.ConvTranspose1d


class LazyConvTranspose2d(Mirror, nn.LazyConvTranspose2d):  # type: ignore[misc]  # torch's own bases disagree
    """`torch.nn.LazyConvTranspose2d`."""

    cls_to_become = layers.ConvTranspose2d


class LazyConvTranspose3d(Mirror, nn.LazyConvTranspose3d):  # type: ignore[misc]  # torch's own bases disagree
    """`torch.nn.LazyConvTranspose3d`."""

    cls_to_become = layers.ConvTranspose3d


class LazyBatchNorm1d(Mirror, nn.LazyBatchNorm1d):
    """`torch.nn.LazyBatchNorm1d`."""

    cls_to_become = layers.BatchNorm1d


class LazyBatchNorm2d(Mirror, nn.LazyBatchNorm2d):
    """`torch.nn.LazyBatchNorm2d`."""

    cls_to_become = layers.BatchNorm2d


class LazyBatchNorm3d(Mirror, nn.LazyBatchNorm3d):
    """`torch.nn.LazyBatchNorm3d`."""

    cls_to_become = layers.BatchNorm3d


class LazyInstanceNorm1d(Mirror, nn.LazyInstanceNorm1d):
    """`torch.nn.LazyInstanceNorm1d`."""

    cls_to_become = layers.InstanceNorm1d


class LazyInstanceNorm2d(Mirror, nn.LazyInstanceNorm2d):
    """`torch.nn.LazyInstanceNorm2d`."""

    cls_to_become = layers.InstanceNorm2d


class LazyInstanceNorm3d(Mirror, nn.LazyInstanceNorm3d):
    """`torch.nn.LazyInstanceNorm3d`."""

    cls_to_become = layers.InstanceNorm3d
