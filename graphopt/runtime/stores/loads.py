"""A record of a store, and a group of them on its way to the caller and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.stores.buffers import nbytes_of


@dataclass(frozen=True)
class TensorInfo:
    """What a record holds.

    Attributes:
        durable: whether a commit makes its value survive the process.
    """

    shape: torch.Size
    dtype: torch.dtype
    durable: bool

    @property
    def nbytes(self) -> int:
        """Size of the value in bytes."""
        return nbytes_of(self.shape, self.dtype)

    def __str__(self) -> str:
        kind = "durable" if self.durable else "scratch"
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}, {kind}"


@dataclass(eq=False, kw_only=True)
class Record(ABC):
    """One named tensor of a store.

    Attributes:
        version: counts its changes.
        token: a byte whose address stands for the record where libraries ask which tensors share memory.
    """

    key: str
    info: TensorInfo
    version: int = 0
    token: Tensor = field(default_factory=lambda: torch.empty(1, dtype=torch.uint8), repr=False)

    @property
    @abstractmethod
    def written(self) -> bool:
        """Whether it has a value."""


class Load(ABC):
    """One group of records on its way from a store to the caller and back."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._versions = [(record, record.version) for record in records]

    @property
    def is_stale(self) -> bool:
        """Whether a record was changed after the load began."""
        return any(record.version != version for record, version in self._versions)

    def wait(self) -> dict[str, Tensor]:
        """The tensors, when they are where they are wanted."""
        tensors = self.arrive()
        for event in self.busy():
            event.synchronize()
        return tensors

    @abstractmethod
    def arrive(self) -> dict[str, Tensor]:
        """The tensors, when nothing but the events that `busy` returns keeps them from being used."""

    def busy(self) -> Sequence[Any]:
        """Events of a device that still reads or writes the tensors."""
        return ()

    @abstractmethod
    def write_back(self, keys: Sequence[str], after: Sequence[Any] = ()) -> None:
        """Begin to write tensors that were changed in place, once these events of a device have passed."""

    @abstractmethod
    def wait_written(self) -> None:
        """Return when all that `write_back` has begun is done; what failed in it is for `Store.flush` to raise."""

    @abstractmethod
    def release(self, after: Sequence[Any] = ()) -> None:
        """Give up what has not begun; the memory goes back when the writes are done, for use after these events."""
