"""A compiled graph as Dynamo calls it: companions appended to the inputs, statistics awaited in backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor

from graphopt import _compat
from graphopt.annotations import SAMPLE_GRAD_NORM, STAGE, Stage, attach, expose, get
from graphopt.capture import CapturedGraph, InputKind, set_sample_axis
from graphopt.runtime import data_parallel
from graphopt.runtime.statistics import Entry, Statistic, enter_backward


class BoundGraph:
    """Callable that Dynamo runs in place of the graph it captured."""

    num_calls = 0  # of all graphs; `transform` compares it before and after a call of the model

    def __init__(
        self,
        graph: CapturedGraph,
        compile_graph: Callable[[], Callable[..., Any]],
        name_call: Callable[[], str] | None = None,
        stages: Mapping[int, Stage] | None = None,
    ) -> None:
        identity = _compat.CompileContext.current_compile_id()
        frame = str(
            getattr(identity, "frame_id", identity)
        )  # the same for recompilations, another behind a graph break
        self._name_call = name_call or (lambda: frame)  # contributions from calls of one name are added before squaring
        companions = [described for described in graph.inputs if described.kind is InputKind.COMPANION]
        self._companions = [
            (described.companion_of, described.annotation, _evaluator(described.num_samples, graph))
            for described in companions
            if described.companion_of is not None and described.annotation is not None
        ]
        self._has_statistics = any(not key.is_lasting for _, key, _ in self._companions)
        self._names = [described.name for described in graph.inputs]
        self._output_axes = graph.output_sample_axes
        self._stages = dict(stages or {})
        self._staged: Tensor | None = None  # the parameter that the stages were last attached to
        if companions or self._stages:
            expose()
        self._compiled = compile_graph()  # last: compilers rename the symbols that the counts are written in

    def __call__(self, *args: Any) -> Any:
        """Run the graph on Dynamo's flat arguments."""
        BoundGraph.num_calls += 1
        if self._has_statistics:
            data_parallel.enter_forward()
        self._attach_stages(args)
        companions, entries = self._bind(args)
        if _compat.is_any_autocast_enabled():
            with _compat.disable_autocast():
                outputs = self._compiled(*args, *companions)
        else:
            outputs = self._compiled(*args, *companions)
        if self._output_axes is not None:
            self._tag(outputs)
        if entries and torch.is_grad_enabled():
            self._await_backward(entries, outputs)
        return outputs

    def _attach_stages(self, args: Sequence[Any]) -> None:
        first = next(iter(self._stages), None)
        if first is None or args[first] is self._staged:
            return
        self._staged = args[first]  # equal modules behind a graph break share a graph, with parameters of their own
        for position, stage in self._stages.items():
            attach(args[position], STAGE, stage)

    def _bind(self, args: Sequence[Any]) -> tuple[list[Tensor], list[Entry]]:
        """The companions in order, and what is to be told about each parameter when backward comes."""
        companions: list[Tensor] = []
        entries: dict[int, Entry] = {}
        for position, key, count in self._companions:
            if key.is_lasting:  # it belongs to the parameter, and not to its gradient
                companions.append(get(args[position], key))
                continue
            num_samples = count(args)
            if position in entries:
                statistic = entries[position].statistic
            else:
                statistic = Statistic.of(args[position])
                statistic.forget_if_cleared()
                statistic.name = self._names[position]
                entries[position] = Entry(statistic, num_samples, None)
            companions.append(statistic.companion_of(key, num_samples))
            if key is SAMPLE_GRAD_NORM:
                entries[position] = Entry(statistic, num_samples, companions[-1])
        return companions, list(entries.values())

    def _await_backward(self, entries: Sequence[Entry], outputs: Sequence[Any]) -> None:
        differentiable = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        if not differentiable:
            return
        frame, call = self._name_call(), BoundGraph.num_calls
        torch.autograd.graph.register_multi_grad_hook(
            differentiable, lambda _: enter_backward(entries, frame, call), mode="any"
        )

    def _tag(self, outputs: Sequence[Any]) -> None:
        assert self._output_axes is not None
        for value, axis in zip(outputs, self._output_axes, strict=True):
            if isinstance(value, Tensor):
                set_sample_axis(value, axis)


class UnboundGraph:
    """A graph that no pass could read, compiled as it is."""

    def __init__(self, compiled: Callable[..., Any]) -> None:
        self._compiled = compiled

    def __call__(self, *args: Any) -> Any:
        """Run the graph on Dynamo's flat arguments."""
        BoundGraph.num_calls += 1
        return self._compiled(*args)


def _evaluator(size: sympy.Expr, graph: CapturedGraph) -> Callable[[Sequence[Any]], int]:
    """A function that computes a size from the graph's inputs."""
    if graph.fake_mode.shape_env is not None:
        size = graph.fake_mode.shape_env.replace(size)  # symbols that were found to be equal have one name
    symbols = sorted(size.free_symbols, key=str)
    if not symbols:
        value = int(cast(Any, size))
        return lambda args: value
    readers = [_reader(cast(sympy.Symbol, symbol), graph) for symbol in symbols]
    if size.is_Symbol:
        return readers[0]
    compute = sympy.lambdify(symbols, size, modules="math")
    return lambda args: int(compute(*(read(args) for read in readers)))


def _reader(symbol: sympy.Symbol, graph: CapturedGraph) -> Callable[[Sequence[Any]], int]:
    for position, fake in enumerate(graph.fake_inputs):
        if isinstance(fake, torch.SymInt) and fake.node.shape_env.replace(fake.node.expr) == symbol:
            return functools.partial(_read_size, position)
        for axis, size in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.shape_env.replace(size.node.expr) == symbol:
                return functools.partial(_read_axis, position, axis)
    raise AssertionError(f"no input has the size {symbol}")


def _read_size(position: int, args: Sequence[Any]) -> int:
    return int(args[position])


def _read_axis(position: int, axis: int, args: Sequence[Any]) -> int:
    return int(args[position].shape[axis])
