"""What the passes did to a model, or would do, as a table for a terminal."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.capture import NamedTensors, capture_settings, mark_samples
from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.pipeline import Coverage, Record, Status
from graphopt.runtime import fully_sharded
from graphopt.runtime.bound_graph import BoundGraph, UnboundGraph
from graphopt.runtime.data_parallel import unwrap
from graphopt.runtime.statistics import Statistic
from graphopt.transform import Setup, records, restore, setup_of, with_own_code

_NOT_REACHED = "no captured graph computes a gradient for it"
_WIDEST_REASON = 60


@dataclass(frozen=True)
class Report:
    """Coverage of a model's parameters, and what it costs.

    Attributes:
        model: name of the model's class.
        coverage: one row for each trainable parameter.
        records: the graphs that it was read from.
    """

    model: str
    coverage: tuple[Coverage, ...]
    records: tuple[Record, ...]

    @classmethod
    def of(cls, model: nn.Module, found: Sequence[Record] | None = None) -> Report:
        """The report of a model that is transformed and has run (see `explain` for one that has not)."""
        model = unwrap(model)
        found = records(model) if found is None else found
        rows: dict[str, Coverage] = {}
        for record in found:
            for row in record.coverage:
                if row.name not in rows or row.status is Status.SKIPPED:
                    rows[row.name] = row
        names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        gathered = fully_sharded.gathered(model)
        for name, parameter in names.items():
            # Equal layers behind a graph break, and equal parts of a sharded model, share one graph, whose record has the names
            # of the first.
            served = rows.get(Statistic.name_in_graph(gathered.get(id(parameter), parameter)) or "")
            missing = Coverage(name, tuple(parameter.shape), Status.SKIPPED, _NOT_REACHED)
            rows.setdefault(name, missing if served is None else dataclasses.replace(served, name=name))
        ordered = [rows[name] for name in [*names, *(name for name in rows if name not in names)]]
        return cls(type(model).__name__, tuple(ordered), tuple(found))

    @property
    def num_covered(self) -> int:
        """Parameters that get the statistic."""
        return sum(row.status is not Status.SKIPPED for row in self.coverage)

    @property
    def extra_flops(self) -> int:
        """Estimated additional floating-point operations of one step."""
        return sum(row.extra_flops for row in self.coverage)

    @property
    def extra_bytes(self) -> int:
        """Estimated bytes that are added: the statistics, and the largest working memory of one parameter."""
        held = sum(4 * _numel(row) for row in self.coverage if row.status is not Status.SKIPPED)
        return held + max((row.extra_bytes for row in self.coverage), default=0)

    def __repr__(self) -> str:
        return (
            f"Report({self.model}: {self.num_covered} of {len(self.coverage)} parameters, {len(self.records)} graphs)"
        )

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"{self.model}: {self.num_covered} of {len(self.coverage)} parameters with sum_grad_squared, "
            f"{len(self.records)} graph{'s' if len(self.records) != 1 else ''}; "
            f"about {_short(self.extra_flops)}FLOP and {_short(self.extra_bytes)}B added to a step"
        )
        for number, record in enumerate(self.records):
            for run in record.passes:
                changes = ", ".join(
                    f"{change:+d} {op.removesuffix('.default')}" for op, change in run.op_changes.items()
                )
                yield f"graph {number}, {run.name}: {run.result.num_changed} nodes rewritten in {run.seconds * 1e3:.0f} ms"
                if changes:
                    yield f"    {changes}"
                yield from (f"    note: {note}" for note in run.result.notes)
        remarks: dict[str, int] = {}  # reasons that are too long for a cell
        rows = [
            ("parameter", "shape", "status", "by", "FLOP", "bytes"),
            *(_cells(row, count, remarks) for row, count in _grouped(self.coverage)),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield from (f"[{number}] {reason}" for reason, number in remarks.items())


def explain(model: nn.Module, *args: Any, **kwargs: Any) -> Report:
    """Say what the passes would do to ``model`` when it is called with these arguments.

    Nothing is computed and no memory is taken: the model is copied with parameters that hold one number each, captured, and
    its graphs return zeros. The model itself is not touched. A transformed model is explained with its own options, another
    one with the default passes. Parameters that cannot be served are rows with the reason, not errors.

    Raises:
        UnsupportedError: the model cannot be traced without values, for example because Python code depends on them.
    """
    model = unwrap(model)
    setup = _tolerant(setup_of(model))
    clone = _without_memory(model)
    found: list[Record] = []

    def call(*values: Any, **keywords: Any) -> Any:
        return clone._call_impl(*values, **keywords)

    def collect(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph, record = setup.rewrite(graph_module, example_inputs, NamedTensors.of(clone))
        found.append(record)
        zeros = _zeros(graph_module)
        return UnboundGraph(zeros) if graph is None else BoundGraph(graph, lambda: zeros)

    mark_samples(clone.forward, args, kwargs, setup.sample_axis)
    try:
        with capture_settings():
            torch.compile(with_own_code(cast(FunctionType, call)), backend=collect)(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        inner = getattr(error, "inner_exception", error)
        if isinstance(inner, GraphoptError):
            raise inner from inner.__cause__
        raise UnsupportedError(
            f"{type(model).__name__} cannot be explained without running it ({type(inner).__name__}: "
            f"{str(inner).splitlines()[0]}). Call the transformed model on a batch and print graphopt.Report.of(model) instead"
        ) from error
    return Report.of(clone, found)


def _tolerant(setup: Setup) -> Setup:
    """The same passes, reporting what they cannot serve."""
    passes = tuple(
        dataclasses.replace(item, unsupported="skip") if hasattr(item, "unsupported") else item  # type: ignore[type-var]
        for item in setup.passes
    )
    return dataclasses.replace(setup, passes=passes)


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy whose parameters hold one number each; ties stay ties, buffers are shared."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        husk = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
        memo[id(parameter)] = nn.Parameter(husk, parameter.requires_grad)
    return restore(copy.deepcopy(model, memo))


def _zeros(graph_module: GraphModule) -> Callable[..., Any]:
    """A stand-in for the graph: outputs of the right shapes, one number each."""
    (output,) = graph_module.graph.find_nodes(op="output")
    fakes = torch.fx.map_arg(output.args[0], lambda node: node.meta["example_value"])

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = [_hint(size) for size in value.shape]
        blank = torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)
        return blank.requires_grad_(value.requires_grad) if value.is_floating_point() else blank

    return lambda *inputs: pytree.tree_map(zeros, fakes)


def _hint(size: int | torch.SymInt) -> int:
    return _compat.size_hint(size.node.shape_env, size.node.expr) if isinstance(size, torch.SymInt) else size


def _grouped(rows: Sequence[Coverage]) -> list[tuple[Coverage, int]]:
    """Equal rows of numbered layers stand as one."""
    pattern = {row: re.sub(r"\.\d+\.", ".*.", row.name) for row in rows}

    def key(row: Coverage) -> tuple[Any, ...]:
        return pattern[row], row.shape, row.status, row.reason, row.extra_flops, row.extra_bytes

    counts = Counter(key(row) for row in rows)
    first: dict[tuple[Any, ...], Coverage] = {}
    for row in rows:
        first.setdefault(key(row), row)
    return [
        (row if counts[k] == 1 else Coverage(pattern[row], *k[1:]), counts[k])
        for k, row in first.items()
    ]  # fmt: skip


def _cells(row: Coverage, count: int, remarks: dict[str, int]) -> tuple[str, ...]:
    reason = row.reason
    if len(reason) > _WIDEST_REASON:
        reason = f"[{remarks.setdefault(reason, len(remarks) + 1)}]"
    name = row.name if count == 1 else f"{row.name} x{count}"
    shape = " x ".join(str(size) for size in row.shape) or "scalar"
    return name, shape, row.status.value, reason, _short(row.extra_flops), _short(row.extra_bytes)


def _numel(row: Coverage) -> int:
    return int(torch.Size(row.shape).numel())


def _short(number: int) -> str:
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} "
