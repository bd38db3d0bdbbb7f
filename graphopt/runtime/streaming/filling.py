"""`fill_store`: give a model that was built on the meta device its values in a disk store, a module at a time.

How it works: modules are initialised in the order of ``Module.apply``. While it is a module's turn, its own parameters are in
memory. Before, they are on the meta device, where writing to them does nothing. Afterwards they are stored tensors: what a module
does to the parameters of its children, as most models of transformers do, is loaded, changed and written back.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt import _compat
from graphopt.errors import OptionError, StoreError
from graphopt.runtime.stores import DiskStore, StoredTensor
from graphopt.runtime.streaming.checkpoints import Checkpoint, Match, Paths, converted, match
from graphopt.runtime.streaming.husks import become, is_pretrained, small_state, swappable, tie_again
from graphopt.runtime.streaming.slots import Slot, signature

_PENDING = 16 << 20  # bytes that may wait for the disk; more would only take memory
_RESETS = ("reset_parameters", "_reset_parameters")  # the second is that of nn.MultiheadAttention and nn.Transformer


def fill_store(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    checkpoint: Paths | None = None,
    initialize: Callable[[nn.Module], Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Fill a new disk store for a model that has no values yet, with one module's own parameters in memory at a time.

    The model is built under ``torch.device("meta")`` or ``accelerate.init_empty_weights()``. Its parameters stay on the meta
    device; ``graphopt.transform(model, [LayerToLayer(store="disk", store_path=path)])`` connects them with the store, in this
    process or in another that builds the same model. Buffers get their values here, and are in the store as well.

    Only its last write makes the store valid: one whose filling was interrupted is refused, and filled anew by another call.

    Args:
        model: with all parameters on the meta device. Those that modules share are initialised by the first of them.
        path: folder of the store; it must not hold a store with values.
        checkpoint: safetensors files to load, or a folder as ``save_pretrained`` makes it. Names must fit exactly; where
            ``initialize`` is given, what is missing in the files is initialised.
        initialize: called with each module, children first, to set the module's own parameters and buffers in place. By default
            ``_init_weights`` does that in models of transformers, and ``reset_parameters`` in all others; they also serve modules
            that ``initialize`` leaves as they are.
        dtype: of all floating-point parameters, as if the model had been built with it; buffers keep theirs.
        device: where modules are initialised, and where buffers end up.

    Raises:
        OptionError: the model is not on the meta device, an argument means nothing, or nothing initialises a module.
        StoreError: there is a store with values, or the checkpoint does not fit. After any error the model is as it was.
    """
    _check(model, dtype)
    tie_again(model)
    filling = _Filling(model, torch.device(device))
    with _compat.large_blocks_apart(), swappable(model), torch.no_grad():
        try:
            filling.convert(dtype)
            source = None if checkpoint is None else Checkpoint(checkpoint)
            found = None if source is None else match(model, source, may_miss=initialize is not None)
            filling.plan(found, initialize)
            with _new_store(Path(path), signature(filling.slots)) as store:
                filling.create(store)
                filling.initialize_modules()
                if source is not None and found is not None:
                    filling.load(source, found)
                store.commit(0, {}, small_state(filling.device, dict(model.named_buffers())))
        except BaseException:
            filling.undo()
            raise
        filling.finish()


class _Filling:
    """One call of `fill_store`."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device
        self.slots: list[Slot] = []
        self._by_id: dict[int, Slot] = {}
        self._store: DiskStore
        self._dtypes = {param: param.dtype for param in model.parameters()}
        self._buffers = {buffer: None if buffer.device.type == "meta" else buffer.clone() for buffer in model.buffers()}
        self._needed: set[int] = set()  # tensors that have to be initialised
        self._stored: set[int] = set()  # parameters whose values are in the store
        self._initialize: Callable[[nn.Module], Any] | None = None

    # ------------------------------------------------------------------------------------------------------ beforehand

    def convert(self, dtype: torch.dtype | None) -> None:
        """Change the dtype of parameters, and name their records."""
        for param in self._dtypes:
            if dtype is not None and param.is_floating_point():
                become(param, torch.empty_like(param, dtype=dtype))
        self.slots = [Slot(name, param, self.device) for name, param in self.model.named_parameters()]
        self._by_id = {id(slot.param): slot for slot in self.slots}

    def plan(self, found: Match | None, initialize: Callable[[nn.Module], Any] | None) -> None:
        """Find out what has to be initialised, and whether something does it."""
        self._initialize = initialize
        self._needed = {id(buffer) for buffer, value in self._buffers.items() if value is None}
        if found is None:
            self._needed |= self._by_id.keys()
        else:
            named = self.model.state_dict(keep_vars=True)
            missing = {id(named[name]) for name in found.missing}
            self._needed -= {id(value) for value in named.values()} - missing
            self._needed |= missing & self._by_id.keys()
        claimed: set[int] = set()
        without: list[tuple[str, nn.Module, list[str]]] = []
        for name, module, owner in _children_first(self.model):
            own = {attribute: tensor for attribute, tensor in self._own(module).items() if id(tensor) not in claimed}
            claimed.update(map(id, own.values()))
            if own and initialize is None and owner is None and _reset_of(module) is None:
                without.append((name, module, list(own)))
        if without:
            raise _not_initialised(without)

    def create(self, store: DiskStore) -> None:
        """Reserve all records, those of neighbours side by side."""
        self._store = store
        for slot in self.slots:
            store.create(slot.key, slot.param.shape, slot.param.dtype)

    # ---------------------------------------------------------------------------------------------------- initialising

    def initialize_modules(self) -> None:
        """Initialise what has to be, module by module.

        What a module leaves without a value, one that contains it may still initialise.
        """
        left: list[tuple[str, nn.Module, _Own]] = []
        for name, module, owner in _children_first(self.model):
            if not any(id(tensor) in self._needed for tensor in chain(module.parameters(), module.buffers())):
                continue
            with self._own_in_memory(module) as own, torch.device(self.device):
                try:
                    self._initialize_module(module, owner, own)
                except Exception as error:
                    error.add_note(f"in graphopt.fill_store, while {name or 'the model'} was being initialised")
                    raise
                self._check_identity(name, module, own)
            if own.unset():
                left.append((name, module, own))
            for tensor in own.tensors.values():
                if isinstance(tensor, nn.Parameter):
                    self._write(self._by_id[id(tensor)], tensor)
        without = [(name, module, unset) for name, module, own in left if (unset := own.unset())]
        if without:
            raise _not_initialised(without)

    @contextmanager
    def _own_in_memory(self, module: nn.Module) -> Iterator[_Own]:
        """Within it, what the module itself has to initialise is in memory, and what it shares with earlier ones on meta."""
        tensors = self._own(module)
        shared = [self._by_id[id(param)] for param in module._parameters.values() if id(param) in self._stored]
        for tensor in tensors.values():
            become(tensor, torch.full(tensor.shape, _mark(tensor.dtype), dtype=tensor.dtype, device=self.device))
        for slot in shared:
            become(slot.param, torch.empty_like(slot.husk, device="meta"))
        yield _Own(tensors)
        for slot in shared:
            become(slot.param, StoredTensor(self._store, slot.key, self.device))

    def _initialize_module(self, module: nn.Module, owner: Any, own: _Own) -> None:
        if self._initialize is None:
            self._initialize_by_default(module, owner, own)
            return
        self._initialize(module)
        if own.unset():
            self._initialize_by_default(module, owner, own)
            self._initialize(module)

    def _initialize_by_default(self, module: nn.Module, owner: Any, own: _Own) -> None:
        reset = _reset_of(module)
        if owner is not None:
            owner._init_weights(module)
        if reset is not None and (owner is None or own.unset()):
            reset()
            if owner is not None:
                owner._init_weights(module)  # as when it was built: after what its constructor has done

    def _own(self, module: nn.Module) -> dict[str, Tensor]:
        """What the module itself has and has to be initialised, by the names in it."""
        return {
            name: tensor
            for name, tensor in chain(module._parameters.items(), module._buffers.items())
            if tensor is not None and tensor.device.type == "meta" and id(tensor) in self._needed
        }

    def _check_identity(self, name: str, module: nn.Module, own: _Own) -> None:
        for attribute, tensor in own.tensors.items():
            members: dict[str, Any] = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
            if members.get(attribute) is not tensor:
                members[attribute] = tensor
                raise OptionError(
                    f"initialising {name or 'the model'} has put another tensor in the place of {attribute}, which ties and "
                    "optimizers would not follow; change it in place: with torch.no_grad(), tensor.copy_(...)"
                )

    def _write(self, slot: Slot, value: Tensor) -> None:
        self._store.write({slot.key: value.detach()})
        become(slot.param, StoredTensor(self._store, slot.key, self.device))
        self._stored.add(id(slot.param))

    # --------------------------------------------------------------------------------------------------------- loading

    def load(self, checkpoint: Checkpoint, found: Match) -> None:
        """Read what the checkpoint has, tensor by tensor."""
        named = self.model.state_dict(keep_vars=True)
        loaded: dict[int, str] = {}
        for group in found.groups:
            values = group.read(checkpoint, self.model)
            while values:
                name, value = values.popitem()
                if name not in named:
                    raise StoreError(
                        f"the checkpoint's {group.sources[0][0]} becomes {name}, which the model does not have"
                    )
                value = converted(value, name, named[name])  # without a second name for what was read
                self._load(named[name], name, value, loaded)
                del value  # before the next is read
        without = [slot.name for slot in self.slots if not self._store.is_written(slot.key)]
        if without:
            raise StoreError(f"the checkpoint has no values for {', '.join(without[:5])}")

    def _load(self, tensor: Tensor, name: str, value: Tensor, loaded: dict[int, str]) -> None:
        if id(tensor) in loaded:
            before = tensor.load() if isinstance(tensor, StoredTensor) else tensor
            if not torch.equal(before, value.to(before.device)):
                raise StoreError(
                    f"{loaded[id(tensor)]} and {name} are one tensor in the model, and differ in the checkpoint: build the model "
                    "without this tie (tie_word_embeddings=False), or leave one of them out of the files"
                )
        elif id(tensor) in self._by_id:
            self._write(self._by_id[id(tensor)], value)
        elif tensor.device.type == "meta":
            become(tensor, value.to(self.device))
        else:
            tensor.copy_(value)
        loaded[id(tensor)] = name

    # ------------------------------------------------------------------------------------------------------ afterwards

    def finish(self) -> None:
        """Put parameters back on the meta device."""
        for slot in self.slots:
            become(slot.param, torch.empty_like(slot.husk, device="meta"))
        for _, module, owner in _children_first(self.model):
            if owner is not None:
                module.__dict__["_is_hf_initialized"] = True  # as in a model that was built with values

    def undo(self) -> None:
        """Put everything back as it was."""
        for param, dtype in self._dtypes.items():
            become(param, torch.empty(param.shape, dtype=dtype, device="meta"))
        for buffer, value in self._buffers.items():
            if value is None:
                become(buffer, torch.empty_like(buffer, device="meta"))
            else:
                buffer.copy_(value)


class _Own:
    """Tensors in memory that a module has to give values to.

    They are full of NaN, or of the smallest integer, before; where booleans are concerned, only their version tells.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._versions = {name: tensor._version for name, tensor in tensors.items()}

    def unset(self) -> list[str]:
        """The names of those that have no value yet, or not everywhere."""
        return [name for name, tensor in self.tensors.items() if self._is_unset(name, tensor)]

    def _is_unset(self, name: str, tensor: Tensor) -> bool:
        if isinstance(tensor, StoredTensor):
            tensor = tensor.load()
        if tensor.is_floating_point() or tensor.is_complex():
            return bool(tensor.sum().isnan()) and bool(tensor.isnan().any())  # the second takes memory
        if tensor.dtype is torch.bool:
            return tensor._version == self._versions[name]
        return bool((tensor == _mark(tensor.dtype)).any())


def _not_initialised(without: Sequence[tuple[str, nn.Module, list[str]]]) -> OptionError:
    name, module, own = without[0]
    others = f", nor what {len(without) - 1} more modules have" if len(without) > 1 else ""
    return OptionError(
        f"nothing initialises {', '.join(own)} of {name or 'the model'} ({type(module).__name__}){others}: it has no "
        "reset_parameters(), or that leaves them as they are. Pass fill_store(..., initialize=function), which is called with "
        "each module and gives values to what belongs to it, in place"
    )


def _check(model: nn.Module, dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise OptionError(f"fill_store(dtype={dtype}): parameters are floating-point numbers")
    named = list(model.named_parameters())
    for name, param in named:
        if type(param) is not nn.Parameter or _compat.local_part(param) is not param:
            raise OptionError(f"{name} is a {type(param).__name__}; only plain parameters can be streamed")
    valued = [name for name, param in named if param.device.type != "meta"]
    if valued or not named:
        which = (
            f"{', '.join(valued[:3])}{', ...' if len(valued) > 3 else ''} of this" if valued else "no parameter of this"
        )
        raise OptionError(
            f"fill_store gives values to models on the meta device, and {which} {type(model).__name__} "
            f"{'has values' if valued else 'is on it'}. Build it under torch.device('meta'), or drop all values with "
            "model.to('meta'); graphopt.transform moves the values of a model that has them into a store by itself"
        )


@contextmanager
def _new_store(path: Path, signature: Mapping[str, Any]) -> Iterator[DiskStore]:
    manifest = path / "manifest.json"
    if manifest.exists():
        with DiskStore(path, create=False, verify=False) as store:  # holds the folder's lock
            if store.keys():
                raise StoreError(
                    f"{path} holds a store already, at step {store.step}; transform(model, [LayerToLayer(store='disk', "
                    "store_path=...)]) goes on with it. To begin anew, give another folder or remove this one"
                )
            manifest.unlink()  # of a store whose filling was interrupted: nothing is in it
    with DiskStore(path, create=True, signature=signature, max_pending_bytes=_PENDING) as store:
        yield store


def _children_first(
    module: nn.Module, name: str = "", owner: Any = None, seen: set[int] | None = None
) -> Iterator[tuple[str, nn.Module, Any]]:
    """Each module once, with its name and the innermost model of transformers that it is part of, if any."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    owner = module if is_pretrained(module) else owner
    for child_name, child in module.named_children():
        yield from _children_first(child, f"{name}.{child_name}" if name else child_name, owner, seen)
    yield name, module, owner


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    for name in _RESETS:
        if callable(reset := getattr(module, name, None)):
            return reset  # type: ignore[no-any-return]
    return None


def _mark(dtype: torch.dtype) -> float | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return False if dtype is torch.bool else torch.iinfo(dtype).min
