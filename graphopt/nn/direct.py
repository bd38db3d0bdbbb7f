"""graphopt's operators without the dispatcher, for graphs that run as ordinary Python.

A registered operator with a backward of its own costs about half a millisecond a call when it takes lists of tensors: the
dispatcher, and a walk over its arguments each way. The same functions, as a ``torch.autograd.Function`` whose arguments are
flattened as the node's own form says, cost a tenth of that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from graphopt import _compat


def without_dispatcher(graph_module: GraphModule) -> GraphModule:
    """A copy of the graph that calls the functions behind registered operators."""
    graph = copy.deepcopy(graph_module.graph)
    for index, node in enumerate(list(graph.nodes)):
        operator = _operator(node)
        if operator is not None:
            node.target = operator.call
            node.target.__name__ = f"graphopt_{index}"  # the generated code needs different names
    return GraphModule(graph_module, graph)


@dataclass(frozen=True)
class _Operator:
    """The parts of a registered operator.

    Attributes:
        function: its forward.
        setup: what it keeps for its backward.
        backward: from output gradients to input gradients, in the nesting of the arguments.
        sizes: for each argument, how long the list of tensors is, or -1 if it is none.
    """

    function: Callable[..., Any]
    setup: Callable[..., None]
    backward: Callable[..., Any]
    sizes: tuple[int, ...]

    @property
    def call(self) -> Callable[..., Any]:
        """The operator as a function of its arguments."""

        def call(*args: Any) -> Any:
            flat: list[Any] = []
            for size, argument in zip(self.sizes, args, strict=True):
                if size < 0:
                    flat.append(argument)
                else:
                    flat.extend(argument)
            return _Direct.apply(self, *flat)  # type: ignore[no-untyped-call]

        return call

    def nest(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """Give one value for each tensor the form of the arguments."""
        nested: list[Any] = []
        position = 0
        for size in self.sizes:
            nested.append(flat[position] if size < 0 else list(flat[position : position + size]))
            position += abs(size)
        return tuple(nested)

    def flatten(self, nested: Any) -> list[Any]:
        """The reverse, where ``None`` may stand for a list of ``None``."""
        flat: list[Any] = []
        for size, value in zip(self.sizes, nested if isinstance(nested, tuple) else (nested,), strict=True):
            if size < 0:
                flat.append(value)
            else:
                flat.extend([None] * size if value is None else value)
        return flat


class _Direct(torch.autograd.Function):
    """Any of them."""

    @staticmethod
    def forward(ctx: Any, operator: _Operator, *flat: Any) -> Any:
        args = operator.nest(flat)
        output = operator.function(*args)
        ctx.graphopt_operator = operator
        operator.setup(ctx=ctx, inputs=args, output=output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        operator = ctx.graphopt_operator
        needs_input_grad = ctx.needs_input_grad
        try:
            ctx.needs_input_grad = operator.nest(needs_input_grad[1:])
            return (None, *operator.flatten(operator.backward(ctx, *grads)))
        finally:
            ctx.needs_input_grad = needs_input_grad


def _operator(node: Node) -> _Operator | None:
    """The parts of the operator that a node calls, if it has a backward and the node says all arguments by position."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "graphopt" or node.kwargs:
        return None
    parts = _compat.custom_op_parts(target)
    if parts is None or len(node.args) != len(target._schema.arguments):
        return None
    takes_tensors = ("List[Tensor]", "List[Optional[Tensor]]")
    sizes = tuple(
        len(argument) if str(declared.type) in takes_tensors and isinstance(argument, list | tuple) else -1
        for declared, argument in zip(target._schema.arguments, node.args, strict=True)
    )
    return _Operator(*parts, sizes)
