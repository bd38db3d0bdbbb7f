"""Graph surgery: insert operators with their fake values, replay views, inline traced functions."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphopt import _compat
from graphopt.annotations import SAMPLE_GRAD_NORM, SUM_GRAD_SQUARED, SUM_POSITION_GRAD_SQUARED, Key
from graphopt.capture import CapturedGraph, InputKind
from graphopt.passes.truegrad.ops.statistics import NORM, POSITION, SQUARE
from graphopt.passes.truegrad.sample_axis import SampleAxis, Size, shape_of, size_of

aten = torch.ops.aten

# What operators call the statistics that they compute (`graphopt.passes.truegrad.ops.statistics`).
OPERATOR_NAMES: dict[Key[Any], str] = {
    SUM_GRAD_SQUARED: SQUARE,
    SAMPLE_GRAD_NORM: NORM,
    SUM_POSITION_GRAD_SQUARED: POSITION,
}


class Editor:
    """Writes into one captured graph. Every node it makes has a fake value, and the place and tags of the node it serves."""

    def __init__(self, graph: CapturedGraph) -> None:
        self.captured = graph
        self.graph = graph.graph_module.graph
        self._last_placeholder = graph.placeholders[-1]
        self._serving: Node | None = None
        self._detached: dict[Node, Node] = {}
        self._sizes: dict[Any, Node | int] = {}

    @contextmanager
    def before(self, node: Node) -> Iterator[None]:
        """Insert in front of ``node``, on its behalf."""
        outer, self._serving = self._serving, node
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._serving = outer

    @contextmanager
    def after(self, node: Node) -> Iterator[None]:
        """Insert behind ``node``, on its behalf; behind all inputs if it is one."""
        following = self._last_placeholder.next if node.op == "placeholder" else node.next
        outer, self._serving = self._serving, node
        try:
            with self.graph.inserting_before(following):
                yield
        finally:
            self._serving = outer

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Insert a call; arguments may be nodes or values."""
        node = self.graph.call_function(target, args, kwargs)
        if self._serving is not None:
            node.meta = {
                k: v for k, v in self._serving.meta.items() if k not in ("val", "example_value", "tensor_meta")
            }
        values, keywords = torch.fx.map_arg((args, kwargs), lambda argument: argument.meta["val"])
        with self.captured.fake_mode, torch.no_grad(), _compat.enable_python_dispatcher():
            node.meta["val"] = target(*values, **keywords)
        return node

    def detached(self, node: Node) -> Node:
        """The node's value, cut from autograd."""
        if node not in self._detached:
            with self.after(node):
                self._detached[node] = self.call(aten.detach.default, node)
        return self._detached[node]

    def companion(self, param: Node, key: Key[Any], num_samples: Size) -> Node:
        """The companion input of a parameter that receives one statistic, added at its first use."""
        position = self.captured.placeholders.index(param)
        for node, described in zip(self.captured.placeholders, self.captured.inputs, strict=True):
            if described.companion_of == position and described.annotation is key:
                return node
        value = cast(Tensor, param.meta["val"])
        dtype = torch.promote_types(value.dtype, torch.float32)
        shape = [self._value(num_samples)] if key is SAMPLE_GRAD_NORM else value.shape
        with self.captured.fake_mode:
            leaf = torch.zeros((), dtype=dtype, device=value.device).expand(shape)
        name = f"{param.name}_{OPERATOR_NAMES[key]}"
        self._last_placeholder = self.captured.add_companion(position, key, name, leaf, num_samples)
        return self._last_placeholder

    def replay(self, root: Node, chain: Sequence[Node], start: Node) -> Node:
        """Apply to ``start`` the views that lead from ``root`` to the end of ``chain``; casts are left out."""
        value = start
        for step in chain:
            if step.target in CASTS:
                continue
            value = self.call(cast(Any, step.target), value, *step.args[1:], **step.kwargs)
        return value

    def rows(self, layout: SampleAxis) -> tuple[Node | int, Node | int, Node | int]:
        """``(outer, num, inner)`` as arguments of an operator."""
        return self.size(layout.outer), self.size(layout.num), self.size(layout.inner)

    def size(self, size: Size) -> Node | int:
        """An integer, or a node that computes the size from the sizes of the inputs, at the top of the graph."""
        if self.captured.fake_mode.shape_env is not None:
            size = self.captured.fake_mode.shape_env.replace(size)  # symbols that were found to be equal have one name
        if size.is_Integer:
            return int(cast(Any, size))
        if size not in self._sizes:
            self._sizes[size] = self._symbol(size) if size.is_Symbol else self._expression(size)
        return self._sizes[size]

    def _value(self, size: Size) -> Any:
        node = self.size(size)
        return node.meta["val"] if isinstance(node, Node) else node

    def inline(self, function: Callable[..., Any], *args: Node) -> Any:
        """Trace ``function`` over the nodes' values and insert what it does; returns nodes in the function's structure."""
        values = [argument.meta["val"] for argument in args]
        with self.captured.fake_mode, _compat.quiet_vmap():
            traced = _compat.make_fx(function)(*values)
        traced.graph.eliminate_dead_code()
        mapping: dict[Node, Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), args, strict=True))
        result: Any = None
        for node in traced.graph.nodes:
            if node.op == "output":
                result = torch.fx.map_arg(node.args[0], mapping.__getitem__)
            elif node.op == "call_function":
                copied = self.graph.node_copy(node, mapping.__getitem__)
                keep = self._serving.meta if self._serving is not None else {}
                copied.meta = {**{k: v for k, v in keep.items() if k != "val"}, "val": node.meta.get("val")}
                mapping[node] = copied
            elif node.op == "get_attr":
                raise NotImplementedError(f"a constant tensor {node.target} in a traced rule")
        return result

    def _symbol(self, symbol: Size) -> Node | int:
        for position, (node, fake) in enumerate(
            zip(self.captured.placeholders, self.captured.fake_inputs, strict=True)
        ):
            if self.captured.inputs[position].kind is InputKind.COMPANION:
                continue
            if isinstance(fake, torch.SymInt) and size_of(fake) == symbol:
                return node
            for axis, size in enumerate(shape_of(fake) if isinstance(fake, Tensor) else ()):
                if size == symbol:
                    with self.after(node):
                        return self.call(aten.sym_size.int, node, axis)
        raise ValueError(f"no input has the size {symbol}")

    def _expression(self, size: Size) -> Node | int:
        """Sums and products of symbols."""
        parts = [self.size(cast(Size, part)) for part in size.args]
        function = {sympy.Mul: operator.mul, sympy.Add: operator.add}.get(size.func)
        if function is None:
            raise ValueError(f"cannot compute the size {size}")
        nodes = [part for part in parts if isinstance(part, Node)]
        order = {node: index for index, node in enumerate(self.graph.nodes)}
        latest = max(nodes, key=order.__getitem__)
        result = parts[0]
        with self.after(latest):
            for part in parts[1:]:
                result = self.call(function, result, part)
        return result


CASTS = frozenset([aten._to_copy.default, aten.to.dtype, aten.to.other, aten.type_as.default, aten.clone.default])
