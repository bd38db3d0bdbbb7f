"""The pass: which boundaries are worth having, and the nodes that mark them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from torch import nn

from graphopt.annotations import STAGE, Key
from graphopt.capture import CapturedGraph
from graphopt.errors import OptionError
from graphopt.passes.layer_to_layer.layers import (
    WORTH_COMPILING_ONCE,
    Boundaries,
    find_layers,
    num_saved,
    structures,
)
from graphopt.passes.layer_to_layer.losses import split_losses
from graphopt.passes.layer_to_layer.micro_batches import Samples, plan_micro_batches, split_tail
from graphopt.passes.layer_to_layer.segments import Segment, arrange, merged
from graphopt.passes.layer_to_layer.sizes import fit_for_streaming
from graphopt.passes.layer_to_layer.writes import without_shared_writes
from graphopt.pipeline import Pass, PassResult
from graphopt.regions import has_boundaries
from graphopt.runtime.streaming.options import Streaming

if TYPE_CHECKING:
    from graphopt.inspect.plan import Plan

_STORES = ("device", "cpu", "disk")


@final
@dataclass(frozen=True)
class LayerToLayer(Pass, adds=("plan",)):
    """Mark the boundaries between layers: each distinct layer is compiled once, and one layer at a time can be held in memory.

    With ``store="device"`` the weights stay where they are. With ``"cpu"`` or ``"disk"`` they live in host memory or in a folder,
    together with gradients, statistics and the optimizer's state, and are brought to the device layer by layer: forward runs a
    layer for all micro-batches before the next and keeps the values between layers only; backward brings each layer again,
    recomputes and differentiates it, and sends its gradients back; ``optimizer.step()`` works layer by layer. The numbers are
    those of ordinary training. `graphopt.stream` gives access to what is stored, and `plan` says beforehand what it will take.

    Attributes:
        boundaries: ``"auto"``; the path of the module that holds the layers (``"encoder.layer"``, patterns allowed), or several;
            or a function from a module's path to the name of its layer, or ``None``.
        device: where layers compute when they are streamed; ``None`` is the device of the parameters.
        store: ``"device"``, ``"cpu"`` or ``"disk"``.
        store_path: folder of the disk store, which is created.
        microbatch_size: samples that a layer computes at once when it is streamed; ``None``: the whole batch. Layers in which
            samples meet (batch normalisation, a loss that is not a mean or sum over rows) take the whole batch; the report
            names them.
        prefetch: how many layers are loaded ahead.
        eager: update the parameters of a layer while backward goes on with the layer before it, as in L2L-p. Nothing may change
            gradients between ``backward()`` and ``step()`` then: clipping by a global norm, accumulation and ``GradScaler`` are
            refused.
        stash: where the values between layers wait for backward: ``"device"``, ``"cpu"`` or ``"disk"``; ``None``: on the device
            for ``store="cpu"``, else on disk.
        resume: go on with a disk store that exists. Without it an existing store is refused, unless the model has no values (it
            was made on the meta device).

    Raises:
        OptionError: an option has no meaning, alone or with the others.

    Reference: Pudipeddi, Mesmakhosroshahi, Xi, Bharadwaj, "Training Large Neural Networks with Constant Memory using a New
    Execution Algorithm", arXiv:2002.05645, 2020 (L2L and L2L-p).
    """

    boundaries: Boundaries = "auto"
    device: torch.device | str | None = None
    store: Literal["device", "cpu", "disk"] = "device"
    store_path: str | os.PathLike[str] | None = None
    microbatch_size: int | None = None
    prefetch: int = 1
    eager: bool = False
    stash: Literal["device", "cpu", "disk"] | None = None
    resume: bool = False

    name: ClassVar[str] = "layer_to_layer"
    provides: ClassVar[frozenset[Key[Any]]] = frozenset({STAGE})
    changes_numerics: ClassVar[bool] = False
    must_be_last: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, value, allowed in (("store", self.store, _STORES), ("stash", self.stash, (*_STORES, None))):
            if value not in allowed:
                raise OptionError(f"LayerToLayer({option}={value!r}): it is one of {list(allowed)}")
        if self.store == "device":
            defaults = {"device": None, "microbatch_size": None, "eager": False, "stash": None}
            if given := [name for name, default in defaults.items() if getattr(self, name) != default]:
                raise OptionError(
                    f"LayerToLayer({given[0]}={getattr(self, given[0])!r}) has an effect only where layers are streamed: add "
                    "store='cpu' or store='disk'"
                )
        if (self.store == "disk") != (self.store_path is not None):
            raise OptionError(
                f"LayerToLayer(store={self.store!r}, store_path={self.store_path!r}): a folder goes with store='disk', and only "
                "with it"
            )
        if self.resume and self.store != "disk":
            raise OptionError(
                f"LayerToLayer(resume=True, store={self.store!r}): only a disk store outlives its process"
            )
        if self.stash == "disk" and self.store != "disk":
            raise OptionError(f"LayerToLayer(stash='disk', store={self.store!r}): only a disk store has a file for it")
        for option, number, least in (("microbatch_size", self.microbatch_size, 1), ("prefetch", self.prefetch, 0)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
                raise OptionError(f"LayerToLayer({option}={number!r}): it is an int, at least {least}")
        if isinstance(self.boundaries, list):
            object.__setattr__(self, "boundaries", tuple(self.boundaries))

    @property
    def streaming(self) -> Streaming | None:
        """How layers are streamed, if they are."""
        if self.store == "device":
            return None
        return Streaming(
            store=self.store,
            path=None if self.store_path is None else Path(self.store_path),
            device=None if self.device is None else torch.device(self.device),
            microbatch_size=self.microbatch_size,
            prefetch=self.prefetch,
            eager=self.eager,
            stash=self.stash or ("device" if self.store == "cpu" else "disk"),
            resume=self.resume,
        )

    @property
    def needs_samples(self) -> bool:
        """For micro-batches; otherwise shapes may be fixed, as ``torch.compile`` has them."""
        return self.microbatch_size is not None

    @property
    def skips_unsupported(self) -> bool:
        """It is compiled as it is then; where layers are streamed, that is refused later."""
        return True

    @property
    def uuid(self) -> str:
        """The same for all options: they decide where a graph is cut, not what its regions are compiled to."""
        return "layer_to_layer"

    def plan(
        self,
        model: nn.Module,
        /,
        *args: Any,
        optimizer: str = "adamw",
        measure: bool = True,
        bandwidth: float | tuple[float, float] | None = None,
        flops: float | None = None,
        **kwargs: Any,
    ) -> Plan:
        """Say what a training step takes with these options, before anything runs.

        Peak bytes of the device, of the host and on disk; bytes that a step moves; how long that takes, and computing; and from
        how many rows (tokens) per visit of a layer computing hides the transfer. The model is captured without memory for its
        weights and without computing anything. It stays as it is, and may be on the meta device, transformed, or streamed.

        Args:
            model: what is to be trained. If it is transformed, its other passes are planned for as well.
            args: positional arguments of one call; tensors may be on the meta device.
            optimizer: ``"adamw"``, ``"sgd"``, ``"sgd_momentum"``, ``"tgadamw"`` and the other keys of
                `graphopt.inspect.traffic.OPTIMIZERS`: what they keep for each parameter counts.
            measure: time the store and a matrix product on this machine, in a second or two. A disk is measured in a temporary
                folder beside ``store_path``, with a quarter of a GB.
            bandwidth: bytes per second between store and device, or a pair from the store and to it; without ``measure``.
            flops: operations per second of the device in the model's dtype; without ``measure``. Without it, or without
                ``bandwidth``, the plan says nothing about time.
            kwargs: keyword arguments of the same call. Those of ``forward`` that are called like one of the above are given by
                position, or to `graphopt.inspect.plan.make_plan`, which takes the call as a tuple and a dict.

        Returns:
            A `graphopt.inspect.plan.Plan`: ``print`` it, or take ``to_dict()``.

        Raises:
            OptionError: an option has no meaning, layers are not streamed (``store="device"``), the arguments do not fit
                ``forward``, or the device is not here to be measured.
            StoreError: the disk cannot be written to, and so not be measured.
            UnsupportedError: the model cannot be traced without values, or not be streamed.
        """
        from graphopt.inspect.plan import make_plan  # which imports the passes

        return make_plan(
            self, model, args, kwargs, optimizer=optimizer, measure=measure, bandwidth=bandwidth, flops=flops
        )

    def run(self, graph: CapturedGraph) -> PassResult:
        """Insert the boundaries."""
        if has_boundaries(graph):
            return PassResult(graph, 0)
        if self.store == "device":
            found = find_layers(graph, self.boundaries)
            if self.boundaries == "auto":
                found = _worthwhile(graph, found)
            if len(found) < 2:
                return PassResult(graph, 0)
            return _arranged(graph, without_shared_writes(graph, found), ())
        if self.microbatch_size is not None:
            split_losses(graph, Samples.of(graph))
        found = fit_for_streaming(graph, find_layers(graph, self.boundaries))
        found = without_shared_writes(graph, found)
        if self.microbatch_size is None:
            return _arranged(graph, found, ())
        samples = Samples.of(graph)
        found = split_tail(found, samples)
        graph.micro_batches = batches = plan_micro_batches(graph, found, samples)
        notes = [f"{found[stage].name} takes the whole batch: {why}" for stage, why in batches.whole.items()]
        if samples.problem is not None:
            notes = [f"microbatch_size={self.microbatch_size} has no effect: {samples.problem}"]
        return _arranged(graph, found, notes)


def _arranged(graph: CapturedGraph, found: Sequence[Segment], notes: Sequence[str]) -> PassResult:
    if not found:
        return PassResult(graph, 0)
    distinct = len(set(structures(graph, found)))
    arrange(graph, found)
    note = f"{len(found)} regions, {distinct} of them distinct: {', '.join(s.name for s in found)}"
    return PassResult(graph, len(found), (note, *notes))


def _worthwhile(graph: CapturedGraph, found: Sequence[Segment]) -> list[Segment]:
    """Keep boundaries around layers that repeat, if that saves enough; join all others."""
    hashes = structures(graph, found)
    if num_saved(found, hashes) < WORTH_COMPILING_ONCE:
        return []
    counts = Counter(hashes)
    alone = [counts[h] == 1 for h in hashes]
    kept: list[Segment] = []
    for position, segment in enumerate(found):
        if kept and alone[position] and alone[position - 1]:
            kept[-1] = merged(kept[-1], segment)
        else:
            kept.append(segment)
    return kept
