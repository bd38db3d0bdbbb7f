"""What operators of a graph write to, and which values are views of which."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree


def is_view(node: Node) -> bool:
    """Whether an operator returns another look at its first argument's memory."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def written_arguments(node: Node) -> list[Node]:
    """The arguments that an operator writes to, ``out=`` among them; none for what is not an operator."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    found: list[Node] = []
    for position, declared in enumerate(node.target._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            argument = node.args[position] if position < len(node.args) else node.kwargs.get(declared.name)
            found += [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, Node)]
    return found


def root_of(node: Node) -> Node:
    """The value whose memory a node looks at, behind all views."""
    return views(node)[-1]


def views(node: Node) -> list[Node]:
    """A node and what it is a view of, up to the value whose memory they look at."""
    found = [node]
    while node.op == "call_function" and is_view(node):
        node = cast(Node, cast(tuple[Any, ...], node.args)[0])
        found.append(node)
    return found
