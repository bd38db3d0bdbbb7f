"""The classes of ``torch.nn`` that own parameters of their own and treat samples alike: products, look-ups, normalisations.

Each is the class of that name in ``torch.nn``, with the same arguments, initial values and results; its backward computes the
statistic beside the gradients. What is written here is only where the samples are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as _NonDynamicallyQuantizableLinear

from graphopt.errors import UnsupportedError
from graphopt.nn.mirror import Arrangement, Mirror

if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm
else:
    _BatchNorm = object  # a mixin, as `Mirror`


class Linear(Mirror, nn.Linear):
    """`torch.nn.Linear`."""

    num_axes = 2


class NonDynamicallyQuantizableLinear(Linear, _NonDynamicallyQuantizableLinear):
    """The output projection of `MultiheadAttention`, which torch keeps a class for."""


class Bilinear(Mirror, nn.Bilinear):
    """`torch.nn.Bilinear`."""

    num_axes = 2


class Embedding(Mirror, nn.Embedding):
    """`torch.nn.Embedding`."""


class EmbeddingBag(Mirror, nn.EmbeddingBag):
    """`torch.nn.EmbeddingBag`. Each bag is a sample."""

    def _arrange(self, arguments: dict[str, Any]) -> Arrangement:
        axis = 0 if arguments["input"].ndim == 2 else None  # with offsets, rows of several bags follow each other
        return Arrangement(arguments, {"input": axis, "offsets": 0, "per_sample_weights": axis})


class PReLU(Mirror, nn.PReLU):
    """`torch.nn.PReLU`."""


# --- convolutions -----------------------------------------------------------------------------------------------------------


class Conv1d(Mirror, nn.Conv1d):
    """`torch.nn.Conv1d`."""

    num_axes = 3


class Conv2d(Mirror, nn.Conv2d):
    """`torch.nn.Conv2d`."""

    num_axes = 4


class Conv3d(Mirror, nn.Conv3d):
    """`torch.nn.Conv3d`."""

    num_axes = 5


class ConvTranspose1d(Mirror, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`."""

    num_axes = 3


class ConvTranspose2d(Mirror, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`."""

    num_axes = 4


class ConvTranspose3d(Mirror, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`."""

    num_axes = 5


# --- normalisations ---------------------------------------------------------------------------------------------------------


class _OverNamedAxes(nn.LayerNorm):
    """`torch.nn.LayerNorm` that takes sizes of 1 in ``normalized_shape`` for axes that need not be there."""

    def forward(self, input: Tensor) -> Tensor:
        shape = self._shape_for(input)
        if shape == self.normalized_shape:
            return super().forward(input)
        weight, bias = (None if tensor is None else tensor.view(shape) for tensor in (self.weight, self.bias))
        return F.layer_norm(input, shape, weight, bias, self.eps)

    def _shape_for(self, input: Tensor) -> tuple[int, ...]:
        shape = self.normalized_shape
        if input.shape[max(0, input.ndim - len(shape)) :] == shape:
            return shape
        named = tuple(size for size in shape if size != 1)
        return named if named and input.shape[max(0, input.ndim - len(named)) :] == named else shape


class LayerNorm(Mirror, _OverNamedAxes):
    """`torch.nn.LayerNorm`, which also takes ``normalized_shape=[1, 10]`` for (16, 10): sizes of 1 need not be there."""

    def _num_axes(self, input: Tensor) -> int:
        return len(self._shape_for(input)) + 1


class _OverChannels(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the second axis, with as many axes behind it as the name of the class says."""

    num_positions: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(-1 - self.num_positions, -1)).movedim(-1, -1 - self.num_positions)


class LayerNorm1d(Mirror, _OverChannels):
    """Layer normalisation over the channels C of (N, C, L), each position by itself; ``torch.nn`` has no such class."""

    num_axes, num_positions = 3, 1


class LayerNorm2d(Mirror, _OverChannels):
    """Layer normalisation over the channels C of (N, C, H, W), each position by itself."""

    num_axes, num_positions = 4, 2


class LayerNorm3d(Mirror, _OverChannels):
    """Layer normalisation over the channels C of (N, C, D, H, W), each position by itself."""

    num_axes, num_positions = 5, 3


class RMSNorm(Mirror, nn.RMSNorm):
    """`torch.nn.RMSNorm`."""

    def _num_axes(self, input: Tensor) -> int:
        return len(self.normalized_shape) + 1


class GroupNorm(Mirror, nn.GroupNorm):
    """`torch.nn.GroupNorm`."""


class _OverSamples(Mirror, _BatchNorm):
    """Batch normalisation. A sample contributes the terms of its own rows, the statistics of the batch taken as given."""

    def forward(self, input: Tensor) -> Tensor:
        count = self.num_batches_tracked if self.training else None
        if self.momentum is not None or count is None or torch.compiler.is_compiling():
            return cast(Tensor, super().forward(input))
        self.momentum = 0.0  # the average over all batches has a weight that the trace cannot know: it is taken here
        try:
            result: Tensor = super().forward(input)
        finally:
            self.momentum = None
        with torch.no_grad():
            F.batch_norm(input, self.running_mean, self.running_var, training=True, momentum=1.0 / float(count))
        return result


class BatchNorm1d(_OverSamples, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`. A sample contributes the terms of its own rows, the statistics of the batch taken as given."""


class BatchNorm2d(_OverSamples, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, as `BatchNorm1d`."""


class BatchNorm3d(_OverSamples, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, as `BatchNorm1d`."""


class SyncBatchNorm(_OverSamples, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` as long as there is one process; with several it is refused."""

    def _arrange(self, arguments: dict[str, Any]) -> Arrangement:
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            raise UnsupportedError(
                "SyncBatchNorm of graphopt.nn cannot be traced across processes. Use torch.nn.SyncBatchNorm, which trains "
                "without the statistic, or BatchNorm of graphopt.nn, which normalises each process's rows by themselves"
            )
        return super()._arrange(arguments)


class InstanceNorm1d(Mirror, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d`."""

    num_axes = 3


class InstanceNorm2d(Mirror, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d`."""

    num_axes = 4


class InstanceNorm3d(Mirror, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`."""

    num_axes = 5
