"""A store in the memory of the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import StoreError
from graphopt.runtime.stores.buffers import AlignedBuffer, Meter
from graphopt.runtime.stores.device_lane import DeviceLoad
from graphopt.runtime.stores.loads import Load, Record, TensorInfo
from graphopt.runtime.stores.store import Store

_OWN_PAGES = (
    1 << 20
)  # from this size on, pinned values have pages of their own: torch would round them up to a power of two


@dataclass(eq=False, kw_only=True)
class HostRecord(Record):
    """A record in memory.

    Attributes:
        tensor: the value.
        has_value: whether it means something.
        busy: events of devices that still read or write the memory.
    """

    tensor: Tensor
    has_value: bool = False
    busy: list[Any] = field(default_factory=list)

    @property
    def written(self) -> bool:
        """Whether it has a value."""
        return self.has_value

    def settle(self) -> Tensor:
        """The value, once no device uses its memory."""
        while self.busy:
            self.busy.pop().synchronize()
        return self.tensor

    def mark(self, event: Any) -> None:
        """Remember that a device uses the memory until an event."""
        self.busy = [*(before for before in self.busy if not before.query()), event]


class HostStore(Store):
    """Tensors in memory. A visit on the CPU gives the stored tensors themselves.

    Args:
        device: the device that computes; for CUDA, the memory is pinned.
    """

    kind = "cpu"

    _records: dict[str, HostRecord]

    def __init__(self, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self._records = {}
        self._pinned = device is not None and torch.device(device).type == "cuda"

    def __repr__(self) -> str:
        nbytes = sum(record.info.nbytes for record in self._records.values())
        how = "closed" if self._closed else "pinned" if self._pinned else "pageable"
        return f"HostStore({len(self._records)} records, {nbytes / 1e9:.3g} GB, step {self.step}, {how})"

    def read(self, key: str) -> Tensor:
        """As the base class says."""
        with self._lock:
            record = self._readable(key)
            self._meter.move(read=record.info.nbytes)
            return record.settle().clone()

    def rollback(self) -> None:
        """Not possible.

        Raises:
            StoreError: always.
        """
        raise StoreError("HostStore keeps no earlier values, so it cannot roll back; DiskStore can")

    def close(self) -> None:
        """As the base class says."""
        with self._lock:
            if self._closed is None:
                self._flush()
                self.trim()
                self._closed = "the store is closed, and what it held is gone"
                self._records = {}

    def _readable(self, key: str) -> HostRecord:
        self._record(key)
        record = self._records[key]
        if not record.has_value:
            raise StoreError(f"HostStore: {key!r} has no value, since it was never written or was cleared")
        return record

    def _create(self, key: str, info: TensorInfo) -> None:
        if self._pinned and info.nbytes >= _OWN_PAGES:
            tensor = AlignedBuffer(info.nbytes, pinned=True).tensor(0, info.shape, info.dtype)
        else:
            tensor = torch.empty(info.shape, dtype=info.dtype, pin_memory=self._pinned)
        self._records[key] = HostRecord(key=key, info=info, tensor=tensor)

    def _delete(self, record: HostRecord) -> None:
        record.settle()
        del self._records[record.key]

    def _clear(self, record: HostRecord) -> None:
        record.has_value = False

    def _write(self, values: Mapping[HostRecord, Tensor], add: bool) -> None:
        for record, value in values.items():
            value = value.detach()
            self._meter.move(written=record.info.nbytes)
            record.version += 1
            if add and record.has_value:
                record.settle().add_(value.cpu())
            elif value.device.type == "cuda":
                lane = self._lane(value.device)
                for event in record.busy:
                    lane.hold(event)
                record.tensor.copy_(value, non_blocking=self._pinned)
                record.mark(lane.mark())
            else:
                record.settle().copy_(value)
            record.has_value = True

    def _flush(self) -> None:
        for record in self._records.values():
            record.settle()

    def _start(self, records: Sequence[HostRecord], device: torch.device) -> Load:
        for record in records:
            self._readable(record.key)
        host = HostLoad(records, self._meter)
        if device.type == "cpu":
            return host
        self._meter.move(read=sum(record.info.nbytes for record in records))
        return DeviceLoad(records, host, self._lane(device), None)

    def _commit(self, step: int, extra: dict[str, Any], small: dict[str, Tensor]) -> None:
        self._flush()


class HostLoad(Load):
    """A group of records in memory: they are where they are wanted from the start."""

    def __init__(self, records: Sequence[HostRecord], meter: Meter) -> None:
        super().__init__(records)
        self._meter, self._by_key = meter, {record.key: record for record in records}

    def arrive(self) -> dict[str, Tensor]:
        """As the base class says."""
        return {key: record.tensor for key, record in self._by_key.items()}

    def busy(self) -> Sequence[Any]:
        """As the base class says."""
        return [event for record in self._by_key.values() for event in record.busy]

    def write_back(self, keys: Sequence[str], after: Sequence[Any] = ()) -> None:
        """Nothing to write but what comes from a device; the change is counted."""
        for key in keys:
            record = self._by_key[key]
            record.version += 1
            self._meter.move(written=record.info.nbytes if after else 0)
            for event in after:
                record.mark(event)

    def wait_written(self) -> None:
        """As the base class says."""

    def release(self, after: Sequence[Any] = ()) -> None:
        """As the base class says."""
        for record in self._by_key.values():
            for event in after:
                record.mark(event)
