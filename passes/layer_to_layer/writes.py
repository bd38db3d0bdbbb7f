"""Operators that write in place: none may write to a value of an earlier layer, which would be read again for its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch.fx import Node

from graphopt.aliasing import is_view, root_of, written_arguments
from graphopt.capture import CapturedGraph
from graphopt.passes.layer_to_layer.segments import Segment, merged


def without_shared_writes(graph: CapturedGraph, segments: Sequence[Segment]) -> list[Segment]:
    """Let operators return what they wrote to a value of an earlier segment; join the segments where that is not possible.

    Args:
        graph: in-place operators in it may be replaced.
        segments: in order; their lists of nodes are kept up to date.
    """
    found = list(segments)
    while True:
        home = {node: position for position, segment in enumerate(found) for node in segment.nodes}
        for node in [node for segment in found for node in segment.nodes]:
            root = _written_root(node)
            if root is None or home.get(root, home[node]) == home[node]:
                continue
            if _returns_instead(graph, node, root, found[home[node]]):
                break
            first, last = home[root], home[node]
            joined = found[first]
            for segment in found[first + 1 : last + 1]:
                joined = merged(joined, segment)
            found[first : last + 1] = [joined]
            break
        else:
            return found


def _written_root(node: Node) -> Node | None:
    """The value that an operator writes to, behind all views; ``None`` if it writes to an input or to nothing."""
    roots = [root_of(argument) for argument in written_arguments(node)]
    return next((root for root in roots if root.op == "call_function"), None)


def _returns_instead(graph: CapturedGraph, node: Node, root: Node, segment: Segment) -> bool:
    """Replace ``x.relu_()`` by ``relu(x)`` for all that read x afterwards; not if views of x could see the difference."""
    target = cast(torch._ops.OpOverload, node.target)
    functional = getattr(torch.ops.aten, target.overloadpacket.__name__.removesuffix("_"), None)
    if node.args[0] is not root or any(is_view(user) for user in root.users) or functional is None:
        return False
    overload = getattr(functional, target._overloadname, None)
    if overload is None or overload._schema.is_mutable:
        return False
    fx_graph = graph.graph_module.graph
    order = {other: position for position, other in enumerate(fx_graph.nodes)}
    with fx_graph.inserting_before(node):
        new = fx_graph.call_function(overload, node.args, node.kwargs)
    new.meta = dict(node.meta)
    for user in list(root.users):
        if user is not new and order.get(user, -1) > order[node]:
            user.replace_input_with(root, new)
    node.replace_all_uses_with(new)
    segment.nodes[segment.nodes.index(node)] = new
    fx_graph.erase_node(node)
    return True
