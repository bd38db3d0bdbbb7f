"""Where each parameter meets the samples.

Between a parameter and its samples may lie a part of the graph that no sample enters: a transposition, a cast, a look-up of
positions, the product of two LoRA factors. This module follows each tracked parameter through that part to its **frontier**,
the operators where it is joined with samples, and remembers the parts that are mere views.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from graphopt import _compat
from graphopt.capture import CapturedGraph
from graphopt.inspect.location import describe
from graphopt.passes.truegrad.editor import CASTS
from graphopt.passes.truegrad.sample_axis import Free, Layout, Layouts, Lost, SampleAxis, is_pointwise

aten = torch.ops.aten

# Views and casts: each element of the result is one element of the parameter, and no two are the same.
VIEWS = CASTS | frozenset(
    [
        aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default, aten.reshape.default, aten.numpy_T.default,
        aten.mT.default, aten.movedim.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.flatten.using_ints, aten.unflatten.int, aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split.sizes,
        aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.narrow.default, aten.alias.default,
        aten.contiguous.default, aten.view_as.default, aten.swapaxes.default, aten._unsafe_view.default, operator.getitem,
    ]
)  # fmt: skip
# In addition what may repeat elements, but computes nothing: squares pass through its backward as gradients do, as long as
# repetitions count as positions of their own (``per="token"``).
SELECTIONS = VIEWS | frozenset([aten.expand.default, aten.embedding.default, aten.index_select.default])

_NO_GRADIENT = frozenset(
    [aten.detach.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default,
     aten.rand_like.default, aten.randn_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default,
     aten.new_full.default, aten.sym_size.int]
)  # fmt: skip


_OLD_WEIGHT_NORM = (
    "the hook of torch.nn.utils.weight_norm leaves the weight on the module, where it could be used again without samples. Use "
    "torch.nn.utils.parametrizations.weight_norm, which computes the same"
)


@dataclass(frozen=True)
class Chain:
    """A value that is a view of one parameter."""

    root: Node
    steps: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Use:
    """One place where a parameter meets samples: ``value``, which depends on it, is an argument of ``node``."""

    node: Node
    value: Node


@dataclass
class Uses:
    """What became of each tracked parameter.

    Attributes:
        of: for each parameter, its frontier.
        params: for each value that no sample enters, the tracked parameters that it depends on.
        views: values that are a view of one parameter.
        selections: values that are views of one parameter, or repeat elements of it.
        problems: parameters that cannot be served, and why.
    """

    of: dict[Node, list[Use]]
    params: dict[Node, frozenset[Node]] = field(default_factory=dict)
    views: dict[Node, Chain] = field(default_factory=dict)
    selections: dict[Node, Chain] = field(default_factory=dict)
    problems: dict[Node, str] = field(default_factory=dict)

    def extend(self, value: Node, view: Node) -> None:
        """Enter a view of ``value`` that a rule has made."""
        self.params[view] = self.params[value]
        for chains in (self.views, self.selections):
            if value in chains:
                chains[view] = Chain(chains[value].root, (*chains[value].steps, view))


def find_uses(graph: CapturedGraph, layouts: Layouts, tracked: list[Node]) -> Uses:
    """Follow every tracked parameter from its placeholder to its frontier."""
    uses = Uses({param: [] for param in tracked})
    for param in tracked:
        uses.params[param] = frozenset([param])
        uses.views[param] = uses.selections[param] = Chain(param)
    grad_enabled = graph.grad_enabled
    for node in graph.graph_module.graph.nodes:
        if node.target is _compat.set_grad_enabled_op:
            grad_enabled = bool(node.args[0])
        values = [argument for argument in node.all_input_nodes if argument in uses.params]
        if not values:
            continue
        if node.op == "output":
            _escape(uses, values)
        elif grad_enabled and _is_differentiable(node):
            _visit(uses, layouts, node, values)
            _check_writes(uses, layouts, node, values)
    return uses


def overlap(chains: list[Chain]) -> bool:
    """Whether two views of one parameter share elements."""
    if len(chains) < 2:
        return False
    shape = [int(size) for size in cast(Tensor, chains[0].root.meta["val"]).shape]
    if not math.prod(shape):
        return False
    seen = torch.zeros(shape, dtype=torch.bool)
    for chain in chains:
        view: Any = seen
        for step in chain.steps:
            if step.target not in CASTS:
                view = cast(Any, step.target)(view, *step.args[1:], **step.kwargs)
        if view.untyped_storage().data_ptr() != seen.untyped_storage().data_ptr() or bool(view.any()):
            return True
        view.fill_(True)
    return False


def _visit(uses: Uses, layouts: Layouts, node: Node, values: list[Node]) -> None:
    layout = _layout(layouts, node)
    params = frozenset().union(*(uses.params[value] for value in values))
    if isinstance(layout, Free):
        uses.params[node] = params
        first = node.args[0] if node.args else None
        if len(node.all_input_nodes) == 1 or node.target is aten.embedding.default:
            for allowed, chains in ((VIEWS, uses.views), (SELECTIONS, uses.selections)):
                if node.target in allowed and first in chains:
                    chain = chains[cast(Node, first)]
                    chains[node] = Chain(chain.root, (*chain.steps, node))
    elif isinstance(layout, SampleAxis):
        for value in values:
            for param in uses.params[value]:
                uses.of[param].append(Use(node, value))
    else:
        for param in params:
            uses.problems.setdefault(
                param, f"it meets samples that no axis tells apart: {layout.why}, at {describe(layout.node)}"
            )


def _check_writes(uses: Uses, layouts: Layouts, node: Node, values: list[Node]) -> None:
    """A parameter's value that is written into another tensor cannot be followed, unless that tensor holds samples itself."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return
    target = node.args[0]
    if target in values or not isinstance(layouts.get(cast(Node, target)), SampleAxis) or not is_pointwise(node.target):
        for value in values:
            for param in uses.params[value]:
                uses.problems.setdefault(
                    param, f"it is written in place, at {describe(node)}: write the sum or product as a new tensor"
                )


def _escape(uses: Uses, values: list[Node]) -> None:
    for value in values:
        if value.target is aten._weight_norm.default:
            uses.problems.update(dict.fromkeys(uses.params[value], _OLD_WEIGHT_NORM))
        for param in uses.params[value]:
            uses.problems.setdefault(
                param,
                f"{describe(value)} leaves the graph without having met samples (a penalty on weights, or a graph break between "
                "the parameter and its samples), so what it adds to the gradient belongs to no sample",
            )


def _layout(layouts: Layouts, node: Node) -> Layout:
    found = layouts.get(node, Free())
    if not isinstance(found, list):
        return found
    return next((layout for layout in found if isinstance(layout, SampleAxis | Lost)), Free())


def _is_differentiable(node: Node) -> bool:
    if node.target in _NO_GRADIENT:
        return False
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(item, Tensor) and (item.is_floating_point() or item.is_complex()) for item in tensors)
