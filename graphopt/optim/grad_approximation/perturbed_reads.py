"""Parameters that seem to have other values, while nothing is written to them."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from graphopt import _compat
from graphopt.errors import UnsupportedError


@contextmanager
def perturbed_reads(params: Sequence[Tensor], value_of: Callable[[int], Tensor]) -> Iterator[PerturbedReads]:
    """Within the block every operation of torch that reads a parameter reads ``value_of(its number)`` instead.

    The parameters themselves are not written to, so there is nothing to be restored, and a value lives as long as the operation
    that asked for it (and what it returned, if that is a view of it). What the block writes to a parameter is seen within the
    block only. Compiled functions run uncompiled, since their kernels do not ask.
    """
    with PerturbedReads(params, value_of) as mode:
        if "torch._dynamo" in sys.modules:  # without it nothing is compiled, and importing it takes seconds
            with torch.compiler.set_stance("force_eager"):
                yield mode
        else:
            yield mode


class PerturbedReads(_compat.TorchDispatchMode):
    """See `perturbed_reads`.

    Attributes:
        num_reads: how often a parameter was read.
    """

    def __init__(self, params: Sequence[Tensor], value_of: Callable[[int], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_reads = 0
        self._params, self._value_of = list(params), value_of
        self._in_storage: defaultdict[int, list[int]] = defaultdict(list)
        self._written: dict[int, Tensor] = {}  # what stands for whole storages that were written to
        for index, param in enumerate(params):
            if type(param) not in (Tensor, Parameter) or param.layout is not torch.strided:
                raise UnsupportedError(
                    f"a parameter is a {type(param).__name__} ({param.layout}), whose reads cannot be followed"
                )
            if param.numel():
                self._in_storage[_storage_of(param)].append(index)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        written = (
            set() if schema is None else {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        )
        names = [] if schema is None else [argument.name for argument in schema.arguments]
        pairs: list[tuple[Tensor, Tensor]] = []
        arguments = [
            self._replaced(value, index < len(names) and names[index] in written, pairs)
            for index, value in enumerate(args)
        ]
        options = {name: self._replaced(value, name in written, pairs) for name, value in kwargs.items()}
        result = func(*arguments, **options)
        # An operation in place returns what was passed in.
        return next((original for original, stand_in in pairs if result is stand_in), result)

    def _replaced(self, value: Any, is_written: bool, pairs: list[tuple[Tensor, Tensor]]) -> Any:
        """An argument, with what is to be seen in place of parameters; these are noted in pairs."""
        if isinstance(value, Tensor):
            stand_in = self._seen(value, is_written)
            if stand_in is not value:
                pairs.append((value, stand_in))
            return stand_in
        if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
            return type(value)([self._replaced(part, is_written, pairs) for part in value])
        return value

    def _seen(self, tensor: Tensor, is_written: bool) -> Tensor:
        """The tensor itself, or what is to be seen in place of a parameter or a part of it."""
        if type(tensor) not in (Tensor, Parameter) or tensor.layout is not torch.strided:
            return tensor
        key = _storage_of(tensor)
        if key == 0 or key not in self._in_storage:
            return tensor
        self.num_reads += 1
        with torch.no_grad():
            if key not in self._written:
                same = [i for i in self._in_storage[key] if _form(self._params[i]) == _form(tensor)]
                if same and not is_written:
                    return _laid_out_like(self._value_of(same[0]), tensor)
                storage = self._whole(key, tensor)
                if not is_written:
                    return _part(storage, tensor)
                self._written[key] = storage
            return _part(self._written[key], tensor)

    def _whole(self, key: int, tensor: Tensor) -> Tensor:
        """A storage, with all the parameters in it replaced, as one vector."""
        params = [(self._params[index], index) for index in self._in_storage[key]]
        if any(param.dtype != tensor.dtype for param, _ in params):
            raise UnsupportedError(f"the memory of a parameter of {params[0][0].dtype} is read as {tensor.dtype}")
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        whole = empty.set_(tensor.untyped_storage()).clone()
        for param, index in params:
            _part(whole, param).copy_(self._value_of(index))
        return whole


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _part(storage: Tensor, like: Tensor) -> Tensor:
    return storage.as_strided(like.shape, like.stride(), like.storage_offset())


def _laid_out_like(value: Tensor, tensor: Tensor) -> Tensor:
    """With the same strides, on which views of it, and the order of sums, depend."""
    if value.stride() == tensor.stride():
        return value
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=value.dtype, device=value.device).copy_(value)
