"""Reductions: the axis of the samples stays as long as it is not one of those that are reduced."""

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
    axis_rule,
    functional_name,
    value_of,
)


@axis_rule(*"sum mean amax amin max min argmax argmin any all var std var_mean std_mean norm logsumexp prod "
           "linalg_vector_norm count_nonzero median aminmax nansum nanmean".split())  # fmt: skip
def reduction(node: Node, value: Tensor, known: Known) -> Layout:
    """``x.sum(dim)``, and ``torch.max(x, y)``, which is element by element."""
    layout = known.layout(node.args[0])
    second = node.args[1] if len(node.args) > 1 else None
    if isinstance(second, Node) and isinstance(second.meta.get("val"), Tensor):
        return broadcast(node, value.ndim, known)
    if not isinstance(layout, SampleAxis):
        return Lost(node, "samples enter only a part")
    before = value_of(node.args[0]).ndim
    op = functional_name(node)
    axes = named_axes(node, 2 if op in ("linalg_vector_norm", "norm") else 1, before)
    if axes is None or layout.axis in axes:
        return Lost(node, "a reduction over the samples")
    return layout.at(layout.axis - (sum(axis < layout.axis for axis in axes) if value.ndim < before else 0))


def named_axes(node: Node, position: int | None, ndim: int) -> list[int] | None:
    """The axes that an argument names; ``None`` if it names none (all axes, or not an axis argument)."""
    if position is None:
        return None
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if given is None or (isinstance(given, Sequence) and not given):
        return None
    if isinstance(given, bool) or not isinstance(given, int | Sequence):
        return None
    return [cast(int, axis) % ndim for axis in (given if isinstance(given, Sequence) else [given])]
