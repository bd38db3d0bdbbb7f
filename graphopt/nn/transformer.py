"""Attention and transformer layers: samples on the second axis, unless ``batch_first``; masks may hold N * heads rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from graphopt.nn.composite import adopts_children
from graphopt.nn.mirror import Arrangement, Mirror, one_sample, remove_axis


class _Attending(Mirror):
    """What attention and the layers built of it share.

    Attributes:
        sequences: arguments with samples on the axis of the batch.
        paddings: arguments (N, T).
        masks: arguments (T, T), the same for all samples, or (N * heads, T, T).
    """

    sequences: tuple[str, ...]
    paddings: tuple[str, ...]
    masks: tuple[str, ...]

    def _attention(self) -> nn.MultiheadAttention:
        raise NotImplementedError

    def _arrange(self, arguments: dict[str, Any]) -> Arrangement:
        heads, axis = self._attention().num_heads, 0 if self._attention().batch_first else 1
        arguments = dict(arguments)
        axes: dict[str, int | None] = {**dict.fromkeys(self.sequences, axis), **dict.fromkeys(self.paddings, 0)}
        batched = arguments[self.sequences[0]].ndim == 3
        for name in self.masks:
            mask = arguments.get(name)
            if isinstance(mask, Tensor) and mask.ndim == 3:
                arguments[name] = mask.unflatten(0, (-1, heads))  # the samples have an axis of their own
                axes[name] = 0
        if batched:
            return Arrangement(arguments, axes)
        own = {name: axis for name, axis in axes.items() if name in arguments and name not in self.masks}
        arranged = one_sample(arguments, own, lambda result: self._unbatch(result, axis))
        return Arrangement(arranged.arguments, axes, arranged.unbatch)

    def _unbatch(self, result: Any, axis: int) -> Any:
        return remove_axis(result, axis)

    def _enter(self, arguments: dict[str, Any]) -> Any:
        flat = {
            name: mask.flatten(0, 1)
            for name in self.masks
            if isinstance(mask := arguments.get(name), Tensor) and mask.ndim == 4
        }
        return super()._enter({**arguments, **flat})


@adopts_children
class MultiheadAttention(_Attending, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`."""

    sequences, paddings, masks = ("query", "key", "value"), ("key_padding_mask",), ("attn_mask",)

    def _attention(self) -> nn.MultiheadAttention:
        return self

    def _unbatch(self, result: Any, axis: int) -> Any:
        output, weights = result
        return output.squeeze(axis), None if weights is None else weights.squeeze(0)


@adopts_children
class TransformerEncoderLayer(_Attending, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`."""

    sequences, paddings, masks = ("src",), ("src_key_padding_mask",), ("src_mask",)

    def _attention(self) -> nn.MultiheadAttention:
        return self.self_attn


@adopts_children
class TransformerDecoderLayer(_Attending, nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`."""

    sequences, masks = ("tgt", "memory"), ("tgt_mask", "memory_mask")
    paddings = ("tgt_key_padding_mask", "memory_key_padding_mask")

    def _attention(self) -> nn.MultiheadAttention:
        return self.self_attn


# --- containers: each of their layers runs by itself -----------------------------------------------------------------------


@adopts_children
class TransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`; its layers compute the statistic."""


@adopts_children
class TransformerDecoder(nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`; its layers compute the statistic."""


@adopts_children
class Transformer(nn.Transformer):
    """`torch.nn.Transformer`; its layers compute the statistic."""
