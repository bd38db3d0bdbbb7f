"""What the passes did to a model, or would do, as a table for a terminal."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.dry_run import dry_run
from graphopt.pipeline import Coverage, Record, Status
from graphopt.runtime import fully_sharded
from graphopt.runtime.data_parallel import unwrap
from graphopt.runtime.statistics import Statistic
from graphopt.transform import Setup, records, setup_of

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

    Nothing is computed and no memory is taken: a copy of the model that has none is captured, and its graphs return zeros. The
    model itself is not touched, and may be on the meta device. A transformed model is explained with its own options, another
    one with the default passes. Parameters that cannot be served are rows with the reason, not errors.

    Raises:
        OptionError: the arguments do not fit ``forward``.
        UnsupportedError: the model cannot be traced without values, for example because Python code depends on them.
    """
    run = dry_run(
        unwrap(model),
        args,
        kwargs,
        _tolerant(setup_of(model)),
        cannot="be explained without running it",
        instead="Call the transformed model on a batch and print graphopt.Report.of(model) instead",
    )
    return Report.of(run.model, [graph.record for graph in run.graphs])


def _tolerant(setup: Setup) -> Setup:
    """The same passes, reporting what they cannot serve."""
    passes = tuple(
        dataclasses.replace(item, unsupported="skip") if hasattr(item, "unsupported") else item  # type: ignore[type-var]
        for item in setup.passes
    )
    return dataclasses.replace(setup, passes=passes)


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
