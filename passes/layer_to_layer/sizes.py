"""How large segments and values are, and cuts where no layers were found: few bytes across, as many parameters on each side."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.capture import CapturedGraph
from graphopt.passes.layer_to_layer.layers import parameters_of
from graphopt.passes.layer_to_layer.segments import Segment, merged

_FEWEST_PARTS = 8  # into which a model without layers is cut, if its parameters allow it


def bytes_of(value: Any) -> int:
    """Size of a fake tensor at the batch size of the capture; of several, their sum."""
    return sum(_tensor_bytes(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def parameter_bytes(graph: CapturedGraph, segment: Segment) -> int:
    """Bytes of the parameters that a segment reads."""
    return sum(bytes_of(node.meta["val"]) for node in parameters_of(graph, segment))


def fit_for_streaming(graph: CapturedGraph, found: Sequence[Segment]) -> list[Segment]:
    """Segments of which none but a layer is larger than the largest layer, and no two neighbours could be one.

    Args:
        graph: stays as it is.
        found: the layers, and what lies between them.
    """
    largest_parameter = max((bytes_of(node.meta["val"]) for s in found for node in parameters_of(graph, s)), default=0)
    layers = [parameter_bytes(graph, segment) for segment in found if segment.layer is not None]
    total = sum(parameter_bytes(graph, segment) for segment in found)
    limit = max(layers, default=max(largest_parameter, total // _FEWEST_PARTS))
    limit = max(limit, largest_parameter)
    parts: list[Segment] = []
    for segment in found:
        if segment.layer is None and parameter_bytes(graph, segment) > limit:
            parts += _balanced(graph, segment, limit)
        else:
            parts.append(segment)
    joined: list[Segment] = []
    for part in parts:
        small = joined and part.layer is None and joined[-1].layer is None
        if small and parameter_bytes(graph, merged(joined[-1], part)) <= limit:
            joined[-1] = merged(joined[-1], part)
        else:
            joined.append(part)
    return joined


def _balanced(graph: CapturedGraph, segment: Segment, limit: int) -> list[Segment]:
    """Cut a segment at its narrowest points, so that no part has more than ``limit`` bytes of parameters."""
    nodes, width, inside = segment.nodes, _widths(segment.nodes), _inside_results(segment.nodes)
    reads = [parameters_of(graph, Segment("", [node])) for node in nodes]
    cuts, held = [0], set[Node]()
    for position in range(len(nodes)):
        together = held.union(reads[position])
        if held and sum(bytes_of(node.meta["val"]) for node in together) > limit:
            places = [at for at in range(cuts[-1] + 1, position + 1) if at not in inside]
            if places:
                cuts.append(min(places, key=lambda at: (width[at], -at)))
                together = {node for own in reads[cuts[-1] : position + 1] for node in own}
        held = together
    ends = [*cuts[1:], len(nodes)]
    return [
        Segment(f"{segment.name}, part {number}", nodes[first:last])
        for number, (first, last) in enumerate(zip(cuts, ends, strict=True), 1)
    ]


def _inside_results(nodes: Sequence[Node]) -> set[int]:
    """The positions between an operator with several results and where they are taken apart: only tensors pass a boundary."""
    position = {node: index for index, node in enumerate(nodes)}
    found: set[int] = set()
    for node, index in position.items():
        if node.target is operator.getitem:
            found.update(range(position.get(node.all_input_nodes[0], index - 1) + 1, index + 1))
    return found


def _widths(nodes: Sequence[Node]) -> list[int]:
    """For each position the bytes of what is computed before it and used at or after it."""
    position = {node: index for index, node in enumerate(nodes)}
    change = [0] * (len(nodes) + 1)
    for index, node in enumerate(nodes):
        last = max((position.get(user, len(nodes)) for user in node.users), default=index)
        if last > index:
            size = bytes_of(node.meta.get("val"))
            change[index + 1] += size
            if last + 1 <= len(nodes):
                change[last + 1] -= size
    widths, width = [], 0
    for step in change[: len(nodes)]:
        width += step
        widths.append(width)
    return widths


def _tensor_bytes(value: Tensor) -> int:
    numel = 1
    for size in value.shape:
        numel *= _compat.size_hint(size.node.shape_env, size.node.expr) if isinstance(size, torch.SymInt) else size
    return numel * value.element_size()
