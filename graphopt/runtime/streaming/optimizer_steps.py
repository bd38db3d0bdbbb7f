"""``optimizer.step()`` of a streamed model: any optimizer that treats each parameter by itself, a few parameters at a time.

A hook that torch calls in front of every ``step`` brings parameters, gradients, statistics and the optimizer's own tensors into
host memory, a group of parameters at a time, lets the optimizer make its ordinary step on these alone, and writes everything
back. Between steps the optimizer's state holds stored tensors, so that ``state_dict()`` works as ever.

With ``eager=True`` a layer's step is made as soon as backward has its gradients, on a thread of its own, while backward goes on.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from graphopt import _compat, annotations
from graphopt.errors import OptionError, StoreError, StreamError
from graphopt.optim.base_optimizer import BaseOptimizer
from graphopt.runtime.stores import Store, StoredTensor, Visit
from graphopt.runtime.streaming.slots import Slot, stored_gradient

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
_EAGER = (
    "LayerToLayer(eager=True) updates a layer while backward still computes the layers before it, so {what}. Use eager=False, "
    "with which it is exact"
)

_streams: weakref.WeakSet[OptimizerSteps] = weakref.WeakSet()


@dataclass
class _Pending:
    """Gradients of one stage that wait for their update."""

    slots: list[Slot]
    values: dict[str, Tensor]


class OptimizerSteps:
    """The optimizers of one stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._of_slot: dict[str, tuple[weakref.ref[Optimizer], dict[str, Any]]] = {}  # name -> optimizer and its group
        self._stepping: int | None = None  # the thread on which an optimizer makes its step
        self._hidden: list[tuple[Slot, Any]] = []
        self._worker: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []
        self._is_open_step = False  # eager: a backward pass has updated parameters, and step() has not been called
        self.taken: set[str] = set()  # eager: parameters whose gradient the running backward pass has used up
        _streams.add(self)
        _register_hooks()

    def close(self) -> None:
        """Let go of the hooks and the thread."""
        _streams.discard(self)
        if self._worker is not None:
            self._worker.shutdown()

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

    def owns(self, optimizer: Optimizer) -> list[Slot]:
        """The streamed parameters of an optimizer, in the order of the layers."""
        ids = {id(param) for param in chain.from_iterable(group["params"] for group in optimizer.param_groups)}
        return [slot for slot in self._stream.slots if id(slot.param) in ids]

    def before_step(self, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        """Make the step for all streamed parameters; what torch runs afterwards finds none of them."""
        self._check(optimizer)
        try:
            if self._is_open_step:
                self._finish_eager()
            else:
                self._stream.check()
                if isinstance(optimizer, BaseOptimizer):
                    optimizer.check()  # it would raise for some parameters after others were changed
                self._update(optimizer, [slot for slot in slots if slot.param.grad is not None])
        except BaseException:
            self._undo()
            raise
        for slot in slots:
            self._of_slot[slot.name] = (weakref.ref(optimizer), _group_of(optimizer, slot))
            self._hidden.append((slot, slot.param.grad))
            slot.param.grad = None

    def after_step(self, optimizer: Optimizer) -> None:
        """Give the gradients back, and finish the step in the store."""
        self._unhide()
        store = self._stream.store
        extra, small = {}, self._stream.small_state()
        for number, known in enumerate(sorted(self._known, key=lambda o: self._number(o))):
            description, tensors = self._describe(known)
            extra[str(number)] = description
            small |= {f"optimizer/{number}/{key}": value for key, value in tensors.items()}
        store.commit(store.step + 1, {"optimizers": extra}, small)

    def _undo(self) -> None:
        """A step failed on the way: a disk store goes back to the last step that was finished, one in memory cannot."""
        store = self._stream.store
        if store.kind == "disk":
            store.rollback()
            for number, found in store.extra.get("optimizers", {}).items():
                for optimizer in self._known:
                    if found["class"] == _class_name(optimizer):
                        self._load_numbers(optimizer, found, number)

    def _unhide(self) -> None:
        while self._hidden:
            slot, grad = self._hidden.pop()
            if slot.param.grad is None:
                slot.param.grad = grad

    def _number(self, optimizer: Optimizer) -> int:
        names = [slot.name for slot in self.owns(optimizer)]
        order = {slot.name: index for index, slot in enumerate(self._stream.slots)}
        return min((order[name] for name in names), default=0)

    def _check(self, optimizer: Optimizer) -> None:
        kind = type(optimizer)
        if kind not in _BY_PARAMETER and getattr(kind, _ALONE, False) is not True:
            raise OptionError(
                f"{kind.__name__} is not known to update each parameter by itself, and a streamed model brings a few parameters at "
                f"a time. If it does (no norm over all gradients, no line search), say so: {kind.__name__}.{_ALONE} = True"
            )
        if optimizer not in self._known:
            self._refuse_forgotten_state(optimizer)
            self._known.add(optimizer)

    def _refuse_forgotten_state(self, optimizer: Optimizer) -> None:
        for slot in self.owns(optimizer):
            if not slot.states and _state_keys(self._stream.store, slot):
                raise StoreError(
                    f"the store holds the state of an optimizer for {slot.name}, from step {self._stream.step}, which this "
                    f"{type(optimizer).__name__} does not have. Call graphopt.stream(model).resume(optimizer) before the first step"
                )

    def _update(self, optimizer: Optimizer, slots: Sequence[Slot]) -> None:
        """The optimizer's step for these parameters, a few at a time."""
        store = self._stream.store
        groups = self._groups(optimizer, slots)
        keys = [[key for slot in group for key in self._keys(optimizer, slot)] for group in groups]
        with closing(cast(Any, store.visit(keys, prefetch=self._stream.options.prefetch))) as visits:
            for group, visit in zip(groups, visits, strict=True):
                self._update_group(optimizer, group, visit, visit.tensors)

    def _update_group(
        self, optimizer: Optimizer, group: Sequence[Slot], visit: Visit, tensors: Mapping[str, Tensor]
    ) -> None:
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
                state = optimizer.state.get(slot.param)
                for name in slot.states if state is not None else ():
                    if isinstance(state[name], StoredTensor):
                        state[name] = tensors[slot.state_key(name)]
                grad, record = slot.param.grad, annotations.take(slot.param)
                kept.append((slot, grad, record))
                slot.param.grad = None
                slot.param.data = tensors[slot.key]
                slot.param.grad = tensors[slot.grad_key]
                if slot.statistic_key in tensors:
                    annotations.publish(slot.param, tensors[slot.statistic_key], slot.num_samples)
            yield
        finally:
            self._stepping = None
            for slot, grad, record in kept:
                slot.param.grad = None
                slot.empty()
                slot.param.grad = grad
                annotations.give_back(slot.param, record)
                self._store_state(optimizer, slot)

    def _collect(self, optimizer: Optimizer, group: Sequence[Slot], visit: Visit, tensors: Mapping[str, Tensor]) -> None:
        """Write back what the step has changed."""
        store = self._stream.store
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
        state = optimizer.state.get(slot.param)
        for name in slot.states if state is not None else ():
            state[name] = StoredTensor(self._stream.store, slot.state_key(name), "cpu")

    def _keys(self, optimizer: Optimizer, slot: Slot) -> list[str]:
        store = self._stream.store
        keys = [slot.key, slot.grad_key]
        if slot.statistic_key in store and store.is_written(slot.statistic_key):
            keys.append(slot.statistic_key)
        state = optimizer.state.get(slot.param, {})
        return [*keys, *(slot.state_key(name) for name in slot.states if isinstance(state.get(name), StoredTensor))]

    def _groups(self, optimizer: Optimizer, slots: Sequence[Slot]) -> list[list[Slot]]:
        """Neighbours that together take no more memory than the largest parameter with what belongs to it."""
        store = self._stream.store
        sizes = {
            slot.name: sum(store.info(key).nbytes for key in self._keys(optimizer, slot)) for slot in slots
        }
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

    # ---------------------------------------------------------------------------------------------------------- eager

    @property
    def _is_eager(self) -> bool:
        return self._stream.options.eager and bool(self._of_slot)

    def begin_backward(self, waiting: Sequence[Run]) -> None:
        """A backward pass begins.

        Raises:
            StreamError: with ``eager``, parameters would be updated that are still needed, or twice in a step.
        """
        self.taken.clear()
        if not self._stream.options.eager:
            return
        if self._is_open_step or any(stored_gradient(slot) is not None for slot in self._stream.slots):
            raise StreamError(
                _EAGER.format(what="gradients cannot be accumulated over several backward passes; call optimizer.step() and "
                              "zero_grad() after each")
            )  # fmt: skip
        if waiting:
            raise StreamError(
                _EAGER.format(what=f"the backward passes of {len(waiting)} other calls of the model, which need the parameters as "
                              "they are, may not be waiting")
            )  # fmt: skip

    def check_change(self, name: str, operator: str) -> None:
        """Raise `StreamError` if gradients may not be changed between backward and step."""
        if self._stream.options.eager and not self.is_stepping:
            raise StreamError(
                f"{operator} changes the gradient of {name}: "
                + _EAGER.format(what="its gradient is used up before a norm over all of them (clip_grad_norm_) or a check for "
                                "infinities (GradScaler) could be known")
            )  # fmt: skip

    def take(self, run: Run, stage: Stage, values: Mapping[str, Tensor]) -> bool:
        """Make the update of a stage that backward is through with; false if gradients are to be kept."""
        if not self._is_eager:
            return False
        self._is_open_step = True
        store = self._stream.store
        last = run.graph.last_stage_of
        own = [
            slot
            for position in stage.parameters
            if last.get(position) == stage.index and (slot := run.slots[position]).name in self._of_slot
        ]
        later = {key: value for key, value in values.items() if not any(key in _own_keys(slot) for slot in own)}
        if later:
            store.write(later, add=True)  # tied parameters, which an earlier stage uses too, and those without an optimizer
        ready = [slot for slot in own if slot.grad_key in values or _is_written(store, slot.grad_key)]
        self.taken.update(slot.name for slot in own)
        for position in stage.parameters:
            if (slot := run.slots[position]) in own and position in run.graph.num_samples:
                slot.num_samples = run.num_samples(position)
        if ready:
            update = {key: value for key, value in values.items() if key not in later}
            self._submit(_Pending(ready, update))
        return True

    def _submit(self, pending: _Pending) -> None:
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "graphopt-eager")
        while len(self._running) > 1:
            self._running.pop(0).result()
        self._running.append(self._worker.submit(self._update_now, pending))

    def _update_now(self, pending: _Pending) -> None:
        """On the thread: gradients are in memory, the rest comes from the store."""
        store = self._stream.store
        by_optimizer: dict[int, tuple[Optimizer, list[Slot]]] = {}
        for slot in pending.slots:
            reference, _ = self._of_slot.get(slot.name, (lambda: None, {}))
            optimizer = reference()
            if optimizer is not None:
                by_optimizer.setdefault(id(optimizer), (optimizer, []))[1].append(slot)
        for optimizer, slots in by_optimizer.values():
            for slot in slots:
                for key in (slot.grad_key, slot.statistic_key):
                    if _is_written(store, key):
                        tied = store.read(key)
                        pending.values[key] = pending.values[key].cpu() + tied if key in pending.values else tied
                        store.clear([key])
            keys = [
                [key for key in self._keys(optimizer, slot) if key not in _own_keys(slot)] for slot in slots
            ]
            with closing(cast(Any, store.visit(keys, prefetch=1))) as visits:
                for slot, visit in zip(slots, visits, strict=True):
                    own = {key: pending.values[key].cpu() for key in _own_keys(slot) if key in pending.values}
                    self._update_group(optimizer, [slot], visit, {**visit.tensors, **own})

    def _finish_eager(self) -> None:
        """``step()``: wait for the updates."""
        self._is_open_step = False
        running, self._running = self._running, []
        for future in running:
            future.result()

    # --------------------------------------------------------------------------------------------------------- resume

    def _describe(self, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What is needed beside the stored tensors: options of the groups, counts, and small tensors."""
        names = {id(slot.param): slot.name for slot in self._stream.slots}
        tensors: dict[str, Tensor] = {}
        groups = []
        for group in optimizer.param_groups:
            options = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
            groups.append({"options": options, "params": [names.get(id(param), "") for param in group["params"]]})
        numbers: dict[str, dict[str, Any]] = {}
        for param, state in optimizer.state.items():
            name = names.get(id(param))
            for key, value in state.items() if name is not None else ():
                if isinstance(value, StoredTensor):
                    continue
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                else:
                    numbers.setdefault(cast(str, name), {})[key] = _plain(value)
        return {"class": _class_name(optimizer), "groups": groups, "numbers": numbers}, tensors

    def resume(self, optimizer: Optimizer) -> None:
        """As `Stream.resume` says."""
        store = self._stream.store
        saved = store.extra.get("optimizers", {})
        own = [slot.name for slot in self.owns(optimizer)]
        kind = _class_name(optimizer)
        self._stream.load_small_state(buffers=False)
        if not saved:
            self._known.add(optimizer)
            return  # killed before the first step
        for number, found in saved.items():
            names = [name for group in found["groups"] for name in group["params"] if name]
            if found["class"] == kind and set(names) == set(own):
                self._load(optimizer, found, number)
                self._known.add(optimizer)
                return
        described = "; ".join(f"{f['class']} over {sum(len(g['params']) for g in f['groups'])} parameters" for f in saved.values())
        raise StoreError(
            f"the store holds the state of other optimizers ({described}) than this {kind} over {len(own)} parameters. Make the "
            "optimizer as it was made then"
        )

    def _load(self, optimizer: Optimizer, found: Mapping[str, Any], number: str) -> None:
        store = self._stream.store
        if [len(g["params"]) for g in found["groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
            raise StoreError(
                f"the store holds the state of an optimizer with groups of {[len(g['params']) for g in found['groups']]} parameters, "
                f"and this one has groups of {[len(g['params']) for g in optimizer.param_groups]}"
            )
        for group, saved in zip(optimizer.param_groups, found["groups"], strict=True):
            for key, value in saved["options"].items():
                old = group.get(key)
                if isinstance(old, Tensor):
                    old.fill_(value)
                elif value is not None or old is None:
                    group[key] = tuple(value) if isinstance(old, tuple) else value
        self._load_numbers(optimizer, found, number)
        for slot in self.owns(optimizer):
            for key in _state_keys(store, slot):
                name = key.split("/")[1]
                slot.states.append(name)
                optimizer.state[slot.param][name] = StoredTensor(store, key, "cpu")

    def _load_numbers(self, optimizer: Optimizer, found: Mapping[str, Any], number: str) -> None:
        """Counts, and other small parts of the state."""
        for slot in self.owns(optimizer):
            numbers = found["numbers"].get(slot.name, {})
            prefix = f"optimizer/{number}/{slot.name}/"
            tensors = {key: v.clone() for key, v in self._stream.store.small.items() if key.startswith(prefix)}
            if numbers or tensors:
                optimizer.state[slot.param].update(numbers)
                optimizer.state[slot.param].update({key.removeprefix(prefix): v for key, v in tensors.items()})


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; what it cannot hold is left to the optimizer that resumes."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else None


def _class_name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _state_keys(store: Store, slot: Slot) -> list[str]:
    """The records of an optimizer's tensors for one parameter."""
    return [key for key in store.keys() if key.startswith("state/") and key.split("/", 2)[2] == slot.name]


def _own_keys(slot: Slot) -> tuple[str, str]:
    return slot.grad_key, slot.statistic_key


def _is_written(store: Store, key: str) -> bool:
    return key in store and store.is_written(key)


def _group_of(optimizer: Optimizer, slot: Slot) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(param is slot.param for param in group["params"]))


@contextmanager
def _only(optimizer: Optimizer, slots: Sequence[Slot]) -> Iterator[None]:
    """The optimizer as if it had these parameters only."""
    own = {id(slot.param) for slot in slots}
    before = [group["params"] for group in optimizer.param_groups]
    try:
        for group, params in zip(optimizer.param_groups, before, strict=True):
            group["params"] = [param for param in params if id(param) in own]
        yield
    finally:
        for group, params in zip(optimizer.param_groups, before, strict=True):
            group["params"] = params


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
            steps._check(optimizer)
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
