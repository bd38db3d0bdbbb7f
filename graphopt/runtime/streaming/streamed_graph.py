"""A compiled graph as Dynamo calls it, run layer by layer from a store."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.annotations import STAGE, Stage, attach, expose
from graphopt.capture import CapturedGraph, InputKind, set_sample_axis
from graphopt.regions import MicroBatches, Region, Rows
from graphopt.runtime.bound_graph import BoundGraph
from graphopt.runtime.streaming.micro_batches import read_sizes
from graphopt.runtime.streaming.run import Run
from graphopt.runtime.streaming.stages import Argument, Value, differentiable_names, prepare
from graphopt.runtime.streaming.stages import Stage as Prepared
from graphopt.runtime.streaming.stream import Stream


class StreamedGraph:
    """Callable that Dynamo runs in place of the graph it captured.

    Attributes:
        stream: of the model.
        stages: in order.
        returned: where what the graph returns comes from.
        rows: how values are cut at samples, by the names of their nodes.
        differentiable: names of the values that gradients may flow to.
        parameters: positions of the parameters among the inputs.
        written: positions of the inputs that the graph writes to, such as buffers.
        last_stage_of: for each of them the stage that backward reaches last.
    """

    def __init__(
        self,
        graph: CapturedGraph,
        regions: Sequence[Region],
        compiled: Mapping[str, Callable[..., Any]],
        stream: Stream,
        stages: Mapping[int, Stage],
    ) -> None:
        self.stream = stream
        shape_env = graph.fake_mode.shape_env  # compilers rename symbols
        resolve = (lambda size: size) if shape_env is None else shape_env.replace
        batches = graph.micro_batches or MicroBatches({}, {})
        self.rows = {name: Rows(rows.axis, resolve(rows.inner)) for name, rows in batches.rows.items()}
        self.symbols = frozenset(found for symbol in batches.symbols if (found := resolve(symbol)).is_Symbol)
        self.differentiable = differentiable_names(graph)
        self.read_sizes = read_sizes(graph)
        self.stages, self.returned = prepare(graph, regions, compiled)
        self.num_samples = {
            described.companion_of: resolve(described.num_samples)
            for described in graph.inputs
            if described.kind is InputKind.COMPANION and described.companion_of is not None
        }
        self.parameters = [
            position for position, described in enumerate(graph.inputs) if described.kind is InputKind.PARAMETER
        ]
        self.written = {
            source.position
            for stage in self.stages
            for source in stage.sources
            if isinstance(source, Argument) and source.is_written
        }
        self.last_stage_of = {  # the last in backward
            position: stage.index
            for stage in reversed(self.stages)
            if self.matters(stage)
            for position in stage.parameters
        }
        self._grad_enabled = graph.grad_enabled
        self._owners = dict(stages)
        self._output_axes = graph.output_sample_axes
        self._is_new = True
        expose()

    def matters(self, prepared: Prepared) -> bool:
        """Whether backward goes through a stage."""
        return any(name in self.differentiable for name in prepared.outputs)

    def __call__(self, *args: Any) -> list[Any]:
        """Run the graph on Dynamo's flat arguments."""
        BoundGraph.num_calls += 1
        if self._is_new:  # what tracing the whole model has left, before memory is taken for its layers
            self._is_new = False
            gc.collect()
            _compat.return_freed_memory()
        for position, stage in self._owners.items():
            attach(args[position], STAGE, stage)
        needs_grad = torch.is_grad_enabled() and self._grad_enabled and any(_requires_grad(value) for value in args)
        self.stream.check()
        run = Run(self, args, keeps=needs_grad)
        if needs_grad:
            self.stream.begin_forward(run)
        with _compat.disable_autocast():
            outputs = self._differentiable(run) if needs_grad else run.forward()
        if self._output_axes is not None:
            for value, axis in zip(outputs, self._output_axes, strict=True):
                if isinstance(value, Tensor):
                    set_sample_axis(value, axis)
        return outputs

    def _differentiable(self, run: Run) -> list[Any]:
        entering = [
            position
            for position, value in enumerate(run.args)
            if position not in set(self.parameters) and _requires_grad(value)
        ]
        computed: dict[str, int] = {}
        for source in self.returned:
            if isinstance(source, Value):
                computed.setdefault(source.name, len(computed))
        passed: list[Any] = []
        tensors = [run.args[position] for position in entering]
        found = cast(Any, _Streamed).apply(run, list(computed), entering, passed, *tensors, _token())
        return [
            found[computed[source.name]] if isinstance(source, Value) else other
            for source, other in zip(self.returned, passed, strict=True)
        ]


class _Streamed(torch.autograd.Function):
    """Connects a run with autograd's graph: one node for all stages."""

    @staticmethod
    def forward(
        ctx: Any, run: Run, names: list[str], entering: list[int], passed: list[Any], *tensors: Tensor
    ) -> tuple[Any, ...]:
        outputs = run.forward()
        passed.extend(outputs)
        of = {
            source.name: value
            for source, value in zip(run.graph.returned, outputs, strict=True)
            if isinstance(source, Value)
        }
        found = tuple(of[name] for name in names)
        ctx.run, ctx.names, ctx.entering = run, names, entering
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(
                value
                for name, value in zip(names, found, strict=True)
                if isinstance(value, Tensor) and name not in run.graph.differentiable
            )
        )
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        cotangents = {name: grad for name, grad in zip(ctx.names, grads, strict=True) if grad is not None}
        found = ctx.run.backward(cotangents)
        return (None, None, None, None, *(found.get(position) for position in ctx.entering), None)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _token() -> Tensor:
    """Something that requires a gradient, so that backward is called though no input may."""
    return torch.zeros((), requires_grad=True)
