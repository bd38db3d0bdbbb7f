"""``optimizer.step()`` of a streamed model: any optimizer that treats each parameter by itself, a few parameters at a time.

A hook that torch calls in front of every ``step`` brings parameters, gradients, statistics and the optimizer's own tensors into
host memory, a group of parameters at a time, lets the optimizer make its ordinary step on these alone, and writes everything
back. Between steps the optimizer's state holds stored tensors, so that ``state_dict()`` works as ever.

With ``eager=True`` a layer's step is made as soon as backward has its gradients (`eager_steps`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from graphopt import _compat
from graphopt import annotations as noted
from graphopt.errors import OptionError, StoreError
from graphopt.optim.base_optimizer import BaseOptimizer
from graphopt.optim.core.modular import Modular
from graphopt.runtime.stores import Store, StoredTensor, Visit
from graphopt.runtime.streaming import saved_optimizers
from graphopt.runtime.streaming.eager_steps import EagerSteps
from graphopt.runtime.streaming.slots import Slot

if TYPE_CHECKING:
    from graphopt.runtime.streaming.run import Run
    from graphopt.runtime.streaming.stages import Stage
    from graphopt.runtime.streaming.stream import Stream

# Classes whose step treats each parameter by itself. Others say so of themselves: ``updates_each_parameter_alone = True``.
_BY_PARAMETER = frozenset(
    getattr(torch.optim, name)
    for name in "Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD Muon".split()
    if name in vars(torch.optim)
)
_ALONE = "updates_each_parameter_alone"
_OF_STEP = ("params", "param_names", "num_steps")
_streams: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()


class OptimizerSteps:
    """The optimizers of one stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._owners: dict[str, weakref.ref[Optimizer]] = {}  # by the name of the parameter
        self._stepping: int | None = None  # the thread on which an optimizer makes its step
        self._hidden: list[tuple[Slot, Any]] = []
        self._eager = EagerSteps(self) if stream.options.eager else None
        _streams.add(self)
        _register_hooks()

    def close(self) -> None:
        """Let go of the hooks and the thread."""
        _streams.discard(self)
        if self._eager is not None:
            self._eager.close()

    def restore(self) -> None:
        """Load all state of the optimizers into memory."""
        for optimizer in self._known:
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, StoredTensor):
                        state[name] = value.load()

    # ------------------------------------------------------------------------------------------------------- one step

    @property
    def is_stepping(self) -> bool:
        """Whether this thread is inside an optimizer's step."""
        return self._stepping == threading.get_ident()

    @property
    def store(self) -> Store:
        """The store of the stream."""
        return self._stream.store

    def optimizer_of(self, slot: Slot) -> Optimizer | None:
        """The optimizer that has made a step for a parameter."""
        reference = self._owners.get(slot.name)
        return None if reference is None else reference()

    def owns(self, optimizer: Optimizer) -> list[Slot]:
        """The streamed parameters of an optimizer, in the order of the layers."""
        ids = {id(param) for param in chain.from_iterable(group["params"] for group in optimizer.param_groups)}
        return [slot for slot in self._stream.slots if id(slot.param) in ids]

    def before_step(self, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        """Make the step for all streamed parameters; what torch runs afterwards finds none of them."""
        self._unhide()  # if a step has failed
        self.check(optimizer)
        self._free_buffers()
        try:
            if self._eager is not None and self._eager.is_open:
                self._eager.finish()
            else:
                self._stream.check()
                if isinstance(optimizer, (BaseOptimizer, Modular)):
                    optimizer.check()  # it would raise for some parameters after others were changed
                self._update(optimizer, [slot for slot in slots if slot.param.grad is not None])
        except BaseException:
            self._undo()
            raise
        for slot in slots:
            self._owners[slot.name] = weakref.ref(optimizer)
            self._hidden.append((slot, slot.param.grad))
            slot.param.grad = None

    def after_step(self, optimizer: Optimizer) -> None:
        """Give the gradients back, and finish the step in the store."""
        self._unhide()
        store = self.store
        extra, small = {}, self._stream.small_state()
        for number, known in enumerate(sorted(self._known, key=lambda o: self._number(o))):
            description, tensors = saved_optimizers.describe(self._stream, known)
            extra[str(number)] = description
            small |= {f"optimizer/{number}/{key}": value for key, value in tensors.items()}
        store.commit(store.step + 1, {"optimizers": extra}, small)
        self._free_buffers()

    def _free_buffers(self) -> None:
        """Between the layers and the optimizer's step, which uses other sizes; not those that it takes long to pin.

        Without it what each phase frees would add to the peak of the next.
        """
        if self._stream.device.type == "cpu":
            self.store.trim()
            _compat.return_freed_memory()

    def _undo(self) -> None:
        """A step failed on the way: a disk store goes back to the last step that was finished, one in memory cannot."""
        if self.store.kind != "disk":
            return
        self.store.rollback()
        for number, found in self.store.extra.get("optimizers", {}).items():
            for optimizer in self._known:
                if found["class"] == saved_optimizers.class_name(optimizer):
                    saved_optimizers.load_numbers(self._stream, optimizer, self.owns(optimizer), found, number)

    def _unhide(self) -> None:
        while self._hidden:
            slot, grad = self._hidden.pop()
            if slot.param.grad is None:
                slot.param.grad = grad

    def _number(self, optimizer: Optimizer) -> int:
        names = [slot.name for slot in self.owns(optimizer)]
        order = {slot.name: index for index, slot in enumerate(self._stream.slots)}
        return min((order[name] for name in names), default=0)

    def check(self, optimizer: Optimizer) -> None:
        """Raise if an optimizer cannot make its step a few parameters at a time."""
        kind = type(optimizer)
        if kind not in _BY_PARAMETER and getattr(optimizer, _ALONE, False) is not True:
            if isinstance(optimizer, Modular):
                raise OptionError(
                    f"{'; '.join(optimizer.places_of_coupled)}: needs all parameters together, and a streamed model brings a "
                    "few at a time. Leave it out of the chain, or take a module that treats each tensor by itself"
                )
            raise OptionError(
                f"{kind.__name__} is not known to update each parameter by itself, and a streamed model brings a few parameters "
                f"at a time. If it does (no norm over all gradients, no line search), say so: {kind.__name__}.{_ALONE} = True"
            )
        if optimizer not in self._known:
            self._refuse_forgotten_state(optimizer)
            self._known.add(optimizer)

    def _refuse_forgotten_state(self, optimizer: Optimizer) -> None:
        for slot in self.owns(optimizer):
            if not slot.states and saved_optimizers.state_keys(self.store, slot):
                raise StoreError(
                    f"the store holds the state of an optimizer for {slot.name}, from step {self._stream.step}, which this "
                    f"{type(optimizer).__name__} does not have. Call graphopt.stream(model).resume(optimizer) before the first "
                    "step"
                )

    def _update(self, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        """The optimizer's step for these parameters, a few at a time."""
        store = self.store
        groups = self._groups(optimizer, slots)
        keys = [[key for slot in group for key in self.keys(optimizer, slot)] for group in groups]
        visit_all = store.visit(keys, prefetch=self._stream.options.prefetch)
        with _compat.large_blocks_apart(), closing(visit_all) as visits:
            for group, visit in zip(groups, visits, strict=True):
                self.update_group(optimizer, group, visit, visit.tensors)

    def update_group(
        self, optimizer: Optimizer, group: Sequence[Slot], visit: Visit, tensors: Mapping[str, Tensor]
    ) -> None:
        """Make the step for a few parameters whose records are in memory: ``tensors``, of which some belong to ``visit``."""
        with self._in_memory(optimizer, group, tensors):
            with _only(optimizer, group):
                _inner_step(optimizer)
            self._collect(optimizer, group, visit, tensors)

    @contextmanager
    def _in_memory(self, optimizer: Optimizer, group: Sequence[Slot], tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Parameters, gradients, statistics and state of a few parameters as ordinary tensors."""
        kept: list[tuple[Slot, Any, Any]] = []
        self._stepping = threading.get_ident()
        try:
            for slot in group:
                state = optimizer.state.get(slot.param, {})
                for name in slot.states:
                    if isinstance(state.get(name), StoredTensor):
                        state[name] = tensors[slot.state_key(name)]
                grad, record = slot.param.grad, noted.take(slot.param)
                kept.append((slot, grad, record))
                slot.param.grad = None
                slot.param.data = tensors[slot.key]
                slot.param.grad = tensors[slot.grad_key]
                if slot.statistic_key in tensors:
                    noted.publish(slot.param, tensors[slot.statistic_key], slot.num_samples)
            yield
        finally:
            self._stepping = None
            for slot, grad, record in kept:
                slot.param.grad = None
                slot.empty()
                slot.param.grad = grad
                noted.give_back(slot.param, record)
                self._store_state(optimizer, slot)

    def _collect(
        self, optimizer: Optimizer, group: Sequence[Slot], visit: Visit, tensors: Mapping[str, Tensor]
    ) -> None:
        """Write back what the step has changed."""
        store = self.store
        back: list[str] = []
        anew: dict[str, Tensor] = {}
        for slot in group:
            value = slot.param.data
            if value is tensors[slot.key] or value.data_ptr() == tensors[slot.key].data_ptr():
                back.append(slot.key)
            else:
                anew[slot.key] = value
            for name, entry in optimizer.state[slot.param].items():
                if not isinstance(entry, Tensor) or isinstance(entry, StoredTensor) or entry.numel() < 2:
                    continue
                key = slot.state_key(name)
                if name not in slot.states:
                    store.create(key, entry.shape, entry.dtype)
                    slot.states.append(name)
                if key in tensors and entry.data_ptr() == tensors[key].data_ptr():
                    back.append(key)
                else:
                    anew[key] = entry
        store.write(anew)
        visit.write_back(back)

    def _store_state(self, optimizer: Optimizer, slot: Slot) -> None:
        state = optimizer.state.get(slot.param, {})
        for name in slot.states:
            state[name] = StoredTensor(self.store, slot.state_key(name), "cpu")

    def keys(self, optimizer: Optimizer, slot: Slot) -> list[str]:
        """The records that a step for one parameter needs."""
        store = self.store
        keys = [slot.key, slot.grad_key]
        if slot.statistic_key in store and store.is_written(slot.statistic_key):
            keys.append(slot.statistic_key)
        state = optimizer.state.get(slot.param, {})
        return [*keys, *(slot.state_key(name) for name in slot.states if isinstance(state.get(name), StoredTensor))]

    def _groups(self, optimizer: Optimizer, slots: Sequence[Slot]) -> list[list[Slot]]:
        """Neighbours that together take no more memory than the largest parameter with what belongs to it."""
        store = self.store
        sizes = {slot.name: sum(store.info(key).nbytes for key in self.keys(optimizer, slot)) for slot in slots}
        limit = max(sizes.values(), default=0)
        groups: list[list[Slot]] = []
        held = 0
        for slot in slots:
            if not groups or held + sizes[slot.name] > limit:
                groups.append([])
                held = 0
            groups[-1].append(slot)
            held += sizes[slot.name]
        return groups

    # ------------------------------------------------------------------------------------------------- before the step

    def begin_backward(self, num_waiting: int) -> None:
        """A backward pass begins, while that of so many other calls has not come."""
        if self._eager is not None:
            self._eager.taken.clear()
            self._eager.begin_backward(self._stream.slots, num_waiting)

    def check_change(self, name: str, operator: str) -> None:
        """Raise `StreamError` if gradients may not be changed between backward and step."""
        if self._eager is not None and not self.is_stepping:
            self._eager.refuse_change(name, operator)

    def take(self, run: Run, stage: Stage, values: Mapping[str, Tensor]) -> bool:
        """Use a stage's gradients up at once; false if they are to be kept."""
        if self._eager is None or not self._owners:
            return False
        self._eager.take(run, stage, values)
        return True

    def has_taken(self, slot: Slot) -> bool:
        """Whether the gradient of a parameter was used up by the running backward pass."""
        return self._eager is not None and slot.name in self._eager.taken

    def resume(self, optimizer: Optimizer) -> None:
        """As `Stream.resume` says."""
        self._stream.load_small_state(buffers=False)
        saved_optimizers.load(self._stream, optimizer, self.owns(optimizer))
        self._known.add(optimizer)


@contextmanager
def _only(optimizer: Optimizer, slots: Sequence[Slot]) -> Iterator[None]:
    """The optimizer as if it had these parameters only.

    What `Modular` keeps in its groups for each parameter, or counts there once a step, is put back, too.
    """
    own = {id(slot.param) for slot in slots}
    kept = [{name: group[name] for name in _OF_STEP if name in group} for group in optimizer.param_groups]
    try:
        for group, before in zip(optimizer.param_groups, kept, strict=True):
            indices = [index for index, param in enumerate(before["params"]) if id(param) in own]
            group["params"] = [before["params"][index] for index in indices]
            if "param_names" in before:
                group["param_names"] = [before["param_names"][index] for index in indices]
        yield
    finally:
        for group, before in zip(optimizer.param_groups, kept, strict=True):
            group.update(before)


def _inner_step(optimizer: Optimizer) -> None:
    """``step()`` without the hooks that torch puts around it."""
    step: Callable[..., Any] = type(optimizer).step
    while hasattr(step, "__wrapped__") and getattr(step, "hooked", False):
        step = step.__wrapped__
    step(optimizer)


_hooks: list[Any] = []


def _register_hooks() -> None:
    """Torch calls these around every optimizer's step, from the first streamed model on."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


@_compat.disable_dynamo
def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    streamed = [(steps, slots) for steps in list(_streams) if (slots := steps.owns(optimizer))]
    if not streamed or any(steps.is_stepping for steps, _ in streamed):
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    loss = None
    if closure is not None:
        for steps, _ in streamed:
            steps.check(optimizer)
        with torch.enable_grad():
            loss = closure()
    with torch.no_grad():
        for steps, slots in streamed:
            steps.before_step(optimizer, slots)
    if closure is None:
        return None
    return (optimizer, lambda: loss, *args[2:]), {key: value for key, value in kwargs.items() if key != "closure"}


@_compat.disable_dynamo
def _after_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for steps in list(_streams):
        if steps._hidden and steps.owns(optimizer):
            steps.after_step(optimizer)
