"""Updates during backward (L2L-p): a layer's parameters change while the layers before it are still being differentiated.

As soon as backward has all gradients of a parameter they go, in memory, to a thread that brings the parameter and the
optimizer's tensors, makes the optimizer's ordinary step on them, and writes them back. ``optimizer.step()`` waits for it and
finishes the step. Which optimizer owns which parameter is known from its first ``step()``, which is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from graphopt import _compat
from graphopt.errors import StreamError
from graphopt.runtime.stores import Store
from graphopt.runtime.streaming.slots import Slot, stored_gradient

if TYPE_CHECKING:
    from graphopt.runtime.streaming.optimizer_steps import OptimizerSteps
    from graphopt.runtime.streaming.run import Run
    from graphopt.runtime.streaming.stages import Stage

_WHY = (
    "LayerToLayer(eager=True) updates a layer while backward still computes the layers before it, so {what}. Use eager=False, "
    "with which it is exact"
)
_ACCUMULATED = (
    "gradients cannot be accumulated over several backward passes; call optimizer.step() and zero_grad() after each"
)
_WAITING = "the backward passes of {number} other calls of the model, which need the parameters as they are, may not be waiting"
_CHANGED = (
    "its gradient is used up before a norm over all of them (clip_grad_norm_) or a check for infinities (GradScaler) could "
    "be known"
)
_MOST_WAITING = 1  # stages whose gradients are in memory while another is being updated


@dataclass
class _Pending:
    """Gradients of one stage that wait for their update."""

    slots: list[Slot]
    values: dict[str, Tensor]


class EagerSteps:
    """The updates of one stream.

    Attributes:
        is_open: whether parameters were updated, and ``step()`` has not been called since.
        taken: names of the parameters whose gradients the running backward pass has used up.
    """

    def __init__(self, steps: OptimizerSteps) -> None:
        self._steps = steps
        self._worker: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []
        self.is_open = False
        self.taken: set[str] = set()

    def close(self) -> None:
        """End the thread."""
        if self._worker is not None:
            self._worker.shutdown()

    def begin_backward(self, slots: Sequence[Slot], num_waiting: int) -> None:
        """A backward pass begins.

        Raises:
            StreamError: parameters would be updated that are still needed, or twice in a step.
        """
        if self.is_open or any(stored_gradient(slot) is not None for slot in slots):
            raise StreamError(_WHY.format(what=_ACCUMULATED))
        if num_waiting:
            raise StreamError(_WHY.format(what=_WAITING.format(number=num_waiting)))

    def refuse_change(self, name: str, operator: str) -> None:
        """Raise `StreamError`: a gradient is to be changed between backward and step."""
        raise StreamError(f"{operator} changes the gradient of {name}: {_WHY.format(what=_CHANGED)}")

    def take(self, run: Run, stage: Stage, values: Mapping[str, Tensor]) -> None:
        """Update the parameters of a stage that backward is through with."""
        self.is_open = True
        store, last = self._steps.store, run.graph.last_stage_of
        own = {
            slot: position
            for position in stage.parameters
            if last.get(position) == stage.index and self._steps.optimizer_of(slot := run.slots[position]) is not None
        }
        keys = {key for slot in own for key in _keys(slot)}
        store.write({key: value for key, value in values.items() if key not in keys}, add=True)  # tied, or nobody's
        self.taken.update(slot.name for slot in own)
        for slot, position in own.items():
            if position in run.graph.num_samples:
                slot.num_samples = run.num_samples(position)
        ready = [slot for slot in own if slot.grad_key in values or _is_written(store, slot.grad_key)]
        if ready:
            self._submit(_Pending(ready, {key: value for key, value in values.items() if key in keys}))

    def finish(self) -> None:
        """Wait for all updates; raises what one of them has raised."""
        self.is_open = False
        running, self._running = self._running, []
        for future in running:
            future.result()

    def _submit(self, pending: _Pending) -> None:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "graphopt-eager")
        while len(self._running) > _MOST_WAITING:
            self._running.pop(0).result()
        self._running.append(self._worker.submit(self._update, pending))

    def _update(self, pending: _Pending) -> None:
        by_optimizer: dict[Optimizer, list[Slot]] = {}
        for slot in pending.slots:
            optimizer = self._steps.optimizer_of(slot)
            if optimizer is not None:
                by_optimizer.setdefault(optimizer, []).append(slot)
        for optimizer, slots in by_optimizer.items():
            gradients = {slot: self._gradients(slot, pending.values) for slot in slots}
            keys = [[key for key in self._steps.keys(optimizer, slot) if key not in _keys(slot)] for slot in slots]
            with _compat.large_blocks_apart(), closing(self._steps.store.visit(keys, prefetch=1)) as visits:
                for slot, visit in zip(slots, visits, strict=True):
                    self._steps.update_group(optimizer, [slot], visit, {**visit.tensors, **gradients.pop(slot)})

    def _gradients(self, slot: Slot, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradient and statistic in host memory, with what later stages have contributed to a tied parameter."""
        store = self._steps.store
        found = {key: values[key].cpu() for key in _keys(slot) if key in values}
        for key in _keys(slot):
            if _is_written(store, key):
                found[key] = store.read(key) + found[key] if key in found else store.read(key)
                store.clear([key])
        return found


def _keys(slot: Slot) -> tuple[str, str]:
    return slot.grad_key, slot.statistic_key


def _is_written(store: Store, key: str) -> bool:
    return key in store and store.is_written(key)
