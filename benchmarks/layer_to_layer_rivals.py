"""The ways to train a model whose batch comes in micro-batches: in memory, checkpointed, and layer by layer.

Each function takes a workload and the number of samples of a micro-batch, and returns a ``Training``. A step trains on the
whole batch, and all of them arrive at the same weights.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import disk
from benchmarks.workloads import Workload

SPEED_REPEATS = 3


@dataclass
class Phases:
    """Seconds of the parts of a step, and what else adds up over steps; the first steps do not count.

    Args:
        skip: How many steps to leave out: they compile, and make the optimizer's state.
    """

    skip: int = 2
    num_steps: int = 0
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs within belongs to a phase."""
        start = time.perf_counter()
        yield
        self.add(f"{name}_seconds", time.perf_counter() - start)

    def add(self, name: str, value: float) -> None:
        """Count something of this step."""
        if self.num_steps >= self.skip:
            self.sums[name] += value

    def end_step(self) -> None:
        """A step is over."""
        self.num_steps += 1

    def means(self) -> dict[str, float]:
        """Per step."""
        counted = self.num_steps - self.skip
        return {name: value / counted for name, value in self.sums.items()} if counted > 0 else {}


@dataclass(frozen=True)
class Training:
    """How a rival trains.

    Args:
        step: Takes a step and returns its loss.
        metrics: What is worth knowing after the last step.
    """

    step: Callable[[], float]
    metrics: Callable[[], Mapping[str, Any]] = dict


def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Torch's fused AdamW, for all rivals."""
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


# --- in memory --------------------------------------------------------------------------------------------------------


def plain(workload: Workload, microbatch: int, *, lr: float, compiler: str) -> Training:
    """``torch.compile``; gradients are accumulated over micro-batches."""
    return _accumulating(workload, torch.compile(workload.model, backend=compiler), microbatch, lr)


def checkpointing(workload: Workload, microbatch: int, *, lr: float, compiler: str) -> Training:
    """The same; every layer keeps its input only and is computed again in backward."""
    from torch.utils.checkpoint import checkpoint

    layers = workload.model.layers
    assert isinstance(layers, nn.ModuleList)

    def forward(input: Tensor) -> Tensor:
        for layer in layers:
            input = checkpoint(layer, input, use_reentrant=False)
        return input

    return _accumulating(workload, torch.compile(forward, backend=compiler), microbatch, lr)


def _accumulating(workload: Workload, compiled: Callable[..., Any], microbatch: int, lr: float) -> Training:
    updates, phases = optimizer(workload.model.parameters(), lr), Phases()
    num = workload.num_samples
    parts = [
        {name: tensor[start : start + microbatch] for name, tensor in workload.batch.items()}
        for start in range(0, num, microbatch)
    ]

    def step() -> float:
        loss = 0.0
        with phases.phase("forward_backward"):
            for part in parts:
                part_loss = workload.loss(compiled, part) / len(parts)
                part_loss.backward()
                loss += part_loss.item()
        with phases.phase("update"):
            updates.step()
            updates.zero_grad()
        phases.end_step()
        return loss

    return Training(step, phases.means)


# --- layer by layer ---------------------------------------------------------------------------------------------------


def streamed(
    workload: Workload, microbatch: int, *, lr: float, compiler: str, store: str, eager: bool = False, prefetch: int = 1
) -> Training:
    """graphopt's ``LayerToLayer`` with a store."""
    import graphopt
    from graphopt.passes import LayerToLayer

    path = disk.new_folder() / "store" if store == "disk" else None
    options: dict[str, Any] = {"store": store, "store_path": path, "microbatch_size": microbatch}
    graphopt.transform(workload.model, [LayerToLayer(**options, eager=eager, prefetch=prefetch)], compiler=compiler)
    updates, phases = optimizer(workload.model.parameters(), lr), Phases()
    found = graphopt.stream(workload.model).store

    def count(phase: str) -> None:
        phases.add(f"{phase}_bytes_read", found.bytes_read)
        phases.add(f"{phase}_bytes_written", found.bytes_written)
        found.reset_counters()

    peak = 0

    def step() -> float:
        nonlocal peak
        found.reset_counters()
        with phases.phase("forward"):
            loss = workload.loss()
        with phases.phase("backward"):
            loss.backward()
        peak = max(peak, found.peak_resident_bytes)
        count("forward_backward")
        with phases.phase("update"):
            updates.step()
        peak = max(peak, found.peak_resident_bytes)
        count("update")
        updates.zero_grad()
        phases.end_step()
        return loss.item()

    def metrics() -> dict[str, Any]:
        means = phases.means()
        totals = {
            f"bytes_{way}": sum(means.get(f"{phase}_bytes_{way}", 0) for phase in ("forward_backward", "update"))
            for way in ("read", "written")
        }
        return {**means, **totals, "peak_resident_bytes": peak}

    return Training(step, metrics)


def layer_to_layer_pytorch(workload: Workload, microbatch: int, *, lr: float, **_: Any) -> Training:
    """The forerunner, used as its README says; on a CPU it moves nothing, and everything stays in memory."""
    from layer_to_layer_pytorch.l2l import Layer2Layer

    wrapped = Layer2Layer(workload.model, layers_attr="layers", microbatch_size=microbatch, gpu_device="cpu")
    updates = optimizer(wrapped.main_params, lr)

    def step() -> float:
        wrapped.zero_grad()
        wrapped.forward(workload.batch["x"])
        loss: float = wrapped.compute_loss(workload.batch["y"], nn.functional.mse_loss)
        wrapped.backward()
        updates.step()
        wrapped.update_main_model_params()
        return loss

    return Training(step)


# --- the disk alone ---------------------------------------------------------------------------------------------------


def transfer(workload: Workload, microbatch: int, **_: Any) -> Training:
    """A step's bytes through a ``DiskStore``, with nothing computed: reads and writes in the mix that training has.

    For every layer its weights are read for forward, read for backward, and read with gradients and the two tensors of
    AdamW; all of these are written back.
    """
    from graphopt.runtime.stores import DiskStore

    folder = disk.new_folder()
    store = DiskStore(folder / "store")
    layers = [list(layer.parameters()) for layer in workload.model.layers]  # type: ignore[union-attr]
    kinds = {"weight": True, "exp_avg": True, "exp_avg_sq": True, "grad": False}  # and whether a crash may not lose it
    everything: list[list[str]] = [[] for _ in layers]
    for kind, durable in kinds.items():
        for number, parameters in enumerate(layers):
            for index, parameter in enumerate(parameters):
                key = f"{kind}/{number}/{index}"
                store.create(key, parameter.shape, parameter.dtype, durable=durable)
                store.write({key: parameter.detach()})
                everything[number].append(key)
    store.commit(0, {})
    weights = [[key for key in keys if key.startswith("weight/")] for keys in everything]
    mixed = [group for groups in zip(weights, weights, everything, strict=True) for group in groups]
    totals: dict[str, int] = {}

    def step() -> float:
        store.reset_counters()
        for number, visit in enumerate(store.visit(mixed)):
            if number % 3 == 2:
                visit.write_back(everything[number // 3])
        store.flush()
        totals["bytes_read"], totals["bytes_written"] = store.bytes_read, store.bytes_written
        return 0.0

    def metrics() -> dict[str, Any]:
        speeds = {f"store_{way}_per_second": speed for way, speed in _store_speeds(store, everything).items()}
        raw = {f"raw_{way}_per_second": speed for way, speed in disk.raw_speeds(folder).items()}
        where = {"file_system": disk.file_system(folder), "direct": store.direct}
        return {**speeds, **raw, **where, **totals}

    return Training(step, metrics)


def _store_speeds(store: Any, groups: list[list[str]]) -> dict[str, float]:
    """Bytes per second that a store reads, and that it writes."""
    values = {key: store.read(key) for key in groups[0]}

    def read() -> None:
        for _ in store.visit(groups):
            pass

    def write() -> None:
        for _ in groups:
            store.write(values)
        store.flush()

    found = {}
    for way, run in (("read", read), ("written", write)):
        speeds = []
        for _ in range(SPEED_REPEATS):
            store.reset_counters()
            start = time.perf_counter()
            run()
            speeds.append((store.bytes_read + store.bytes_written) / (time.perf_counter() - start))
        found[way] = sorted(speeds)[SPEED_REPEATS // 2]
    return found
