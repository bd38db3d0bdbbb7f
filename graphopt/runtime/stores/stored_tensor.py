"""A tensor that lives in a store and can stand wherever a tensor can: in ``p.grad``, in an optimizer's state, in a state dict.

An operator on it loads the value, runs, and writes the value back if the operator's schema says that it changes it. Views are
not loaded: they remember how they follow from the record, so that ``p.grad.view(-1).mul_(2)`` changes the record too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import StoreError
from graphopt.runtime.stores.store import Store, Visit

OnChange = Callable[[str, str], None]

_LISTS = ("_foreach_", "_amp_foreach_", "_fused_")  # operators that treat the elements of their lists one by one
_WHOLE = {torch.ops.aten.copy_.default, torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar}  # need no old value
# Methods that return the tensor itself where there is nothing to do, or read its memory: they get the value instead.
_ON_VALUE = (
    *("to", "cpu", "cuda", "contiguous", "type", "type_as", "pin_memory", "numpy", "tolist", "__array__", "__dlpack__"),
    *("float", "double", "half", "bfloat16", "int", "long", "short", "char", "byte", "bool"),
)


@dataclass(frozen=True)
class _View:
    """One step from a tensor to a view of it."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None = None  # which of several results

    def __call__(self, tensor: Tensor) -> Tensor:
        result = self.op(tensor, *self.args, **self.kwargs)
        return cast(Tensor, result if self.index is None else result[self.index])


class StoredTensor(Tensor):
    """A record of a store as a tensor.

    Args:
        store: where it lives.
        key: the record.
        device: where it seems to be, and where operators run.
        on_change: called with the key and the operator's name before the record is changed in place. What it raises leaves
            the record as it was.
    """

    store: Store
    key: str
    on_change: OnChange | None
    _views: tuple[_View, ...]

    @staticmethod
    def __new__(
        cls: type[StoredTensor],
        store: Store,
        key: str,
        device: torch.device | str = "cpu",
        *,
        on_change: OnChange | None = None,
    ) -> StoredTensor:
        """Make the tensor without its value."""
        info = store.info(key)
        return cls._make(store, key, torch.empty(info.shape, dtype=info.dtype, device="meta"), device, on_change, ())

    @classmethod
    def _make(
        cls,
        store: Store,
        key: str,
        like: Tensor,
        device: torch.device | str,
        on_change: OnChange | None,
        views: tuple[_View, ...],
    ) -> StoredTensor:
        made: StoredTensor = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            like.stride(),
            like.storage_offset(),
            dtype=like.dtype,
            device=torch.device(device),
            requires_grad=False,
        )
        made.store, made.key, made.on_change, made._views = store, key, on_change, views
        return made

    # Otherwise torch turns results into this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def version(self) -> int:
        """How often the record was changed."""
        return self.store.version(self.key)

    def load(self) -> Tensor:
        """An ordinary tensor with the value, on ``device``."""
        return self._replay(self.store.read(self.key).to(self.device))

    def untyped_storage(self) -> Any:
        """What libraries that look for shared memory ask: an identity of the record, with its size. It holds no values."""
        return StorageIdentity(self.store.storage_id(self.key), self.store.info(self.key).nbytes, self.device)

    def data_ptr(self) -> int:
        """There is none.

        Raises:
            StoreError: always.
        """
        raise StoreError(f"{self!r} has no memory that could be read; .contiguous() or .cpu() gives an ordinary tensor")

    @property
    def data(self) -> Tensor:
        """The same record; what is assigned is written to it."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
            raise StoreError(f"{self!r} cannot become {value.dtype}{list(value.shape)} on {value.device}")
        self.copy_(value)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        dtype = str(self.dtype).removeprefix("torch.")
        view = ", view" if self._views else ""
        return f"StoredTensor({self.key!r}, {dtype}{list(self.shape)}, {self.device}, in {self.store.kind}{view})"

    def __format__(self, spec: str) -> str:
        return format(self.load(), spec) if spec else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return cast(Tensor, memo.setdefault(id(self), self.load()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.load().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator of which an argument is a stored tensor."""
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        if op.is_view and isinstance(args[0], StoredTensor):
            return args[0]._view(op, args[1:], kwargs)
        if torch.Tag.inplace_view in op.tags:
            raise StoreError(f"{name} would change the shape of {args[0]!r}; a stored tensor keeps it")
        call = _Call(op, args, kwargs)
        for stored in call.changed:
            if stored.on_change is not None:
                stored.on_change(stored.key, name)
        if name.startswith(_LISTS):
            return call.run_one_by_one()
        if op in _WHOLE and isinstance(args[0], StoredTensor) and not args[0]._views:
            return args[0]._overwrite(op, args[1:])
        return call.run()

    def _replay(self, value: Tensor) -> Tensor:
        for view in self._views:
            value = view(value)
        return value

    def _view(self, op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if op in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            like, views = self._replay(self._meta()), self._views
            return self._make(self.store, self.key, like, self.device, self.on_change, views)
        result = op(self._replay(self._meta()), *args, **kwargs)
        if isinstance(result, Tensor):
            step = _View(op, args, kwargs)
            return self._make(self.store, self.key, result, self.device, self.on_change, (*self._views, step))
        return type(result)(
            self._make(
                self.store, self.key, part, self.device, self.on_change, (*self._views, _View(op, args, kwargs, index))
            )
            for index, part in enumerate(result)
        )

    def _meta(self) -> Tensor:
        info = self.store.info(self.key)
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def _overwrite(self, op: Any, args: tuple[Any, ...]) -> StoredTensor:
        """Change all of the record without loading it."""
        value = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        op(value, *args)
        self.store.write({self.key: value})
        return self


class StorageIdentity:
    """Answers the two questions by which libraries find out what shares memory."""

    def __init__(self, address: int, nbytes: int, device: torch.device) -> None:
        self._address, self._nbytes, self.device = address, nbytes, device

    def data_ptr(self) -> int:
        """An address that is that of no other tensor; nothing can be read there."""
        return self._address

    def nbytes(self) -> int:
        """Size of the record in bytes."""
        return self._nbytes

    def size(self) -> int:
        """Size of the record in bytes."""
        return self._nbytes


@dataclass
class _Call:
    """An operator with its arguments."""

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    changed: list[StoredTensor] = field(init=False)

    def __post_init__(self) -> None:
        changed = []
        for argument, value in self._arguments():
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, StoredTensor)]
        self.changed = changed

    def _arguments(self) -> Iterator[tuple[Any, Any]]:
        for position, argument in enumerate(self.op._schema.arguments):
            if argument.name in self.kwargs:
                yield argument, self.kwargs[argument.name]
            elif position < len(self.args):
                yield argument, self.args[position]

    def run(self) -> Any:
        """Load what is stored, run, and write back what has changed."""
        stored = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, StoredTensor)]
        with ExitStack() as stack:
            visits: dict[tuple[int, str], Visit] = {}
            values: dict[int, Tensor] = {}
            for leaf in stored:
                record = (id(leaf.store), leaf.key)
                if record not in visits:
                    visits[record] = stack.enter_context(_borrow(leaf))
                if id(leaf) not in values:
                    values[id(leaf)] = leaf._replay(visits[record].tensors[leaf.key].to(leaf.device))
            args, kwargs = pytree.tree_map_only(
                StoredTensor, lambda leaf: values[id(leaf)], (self.args, dict(self.kwargs))
            )
            result = self.op(*args, **kwargs)
            for leaf in self.changed:
                visits[id(leaf.store), leaf.key].write_back([leaf.key])
            wrappers = {id(values[id(leaf)]): leaf for leaf in stored}
            borrowed = {value.untyped_storage().data_ptr() for value in values.values()}

            def keep(tensor: Tensor) -> Tensor:
                if id(tensor) in wrappers:
                    return wrappers[id(tensor)]
                return tensor.clone() if tensor.untyped_storage().data_ptr() in borrowed else tensor

            return pytree.tree_map_only(Tensor, keep, result)

    def run_one_by_one(self) -> Any:
        """Run an operator on lists for each element alone, so that no more than one value is in memory."""
        names = [argument.name for argument in self.op._schema.arguments]
        named = dict(zip(names, self.args, strict=False)) | dict(self.kwargs)
        length = next(len(value) for value in named.values() if isinstance(value, list | tuple) and value)
        results: list[Any] = []
        for index in range(length):
            part = {name: _element(name, value, index, length) for name, value in named.items()}
            args = tuple(part.pop(name) for name in names[: len(self.args)])
            results += _Call(self.op, args, part).run() or []
        return results if self.op._schema.returns else None


def _element(name: str, value: Any, index: int, length: int) -> Any:
    """The part of an argument that belongs to one element of the lists; what is no list belongs to all."""
    if isinstance(value, list | tuple) and len(value) == length:
        return [value[index]]
    if name == "scalars" and isinstance(value, Tensor):
        return value[index : index + 1]
    return value


@contextmanager
def _borrow(stored: StoredTensor) -> Iterator[Visit]:
    """The value of a record while it is used."""
    visits = stored.store.visit([[stored.key]], prefetch=0, device=stored.device)
    try:
        yield next(visits)
        next(visits, None)
    finally:
        visits.close()


def _on_value(name: str) -> Callable[..., Any]:
    def method(self: StoredTensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.load(), name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _ON_VALUE:
    setattr(StoredTensor, _name, _on_value(_name))
