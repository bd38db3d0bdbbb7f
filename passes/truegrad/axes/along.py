"""Operators that work along axes which they name: differences, rotations, Fourier transforms, quantiles, distances.

The axis of the samples must not be among these. What an operator does to the others follows from its result: as many axes, or
fewer by those that it named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.axes.elementwise import broadcast
from graphopt.passes.truegrad.sample_axis import (
    Known,
    Layout,
    Lost,
    SampleAxis,
    argument_of,
    axis_rule,
    functional_name,
    value_of,
)

_LAST = (-1,)
_LAST_TWO = (-2, -1)

# Name of the argument that names the axes, its position, and the axes without it (``None``: all, or those of the flattened
# tensor, so that samples mix).
_AXES: dict[str, tuple[str, int, Sequence[int] | None]] = {
    "roll": ("dims", 2, None),
    "rot90": ("dims", 2, (0, 1)),
    "diff": ("dim", 2, _LAST),
    "kthvalue": ("dim", 2, _LAST),
    "mode": ("dim", 1, _LAST),
    "msort": ("", 99, (0,)),
    "fliplr": ("", 99, (1,)),
    "flipud": ("", 99, (0,)),
    "quantile": ("dim", 2, None),
    "nanquantile": ("dim", 2, None),
    "nanmedian": ("dim", 1, None),
    "trapezoid": ("dim", 99, _LAST),
    "trapz": ("dim", 99, _LAST),
    "cumulative_trapezoid": ("dim", 99, _LAST),
    "cosine_similarity": ("dim", 2, (1,)),
    "pairwise_distance": ("", 99, _LAST),
    "linalg_cross": ("dim", 2, _LAST),
    "linalg_norm": ("dim", 2, None),
    "linalg_matrix_norm": ("dim", 2, _LAST_TWO),
    "frobenius_norm": ("dim", 1, None),
    "nuclear_norm": ("dim", 1, None),
    "special_softmax": ("dim", 1, None),
    "special_log_softmax": ("dim", 1, None),
    "special_logsumexp": ("dim", 1, None),
    "_safe_softmax": ("dim", 1, None),
    "searchsorted": ("", 99, _LAST),
    **{f"fft_{name}": ("dim", 2, _LAST) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{f"fft_{name}2": ("dim", 2, _LAST_TWO) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{f"fft_{name}n": ("dim", 2, None) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    "fft_fftshift": ("dim", 1, None),
    "fft_ifftshift": ("dim", 1, None),
}


@axis_rule(*_AXES)
def along(node: Node, value: Tensor, known: Known) -> Layout:
    """The axis stays, unless the operator works along it."""
    name = functional_name(node)
    keyword, position, default = _AXES[name]
    given = argument_of(node, position, keyword)
    axes = (
        default if given is None or given == [] else [given] if isinstance(given, int) else cast(Sequence[int], given)
    )
    inputs = [argument for argument in node.all_input_nodes if isinstance(argument.meta.get("val"), Tensor)]
    ndim = max(value_of(argument).ndim for argument in inputs)
    if name == "searchsorted" and value_of(node.args[0]).ndim == 1:  # one sorted sequence for all: element by element
        axes = ()
    if name == "searchsorted" and not axes and isinstance(known.layout(node.args[0]), SampleAxis):
        return Lost(node, "searchsorted works across samples")
    if "quantile" in name and isinstance(node.args[1], Node) and value_of(node.args[1]).ndim:
        return Lost(node, f"{name} makes axes of its own")
    layout = broadcast(node, ndim, known)
    if not isinstance(layout, SampleAxis):
        return layout
    if axes is None:
        return Lost(node, f"{name} works across samples")
    named = [axis % ndim for axis in axes]
    if layout.axis in named:
        return Lost(node, f"{name} works across samples")
    if value.ndim == ndim:
        return layout
    if value.ndim != ndim - len(named):
        return Lost(node, f"{name} makes axes of its own")
    return layout.at(layout.axis - sum(axis < layout.axis for axis in named))


@axis_rule("renorm")
def renorm(node: Node, value: Tensor, known: Known) -> Layout:
    """Each place along one axis is scaled by itself: it must be the samples'."""
    layout = known.layout(node.args[0])
    own = isinstance(layout, SampleAxis) and layout.axis == cast(int, node.args[2]) % value.ndim
    return layout if own else Lost(node, "renorm works across samples")


@axis_rule("stft")
def short_time_fourier_transform(node: Node, value: Tensor, known: Known) -> Layout:
    """(N, T) -> (N, frequencies, frames)."""
    layout = known.layout(node.args[0])
    own = isinstance(layout, SampleAxis) and layout.axis == 0 and value_of(node.args[0]).ndim == 2
    return layout if own else Lost(node, "stft of signals whose samples are not on the first axis")
