"""What it will take to train a model layer by layer: memory, bytes moved, and time, before anything runs.

`graphopt.passes.LayerToLayer.plan` makes a `Plan`, and so does the command ``graphopt plan``. The model is captured without
memory and without computing anything (`graphopt.dry_run`), so one that fits on no machine can be planned: put it on the
meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphopt.dry_run import dry_run
from graphopt.errors import OptionError, UnsupportedError
from graphopt.inspect.machine import Machine, given, measured
from graphopt.inspect.memory import Peak, StepMemory
from graphopt.inspect.plan_text import lines, short
from graphopt.inspect.stage_costs import GraphCosts, StageCosts, Weight, costs_of
from graphopt.inspect.timing import Timing, hiding_rows, timing_of
from graphopt.inspect.traffic import OptimizerCosts, Traffic, optimizer_costs, stages_of, traffic_of
from graphopt.pipeline import Pass
from graphopt.runtime.data_parallel import unwrap
from graphopt.runtime.streaming.options import Streaming
from graphopt.transform import Setup, is_transformed, setup_of

if TYPE_CHECKING:
    from graphopt.passes import LayerToLayer


@dataclass(frozen=True)
class StagePlan:
    """One stage: a layer, or what lies between layers.

    Attributes:
        parameter_bytes: bytes of the parameters that it reads.
        trainable_bytes: bytes of those that get a gradient.
        kept_bytes: bytes of the values that enter it and are kept for backward, each counted at the first stage that reads it.
        flops_per_sample: operations of forward for one sample; of the whole call where the number of samples is not known.
        num_parts: micro-batches that it runs.
        whole: why it takes the whole batch; ``None`` if it does not.
    """

    name: str
    parameter_bytes: int
    trainable_bytes: int
    kept_bytes: int
    flops_per_sample: int
    num_parts: int
    whole: str | None

    @property
    def training(self) -> str:
        """``"trainable"``, ``"frozen"`` or ``"partly"``; nothing for a stage without parameters."""
        if not self.parameter_bytes:
            return ""
        if not self.trainable_bytes:
            return "frozen"
        return "trainable" if self.trainable_bytes == self.parameter_bytes else "partly"


@dataclass(frozen=True)
class Plan:
    """What a step of a model takes when its layers are streamed.

    Attributes:
        model: name of its class.
        options: of the pass, with the device that was found.
        optimizer: its name.
        num_samples: of the call.
        stages: in the order of forward.
        parameter_bytes: of the whole model.
        traffic: bytes that a step moves without ``eager``.
        traffic_eager: the same with it.
        device_peak: the most memory on the device; on a CPU, all memory.
        host_peak: the most memory of the host.
        disk: bytes of the store's files, by what they hold.
        buffer_bytes: the most that the store's buffers take, of the above; and if the disk does not keep up.
        machine: its speeds.
        timing: of a step without ``eager``; ``None`` if speeds are missing.
        timing_eager: the same with it.
        rows_per_visit: how many rows the matrices of the model's layers are multiplied with each time that their layer is loaded:
            in a language model the tokens of the batch.
        hidden_from: so many rows per visit hide the transfer of a layer's weights behind its forward.
        step_hidden_from: so many hide all that a step moves; infinite if the values between layers take longer to move than to
            compute.
        notes: what the passes have to say.
    """

    model: str
    options: Streaming
    optimizer: str
    num_samples: int | None
    stages: tuple[StagePlan, ...]
    parameter_bytes: int
    traffic: Traffic
    traffic_eager: Traffic
    device_peak: Peak
    host_peak: Peak
    disk: Mapping[str, int]
    buffer_bytes: tuple[int, int]
    machine: Machine
    timing: Timing | None
    timing_eager: Timing | None
    rows_per_visit: float
    hidden_from: float | None
    step_hidden_from: float | None
    notes: tuple[str, ...]

    @property
    def moved(self) -> Traffic:
        """The traffic of the pass's own option ``eager``."""
        return self.traffic_eager if self.options.eager else self.traffic

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it: bytes, seconds, operations, and speeds per second."""
        options = {key: value for key, value in asdict(self.options).items() if key not in ("path", "resume")}
        return {
            "model": self.model,
            "options": {**options, "path": _text(self.options.path), "device": _text(self.options.device)},
            "optimizer": self.optimizer,
            "num_samples": self.num_samples,
            "parameter_bytes": self.parameter_bytes,
            "stages": [{**asdict(stage), "training": stage.training} for stage in self.stages],
            "peak": {
                "device": {"bytes": self.device_peak.nbytes, **asdict(self.device_peak)},
                "host": {"bytes": self.host_peak.nbytes, **asdict(self.host_peak)},
                "disk": {"bytes": sum(self.disk.values()), "parts": dict(self.disk)},
            },
            "buffer_bytes": list(self.buffer_bytes),
            "moved": {
                "eager=False": [asdict(move) for move in self.traffic.moves],
                "eager=True": [asdict(move) for move in self.traffic_eager.moves],
            },
            "machine": asdict(self.machine),
            "timing": {
                "eager=False": None if self.timing is None else self.timing.to_dict(),
                "eager=True": None if self.timing_eager is None else self.timing_eager.to_dict(),
            },
            "rows_per_visit": self.rows_per_visit,
            "hidden_from": self.hidden_from,
            "step_hidden_from": None if self.step_hidden_from == float("inf") else self.step_hidden_from,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return (
            f"Plan({self.model}: {len(self.stages)} stages, peak {short(self.device_peak.nbytes)}B on {self.options.device}, "
            f"{short(self.moved.read + self.moved.written)}B moved in a step)"
        )

    def __str__(self) -> str:
        return "\n".join(lines(self))


def make_plan(
    layer_to_layer: LayerToLayer,
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    optimizer: str = "adamw",
    measure: bool = True,
    bandwidth: float | tuple[float, float] | None = None,
    flops: float | None = None,
) -> Plan:
    """Plan a training step; `graphopt.passes.LayerToLayer.plan` says what the arguments mean."""
    options = layer_to_layer.streaming
    if options is None:
        raise OptionError(
            "LayerToLayer(store='device').plan(): the layers stay on the device, so there is nothing to plan. Plan for "
            "store='cpu', or store='disk' with a store_path"
        )
    costs = optimizer_costs(optimizer)
    if measure and (bandwidth is not None or flops is not None):
        raise OptionError("plan(bandwidth=..., flops=...) says what measuring would find out: add measure=False")
    model = unwrap(model)
    setup = _setup(layer_to_layer, model, costs)
    wanted = options.device if options.device is not None and _is_here(options.device) else None
    run = dry_run(
        model,
        args,
        kwargs,
        setup,
        cannot="be planned without running it",
        instead="Let the forward pass take no decision by values, or run a step and read graphopt.stream(model).store.bytes_read",
        device=wanted,
        beside=replace(setup, passes=(layer_to_layer,)) if len(setup.passes) > 1 else None,
    )
    captured = run.graphs
    found = next((parameter.device for parameter in run.model.parameters()), torch.device("cpu"))
    options = replace(options, device=options.device or found)
    if any(graph.graph is None for graph in captured) or not captured:
        reasons = sorted({row.reason for graph in captured for row in graph.record.uncaptured})
        raise UnsupportedError(
            f"a graph of {type(model).__name__} cannot be captured, so its layers cannot be streamed: "
            f"{'; '.join(reasons) or 'Dynamo skipped the call'}"
        )
    graphs = [costs_of(graph, options.microbatch_size) for graph in captured]
    weights = [
        Weight(name, param.numel(), param.numel() * param.dtype.itemsize, param.dtype, param.requires_grad)
        for name, param in run.model.named_parameters()
    ]
    device = options.device or found
    machine = measured(options, device, _dtype(weights)) if measure else given(bandwidth, flops, options, device)
    notes = tuple(dict.fromkeys(note for graph in captured for result in graph.record.results for note in result.notes))
    return _assemble(type(model).__name__, options, device, optimizer, costs, graphs, weights, machine, notes)


def _assemble(
    model: str,
    options: Streaming,
    device: torch.device,
    optimizer: str,
    costs: OptimizerCosts,
    graphs: Sequence[GraphCosts],
    weights: Sequence[Weight],
    machine: Machine,
    notes: tuple[str, ...],
) -> Plan:
    traffic, traffic_eager = (traffic_of(graphs, options, device, costs, eager=eager) for eager in (False, True))
    memory = StepMemory(graphs, weights, options, device, costs)
    timing = timing_of(graphs, costs, machine, traffic, eager=False)
    timing_eager = timing_of(graphs, costs, machine, traffic_eager, eager=True)
    layers = _layers(graphs)
    numel = sum(stage.weight_numel for stage in layers)
    rows = sum(stage.weight_flops for stage in layers) / (2 * numel) if numel else 0.0
    computing = machine.compute(sum(stage.forward_flops for stage in layers))
    loading = machine.transfer(sum(stage.nbytes for stage in layers), 0)
    chosen, moved = (timing_eager, traffic_eager) if options.eager else (timing, traffic)
    return Plan(
        model=model,
        options=options,
        optimizer=optimizer,
        num_samples=next((graph.num_samples for graph in graphs if graph.num_samples is not None), None),
        stages=tuple(_stage_plans(graphs)),
        parameter_bytes=sum(weight.nbytes for weight in weights),
        traffic=traffic,
        traffic_eager=traffic_eager,
        device_peak=memory.device_peak(),
        host_peak=memory.host_peak(),
        disk=memory.disk,
        buffer_bytes=memory.buffers(),
        machine=machine,
        timing=timing,
        timing_eager=timing_eager,
        rows_per_visit=rows,
        hidden_from=rows * loading / computing if loading is not None and computing else None,
        step_hidden_from=None if chosen is None else hiding_rows(rows, chosen, moved, machine),
        notes=notes,
    )


def _setup(layer_to_layer: LayerToLayer, model: nn.Module, costs: OptimizerCosts) -> Setup:
    """The passes that will run: those of a transformed model, or TrueGrad where the optimizer needs it; this one is the last."""
    if is_transformed(model):
        setup = setup_of(model)
        others: list[Pass] = [item for item in setup.passes if item.name != layer_to_layer.name]
        return replace(setup, passes=(*others, layer_to_layer))
    from graphopt.passes import TrueGrad

    return Setup.parse({"passes": [TrueGrad(), layer_to_layer] if costs.reads_statistics else [layer_to_layer]})


def _is_here(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def _dtype(weights: Sequence[Weight]) -> torch.dtype:
    """The dtype of most bytes."""
    nbytes: Counter[torch.dtype] = Counter()
    for weight in weights:
        nbytes[weight.dtype] += weight.nbytes
    return nbytes.most_common(1)[0][0] if nbytes else torch.float32


def _layers(graphs: Sequence[GraphCosts]) -> list[StageCosts]:
    """The stages that repeat; without any, the one that computes most."""
    stages = [stage for stage in stages_of(graphs) if stage.numel and stage.forward_flops]
    if not stages:
        return []
    (structure, count), *_ = Counter(stage.structure for stage in stages).most_common()
    if count > 1:
        return [stage for stage in stages if stage.structure == structure]
    return [max(stages, key=lambda stage: stage.forward_flops)]


def _stage_plans(graphs: Sequence[GraphCosts]) -> Iterator[StagePlan]:
    for graph in graphs:
        kept: set[str] = set()
        for stage in graph.stages:
            new = [name for name in stage.reads if name not in kept]
            kept.update(new)
            yield StagePlan(
                name=stage.name,
                parameter_bytes=stage.nbytes,
                trainable_bytes=sum(weight.nbytes for weight in stage.weights if weight.name in stage.reached),
                kept_bytes=sum(graph.values[name].nbytes for name in new),
                flops_per_sample=stage.forward_flops // (graph.num_samples or 1),
                num_parts=stage.num_parts,
                whole=stage.whole,
            )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
