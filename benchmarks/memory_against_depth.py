"""What memory training takes as models get deeper: layers streamed from a disk, against training in memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import figures
from benchmarks.harness import Benchmark, Case, Rival
from benchmarks.pictures import Curves, Line
from benchmarks.tables import MISSING, table
from benchmarks.worker import Task

DEPTHS, QUICK_DEPTHS = (8, 16, 32, 64), (2, 4)
SIZES = {"kind": "llama", "hidden": 640, "intermediate": 1792, "heads": 10, "batch": 1, "length": 128}
SMALL = {"kind": "llama", "hidden": 32, "intermediate": 48, "heads": 2, "vocabulary": 50, "batch": 2, "length": 8}
LEARNING_RATE = 1e-5
STEPS = 3
MOST = 1.1  # the target: the deepest against the shallowest
MEBIBYTE = 2**20

LABELS = {
    "disk": "graphopt, store=disk",
    "disk-eager": "graphopt, store=disk, eager=True",
    "plain": "in memory, eager PyTorch",
}


def build(*, workload: dict[str, Any], method: str, compiler: str = "inductor") -> Task:
    """A training step: forward, loss, backward, AdamW, zero_grad.

    Args:
        workload: Arguments of ``workloads.make``.
        method: A key of ``LABELS``, or ``"torch"`` or ``"compiler"``: nothing but what these load.
        compiler: Of the streamed layers.
    """
    import torch

    if method == "torch":
        return Task(lambda: None)
    if method == "compiler":
        import transformers.models.llama.modeling_llama  # noqa: F401

        add_one = torch.compile(lambda x: x + 1, backend=compiler)
        return Task(lambda: add_one(torch.zeros(1, requires_grad=True)).backward())
    from benchmarks import workloads

    streams = method.startswith("disk")
    training = workloads.make(**workload, meta=streams)
    model = training.model
    store = _stream(model, compiler, eager=method.endswith("eager")) if streams else None
    updates = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    peaks: list[int] = []

    def step() -> None:
        training.loss().backward()
        updates.step()
        updates.zero_grad()
        if store is not None:
            peaks.append(store.peak_resident_bytes)
            store.reset_counters()

    def metrics() -> dict[str, int]:
        found = {"weights_bytes": sum(parameter.nbytes for parameter in model.parameters())}
        return found if store is None else {**found, "buffers_bytes": max(peaks)}

    return Task(step, metrics)


def _stream(model: Any, compiler: str, *, eager: bool) -> Any:
    """Fill a store for a model without values, and stream it from there."""
    import graphopt
    from benchmarks import disk
    from graphopt.passes import LayerToLayer
    from graphopt.runtime.streaming.filling import fill_store

    path = disk.new_folder() / "store"
    fill_store(model, path)
    graphopt.transform(model, [LayerToLayer(store="disk", store_path=path, eager=eager)], compiler=compiler)
    return graphopt.stream(model).store


# --- the cases --------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> tuple[Case, ...]:
    """All depths in one case, each rival in a process of its own, one after the other."""
    sizes, depths = (SMALL, QUICK_DEPTHS) if quick else (SIZES, DEPTHS)
    compiler = {"compiler": "eager"} if quick else {}
    rivals = [
        Rival(
            name=f"{method}-{depth}",
            label=f"{label}, {depth} layers",
            build=build,
            options={"workload": {**sizes, "layers": depth}, "method": method, **compiler},
            ours=method != "plain",
        )
        for method, label in LABELS.items()
        for depth in depths
    ]
    empty = [
        Rival(name=name, label=label, build=build, options={"workload": {}, "method": name, **compiler})
        for name, label in (
            ("torch", "torch imported"),
            ("compiler", "torch and transformers imported, one addition compiled"),
        )
    ]
    return (
        Case(
            name="depth",
            title=f"Memory of {STEPS} training steps of Llama with layers of {sizes['hidden']} and {sizes['intermediate']}, "
            f"batch {sizes['batch']}, {sizes['length']} tokens, AdamW, from the start of the process to its end",
            rivals=(*rivals, *empty),
            baseline=f"disk-{depths[0]}",
            measure="lives",
            steps=STEPS,
            columns={
                "peak_bytes": "peak memory",
                "later_peak_bytes": "without building and compiling",
                "weights_bytes": "weights",
                "buffers_bytes": "the store's buffers",
                "seconds": "step",
            },
        ),
    )


# --- what they show together ------------------------------------------------------------------------------------------


def conclusions(records: Mapping[str, Any]) -> str:
    """Peak memory by depth, and what of it is not torch's."""
    if "depth" not in records:
        return ""
    rivals, depths = records["depth"]["rivals"], _depths(records["depth"])
    empty = {name: _median(rivals, name, "peak_bytes") for name in ("torch", "compiler")}
    rows = []
    for method, label in LABELS.items():
        peaks = {depth: _median(rivals, f"{method}-{depth}", "peak_bytes") for depth in depths}
        name = label if method == "plain" else f"**{label}**"
        rows.append((name, *map(_written, peaks.values()), _growth(peaks)))
        for kind, title in (("torch", "beside torch"), ("compiler", "beside torch, its compiler and transformers")):
            if kind == "compiler" and method == "plain":
                continue  # it compiles nothing
            less = {depth: _without(peak, empty[kind]) for depth, peak in peaks.items()}
            rows.append((f"— {title}", *map(_written, less.values()), _growth(less)))
        if method != "plain":
            metrics = {depth: rivals.get(f"{method}-{depth}", {}).get("metrics", {}) for depth in depths}
            buffers = {depth: found.get("buffers_bytes") for depth, found in metrics.items()}
            rows.append(("— the store's buffers", *map(_written, buffers.values()), _growth(buffers)))
    heads = ("peak memory", *(f"{depth} layers" for depth in depths))
    first, last = depths[0], depths[-1]
    return table((*heads, f"{last} against {first} (target for a process: {MOST:g})"), rows)


def curves(records: Mapping[str, Any]) -> Sequence[Curves]:
    """Peak memory against depth."""
    if "depth" not in records:
        return ()
    rivals = records["depth"]["rivals"]
    lines = []
    for method, label in LABELS.items():
        points = []
        for depth in _depths(records["depth"]):
            if found := figures.summary(figures.samples(rivals, f"{method}-{depth}", "peak_bytes")):
                points.append((float(depth), *(found[key] / MEBIBYTE for key in ("q1", "median", "q3"))))
        lines.append(Line(label=label, points=points, ours=method != "plain"))
    return (
        Curves(
            name="memory",
            title="Peak memory of the process, from its start to its end",
            x="equal layers",
            y="MiB",
            lines=lines,
            doubling=False,
        ),
    )


def _depths(record: Mapping[str, Any]) -> list[int]:
    numbers = (name.rpartition("-")[2] for name in record["rivals"])
    return sorted({int(number) for number in numbers if number.isdigit()})


def _median(rivals: Mapping[str, Any], name: str, quantity: str) -> float | None:
    found = figures.samples(rivals, name, quantity)
    return statistics.median(found) if found else None


def _without(peak: float | None, empty: float | None) -> float | None:
    return None if peak is None or empty is None else peak - empty


def _written(nbytes: float | None) -> str:
    return MISSING if nbytes is None else f"{nbytes / MEBIBYTE:.0f} MiB"


def _growth(by_depth: Mapping[int, float | None]) -> str:
    first, *_, last = by_depth.values()
    return MISSING if first is None or last is None else f"{last / first:.2f}x"


BENCHMARK = Benchmark(
    name="memory_against_depth",
    title="Memory against depth",
    text=(
        "Each model is trained in a process of its own, whose peak of resident memory is read from outside. With a store "
        "the model is made without values and filled layer by layer, and its layers are compiled by Inductor; the model in "
        "memory runs eagerly, which takes less. Two small processes say how much of a peak is what was imported. *Without "
        "building and compiling* is the peak after the first step."
    ),
    cases=cases,
    conclusions=conclusions,
    curves=curves,
)
