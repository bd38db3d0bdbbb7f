"""What training from a disk costs: layers streamed from a store against training in memory, and against the bound."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import figures
from benchmarks.harness import Benchmark, Case, Rival
from benchmarks.pictures import Curves, Line
from benchmarks.tables import MISSING, duration, table
from benchmarks.worker import Task

ROUNDS = {1: 7, 2: 5, 4: 4, 8: 3}  # by the number of micro-batches, which is also how long a step takes
MICROBATCH = 1  # samples
SIZES = {"kind": "llama_layers", "layers": 8, "hidden": 512, "intermediate": 1408, "heads": 8, "length": 128}
SMALL = {"kind": "llama_layers", "layers": 3, "hidden": 32, "intermediate": 48, "heads": 2, "length": 8}
LEARNING_RATE, CHECKED_LEARNING_RATE = 1e-5, 1e-3
CHECKED_STEPS = 4
SAME = 1e-4  # largest relative difference of a loss
CHECKED_AT = 2  # micro-batches
TARGET = 0.9  # of the bound
FLOPS = 8  # per weight and token: 2 forward, 2 again, 4 backward
NUM_BYTES = 4  # of a weight


def build(*, workload: dict[str, Any], microbatch: int, method: dict[str, Any], **_: Any) -> Task:
    """A training step on the whole batch.

    Args:
        workload: Arguments of ``workloads.make``.
        microbatch: Samples that are computed at once.
        method: ``{"name": a function of layer_to_layer_rivals, and its options}``.
    """
    from benchmarks import workloads

    data = workloads.make(**workload)
    training = _training(data, microbatch, method, LEARNING_RATE)
    facts = {
        "tokens": workload["batch"] * workload["length"],
        "num_parameters": sum(parameter.numel() for parameter in data.model.parameters()),
    }
    return Task(training.step, lambda: {**facts, **training.metrics()})


def check(*, small: dict[str, Any], microbatch: int, method: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Compare the losses of a few steps with those of eager PyTorch on the whole batch."""
    from benchmarks import layer_to_layer_rivals, workloads

    data = workloads.make(**small)
    updates = layer_to_layer_rivals.optimizer(data.model.parameters(), CHECKED_LEARNING_RATE)
    wanted = []
    for _step in range(CHECKED_STEPS):
        loss = data.loss()
        loss.backward()
        updates.step()
        updates.zero_grad()
        wanted.append(loss.item())
    training = _training(workloads.make(**small), microbatch, method, CHECKED_LEARNING_RATE)
    losses = [training.step() for _step in range(CHECKED_STEPS)]
    error = max(abs(loss - want) / abs(want) for loss, want in zip(losses, wanted, strict=True))
    return {"verdict": "same" if error <= SAME else "wrong", "max_relative_error": error, "losses": losses}


def _training(data: Any, microbatch: int, method: dict[str, Any], lr: float) -> Any:
    from benchmarks import layer_to_layer_rivals

    options = {key: value for key, value in method.items() if key != "name"}
    return getattr(layer_to_layer_rivals, method["name"])(data, microbatch, lr=lr, **options)


# --- the cases --------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> tuple[Case, ...]:
    """One case for each number of micro-batches; a micro-batch is always as large."""
    return tuple(_case(num, quick) for num in ((CHECKED_AT,) if quick else ROUNDS))


def _case(num: int, quick: bool) -> Case:
    sizes = {**(SMALL if quick else SIZES), "batch": num * MICROBATCH}
    small = {**SMALL, "batch": num * MICROBATCH}
    compiler = {"compiler": "eager" if quick else "inductor"}
    streamed = {"name": "streamed", **compiler}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "checkpointing": ("in memory, checkpointed, torch.compile", {"name": "checkpointing", **compiler}),
        "plain": ("in memory, torch.compile", {"name": "plain", **compiler}),
        "transfer": ("the step's bytes through the store, nothing computed", {"name": "transfer"}),
        "disk": ("graphopt, store=disk", {**streamed, "store": "disk"}),
        "disk-eager": ("graphopt, store=disk, eager=True", {**streamed, "store": "disk", "eager": True}),
        "cpu": ("graphopt, store=cpu", {**streamed, "store": "cpu"}),
        "layer-to-layer-pytorch": ("layer-to-layer-pytorch 0.3.0", {"name": "layer_to_layer_pytorch"}),
    }
    rivals = tuple(
        Rival(
            name=name,
            label=label,
            build=build,
            check=check if name != "transfer" and num == CHECKED_AT else None,
            options={"workload": sizes, "small": small, "microbatch": MICROBATCH, "method": method},
            environment="layer-to-layer" if name == "layer-to-layer-pytorch" else "current",
            ours=name in ("disk", "disk-eager", "cpu"),
            note="eager PyTorch, everything in memory" if name == "layer-to-layer-pytorch" else "",
        )
        for name, (label, method) in methods.items()
    )
    tokens = MICROBATCH * sizes["length"]
    megabytes = NUM_BYTES * _weights_of_a_layer(sizes) / 1e6
    return Case(
        name=f"microbatches-{num}",
        title=f"One training step of {sizes['layers']} Llama layers of {megabytes:.3g} MB in float32, {num} micro-batches of "
        f"{tokens} tokens, AdamW",
        rivals=rivals,
        baseline="checkpointing",
        rounds=ROUNDS[num],
        checked="losses",
        shares_caches=True,  # all cases compile the same: a micro-batch
    )


def _weights_of_a_layer(sizes: Mapping[str, Any]) -> int:
    hidden = int(sizes["hidden"])
    return 4 * hidden**2 + 3 * hidden * int(sizes["intermediate"]) + 2 * hidden


# --- the bound --------------------------------------------------------------------------------------------------------


def bounds(rivals: Mapping[str, Any], name: str) -> list[tuple[float, float, float]]:
    """For each round, seconds of computing in memory with recompute, of moving a rival's bytes alone, and of its step.

    The bytes are moved as fast as ``transfer`` has moved bytes in the same round.
    """
    moved, own = (_moved(rivals, rival) for rival in ("transfer", name))
    if not moved or not own:
        return []
    computing, moving, steps = (
        figures.samples(rivals, rival, "seconds") for rival in ("checkpointing", "transfer", name)
    )
    return [(compute, move * own / moved, step) for compute, move, step in zip(computing, moving, steps, strict=False)]


def bound_by_phases(rivals: Mapping[str, Any], name: str) -> list[float]:
    """The bound where an optimizer's step begins after backward: the sum of the bounds of both, for each round."""
    found = bounds(rivals, name)
    metrics = rivals.get(name, {}).get("metrics", {})
    update = rivals.get("checkpointing", {}).get("metrics", {}).get("update_seconds")
    parts = [metrics.get(f"update_bytes_{way}") for way in ("read", "written")]
    if update is None or None in parts or not found:
        return []
    share = sum(parts) / _moved(rivals, name)
    return [max(compute - update, move * (1 - share)) + max(update, move * share) for compute, move, _ in found]


def _moved(rivals: Mapping[str, Any], name: str) -> float:
    """Bytes of a step, both directions; 0 for a rival that failed."""
    rival = rivals.get(name, {})
    metrics = rival.get("metrics", {}) if rival.get("status") == "ok" else {}
    return float(metrics.get("bytes_read", 0) + metrics.get("bytes_written", 0))


# --- what they show together ------------------------------------------------------------------------------------------


def conclusions(records: Mapping[str, Any]) -> str:
    """Step times against the bound, throughputs, and what the disk gives."""
    return "\n\n".join(part for part in (_against_the_bound(records), _throughputs(records), _disk(records)) if part)


def _against_the_bound(records: Mapping[str, Any]) -> str:
    rows = []
    for record in _by_tokens(records):
        for name in ("disk", "disk-eager"):
            found = bounds(record["rivals"], name)
            if not found:
                continue
            metrics = record["rivals"][name]["metrics"]
            computing, moving, steps = (statistics.median(values) for values in zip(*found, strict=True))
            reached = figures.summary([max(compute, move) / step for compute, move, step in found])
            phases = bound_by_phases(record["rivals"], name) if name == "disk" else []
            by_phases = [bound / step for bound, (_, _, step) in zip(phases, found, strict=False)]
            rows.append(
                (
                    f"{_tokens(record)}",
                    f"**{record['rivals'][name]['label']}**",
                    f"{metrics['bytes_read'] / 1e6:.0f} / {metrics['bytes_written'] / 1e6:.0f} MB",
                    duration(computing),
                    duration(moving),
                    duration(steps),
                    _share(reached),
                    _share(figures.summary(by_phases)),
                )
            )
    heads = (
        "tokens per layer visit",
        "",
        "read / written",
        "computing with recompute",
        "moving",
        "step",
        f"bound / step (target: {TARGET:g})",
        "the same, phase by phase",
    )
    return table(heads, rows) if rows else ""


def _throughputs(records: Mapping[str, Any]) -> str:
    ordered = _by_tokens(records)
    names = {name: rival for record in ordered for name, rival in record["rivals"].items() if name != "transfer"}
    rows = []
    for name, rival in names.items():
        cells = []
        for record in ordered:
            found = figures.summary(_tokens_per_second(record, name))
            cells.append(MISSING if found is None else f"{found['median']:.0f}")
        rows.append((f"**{rival['label']}**" if rival["ours"] else rival["label"], *cells))
    return (
        table(("tokens per second, at tokens per layer visit", *(str(_tokens(r)) for r in ordered)), rows)
        if rows
        else ""
    )


def _disk(records: Mapping[str, Any]) -> str:
    found = [r["rivals"]["transfer"]["metrics"] for r in _by_tokens(records) if _moved(r["rivals"], "transfer")]
    if not found:
        return ""
    mixed = [
        _moved(record["rivals"], "transfer") / seconds
        for record in _by_tokens(records)
        for seconds in figures.samples(record["rivals"], "transfer", "seconds")
    ]
    speeds = {
        key: statistics.median(metrics[f"{key}_per_second"] for metrics in found) / 1e9
        for key in ("store_read", "store_written", "raw_read", "raw_written", "raw_mixed")
    }
    how = "direct I/O" if found[0]["direct"] else "through the page cache"
    text = (
        f"The disk ({found[0]['file_system']}, {how}) gives the store {speeds['store_read']:.2f} GB/s reading, "
        f"{speeds['store_written']:.2f} GB/s writing, and {statistics.median(mixed) / 1e9:.2f} GB/s in the mix of a step, both "
        f"directions added; to two threads that do nothing else it gives {speeds['raw_read']:.2f}, {speeds['raw_written']:.2f} "
        f"and {speeds['raw_mixed']:.2f} GB/s."
    )
    if not (knees := _knees(records)):
        return text
    forward, step = knees
    return (
        f"{text} By that, and by the speed of computing in memory, a layer's weights arrive behind the forward of the layer "
        f"before from T\\* = F b / (2 BW) = {forward:.0f} tokens per visit on, and all that a step with `eager=True` moves is "
        f"hidden from {step:.0f} tokens on."
    )


def _knees(records: Mapping[str, Any]) -> tuple[float, float] | None:
    """Tokens per visit that hide a layer's weights behind its forward, and all that an eager step moves."""
    ordered = _by_tokens(records)
    if not ordered:
        return None
    last = ordered[-1]["rivals"]
    found = bounds(last, "disk-eager")
    metrics = last.get("checkpointing", {}).get("metrics", {})
    update = metrics.get("update_seconds")
    if not found or update is None:
        return None
    tokens = metrics["tokens"]
    computing, moving, _ = (statistics.median(values) for values in zip(*found, strict=True))
    per_token = (computing - update) / tokens
    flops = FLOPS * metrics["num_parameters"] / per_token
    bandwidth = last["transfer"]["metrics"]["store_read_per_second"]
    return flops * NUM_BYTES / (2 * bandwidth), max(moving - update, 0) / per_token


def curves(records: Mapping[str, Any]) -> Sequence[Curves]:
    """Throughput against tokens per layer visit, with the predicted knees."""
    ordered = _by_tokens(records)
    names = {name: rival for record in ordered for name, rival in record["rivals"].items() if name != "transfer"}
    lines = []
    for name, rival in names.items():
        points = []
        for record in ordered:
            if found := figures.summary(_tokens_per_second(record, name)):
                points.append((float(_tokens(record)), found["q1"], found["median"], found["q3"]))
        lines.append(Line(label=rival["label"], points=points, ours=rival["ours"]))
    knees = _knees(records)
    texts = ("T* = F b / (2 BW)", "the whole step is hidden")
    return (
        Curves(
            name="throughput",
            title="Training from the disk, layer by layer",
            x="tokens per layer visit",
            y="tokens per second",
            lines=lines,
            marks=tuple(zip(knees, texts, strict=True)) if knees else (),
        ),
    )


def _by_tokens(records: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted((record for record in records.values() if _tokens(record)), key=_tokens)


def _tokens(record: Mapping[str, Any]) -> int:
    """Of a step, which is also how many meet a layer at each of its visits."""
    found = (rival.get("metrics", {}).get("tokens") for rival in record["rivals"].values())
    return next((int(tokens) for tokens in found if tokens), 0)


def _tokens_per_second(record: Mapping[str, Any], name: str) -> list[float]:
    return [_tokens(record) / seconds for seconds in figures.samples(record["rivals"], name, "seconds")]


def _share(found: dict[str, float] | None) -> str:
    return MISSING if found is None else f"{found['median']:.2f} [{found['q1']:.2f}, {found['q3']:.2f}]"


BENCHMARK = Benchmark(
    name="layer_to_layer",
    title="Training layer by layer from a disk",
    text=(
        "Everyone takes the same training step in the same micro-batches and arrives at the same weights; *losses* is what "
        "a comparison of four steps with eager PyTorch says. The bound is the larger of two times of the same round: a step "
        "in memory that computes each layer again in backward, and moving as many bytes through the store, both directions, "
        "with nothing computed. *Phase by phase* is for the optimizer's step that begins when backward is through: the "
        "larger of both times for forward and backward, and again for the step.\n\n"
        "What else trains beyond memory does not run here: FairScale's `OffloadModel` (0.4.13) refuses a machine without "
        "CUDA; DeepSpeed's ZeRO-Infinity (0.19.8) builds its access to disks against libaio, which is not installed; "
        "accelerate's `disk_offload` (1.15.0) is for inference: `backward()` runs, and leaves no gradient on any parameter. "
        "layer-to-layer-pytorch keeps everything in memory where the device is the CPU, so it shows what its schedule costs "
        "without transfers."
    ),
    cases=cases,
    conclusions=conclusions,
    curves=curves,
)
