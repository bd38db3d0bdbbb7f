"""A model whose weights live in a store: what is where, and what belongs to one step."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from graphopt import _compat
from graphopt import annotations as noted
from graphopt.annotations import SAMPLE_GRAD_NORM, SUM_GRAD_SQUARED, SUM_POSITION_GRAD_SQUARED, Key
from graphopt.errors import OptionError, StoreError, StreamError
from graphopt.runtime.stores import DiskStore, HostStore, Store, StoredTensor
from graphopt.runtime.streaming import outside
from graphopt.runtime.streaming.exporting import save_safetensors
from graphopt.runtime.streaming.husks import fill_store, match_store, small_state, tie_again
from graphopt.runtime.streaming.optimizer_steps import OptimizerSteps
from graphopt.runtime.streaming.options import Streaming
from graphopt.runtime.streaming.random_states import set_random_state
from graphopt.runtime.streaming.slots import Slot, signature
from graphopt.runtime.streaming.state_dicts import StateDictHooks

if TYPE_CHECKING:
    from graphopt.runtime.streaming.run import Run
    from graphopt.runtime.streaming.stages import Stage


_LEAST_PENDING = 1 << 20  # bytes on their way to the disk, or the largest parameter
Direction = Literal["forward", "backward"]


class Stream:
    """The store of one model, and everything in it that belongs to a parameter.

    Made by ``graphopt.transform(model, [..., LayerToLayer(store=...)])``; `graphopt.stream` returns it.

    Attributes:
        store: the store itself.
        options: those of the pass.
        device: where layers compute.
        slots: the parameters.
        on_stage: called after each stage, if it is set: which pass, the stage's number in it from 0, and how many there are.
        on_gradient: called with a parameter's name and its gradient from one stage, if it is set; what it returns is added to
            the store instead. It does not see statistics, which would have to follow.
    """

    def __init__(self, model: nn.Module, options: Streaming) -> None:
        self.options = options
        if any(param.device.type == "meta" for param in model.parameters()):
            tie_again(model)
        named = list(model.named_parameters())
        self.device = options.device or _device_of(named)
        self.slots = [Slot(name, param, self.device) for name, param in named]
        self._model = weakref.ref(model)
        for buffer in self._buffers.values():  # layers read them where they compute
            if buffer.device.type != "meta" and buffer.device != self.device:
                buffer.data = buffer.data.to(self.device)
        self._by_id = {id(slot.param): slot for slot in self.slots}
        self._waiting: weakref.WeakSet[Run] = weakref.WeakSet()  # forward passes whose backward has not come
        self._accumulated = False
        self.on_stage: Callable[[Direction, int, int], None] | None = None
        self.on_gradient: Callable[[str, Tensor], Tensor] | None = None
        self.store = _open(options, {slot.name: slot for slot in self.slots})
        try:
            if self.store.keys():
                match_store(self, model)
            else:
                fill_store(self)
        except BaseException:
            self.store.close()
            raise
        self.optimizers = OptimizerSteps(self)
        self._hooks = StateDictHooks(model, self)
        self._watches = outside.watch(self.slots)
        self._used: set[str] = set()  # by graphs during the current call

    # ------------------------------------------------------------------------------------------------- what users call

    @property
    def step(self) -> int:
        """Steps that are finished, and, on disk, survive the process."""
        return self.store.step

    def value(self, name: str) -> StoredTensor:
        """A parameter as a tensor that is loaded when it is read, and written through.

        Raises:
            StreamError: no parameter has this name.
        """
        slot = next((slot for slot in self.slots if slot.name == name), None)
        if slot is None:
            raise StreamError(
                f"the model has no parameter {name!r}; it has {[slot.name for slot in self.slots[:5]]}, ..."
            )
        return StoredTensor(self.store, slot.key, self.device)

    def resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Give an optimizer the state that it had at the last finished step, and set the random generators.

        Args:
            optimizer: made as it was made then: of the same class, over the same parameters in the same groups.

        Returns:
            The number of finished steps.

        Raises:
            StoreError: the store holds the state of another optimizer.
        """
        self.optimizers.resume(optimizer)
        return self.step

    def save_safetensors(self, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Write the model's values to safetensors files as transformers reads them, one tensor in memory at a time.

        Args:
            folder: gets ``model.safetensors``, or shards and their index.
            max_shard_bytes: size of a shard.
        """
        save_safetensors(self._hooks.state_dict(), folder, max_shard_bytes=max_shard_bytes)

    def close(self) -> None:
        """Close the store. What is in it stays there; the model cannot be used any more, except by another process."""
        self.optimizers.close()
        self.store.close()

    def __repr__(self) -> str:
        return f"Stream({len(self.slots)} parameters, step {self.step}, {self.store!r})"

    # ------------------------------------------------------------------------------------------- what transform calls

    def check(self) -> None:
        """Raise `StreamError` if a parameter is not what the stream has put there."""
        if self.store.is_closed:
            raise StreamError(
                "the store of this model is closed. Call graphopt.transform again, with resume=True for one on disk"
            )
        for slot in self.slots:
            slot.check()

    def begin_call(self) -> None:
        """The model is called."""
        self._used.clear()

    def end_call(self, outputs: Any) -> None:
        """The call returns: raise `StreamError` if a parameter was read where nobody has loaded it."""
        outside.check_outputs(outputs, self.slots, self._used)

    def restore(self) -> None:
        """Bring all values back into memory, and forget the store."""
        self._hooks.remove()
        for watch in self._watches:
            watch.remove()
        for slot in self.slots:
            gradient = slot.param.grad
            slot.param.data = self.store.read(slot.key).to(self.device)
            if isinstance(gradient, StoredTensor):
                noted.clear([slot.param])
                slot.param.grad = gradient.load()
        self.optimizers.restore()
        self.close()

    # ---------------------------------------------------------------------------------------------- what the runs call

    def slot_of(self, param: Any) -> Slot:
        """The slot of a parameter that a graph was called with."""
        slot = self._by_id.get(id(param))
        if slot is None:
            raise StreamError(
                f"a parameter of shape {tuple(param.shape)} was added to the model after graphopt.transform, so it is not in the "
                "store. Add it first, or call graphopt.transform again"
            )
        self._used.add(slot.name)
        return slot

    def visit(self, groups: Sequence[Sequence[str]]) -> Generator[dict[str, Tensor]]:
        """The records of each group on the device, one group after the other."""
        visits = self.store.visit(groups, prefetch=self.options.prefetch, device=self.device)
        with closing(visits):
            for visit in visits:
                yield dict(visit.tensors)

    def begin_forward(self, run: Run) -> None:
        """A forward pass whose values are kept."""
        self._waiting.add(run)

    def begin_backward(self, run: Run) -> None:
        """A backward pass begins: gradients that were cleared meanwhile are cleared in the store."""
        self._waiting.discard(run)
        self.optimizers.begin_backward(len(self._waiting))
        for slot in run.slots.values():
            grad = slot.param.grad
            slot.norms = None
            if grad is None:
                self.store.clear([k for k in self._step_keys(slot) if k in self.store])
                noted.clear([slot.param])
                slot.num_samples = 0
            elif not isinstance(grad, StoredTensor):  # somebody has set it
                slot.create_scratch(self.store, slot.grad_key, slot.param.dtype)
                self.store.write({slot.grad_key: grad})
            else:
                slot.norms = noted.find(slot.param, SAMPLE_GRAD_NORM)

    def report(self, direction: Direction, number: int, num_stages: int) -> None:
        """A stage is through."""
        if self.on_stage is not None:
            self.on_stage(direction, number, num_stages)

    def receive(self, run: Run, stage: Stage, found: Mapping[Slot, Mapping[Key[Any] | None, Tensor]]) -> None:
        """The gradients (key ``None``) and statistics of one stage, over all its micro-batches."""
        values: dict[str, Tensor] = {}
        for slot, tensors in found.items():
            for key, tensor in tensors.items():
                record = slot.grad_key if key is None else _record(slot, key)
                if key is None and self.on_gradient is not None:
                    tensor = self.on_gradient(slot.name, tensor)
                slot.create_scratch(self.store, record, tensor.dtype)
                values[record] = tensor
        done = self.optimizers.take(run, stage, values)
        if not done:
            self.store.write(values, add=True)

    def end_backward(self, run: Run, touched: Mapping[int, set[Key[Any]]], norms: Mapping[int, Tensor]) -> None:
        """All stages are through: publish gradients and statistics."""
        for position, slot in run.slots.items():
            if slot.grad_key not in self.store or self.optimizers.has_taken(slot):
                continue
            if not self.store.is_written(slot.grad_key):
                continue
            if not isinstance(slot.param.grad, StoredTensor):
                slot.param.grad = StoredTensor(self.store, slot.grad_key, self.device, on_change=self._on_change(slot))
            keys = touched.get(position, set())
            if SUM_GRAD_SQUARED in keys:
                slot.num_samples += run.num_samples(position)
                self._publish(slot, keys, norms.get(position))

    def _publish(self, slot: Slot, keys: set[Key[Any]], norms: Tensor | None) -> None:
        others: dict[Key[Any], Tensor] = {}
        if SUM_POSITION_GRAD_SQUARED in keys:
            others[SUM_POSITION_GRAD_SQUARED] = StoredTensor(
                self.store, _record(slot, SUM_POSITION_GRAD_SQUARED), self.device
            )
        if norms is not None:
            own = norms.clamp(min=0).sqrt()
            others[SAMPLE_GRAD_NORM] = own if slot.norms is None else torch.cat([slot.norms, own])
        statistic = StoredTensor(self.store, slot.statistic_key, self.device)
        noted.publish(slot.param, statistic, slot.num_samples, others=others)

    def _on_change(self, slot: Slot) -> Any:
        param = weakref.ref(slot.param)

        def before(key: str, operator: str) -> None:
            self.optimizers.check_change(slot.name, operator)
            if (own := param()) is not None:
                noted.before_change(own)

        return before

    def _step_keys(self, slot: Slot) -> list[str]:
        return [slot.grad_key, slot.statistic_key, _record(slot, SUM_POSITION_GRAD_SQUARED)]

    @property
    def _buffers(self) -> dict[str, Tensor]:
        """The model's buffers as they are now: a module may replace them."""
        model = self._model()
        return {} if model is None else dict(model.named_buffers())

    def small_state(self) -> dict[str, Tensor]:
        """Buffers and random states, as they are now."""
        return small_state(self.device, self._buffers)

    def load_small_state(self, *, buffers: bool) -> None:
        """Set buffers, or random states, to what they were at the last finished step."""
        small = self.store.small
        if not buffers:
            states = [small[f"random/{index}"] for index in range(2) if f"random/{index}" in small]
            if states:
                set_random_state(self.device, states)
            return
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                if f"buffer/{name}" in small:
                    buffer.copy_(small[f"buffer/{name}"])


def _record(slot: Slot, key: Key[Any]) -> str:
    return slot.statistic_key if key is SUM_GRAD_SQUARED else f"{key.name}/{slot.name}"


def _device_of(named: Sequence[tuple[str, nn.Parameter]]) -> torch.device:
    devices = {param.device for _, param in named if param.device.type != "meta"}
    if len(devices) > 1:
        raise OptionError(
            f"the parameters lie on several devices ({', '.join(sorted(map(str, devices)))}); say where layers are to compute: "
            "LayerToLayer(device=...)"
        )
    return devices.pop() if devices else torch.device("cpu")


def _open(options: Streaming, slots: Mapping[str, Slot]) -> Store:
    for name, slot in slots.items():
        if type(slot.param) is not nn.Parameter or _compat.local_part(slot.param) is not slot.param:
            raise OptionError(f"{name} is a {type(slot.param).__name__}; only plain parameters can be streamed")
    if options.store == "cpu":
        return HostStore(device=next(iter(slots.values())).husk.device) if slots else HostStore()
    assert options.path is not None
    exists = (options.path / "manifest.json").exists()
    has_values = any(slot.param.device.type != "meta" for slot in slots.values())
    if exists and has_values and not options.resume:
        raise StoreError(
            f"{options.path} holds a store already, and the model has values of its own: which of them count? To go on with the "
            "store, LayerToLayer(resume=True) or a model on the meta device; to begin anew, another folder, or remove this one"
        )
    largest = max((slot.param.nbytes for slot in slots.values()), default=0)
    return DiskStore(options.path, signature=signature(slots.values()), max_pending_bytes=max(largest, _LEAST_PENDING))
