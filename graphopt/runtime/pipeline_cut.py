"""Cut a captured graph into the graphs of pipeline stages: what each computes, what travels between them, who owns what."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.capture import CapturedGraph, Input, InputKind
from graphopt.compilation import compile_graph
from graphopt.dry_run import DryGraph, dry_run
from graphopt.errors import OptionError, UnsupportedError
from graphopt.passes import LayerToLayer
from graphopt.passes.layer_to_layer.layers import Boundaries, find_layers, parameters_of
from graphopt.passes.layer_to_layer.segments import Segment, arrange
from graphopt.passes.layer_to_layer.sizes import bytes_of, fit_for_streaming
from graphopt.passes.layer_to_layer.writes import without_shared_writes
from graphopt.regions import BOUNDARY, find_differentiable, origins, stages_of
from graphopt.runtime.bound_graph import BoundGraph
from graphopt.runtime.stage_module import (
    Argument,
    Computed,
    Fixed,
    Own,
    Received,
    Source,
    StageLayout,
    StageModule,
    Wire,
    flat_arguments,
)
from graphopt.transform import Setup

aten = torch.ops.aten
_WRITES_BUFFERS = (aten.batch_norm.default, aten.instance_norm.default)  # although their schemas do not say so


class PipelineCut:
    """A model's graph, and which of its layers belong to which stage.

    Attributes:
        graph: with boundaries between the layers.
        groups: the layers of each stage, and what lies between them.
        wires: what enters each stage, and, behind the last, what the model returns.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        num_stages: int,
        setup: Setup,
        boundaries: Boundaries,
        device: torch.device,
    ) -> None:
        self._model, self._device, self._name = model, device, type(model).__name__
        self._setup, boundaries = _without_layer_to_layer(setup, boundaries)
        run = dry_run(
            model,
            args,
            kwargs,
            self._setup,
            cannot="be captured in one graph",
            instead="Remove what breaks the graph (TORCH_LOGS=graph_breaks shows where it is)",
            is_whole=True,
            device=device,
        )
        if not run.graphs:
            raise UnsupportedError(f"{self._name} computes nothing that could be cut into stages")
        captured = run.graphs[-1]
        if captured.graph is None:
            reasons = sorted({row.reason for row in captured.record.uncaptured}) or ["it has no form in ATen"]
            raise UnsupportedError(f"{self._name} cannot be captured: {'; '.join(reasons)}")
        self.graph = captured.graph.copy()
        found = fit_for_streaming(self.graph, find_layers(self.graph, boundaries))
        found = without_shared_writes(self.graph, found)
        if len(found) < num_stages:
            raise OptionError(
                f"num_stages={num_stages}, but {self._name} has {len(found)} layers and parts between them "
                f"({', '.join(segment.name for segment in found)}). Use at most {len(found)} stages, or say where smaller layers "
                "begin: boundaries="
            )
        self.groups = _balanced(self.graph, found, num_stages)
        arrange(self.graph, found)
        arguments = flat_arguments(run.arguments)
        self._examples = {
            path: torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value
            for path, value in arguments.items()
        }
        self._sources = _sources_of(self.graph, captured, run.model, arguments)
        self._origin = origins(self.graph.graph_module.graph)
        self._differentiable = find_differentiable(self.graph)
        self._nodes = list(_by_stage(self.graph, self.groups))
        self._home = {node: stage for stage, nodes in enumerate(self._nodes) for node in nodes}
        returned = self._returned(captured, run.result)
        self._producer, last_use = self._lives(returned)
        self._meaning = _meanings(self.graph, self._origin)
        # By what they mean, since passes need not insert their nodes in the same order in every process.
        order = [node for node in self.graph.graph_module.graph.nodes if node in self._producer]
        order.sort(key=lambda node: self._meaning[node])
        self.wires = [
            [node for node in order if self._producer[node] < stage <= last_use[node]] for stage in range(num_stages)
        ]
        self.wires.append(returned)

    def describe(self) -> list[str]:
        """A line for each stage: the same on ranks that cut the same model in the same way."""
        lines = []
        for group, entering, nodes in zip(self.groups, self.wires, self._nodes, strict=False):
            computed = sorted(self._meaning[node] for node in self._computing(nodes))
            received = [self._meaning[node] for node in entering]
            digest = hashlib.sha256(repr((computed, received)).encode()).hexdigest()[:8]
            looks = ", ".join(self._wire(node).look for node in entering) or "nothing"
            lines.append(f"{', '.join(s.name for s in group)}; receives {looks}; graph {digest}")
        return lines

    def stage(self, index: int) -> StageModule:
        """Compile one group of layers, and move what it owns to its device."""
        graph, sources, results = self._extract(index)
        setup, stages = self._setup, stages_of(graph)
        names = dict(self._owned(index))
        for tensor in names.values():
            if not tensor.is_meta and tensor.device != self._device:
                tensor.data = tensor.data.to(self._device)
        layout = StageLayout(
            index=index,
            num_stages=len(self.groups),
            layers=[segment.name for segment in self.groups[index]],
            sources=sources,
            results=results,
            received=[self._wire(node) for node in self.wires[index]],
            sent=[self._wire(node) for node in self.wires[index + 1]],
            returns_one=len(self.wires[-1]) == 1,
            examples=self._examples if index == 0 else {},
            is_training=self._model.training,
            device=self._device,
            signature=inspect.signature(self._model.forward),
        )
        bound = BoundGraph(
            graph,
            lambda: compile_graph(graph, setup.compiler, setup.passes, setup.config),
            name_call=lambda: f"stage {index}",
            stages=stages,
        )
        return StageModule(layout, bound, names, _non_persistent(self._model))

    def _returned(self, captured: DryGraph, result: Any) -> list[Node]:
        """The nodes of the tensors in what the model returns."""
        outputs = dict(zip(map(id, captured.outputs), self.graph.output_nodes, strict=True))
        inputs = dict(zip(map(id, captured.inputs), self.graph.placeholders, strict=False))
        tensors = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
        nodes = [outputs.get(id(value), inputs.get(id(value))) for value in tensors]
        if not nodes or not all(isinstance(node, Node) for node in nodes):
            what = "no tensor" if not nodes else "a tensor that is not computed in its graph"
            raise UnsupportedError(
                f"{self._name} returns a {type(result).__name__} with {what} in it, and the last stage has nothing else to "
                "return. Let forward return a tensor that it computes, or a tuple of them"
            )
        return [self._origin[node] for node in nodes if isinstance(node, Node)]

    def _lives(self, returned: Sequence[Node]) -> tuple[dict[Node, int], dict[Node, int]]:
        """For what may travel, the stage that has it first; for everything, the last stage that reads it."""
        uses: dict[Node, set[int]] = defaultdict(set)
        for stage, nodes in enumerate(self._nodes):
            for node in self._computing(nodes):
                for argument in node.all_input_nodes:
                    uses[self._origin[argument]].add(stage)
        for node in returned:
            uses[node].add(len(self.groups) - 1)
        self._refuse_split_companions(uses)
        inputs = zip(self.graph.placeholders, self.graph.inputs, strict=True)
        kinds = {node: described.kind for node, described in inputs}
        producer: dict[Node, int] = {}
        for node, stages in uses.items():
            source = self._sources.get(node)
            if node in self._home:
                if not _is_number(node.meta.get("val")):
                    producer[node] = self._home[node]
            elif isinstance(source, Argument):
                producer[node] = 0
            elif isinstance(source, Own) and kinds[node] is InputKind.PARAMETER:
                producer[node] = min(stages)
            elif len(stages) > 1 and any(_may_write(user) for user in node.users):
                raise UnsupportedError(
                    f"{getattr(source, 'name', node.name)} of {self._name} is written by layers of the stages {sorted(stages)}, "
                    "and each would change a copy of its own. Use fewer stages, or boundaries= that keep these layers together"
                )
        return producer, {node: max(stages) for node, stages in uses.items()}

    def _refuse_split_companions(self, uses: Mapping[Node, set[int]]) -> None:
        placeholders = self.graph.placeholders
        for node, described in zip(placeholders, self.graph.inputs, strict=True):
            if described.companion_of is None or described.annotation is None:
                continue
            stages = uses.get(node, set()) | uses.get(placeholders[described.companion_of], set())
            if len(stages) > 1:
                name = self.graph.inputs[described.companion_of].name
                raise UnsupportedError(
                    f"{name} of {self._name} is used in the stages {sorted(stages)}, and {described.annotation.name} needs all "
                    "uses of a parameter in one. Give the other layers a parameter of their own (untie it), or leave it out: "
                    f"TrueGrad(where=lambda name, parameter: name != {name!r}), or use fewer stages"
                )

    def _extract(self, index: int) -> tuple[CapturedGraph, list[Source], list[Source]]:
        """One stage as a graph of its own, where its inputs come from, and where what it sends comes from."""
        nodes, entering, leaving = self._nodes[index], self.wires[index], self.wires[index + 1]
        read = dict.fromkeys(
            self._origin[argument] for node in self._computing(nodes) for argument in node.all_input_nodes
        )
        extracted = Graph()
        copies: dict[Node, Node] = {}
        inputs: list[Input] = []
        fakes: list[Any] = []
        sources: list[Source] = []

        def add(described: Input, fake: Any, source: Source | None, node: Node | None = None) -> None:
            copied = extracted.placeholder(f"size_{described.name}" if node is None else node.name)
            copied.meta = {**(node.meta if node is not None else {}), "val": fake}
            if node is not None:
                copies[node] = copied
            inputs.append(described)
            fakes.append(fake)
            if source is not None:
                sources.append(source)

        positions: dict[int, int] = {}
        companions: list[tuple[Node, Input, Any]] = []
        for position, node in enumerate(self.graph.placeholders):
            described, fake = self.graph.inputs[position], self.graph.fake_inputs[position]
            if node not in read or node in entering:
                continue
            if described.kind is InputKind.COMPANION:
                companions.append((node, described, fake))
            else:
                positions[position] = len(inputs)
                add(described, fake, self._sources[node], node)
        for position, node in enumerate(entering):
            fake = self._received_fake(node)
            add(Input(InputKind.BETWEEN, node.name, requires_grad=fake.requires_grad), fake, Received(position), node)
        for node in read:
            if node not in copies and _is_number(node.meta.get("val")) and self._home.get(node) != index:
                add(Input(InputKind.SIZE, node.name), node.meta["val"], Fixed(self._value_of(node)), node)
        for symbol in sorted(self._counted(companions), key=str):
            size = self._shape_env.create_symintnode(symbol, hint=_compat.size_hint(self._shape_env, symbol))
            add(Input(InputKind.SIZE, str(symbol)), size, Fixed(_hint(size)))
        for node, described, fake in companions:
            assert described.companion_of is not None
            add(dataclasses.replace(described, companion_of=positions[described.companion_of]), fake, None, node)
        for node in read:
            if node.op == "get_attr":
                copies[node] = extracted.node_copy(node)
        for node in nodes:
            copies[node] = extracted.node_copy(node, lambda argument: copies[argument])
        computed = [node for node in dict.fromkeys(leaving) if self._home.get(node) == index]
        extracted.output([copies[node] for node in computed])
        results = [
            Computed(computed.index(node))
            if self._home.get(node) == index
            else Received(entering.index(node))
            if node in entering
            else self._sources[node]
            for node in leaving
        ]
        module = GraphModule(self.graph.graph_module, extracted)
        stage = CapturedGraph(module, inputs, fakes, self.graph.fake_mode, self.graph.grad_enabled)
        return stage, sources, results

    def _computing(self, nodes: Sequence[Node]) -> Iterator[Node]:
        """Without boundaries, and without what they hand through."""
        return (node for node in nodes if node.target is not BOUNDARY and self._origin[node] is node)

    def _received_fake(self, node: Node) -> Tensor:
        """What arrives is contiguous, whatever was sent, and begins an autograd graph."""
        fake = node.meta["val"]
        with self.graph.fake_mode, torch.no_grad():
            whole = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
        return whole.requires_grad_(self._wire(node).requires_grad)

    def _wire(self, node: Node) -> Wire:
        fake = node.meta["val"]
        floating = fake.is_floating_point() or fake.is_complex()
        shape = tuple(_hint(size) for size in fake.shape)
        return Wire(node.name, shape, fake.dtype, floating and node in self._differentiable)

    def _value_of(self, node: Node) -> Any:
        value = _hint(node.meta["val"])
        if value is None:
            raise UnsupportedError(
                f"a number that {self._name} computes from values ({node.name}) is used in another stage; only tensors and sizes "
                "travel between stages. Use boundaries= that keep these layers together"
            )
        return value

    @property
    def _shape_env(self) -> Any:
        return self.graph.fake_mode.shape_env

    def _counted(self, companions: Sequence[tuple[Node, Input, Any]]) -> set[sympy.Symbol]:
        """The symbols in the numbers of samples that companions need."""
        resolve = (lambda size: size) if self._shape_env is None else self._shape_env.replace
        return {symbol for _, described, _ in companions for symbol in resolve(described.num_samples).free_symbols}

    def _owned(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """All names of the parameters and buffers of a stage; what no stage uses stays with the last."""
        own: dict[str, set[int]] = defaultdict(set)
        for stage, nodes in enumerate(self._nodes):
            for node in self._computing(nodes):
                for argument in node.all_input_nodes:
                    source = self._sources.get(argument)
                    if isinstance(source, Own):
                        own[source.name].add(self._producer.get(argument, stage))
        model = self._model
        named = list(
            itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        )
        first: dict[int, str] = {}
        for name, tensor in named:
            first.setdefault(id(tensor), name)
        last, passing = len(self.groups) - 1, _non_persistent(model)
        for name, tensor in named:
            stages = own.get(first[id(tensor)]) or (set() if name in passing else {last})
            if index in stages:
                yield name, tensor


def _without_layer_to_layer(setup: Setup, boundaries: Boundaries) -> tuple[Setup, Boundaries]:
    """The stages are cut here; what the pass was told about boundaries counts."""
    passes = tuple(item for item in setup.passes if not isinstance(item, LayerToLayer))
    for item in setup.passes:
        if isinstance(item, LayerToLayer):
            if item.streaming is not None:
                raise OptionError(
                    f"LayerToLayer(store={item.store!r}) streams the layers of a whole model, and a pipeline's stage is a part "
                    "of one. Use LayerToLayer() without store, or no pipeline"
                )
            boundaries = item.boundaries if boundaries == "auto" else boundaries
    return dataclasses.replace(setup, passes=passes), boundaries


def _balanced(graph: CapturedGraph, found: Sequence[Segment], num_stages: int) -> list[list[Segment]]:
    """Consecutive groups, with the least sum of squared bytes of parameters."""
    seen: set[Node] = set()
    bytes_up_to = [0]
    for segment in found:
        new = [node for node in parameters_of(graph, segment) if node not in seen]
        seen.update(new)
        bytes_up_to.append(bytes_up_to[-1] + sum(bytes_of(node.meta["val"]) for node in new))
    # Number of segments so far -> cost, and where the groups begin and end.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for stage in range(num_stages):
        ends = range(stage + 1, len(found) - (num_stages - stage - 1) + 1)
        best = {
            end: min(
                (cost + (bytes_up_to[end] - bytes_up_to[start]) ** 2, [*cuts, end])
                for start, (cost, cuts) in best.items()
                if start < end
            )
            for end in ends
        }
    cuts = best[len(found)][1]
    return [list(found[start:end]) for start, end in itertools.pairwise(cuts)]


def _by_stage(graph: CapturedGraph, groups: Sequence[Sequence[Segment]]) -> Iterator[list[Node]]:
    """The nodes of each stage in order: operators, boundaries and what they hand through."""
    stage_of = [stage for stage, group in enumerate(groups) for _ in group]
    nodes: list[list[Node]] = [[] for _ in groups]
    current = 0
    for node in graph.graph_module.graph.nodes:
        if node.target is BOUNDARY:
            current = stage_of[node.args[1]]
        if node.op not in ("placeholder", "get_attr", "output"):
            nodes[current].append(node)
    yield from nodes


def _meanings(graph: CapturedGraph, origin: Mapping[Node, Node]) -> dict[Node, str]:
    """For each node a hash of what it computes, in terms of the graph's inputs; the same in every process."""
    found: dict[Node, str] = {}
    described = dict(zip(graph.placeholders, graph.inputs, strict=True))
    for node in graph.graph_module.graph.nodes:
        if node in described:
            item = described[node]
            row: Any = (item.name, item.kind.value, item.annotation and item.annotation.name)
        else:
            refer = torch.fx.map_arg((node.args, node.kwargs), lambda argument: found[origin[argument]])
            row = (node.op, str(node.target), repr(refer))
        found[node] = hashlib.sha256(repr(row).encode()).hexdigest()
    return found


def _sources_of(
    graph: CapturedGraph, captured: DryGraph, model: nn.Module, arguments: Mapping[str, Any]
) -> dict[Node, Source]:
    """Where the inputs of the whole graph come from; those that passes have added are bound by the runtime.

    Raises:
        UnsupportedError: a tensor that nobody could hand to a stage.
    """
    names = {id(tensor): name for name, tensor in itertools.chain(model.named_buffers(), model.named_parameters())}
    paths: dict[int, str] = {}
    for path, value in arguments.items():
        paths.setdefault(id(value), path)
    found: dict[Node, Source] = {}
    for node, described, value in zip(graph.placeholders, graph.inputs, captured.inputs, strict=False):
        if not isinstance(value, Tensor):
            found[node] = Fixed(_hint(value))
        elif id(value) in names:
            found[node] = Own(names[id(value)])
        elif id(value) in paths:
            found[node] = Argument(paths[id(value)])
        elif described.kind is InputKind.BUFFER and not value.is_meta:
            found[node] = Fixed(value)
        else:
            raise UnsupportedError(
                f"{type(model).__name__} uses the tensor {described.name}, which is no parameter or buffer of it and not found "
                "in its arguments. Register it (register_buffer), or pass it as it is, or in tuples, lists and dicts"
            )
    return found


def _non_persistent(model: nn.Module) -> set[str]:
    """Names of the buffers that are not in the model's state dict."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def _may_write(node: Node) -> bool:
    target = node.target
    return target in _WRITES_BUFFERS or (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _hint(value: Any) -> Any:
    """What a size was when the graph was captured."""
    if isinstance(value, torch.SymInt):
        return _compat.size_hint(value.node.shape_env, value.node.expr) if value.node.has_hint() else None
    return value.node.hint if isinstance(value, torch.SymFloat | torch.SymBool) else value
