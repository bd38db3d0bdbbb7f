"""``torch.nn`` whose parameters carry the statistic after ``backward()``, without a compiler.

    from graphopt import nn              # instead of: from torch import nn

Every class of ``torch.nn`` that owns parameters is mirrored: same name, arguments, initial values and results. Everything else
is ``torch.nn``'s own. Samples lie on the first axis of a module's inputs (the second for recurrent, attention and transformer
layers without ``batch_first``); ``module.sample_axis = 1`` says otherwise.

A module sees its own call only. A parameter that is used by two calls within one backward pass, or outside its module, needs the
whole model's graph: `graphopt.patch_model` or `graphopt.transform`, which accept these modules too.

Attributes:
    modules: the mirrored classes, for ``isinstance``.
"""

from typing import Any

import torch.nn as _torch_nn

from graphopt.nn import composite as _composite
from graphopt.nn.layers import BatchNorm1d as BatchNorm1d
from graphopt.nn.layers import BatchNorm2d as BatchNorm2d
from graphopt.nn.layers import BatchNorm3d as BatchNorm3d
from graphopt.nn.layers import Bilinear as Bilinear
from graphopt.nn.layers import Conv1d as Conv1d
from graphopt.nn.layers import Conv2d as Conv2d
from graphopt.nn.layers import Conv3d as Conv3d
from graphopt.nn.layers import ConvTranspose1d as ConvTranspose1d
from graphopt.nn.layers import ConvTranspose2d as ConvTranspose2d
from graphopt.nn.layers import ConvTranspose3d as ConvTranspose3d
from graphopt.nn.layers import Embedding as Embedding
from graphopt.nn.layers import EmbeddingBag as EmbeddingBag
from graphopt.nn.layers import GroupNorm as GroupNorm
from graphopt.nn.layers import InstanceNorm1d as InstanceNorm1d
from graphopt.nn.layers import InstanceNorm2d as InstanceNorm2d
from graphopt.nn.layers import InstanceNorm3d as InstanceNorm3d
from graphopt.nn.layers import LayerNorm as LayerNorm
from graphopt.nn.layers import LayerNorm1d as LayerNorm1d
from graphopt.nn.layers import LayerNorm2d as LayerNorm2d
from graphopt.nn.layers import LayerNorm3d as LayerNorm3d
from graphopt.nn.layers import Linear as Linear
from graphopt.nn.layers import NonDynamicallyQuantizableLinear as NonDynamicallyQuantizableLinear
from graphopt.nn.layers import PReLU as PReLU
from graphopt.nn.layers import RMSNorm as RMSNorm
from graphopt.nn.layers import SyncBatchNorm as SyncBatchNorm
from graphopt.nn.lazy import LazyBatchNorm1d as LazyBatchNorm1d
from graphopt.nn.lazy import LazyBatchNorm2d as LazyBatchNorm2d
from graphopt.nn.lazy import LazyBatchNorm3d as LazyBatchNorm3d
from graphopt.nn.lazy import LazyConv1d as LazyConv1d
from graphopt.nn.lazy import LazyConv2d as LazyConv2d
from graphopt.nn.lazy import LazyConv3d as LazyConv3d
from graphopt.nn.lazy import LazyConvTranspose1d as LazyConvTranspose1d
from graphopt.nn.lazy import LazyConvTranspose2d as LazyConvTranspose2d
from graphopt.nn.lazy import LazyConvTranspose3d as LazyConvTranspose3d
from graphopt.nn.lazy import LazyInstanceNorm1d as LazyInstanceNorm1d
from graphopt.nn.lazy import LazyInstanceNorm2d as LazyInstanceNorm2d
from graphopt.nn.lazy import LazyInstanceNorm3d as LazyInstanceNorm3d
from graphopt.nn.lazy import LazyLinear as LazyLinear
from graphopt.nn.losses import AdaptiveLogSoftmaxWithLoss as AdaptiveLogSoftmaxWithLoss
from graphopt.nn.recurrent import GRU as GRU
from graphopt.nn.recurrent import LSTM as LSTM
from graphopt.nn.recurrent import RNN as RNN
from graphopt.nn.recurrent import GRUCell as GRUCell
from graphopt.nn.recurrent import LSTMCell as LSTMCell
from graphopt.nn.recurrent import RNNCell as RNNCell
from graphopt.nn.transformer import MultiheadAttention as MultiheadAttention
from graphopt.nn.transformer import Transformer as Transformer
from graphopt.nn.transformer import TransformerDecoder as TransformerDecoder
from graphopt.nn.transformer import TransformerDecoderLayer as TransformerDecoderLayer
from graphopt.nn.transformer import TransformerEncoder as TransformerEncoder
from graphopt.nn.transformer import TransformerEncoderLayer as TransformerEncoderLayer
from graphopt.nn.truegrad_parameter import TrueGradParameter as TrueGradParameter

modules: tuple[type[_torch_nn.Module], ...] = (
    AdaptiveLogSoftmaxWithLoss,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Bilinear,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Embedding,
    EmbeddingBag,
    GRU,
    GRUCell,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LSTM,
    LSTMCell,
    LayerNorm,
    LayerNorm1d,
    LayerNorm2d,
    LayerNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
    LazyConv1d,
    LazyConv2d,
    LazyConv3d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
    LazyConvTranspose3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
    LazyLinear,
    Linear,
    MultiheadAttention,
    NonDynamicallyQuantizableLinear,
    PReLU,
    RMSNorm,
    RNN,
    RNNCell,
    SyncBatchNorm,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
if hasattr(_torch_nn, "LinearCrossEntropyLoss"):  # torch 2.13
    from graphopt.nn.losses import LinearCrossEntropyLoss as LinearCrossEntropyLoss

    modules = (*modules, LinearCrossEntropyLoss)

_composite.register(*modules)


def __getattr__(name: str) -> Any:
    """What has no parameters is ``torch.nn``'s own."""
    try:
        return getattr(_torch_nn, name)
    except AttributeError:
        raise AttributeError(f"neither graphopt.nn nor torch.nn has {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_torch_nn)})
