"""A plan as text for a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from graphopt.inspect.timing import Timing

if TYPE_CHECKING:
    from graphopt.inspect.plan import Plan, StagePlan

_KINDS: Mapping[str, str] = {
    "weights": "weights",
    "stash": "values between layers",
    "gradients": "gradients",
    "statistics": "statistics",
    "optimizer": "weights and the optimizer's tensors",
}


def lines(plan: Plan) -> Iterator[str]:
    """The lines of the table."""
    options = plan.options
    batch = "a call" if plan.num_samples is None else f"{plan.num_samples} samples"
    size = f" in micro-batches of {options.microbatch_size}" if options.microbatch_size is not None else ""
    yield (
        f"{plan.model}: {short(plan.parameter_bytes)}B of weights in {len(plan.stages)} stages, from store={options.store!r} to "
        f"{options.device}; {batch}{size}; optimizer {plan.optimizer}"
    )
    yield ""
    yield from _stages(plan)
    yield ""
    yield from _memory(plan)
    yield ""
    yield from _moved(plan)
    yield ""
    yield from _time(plan)
    yield from (f"note: {note}" for note in plan.notes if not re.search(r"^\d+ regions, |takes the whole batch", note))


def short(number: float) -> str:
    """Three digits and a prefix: ``1.23 G``."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g} "


def _table(rows: Sequence[Sequence[str]], left: int = 1) -> Iterator[str]:
    """Columns, the first ones flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _stages(plan: Plan) -> Iterator[str]:
    per = "FLOP" if plan.num_samples is None else "FLOP/sample"
    rows = [("stage", "", "weights", "kept for backward", per, "micro-batches")]
    reasons: dict[str, int] = {}
    for (name, whole, *_), group in groupby(plan.stages, key=_look):
        stage, *others = group
        count = f" x{1 + len(others)}" if others else ""
        parts = str(stage.num_parts)
        if plan.options.microbatch_size is not None and whole is not None:
            parts = f"whole [{reasons.setdefault(whole, len(reasons) + 1)}]"
        cells = (
            f"{short(stage.parameter_bytes)}B",
            f"{short(stage.kept_bytes)}B",
            short(stage.flops_per_sample).strip(),
        )
        rows.append((f"{name if others else stage.name}{count}", stage.training, *cells, parts))
    yield from _table(rows, left=2)
    yield from (f"[{number}] {reason}" for reason, number in reasons.items())


def _look(stage: StagePlan) -> tuple[Any, ...]:
    """Equal for stages that stand in one row: those that differ by a number in their names."""
    return (
        _unnumbered(stage.name),
        None if stage.whole is None else _unnumbered(stage.whole),
        stage.parameter_bytes,
        stage.trainable_bytes,
        stage.kept_bytes,
        stage.flops_per_sample,
        stage.num_parts,
    )


def _unnumbered(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$| )", r"\1*", name)


def _memory(plan: Plan) -> Iterator[str]:
    on_cpu = str(plan.options.device) == "cpu"
    places = [("memory" if on_cpu else f"memory of {plan.options.device}", plan.device_peak)]
    if not on_cpu:
        places.append(("memory of the host", plan.host_peak))
    rows = []
    for place, peak in places:
        rows.append((f"{place} at its peak, in {peak.moment}", f"{short(peak.nbytes)}B"))
        rows += [(f"    {what}", f"{short(nbytes)}B") for what, nbytes in peak.parts.items()]
        if peak.at_most > peak.nbytes:
            rows.append(("    at most, if the disk does not keep up", f"{short(peak.at_most)}B"))
    if plan.disk:
        rows.append(("files of the store", f"{short(sum(plan.disk.values()))}B"))
        rows += [(f"    {what}", f"{short(nbytes)}B") for what, nbytes in plan.disk.items() if nbytes]
    yield from _table(rows)


def _moved(plan: Plan) -> Iterator[str]:
    both = (plan.traffic, plan.traffic_eager)
    rows: list[tuple[str, ...]] = [("moved in a step", "read", "written", "eager: read", "written")]
    seen = dict.fromkeys((move.phase, move.kind) for traffic in both for move in traffic.moves)
    for phase, kind in sorted(seen, key=lambda key: ("forward", "backward", "optimizer").index(key[0])):
        cells = [
            f"{short(traffic.total(phases=[phase], kind=kind, direction=direction))}B"
            for traffic in both
            for direction in ("read", "written")
        ]
        rows.append((f"    {phase}: {_KINDS[kind]}", *cells))
    rows.append(("    in all", *(f"{short(n)}B" for traffic in both for n in (traffic.read, traffic.written))))
    yield from _table(rows)


def _time(plan: Plan) -> Iterator[str]:
    machine, timing = plan.machine, plan.timing_eager if plan.options.eager else plan.timing
    other = plan.timing if plan.options.eager else plan.timing_eager
    if timing is None or other is None:
        yield "time: not known, since the speeds of the machine were neither measured nor given"
        return
    speeds = [
        f"{short(machine.read or 0)}B/s read",
        f"{short(machine.written or 0)}B/s written",
        f"{short(machine.flops or 0)}FLOP/s",
    ]
    rows = [("time", "compute", "transfer", "")]
    for phase in timing.phases:
        rows.append((f"    {phase.phase}", _seconds(phase.compute), _seconds(phase.transfer), phase.bound))
    rows.append(("    in all", _seconds(timing.compute), _seconds(timing.transfer), timing.bound))
    yield f"speeds: {', '.join(speeds)}{f' ({machine.note})' if machine.note else ''}"
    yield from _table(rows)
    yield f"a step takes at least {_both(timing)}; with eager={not plan.options.eager}, {_both(other)}"
    if plan.hidden_from is not None:
        whole = plan.step_hidden_from
        rest = "no number hides" if whole == float("inf") else f"{whole or 0:,.0f} hide"
        yield (
            f"{plan.hidden_from:,.0f} rows (tokens) per visit of a layer hide the transfer of its weights behind its forward, "
            f"{rest} all that a step moves; this batch has {plan.rows_per_visit:,.0f}"
        )


def _both(timing: Timing) -> str:
    return f"{_seconds(timing.seconds)}, or {_seconds(timing.seconds_by_phase)} phase by phase"


def _seconds(number: float) -> str:
    return f"{number:.3g} s" if number >= 1 else f"{number * 1e3:.3g} ms"
