"""Views and copies of a whole tensor: reshapes, permutations, expansions, repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import sympy
from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import (
    Known,
    Layout,
    Lost,
    SampleAxis,
    Size,
    argument_of,
    axis_rule,
    functional_name,
    shape_of,
    value_of,
)


@axis_rule(*"view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as _reshape_alias "
           "atleast_1d atleast_2d atleast_3d ravel".split())  # fmt: skip
def reshape(node: Node, value: Tensor, known: Known) -> Layout:
    """The block of rows that belong to samples must lie along one axis of the result."""
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    found = _reshaped(layout, shape_of(value_of(node.args[0])), shape_of(value))
    return found or Lost(node, "a view cuts through samples")


@axis_rule("view_as_complex", "view_as_real")
def complex_view(node: Node, value: Tensor, known: Known) -> Layout:
    """Real and imaginary part lie on an axis of their own, the last."""
    layout = known.layout(node.args[0])
    if isinstance(layout, SampleAxis) and layout.axis < min(value.ndim, value_of(node.args[0]).ndim):
        return layout
    return Lost(node, "samples on the axis of real and imaginary parts")


@axis_rule(*"permute transpose t numpy_T movedim swapaxes swapdims mT mH adjoint moveaxis".split())
def permutation(node: Node, value: Tensor, known: Known) -> Layout:
    """The axis moves."""
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    return layout.at(_permuted(node, value_of(node.args[0]).ndim).index(layout.axis))


@axis_rule("expand", "expand_as", "broadcast_to")
def expansion(node: Node, value: Tensor, known: Known) -> Layout:
    """New axes come in front."""
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    return layout.at(layout.axis + value.ndim - value_of(node.args[0]).ndim)


@axis_rule("repeat", "tile")
def repeat(node: Node, value: Tensor, known: Known) -> Layout:
    """Copies end to end: the whole block of samples, several times."""
    layout = known.layout(node.args[0])
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    given = cast(Sequence[Any], node.args[1])
    shift = value.ndim - value_of(node.args[0]).ndim
    times = ([1] * (value.ndim - len(given)) + list(given))[layout.axis + shift]
    if not isinstance(times, int):
        return Lost(node, "samples are repeated")
    return replace(layout.at(layout.axis + shift), outer=layout.outer * times)


@axis_rule("repeat_interleave")
def repeat_interleave(node: Node, value: Tensor, known: Known) -> Layout:
    """Copies of each row behind it."""
    layout = known.layout(node.args[0])
    dim = argument_of(node, 2, "dim")
    if dim is None and value_of(node.args[0]).ndim == 1:
        dim = 0
    if not isinstance(layout, SampleAxis) or dim is None:
        return Lost(node, "samples are repeated")
    if cast(int, dim) % value.ndim != layout.axis:
        return layout
    if isinstance(node.args[1], int):
        return replace(layout, inner=layout.inner * node.args[1], is_iota=False)
    return Lost(node, "samples are repeated")


def _reshaped(layout: SampleAxis, before: list[Size], after: list[Size]) -> SampleAxis | None:
    """Row-major views: find the axis that holds the whole block of samples."""
    step = layout.inner * sympy.prod(before[layout.axis + 1 :])  # elements of one sample's block
    block = step * layout.num
    below = sympy.S.One
    for axis in reversed(range(len(after))):
        inner = _quotient(step, below)
        outer = _quotient(below * after[axis], block)
        if inner is not None and outer is not None:
            is_iota = layout.is_iota and inner == 1 == outer
            return replace(layout, axis=axis, outer=outer, inner=inner, is_iota=is_iota)
        below = below * after[axis]
    return None


def _quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` if it is an integer for all sizes."""
    ratio = sympy.cancel(a / b)
    return ratio if ratio.as_numer_denom()[1] == 1 else None


def _permuted(node: Node, ndim: int) -> list[int]:
    """For each output axis, the input axis that it shows."""
    op = functional_name(node)
    order = list(range(ndim))
    if op == "permute":
        return [cast(int, axis) % ndim for axis in cast(Sequence[Any], node.args[1])]
    if op in ("t", "numpy_T"):
        return order[::-1]
    if op in ("mT", "mH", "adjoint"):
        return [*order[:-2], *order[:-3:-1]]
    first, second = node.args[1], node.args[2]
    if op in ("movedim", "moveaxis"):
        return _moved(order, first, second)
    a, b = cast(int, first) % ndim, cast(int, second) % ndim
    order[a], order[b] = order[b], order[a]
    return order


def _moved(order: list[int], source: Any, destination: Any) -> list[int]:
    sources = [source] if isinstance(source, int) else list(source)
    destinations = [destination] if isinstance(destination, int) else list(destination)
    ndim = len(order)
    rest = [axis for axis in order if axis not in [s % ndim for s in sources]]
    for target, axis in sorted((d % ndim, s % ndim) for s, d in zip(sources, destinations, strict=True)):
        rest.insert(target, axis)
    return rest
