"""What each region of a streamed graph takes and gives, prepared once, so that a call has only to look it up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphopt.aliasing import root_of, written_arguments
from graphopt.annotations import Key
from graphopt.capture import CapturedGraph, InputKind
from graphopt.regions import Region, find_differentiable, held, origins
from graphopt.runtime.streaming.micro_batches import expression_of

aten = torch.ops.aten

# Operators that write to arguments although their schemas do not say so: position of the first, how many, and of the switch.
_WRITES_STATISTICS = {aten.batch_norm.default: (3, 2, 5), aten.instance_norm.default: (3, 2, 5)}


@dataclass(frozen=True)
class Parameter:
    """The value of the graph's input at ``position``, from the store."""

    position: int


@dataclass(frozen=True)
class Companion:
    """A leaf of the shape of the parameter at ``position``, which receives one statistic."""

    position: int
    key: Key[Any]
    num_samples: sympy.Expr


@dataclass(frozen=True)
class Argument:
    """The graph's input at ``position``, as it was passed; ``name`` is that of its node."""

    position: int
    name: str
    is_written: bool = False


@dataclass(frozen=True)
class Value:
    """What an earlier stage has computed."""

    name: str


@dataclass(frozen=True)
class Size:
    """A number that follows from the sizes of the inputs."""

    expression: sympy.Expr


@dataclass(frozen=True)
class Constant:
    """A tensor that the graph holds."""

    value: Tensor


Source = Parameter | Companion | Argument | Value | Size | Constant


@dataclass
class Stage:
    """One region, ready to be run.

    Attributes:
        index: its number.
        layer: its name.
        function: compiled forward and backward.
        sources: where its inputs come from, in order.
        fakes: a fake value for each input.
        outputs: names of the values that it returns.
        parameters: positions of the parameters that it reads.
        is_whole: whether it takes the whole batch.
        is_random: whether it draws random numbers.
        last_uses: values that no later stage reads.
    """

    index: int
    layer: str
    function: Callable[..., Sequence[Any]]
    sources: list[Source]
    fakes: list[Any]
    outputs: list[str]
    parameters: list[int]
    is_whole: bool
    is_random: bool
    last_uses: list[str] = field(default_factory=list)

    @property
    def values(self) -> list[str]:
        """Names of the values of earlier stages that it reads."""
        return [source.name for source in self.sources if isinstance(source, Value)]


def prepare(
    graph: CapturedGraph, regions: Sequence[Region], compiled: Mapping[str, Callable[..., Any]]
) -> tuple[list[Stage], list[Source | Any]]:
    """The stages, and where what the graph returns comes from."""
    origin = origins(graph.graph_module.graph)
    positions = {node: position for position, node in enumerate(graph.placeholders)}
    written = _written_inputs(graph, origin)
    whole = {} if graph.micro_batches is None else graph.micro_batches.whole
    stages = []
    for region in regions:
        sources = [_source(graph, node, positions, written) for node in region.inputs]
        nodes = [node for node in region.graph_module.graph.nodes if node.op == "call_function"]
        stages.append(
            Stage(
                index=region.stage,
                layer=region.layer,
                function=compiled[region.structure],
                sources=sources,
                fakes=region.fake_inputs,
                outputs=[node.name for node in region.outputs],
                parameters=list(dict.fromkeys(s.position for s in sources if isinstance(s, Parameter))),
                is_whole=graph.micro_batches is None or region.stage in whole,
                is_random=any(_draws(node) for node in nodes),
            )
        )
    returned: list[Source | Any] = []
    for value in graph.output_nodes:
        source = _source(graph, origin[value], positions, written) if isinstance(value, Node) else value
        returned.append(source)
    kept = {source.name for source in returned if isinstance(source, Value)}
    for stage in reversed(stages):
        names = dict.fromkeys([*stage.values, *stage.outputs])
        stage.last_uses = [name for name in names if name not in kept]
        kept.update(names)
    return stages, returned


def differentiable_names(graph: CapturedGraph) -> set[str]:
    """Names of the values that gradients may flow to."""
    return {node.name for node in find_differentiable(graph)}


def _source(graph: CapturedGraph, node: Node, positions: Mapping[Node, int], written: set[Node]) -> Source:
    value = node.meta.get("val")
    if node in positions:
        position = positions[node]
        described = graph.inputs[position]
        if described.kind is InputKind.PARAMETER:
            return Parameter(position)
        if described.kind is InputKind.COMPANION:
            assert described.companion_of is not None
            assert described.annotation is not None
            return Companion(described.companion_of, described.annotation, described.num_samples)
        if described.kind is InputKind.SIZE and isinstance(graph.fake_inputs[position], torch.SymInt):
            return Size(expression_of(graph.fake_inputs[position]))
        return Argument(position, node.name, node in written)
    if node.op == "get_attr":
        return Constant(held(graph.graph_module, node))
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return Size(expression_of(value))
    return Value(node.name)


def _written_inputs(graph: CapturedGraph, origin: Mapping[Node, Node]) -> set[Node]:
    """The inputs that operators write to: buffers, mostly."""
    found: set[Node] = set()
    for node in graph.graph_module.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        targets: list[Any] = written_arguments(node)
        if node.target in _WRITES_STATISTICS:
            first, count, switch = _WRITES_STATISTICS[node.target]
            if node.args[switch]:
                targets += node.args[first : first + count]
        roots = [origin[root_of(target)] for target in targets if isinstance(target, Node)]
        found.update(root for root in roots if root.op == "placeholder")
    return found


def _draws(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
