"""What the records of the benchmark ``optim`` show together: tables with the targets beside what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import figures
from benchmarks.tables import MISSING, duration, table

SET_LABELS = {
    "bert-11m": "11 M in 74 tensors",
    "bert-110m": "110 M in 202 tensors",
    "small-1000": "1 M in 1,000 tensors",
}
LABELS = {
    "graphopt": "graphopt",
    "torch-fused": "torch AdamW, fused",
    "torch-foreach": "torch AdamW, foreach",
    "torch-loop": "torch AdamW, a loop",
    "torch-compiled": "torch AdamW, foreach, compiled",
    "foreach": "torch._foreach by hand",
    "torchzero": "torchzero 0.4.4",
    "heavyball": "HeavyBall 3.2.1",
    "copy": "a copy",
}
OVERHEAD_METHODS = ("torch-fused", "graphopt", "torch-foreach", "torchzero")
TIMED_ELEMENTS = 10  # of each tensor, where overhead is timed
SCHEDULED_STEPS = 100
COLD = "cold_first_step_seconds"
CHAIN_TARGET, PER_BYTE_TARGET, TORCHZERO_TARGET, START_TARGET, COMPILE_TARGET = 1.1, 1.5, 5, 5, 2


def conclusions(records: Mapping[str, Any]) -> str:
    """Steps of AdamW and of other chains, first steps, compilations and overhead, each with its target."""
    steps = {
        name: record["rivals"] for name, record in records.items() if record["measure"] == "steps" and name != "tiny"
    }
    parts = [_adamw_table(steps), _chain_table(steps)]
    if "starts" in records:
        parts.append(_start_table(records["starts"]["rivals"]))
    if "compilations" in records:
        parts.append(_compilation_table(records["compilations"]["rivals"]))
    parts.append(_overhead_table(*(records.get(name, {}).get("rivals", {}) for name in ("calls", "tiny"))))
    parts.append(_method_table(steps))
    return "\n\n".join(part for part in parts if part)


def _method_table(steps: Mapping[str, Mapping[str, Any]]) -> str:
    from benchmarks import optim_methods

    libraries = [library for library in optim_methods.LABELS if library != "graphopt"]
    rows = []
    for method, title in optim_methods.TITLES.items():
        for name, described in optim_methods.SET_LABELS.items():
            rivals = steps.get(f"{method}-{name}")
            if rivals is not None:
                row = [title, described, _seconds(rivals, "graphopt")]
                rows.append([*row, *(_ratio(rivals, library, "graphopt") for library in libraries)])
    if not rows:
        return ""
    targets = {"torchzero": f" (target: never below 1, {TORCHZERO_TARGET:g} where launches bind)"}
    heads = [f"{optim_methods.LABELS[library]} takes{targets.get(library, '')}" for library in libraries]
    return table((f"{optim_methods.PERIOD} steps", "parameters", "**graphopt**", *heads), rows)


def _adamw_table(steps: Mapping[str, Mapping[str, Any]]) -> str:
    sets = {name: steps[f"adamw-{name}"] for name in SET_LABELS if f"adamw-{name}" in steps}
    if not sets:
        return ""
    rows = []
    for method, label in LABELS.items():
        if not any(method in rivals for rivals in sets.values()) or method == "copy":
            continue
        row = [f"**{label}**" if method == "graphopt" else label]
        for rivals in sets.values():
            row += [_seconds(rivals, method), _ratio(rivals, method, "torch-fused")]
        rows.append(row)
    heads = [f"a chain equal to AdamW (target: at most {CHAIN_TARGET:g} of fused)"]
    for name in sets:
        heads += [SET_LABELS[name], "of fused"]
    return table(heads, rows)


def _chain_table(steps: Mapping[str, Mapping[str, Any]]) -> str:
    from benchmarks import optim_rivals

    rows = []
    for chain, described in optim_rivals.CHAINS.items():
        for name in SET_LABELS:
            rivals = steps.get(f"{chain}-{name}")
            if rivals is None:
                continue
            by_hand = "torch-foreach" if chain == "adamw" else "foreach"
            row = [described.title, SET_LABELS[name], str(described.num_bytes), _seconds(rivals, "graphopt")]
            row += [_bandwidth(rivals, "graphopt"), _times(_per_byte(rivals, "copy", "graphopt"))]
            row += [_times(_per_byte(rivals, "graphopt", "torch-fused"))]
            row += [_ratio(rivals, rival, "graphopt") for rival in (by_hand, "torchzero")]
            rows.append(row)
    if not rows:
        return ""
    heads = ("**graphopt**, by chain", "parameters", "bytes an element", "step", "GB/s", "of a copy's")
    per_byte = f"time per byte, of fused AdamW's (target: {PER_BYTE_TARGET:g})"
    others = ("torch._foreach takes", f"torchzero takes (target where launches bind: {TORCHZERO_TARGET:g})")
    return table((*heads, per_byte, *others), rows)


def _start_table(rivals: Mapping[str, Any]) -> str:
    rows = []
    for record in rivals.values():
        if record["status"] != "ok":
            rows.append((_bold(record), "failed", MISSING))
            continue
        found = figures.summary(record["samples"].get(COLD, []))
        construction = record["metrics"]["construction_seconds"]
        rows.append((_bold(record), MISSING if found is None else duration(found["median"]), duration(construction)))
    heads = (f"a new process, empty caches (target: {START_TARGET} s)", "first step", "making the optimizer, before it")
    return table(heads, rows)


def _compilation_table(rivals: Mapping[str, Any]) -> str:
    rows = []
    for record in rivals.values():
        metrics = record.get("metrics", {}) if record["status"] == "ok" else {}
        rows.append(
            (_bold(record), *(str(metrics.get(key, MISSING)) for key in ("num_compiled", "num_compiled_in_first")))
        )
    heads = (
        f"{SCHEDULED_STEPS} steps under a scheduler (target: {COMPILE_TARGET})",
        "graphs that Inductor compiled",
        "in the first step",
    )
    return table(heads, rows)


def _overhead_table(calls: Mapping[str, Any], tiny: Mapping[str, Any]) -> str:
    numbers = sorted({int(name.rpartition("-")[2]) for name in (*calls, *tiny)})
    if not numbers:
        return ""
    rows = []
    for method in OVERHEAD_METHODS:
        row = [f"**{LABELS[method]}**" if method == "graphopt" else LABELS[method]]
        for number in numbers:
            record = calls.get(f"{method}-{number}", {})
            counted = record.get("metrics", {}).get("num_calls") if record.get("status") == "ok" else None
            row.append(MISSING if counted is None else f"{counted:,}")
        row += [_seconds(tiny, f"{method}-{number}") for number in numbers]
        rows.append(row)
    heads = [f"function calls, {number:,} tensors" for number in numbers]
    heads += [f"step, {number:,} tensors of {TIMED_ELEMENTS}" for number in numbers]
    return table(("overhead of a step", *heads), rows)


def _per_byte(rivals: Mapping[str, Any], name: str, other: str) -> dict[str, float] | None:
    """The time that ``name`` takes for a byte that it must move, divided by what ``other`` takes for one in the same round."""
    ratio = figures.paired_ratio(*(figures.samples(rivals, rival, "seconds") for rival in (name, other)))
    if ratio is None:
        return None
    factor = rivals[other]["metrics"]["num_bytes"] / rivals[name]["metrics"]["num_bytes"]
    return {key: value * factor for key, value in ratio.items()}


def _bandwidth(rivals: Mapping[str, Any], name: str) -> str:
    found = figures.summary(figures.samples(rivals, name, "seconds"))
    return MISSING if found is None else f"{rivals[name]['metrics']['num_bytes'] / found['median'] / 1e9:.1f}"


def _seconds(rivals: Mapping[str, Any], name: str) -> str:
    found = figures.summary(figures.samples(rivals, name, "seconds"))
    if found is None:
        return "failed" if rivals.get(name, {}).get("status") == "failed" else MISSING
    return duration(found["median"])


def _ratio(rivals: Mapping[str, Any], name: str, other: str) -> str:
    if name == other:
        return "1"
    return _times(figures.paired_ratio(*(figures.samples(rivals, rival, "seconds") for rival in (name, other))))


def _times(ratio: dict[str, float] | None) -> str:
    return MISSING if ratio is None else f"{ratio['median']:.2f}x [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"


def _bold(record: Mapping[str, Any]) -> str:
    return f"**{record['label']}**" if record["ours"] else str(record["label"])
