"""Serve parameters by `ops.collect`: their per-sample gradients are made in one place, a slice of samples at a time.

For parameters whose per-sample gradients would not fit into memory all at once, and for operators that no rule serves.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from graphopt import _compat
from graphopt.inspect.location import describe
from graphopt.passes.truegrad._registry import Declined, Refused
from graphopt.passes.truegrad.ops.collect import NAMES, compiled
from graphopt.passes.truegrad.sample_axis import Free, Layout, Lost, SampleAxis, shape_of

aten = torch.ops.aten

# Operators whose value for one sample depends on the others: a program for one sample cannot repeat them.
_ACROSS_SAMPLES = frozenset([aten.batch_norm.default, aten.instance_norm.default, aten.native_batch_norm.default])


@dataclass
class Program:
    """What several operators compute from parameters and operands, for one sample."""

    params: list[Node]
    text: str = ""
    operands: list[Node] = field(default_factory=list)


def collect_gradients(params: Sequence[Node], nodes: Sequence[Node], context: Any, max_bytes: int) -> Declined | None:
    """Rewrite ``nodes``, where ``params`` meet samples; nothing is changed if that is declined.

    Args:
        params: placeholders, none of which meets samples elsewhere.
        nodes: in the order of the graph.
        context: the rewriter.
        max_bytes: memory for per-sample gradients.
    """
    program = write_program(params, nodes, context.uses.params)
    if isinstance(program, Declined):
        return program
    values = [*nodes, *program.operands]
    for value in values:
        if not isinstance(value.meta["val"], Tensor):
            return Declined(f"{describe(value)} has several results")
        if isinstance(layout := context.layout(value), Lost):
            return Declined(f"samples meet in one of its operands: {layout.why}, at {describe(layout.node)}")
    try:
        sizes = [size for value in values for size in _sizes(value, context.editor)]
        grouping = [part for value in values for part in _grouping(context.layout(value), context.editor)]
    except ValueError as problem:
        return Declined(f"the size of one of its operands is not known beforehand ({problem})")
    if isinstance(refused := _try_on_one_sample(program, nodes, context), Declined):
        return refused
    _emit(program, nodes, context, sizes, grouping, max_bytes)
    return None


def write_program(params: Sequence[Node], nodes: Sequence[Node], depends: dict[Node, Any]) -> Program | Declined:
    """The program of ``nodes``, with everything between them and the parameters.

    Args:
        params: placeholders that the program differentiates.
        nodes: operators where they meet samples.
        depends: values that are computed from tracked parameters alone.
    """
    program, graph = Program(list(params)), Graph()
    copies: dict[Node, Node] = {param: graph.placeholder(f"p{index}") for index, param in enumerate(params)}
    steps = _steps(nodes, copies, depends)
    for step in [*steps, *nodes]:
        if isinstance(problem := _problem(step), str):
            return Declined(problem)
        for argument in step.all_input_nodes:
            if argument not in copies and argument not in steps:
                if not isinstance(argument.meta.get("val"), Tensor):
                    return Declined(f"{describe(step)} has an argument that depends on the number of samples")
                program.operands.append(argument)
                copies[argument] = graph.placeholder(f"o{len(program.operands) - 1}")
    outputs = []
    for step in [*steps, *nodes]:
        copied = graph.call_function(
            cast(Any, step.target), *torch.fx.map_arg((step.args, step.kwargs), copies.__getitem__)
        )
        if step in nodes:
            outputs.append(copied)
        else:
            copies[step] = copied
    graph.output(outputs)
    code = graph.python_code("self")
    always_there = {"fx_pytree", "pytree"}
    if unknown := set(code.globals) - NAMES.keys() - always_there:
        return Declined(f"its source names {sorted(unknown)}")
    program.text = code.src
    return program


def _try_on_one_sample(program: Program, nodes: Sequence[Node], context: Any) -> Declined | None:
    """Run the program on fake tensors: a parameter, or a constant, with rows for the samples would not fit one of them."""

    def one(value: Node) -> Tensor:
        fake, layout = value.meta["val"], context.layout(value)
        shape = [context.hint(size) for size in shape_of(fake)]
        if isinstance(layout, SampleAxis):
            shape[layout.axis] = context.hint(layout.outer * layout.inner)
        return torch.empty(shape, dtype=fake.dtype, device=fake.device)

    with _compat.FakeTensorMode(), _compat.quiet_fake_tensors():
        expected = [one(node) for node in nodes]
        try:
            found = compiled(program.text)(None, *map(one, [*program.params, *program.operands]))
        except Exception as error:
            why = str(error).splitlines()[0] if str(error) else "no text"
            return Refused(
                f"{describe(nodes[0])} cannot be computed for one sample alone ({type(error).__name__}: {why})"
            )
    for node, own, wanted in zip(nodes, found, expected, strict=True):
        if own.shape != wanted.shape:
            return Refused(
                f"{describe(node)} gives {tuple(own.shape)} for one sample instead of {tuple(wanted.shape)}: a parameter or a "
                "constant in it has rows for the samples of one batch size"
            )
        if own.dtype != wanted.dtype:
            return Refused(f"{describe(node)} gives {own.dtype} for one sample instead of {wanted.dtype}")
    return None


def _emit(
    program: Program, nodes: Sequence[Node], context: Any, sizes: list[Any], grouping: list[Any], max_bytes: int
) -> None:
    """Put the program in front of its first operator, and deliveries behind all of them."""
    editor = context.editor
    values = [*nodes, *program.operands]
    num = context.sample_axis(nodes[0]).num
    dtypes = ",".join(str(value.meta["val"].dtype).removeprefix("torch.") for value in values)
    companions = [companion for param in program.params for companion in context.companions(param)]
    with editor.before(nodes[0]):
        tail = (sizes, dtypes, grouping, len(nodes), editor.size(num), max_bytes)
        slots = editor.call(
            torch.ops.graphopt.collect.default, program.params, companions, context.wanted, program.text, *tail
        )
        taken = [editor.call(operator.getitem, slots, index) for index in range(len(values))]
    now = {operand: operand for operand in program.operands}  # what stands for an operand that was replaced meanwhile
    waiting = list(program.operands)
    for index, node in enumerate(nodes):
        own = [o for o in waiting if now[o] in node.all_input_nodes or index == len(nodes) - 1]
        waiting = [o for o in waiting if o not in own]
        with editor.before(node):
            args, kwargs = torch.fx.map_arg(
                (node.args, node.kwargs), lambda a: editor.detached(a) if a in context.uses.params else a
            )
            value = editor.call(cast(Any, node.target), *args, **kwargs)
            places = [taken[index], *(taken[len(nodes) + program.operands.index(operand)] for operand in own)]
            sent = [editor.detached(now[operand]) for operand in own]
            new = editor.call(torch.ops.graphopt.deliver.default, value, places, sent)
        context.replace(node, new)
        editor.graph.erase_node(node)
        if node in now:
            now[node] = new


def _steps(nodes: Sequence[Node], known: dict[Node, Node], depends: dict[Node, Any]) -> list[Node]:
    """What lies between the parameters and the operators, in the order of the graph."""
    found: set[Node] = set()
    waiting = [argument for node in nodes for argument in node.all_input_nodes]
    while waiting:
        current = waiting.pop()
        if current in depends and current not in known and current not in found:
            found.add(current)
            waiting += current.all_input_nodes
    return [node for node in nodes[0].graph.nodes if node in found]


def _problem(node: Node) -> str | None:
    """Why an operator cannot be repeated for one sample."""
    target = node.target
    if target is operator.getitem:
        return None
    if node.op == "placeholder":
        return f"it is used together with {node.name}, which cannot be served"
    if not isinstance(target, torch._ops.OpOverload):
        return f"{describe(node)} is not an operator"
    if target in _ACROSS_SAMPLES:
        return f"{describe(node)} depends on all samples"
    if target._schema.is_mutable:
        return f"{describe(node)} writes in place"
    random = torch.Tag.nondeterministic_seeded in target.tags
    if random and not (target is aten.scaled_dot_product_attention.default and not _dropout(node)):
        return f"{describe(node)} draws random numbers"
    return None


def _dropout(node: Node) -> Any:
    return node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)


def _sizes(value: Node, editor: Any) -> list[Any]:
    shape = shape_of(value.meta["val"])
    return [len(shape), *(editor.size(size) for size in shape)]


def _grouping(layout: Layout, editor: Any) -> list[Any]:
    if isinstance(layout, SampleAxis):
        outer, _, inner = editor.rows(layout)
        return [layout.axis, outer, inner]
    assert isinstance(layout, Free), layout
    return [-1, 1, 1]
