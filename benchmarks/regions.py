"""What compiling each distinct layer once brings: cold starts of models with 4 to 32 equal layers, and the step time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import figures
from benchmarks.harness import Benchmark, Case, Rival
from benchmarks.pictures import Curves, Line
from benchmarks.tables import MISSING, duration, table
from benchmarks.worker import Task

DEPTHS, QUICK_DEPTHS = (4, 8, 16, 32), (2, 4)
DEFAULT_DEPTHS = (4, 32)  # what TrueGrad adds is known from two
STEP_DEPTH = 8
START_SIZES = {"kind": "llama", "batch": 2, "length": 64}  # a small batch: what is measured is compiling, not computing
ROUNDS = 2
LEARNING_RATE = 1e-5  # small: hundreds of steps on one batch must not end in overflow
EXACT = 1e-4  # relative error of a gradient in float32
COLD = "cold_first_step_seconds"
MOST_OF_SHALLOW, LEAST_AGAINST_INDUCTOR, MOST_OF_WHOLE = 1.2, 2.5, 1.02  # the targets

LABELS = {
    "inductor": "torch.compile (Inductor)",
    "regions": "graphopt, LayerToLayer",
    "default": "graphopt, default passes (TrueGrad, LayerToLayer)",
    "whole": "graphopt, no pass (the whole graph)",
}
PASSES: dict[str, list[str] | None] = {"regions": ["layer_to_layer"], "default": None, "whole": []}


def build(*, workload: dict[str, Any], method: str, compiler: str = "inductor", **_: Any) -> Task:
    """A training step: forward, loss, backward, AdamW, zero_grad.

    Args:
        workload: Arguments of ``workloads.make``.
        method: A key of ``LABELS``.
        compiler: Inductor, or another for tests.
    """
    import torch

    from benchmarks import workloads

    _import_compilers()
    training = workloads.make(**workload)
    updates = torch.optim.AdamW(training.model.parameters(), lr=LEARNING_RATE, fused=True)
    compiled: Any = None

    def step() -> None:
        nonlocal compiled
        if compiled is None:  # part of the first step
            compiled = _compiled(training.model, method, compiler)
        training.loss(compiled).backward()
        updates.step()
        updates.zero_grad()

    return Task(step, lambda: _regions(training.model))


def check(*, small: dict[str, Any], method: str, compiler: str = "inductor", **_: Any) -> dict[str, Any]:
    """Compare the gradients with those of eager PyTorch."""
    from benchmarks import workloads

    plain, training = workloads.make(**small), workloads.make(**small)
    plain.loss().backward()
    training.loss(_compiled(training.model, method, compiler)).backward()
    wanted = dict(plain.model.named_parameters())
    errors = {
        name: ((parameter.grad - wanted[name].grad).abs().max() / wanted[name].grad.abs().max()).item()
        for name, parameter in training.model.named_parameters()
    }
    worst = max(errors, key=lambda name: errors[name])
    return {
        "verdict": "exact" if errors[worst] <= EXACT else "wrong",
        "max_relative_error": errors[worst],
        "worst_parameter": worst,
        "num_checked": len(errors),
        "num_wrong": sum(not error <= EXACT for error in errors.values()),
    }


def _import_compilers() -> None:
    """Import what the first compilation would, before anything is timed: the same for all methods."""
    import setuptools  # noqa: F401  asked for the compiler's flags
    import torch._dynamo.backends.inductor
    import torch._inductor.codegen.cpp_wrapper_cpu
    import torch._inductor.compile_fx
    import torch._inductor.fx_passes.joint_graph
    import torch._inductor.fx_passes.post_grad
    import torch.export  # noqa: F401

    import graphopt  # noqa: F401


def _compiled(model: Any, method: str, compiler: str) -> Any:
    import torch

    if method == "inductor":
        return torch.compile(model, backend=compiler)
    import graphopt

    return graphopt.transform(model, PASSES[method], compiler=compiler)


def _regions(model: Any) -> dict[str, int]:
    """How many regions the passes have made, and how many of them are distinct, by their own report."""
    import graphopt

    found = {"num_regions": 0, "num_distinct": 0}
    for record in graphopt.records(model):
        for note in (note for result in record.results for note in result.notes):
            if counts := re.match(r"(\d+) regions, (\d+) of them distinct", note):
                found["num_regions"] += int(counts[1])
                found["num_distinct"] += int(counts[2])
    return found


# --- the cases --------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> tuple[Case, ...]:
    """Cold starts at all depths in one case, so that ratios between depths are of one round; and steps at one depth."""
    small = {"kind": "llama", "hidden": 32, "intermediate": 48, "heads": 2, "vocabulary": 50, "batch": 2, "length": 8}
    sizes: dict[str, Any] = {**small} if quick else {"kind": "llama"}
    start_sizes = small if quick else START_SIZES
    compiler = {"compiler": "eager"} if quick else {}  # Inductor would take minutes
    depths = QUICK_DEPTHS if quick else DEPTHS
    starts = tuple(
        Rival(
            name=f"{method}-{depth}",
            label=f"{LABELS[method]}, {depth} layers",
            build=build,
            options={"workload": {**start_sizes, "layers": depth}, "method": method, **compiler},
            ours=method != "inductor",
        )
        for method in ("inductor", "regions", "default")
        for depth in depths
        if quick or method != "default" or depth in DEFAULT_DEPTHS
    )
    deep = {**sizes, "layers": depths[-1] if quick else STEP_DEPTH}
    steps = tuple(
        Rival(
            name=method,
            label=LABELS[method],
            build=build,
            check=check,
            options={"workload": deep, "small": {**small, "layers": 4}, "method": method, **compiler},
            ours=method != "inductor",
        )
        for method in ("inductor", "whole", "regions")
    )
    what = "Llama with layers of 256 and 704, batch {} of {} tokens, AdamW"
    return (
        Case(
            name="starts",
            title=f"Compilation and first training step of {what.format(2, 64)}, in a new process with empty compile caches",
            rivals=starts,
            baseline=f"inductor-{depths[-1]}",
            measure="starts",
            rounds=ROUNDS,
            caches=("cold",),
        ),
        Case(
            name="steps",
            title=f"One training step of {what.format(8, 128)}, {STEP_DEPTH} layers",
            rivals=steps,
            baseline="inductor",
            checked="gradient",
        ),
    )


# --- what they show together ------------------------------------------------------------------------------------------


def conclusions(records: Mapping[str, Any]) -> str:
    """Cold starts by depth, and the three targets."""
    parts = []
    if "starts" in records:
        parts.append(_starts_by_depth(records["starts"]))
    if "steps" in records:
        rivals = records["steps"]["rivals"]
        ratio = figures.paired_ratio(*(figures.samples(rivals, name, "seconds") for name in ("regions", "whole")))
        parts.append(
            f"A step with {LABELS['regions']} takes {_times(ratio)} of one with the whole graph compiled (target: at most "
            f"{MOST_OF_WHOLE:g})."
        )
    return "\n\n".join(parts)


def _starts_by_depth(record: Mapping[str, Any]) -> str:
    rivals, depths = record["rivals"], _depths(record)
    methods = [method for method in LABELS if f"{method}-{depths[0]}" in rivals]
    rows = []
    for method in methods:
        cold = {depth: figures.samples(rivals, f"{method}-{depth}", COLD) for depth in depths}
        growth = figures.paired_ratio(cold[depths[-1]], cold[depths[0]])
        baseline = figures.samples(rivals, f"inductor-{depths[-1]}", COLD)
        gain = figures.paired_ratio(baseline, cold[depths[-1]])
        metrics = rivals[f"{method}-{depths[-1]}"].get("metrics", {})
        graphs = rivals[f"{method}-{depths[-1]}"].get("compiler", {}).get("cold", {}).get("fxgraph_cache_miss", MISSING)
        counts = (
            f"{metrics.get('num_regions')}, {metrics.get('num_distinct')} distinct"
            if metrics.get("num_regions")
            else MISSING
        )
        seconds = (_seconds(figures.summary(cold[depth])) for depth in depths)
        label = LABELS[method] if method == "inductor" else f"**{LABELS[method]}**"
        rows.append((label, *seconds, _times(growth), _times(gain), counts, str(graphs)))
    first, last = depths[0], depths[-1]
    heads = (
        "first step, empty caches",
        *(f"{depth} layers" for depth in depths),
        f"{last} against {first} (target: {MOST_OF_SHALLOW:g})",
        f"Inductor's {last} against it (target: {LEAST_AGAINST_INDUCTOR:g})",
        f"regions at {last}",
        "graphs compiled",
    )
    foot = "Forward and backward are two graphs, so there should be two for each distinct region."
    return f"{table(heads, rows)}\n\n{foot}"


def curves(records: Mapping[str, Any]) -> Sequence[Curves]:
    """Cold start against depth."""
    if "starts" not in records:
        return ()
    record = records["starts"]
    lines = []
    for method, label in LABELS.items():
        points = []
        for depth in _depths(record):
            if found := figures.summary(figures.samples(record["rivals"], f"{method}-{depth}", COLD)):
                points.append((float(depth), found["q1"], found["median"], found["q3"]))
        lines.append(Line(label=label, points=points, ours=method != "inductor"))
    return (
        Curves(
            name="depth",
            title="First training step in a new process with empty compile caches",
            x="equal layers",
            y="seconds",
            lines=lines,
        ),
    )


def _depths(record: Mapping[str, Any]) -> list[int]:
    return sorted({int(name.rpartition("-")[2]) for name in record["rivals"]})


def _seconds(found: dict[str, float] | None) -> str:
    return MISSING if found is None else duration(found["median"])


def _times(ratio: dict[str, float] | None) -> str:
    return MISSING if ratio is None else f"{ratio['median']:.2f}x [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"


BENCHMARK = Benchmark(
    name="regions",
    title="Each distinct layer compiled once",
    text=(
        "Models of equal layers, compiled as one graph by Inductor, and by graphopt layer by layer, where equal layers are "
        "one region. A start is timed in a new process with an empty cache directory, from the call that compiles the model to "
        "the end of the first step; torch, its compiler, transformers and graphopt are imported before. Ratios between depths "
        "are medians of ratios within a round. *Graphs compiled* is Inductor's own count."
    ),
    cases=cases,
    conclusions=conclusions,
    curves=curves,
)
