"""What all stores share: named records, and the window of groups that moves over them."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from graphopt.errors import OptionError, StoreError
from graphopt.runtime.stores.buffers import Meter
from graphopt.runtime.stores.device_lane import DeviceLane
from graphopt.runtime.stores.loads import Load, Record, TensorInfo
from graphopt.runtime.stores.manifest import plain_json


class Visit:
    """One group of records while the caller works on it.

    Attributes:
        tensors: the values by key. They lie in memory that is used again as soon as the next group is asked for.
    """

    def __init__(self, load: Load, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self._load: Load | None = load

    def write_back(self, keys: Sequence[str]) -> None:
        """Write tensors that were changed in place to the store, in the background and straight from here.

        They must not be changed again before the next group is asked for.

        Raises:
            StoreError: the visit is over, or a key is not of its group.
        """
        if self._load is None:
            raise StoreError(
                "write_back: this visit is over, its memory belongs to another group; call it before the next"
            )
        foreign = [key for key in keys if key not in self.tensors]
        if foreign:
            raise StoreError(
                f"write_back: {foreign[0]!r} is not of the group that is visited: {sorted(self.tensors)[:5]}"
            )
        self._load.write_back(keys)

    def __repr__(self) -> str:
        return f"Visit({', '.join(self.tensors)})"

    def _end(self) -> None:
        self._load, self.tensors = None, {}


class Store(ABC):
    """Named tensors that are kept away from the device that computes.

    A record is *durable* or *scratch*. Writes are visible at once to all later reads, and durable ones survive the process
    from the next `commit` on.
    """

    kind: ClassVar[str]
    path: Path | None = None

    _records: Mapping[str, Record]

    def __init__(self) -> None:
        self._lock = threading.RLock()  # callers may be on several threads: autograd has its own
        self._meter = Meter()
        self._closed: str | None = None
        self._leaving: Load | None = None
        self._lanes: dict[torch.device, DeviceLane] = {}
        self._doomed: deque[str] = deque()
        self._step, self._extra, self._small = 0, dict[str, Any](), dict[str, Tensor]()

    # -------------------------------------------------------------------------------------------------------- records

    def create(self, key: str, shape: Sequence[int], dtype: torch.dtype, *, durable: bool = True) -> None:
        """Reserve a record. Nothing can be read from it before something was written.

        Raises:
            StoreError: the key exists with another shape, dtype or durability.
        """
        info = TensorInfo(torch.Size(shape), dtype, durable)
        with self._lock:
            self._check_usable()
            self._delete_doomed()
            old = self._records.get(key)
            if old is None:
                self._create(key, info)
            elif old.info != info:
                raise StoreError(
                    f"{self._name}: {key!r} exists as {old.info} and cannot be created as {info}; delete it first"
                )

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def keys(self) -> list[str]:
        """The names of all records, in the order in which they were created."""
        return list(self._records)

    def info(self, key: str) -> TensorInfo:
        """Shape, dtype and size of a record."""
        return self._record(key).info

    def is_written(self, key: str) -> bool:
        """Whether the record was written since it was created or cleared."""
        return self._record(key).written

    def version(self, key: str) -> int:
        """How often the record was changed since the store was opened."""
        return self._record(key).version

    def storage_id(self, key: str) -> int:
        """An address that no other tensor has while the record exists."""
        return self._record(key).token.data_ptr()

    def delete(self, keys: Iterable[str]) -> None:
        """Forget records; the space of durable ones is used again after the next commit."""
        with self._lock:
            for record in [self._record(key) for key in dict.fromkeys(keys)]:
                record.version += 1
                self._delete(record)

    def delete_later(self, keys: Iterable[str]) -> None:
        """Forget records when the store is next used to create, write, flush or commit.

        This is for finalizers: it takes no lock and waits for nothing, on whatever thread the garbage collector runs.
        """
        self._doomed.extend(list(keys))

    def clear(self, keys: Iterable[str]) -> None:
        """Make records as if they were never written, as is done with gradients."""
        with self._lock:
            for record in [self._record(key) for key in dict.fromkeys(keys)]:
                record.version += 1
                self._clear(record)

    # --------------------------------------------------------------------------------------------------------- values

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """A new CPU tensor with the value of one record.

        Raises:
            StoreError: the record was never written, or cannot be read.
        """

    def write(self, values: Mapping[str, Tensor], add: bool = False) -> None:
        """Give records new values. What is passed may be changed or freed as soon as this returns.

        Args:
            values: tensors on any device, of the records' shapes and dtypes.
            add: add to what the records hold; those that were never written take the value as it is.

        Raises:
            StoreError: a key, shape or dtype is wrong; then nothing is written.
        """
        with self._lock:
            self._delete_doomed()
            records = [self._record(key) for key in values]
            for record, value in zip(records, values.values(), strict=True):
                given = TensorInfo(value.shape, value.dtype, record.info.durable)
                if given != record.info:
                    raise StoreError(
                        f"{self._name}: {record.key!r} is {record.info}; the value to be written is {given}"
                    )
            self._write(dict(zip(records, values.values(), strict=True)), add)

    def visit(
        self, groups: Sequence[Sequence[str]], *, prefetch: int = 1, device: torch.device | str | None = None
    ) -> Generator[Visit, None, None]:
        """Visit groups of records one after the other, while the next are being loaded.

        At most ``1 + prefetch`` groups are in memory, and one more that is being written back. A record that is written
        after it was prefetched is loaded again when its turn comes.

        Args:
            groups: the keys of each group.
            prefetch: how many groups to load ahead of the one that is visited.
            device: where the tensors are wanted: the CPU, or a CUDA device.

        Yields:
            One visit for each group. It is over when the next is asked for or the iterator is closed.

        Raises:
            StoreError: a record does not exist, has no value or cannot be read.
        """
        target = torch.device("cpu" if device is None else device)
        if target.type not in ("cpu", "cuda"):
            raise OptionError(f"visit(device={str(target)!r}): a store brings tensors to 'cpu' or 'cuda'")
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        if prefetch < 0:
            raise OptionError(f"visit(prefetch={prefetch}): it counts groups that are loaded ahead; give 0 or more")
        with self._lock:
            for group in groups:
                for key in group:
                    self._record(key)
        return self._visit([tuple(dict.fromkeys(group)) for group in groups], prefetch, target)

    def _visit(
        self, groups: Sequence[Sequence[str]], prefetch: int, device: torch.device
    ) -> Generator[Visit, None, None]:
        ahead: deque[Load | None] = deque()
        load: Load | None = None
        done = False
        try:
            for position, keys in enumerate(groups):
                self._check_usable()
                for group in groups[position + len(ahead) : position + 1 + prefetch]:
                    ahead.append(self._start_ahead(group, device))
                load = ahead.popleft()
                if load is None or load.is_stale:
                    if load is not None:
                        load.release()
                    load = self._start_checked(keys, device)
                visit = Visit(load, load.wait())
                try:
                    yield visit
                finally:
                    visit._end()
                self._leave(load)
                load = None
            done = True
        finally:
            for left in [load, *ahead]:
                if left is not None:
                    left.release()
            if not done and load is not None:
                load.wait_written()

    def _start_ahead(self, keys: Sequence[str], device: torch.device) -> Load | None:
        """The load of a group whose turn has not come; ``None`` if it must wait for it, because a value is still missing."""
        try:
            return self._start_checked(keys, device)
        except StoreError:
            return None

    def _start_checked(self, keys: Sequence[str], device: torch.device) -> Load:
        with self._lock:
            return self._start([self._record(key) for key in keys], device)

    def _leave(self, load: Load) -> None:
        """Release a load; of those that are still being written back there is one at a time in the whole store."""
        with self._lock:
            before, self._leaving = self._leaving, load
        if before is not None:
            before.wait_written()
        load.release()

    # -------------------------------------------------------------------------------------------------------- commits

    @property
    def step(self) -> int:
        """The step of the last commit; 0 for a new store."""
        return self._step

    @property
    def extra(self) -> dict[str, Any]:
        """What was passed to the last commit, as JSON gives it back."""
        return self._extra

    @property
    def small(self) -> dict[str, Tensor]:
        """The small tensors of the last commit."""
        return self._small

    def flush(self) -> None:
        """Wait for all writes.

        Raises:
            StoreError: one has failed. It is raised again until the record is written anew or cleared, or `rollback`.
        """
        with self._lock:
            self._check_usable()
            self._delete_doomed()
            self._flush()

    def commit(self, step: int, extra: Mapping[str, Any], small: Mapping[str, Tensor] | None = None) -> None:
        """Make everything durable that was written since the last commit, all of it or nothing.

        Args:
            step: number of the step.
            extra: anything that JSON can hold.
            small: small tensors that belong to the step, such as the state of random generators.

        Raises:
            StoreError: a write has failed, or ``extra`` is not JSON.
        """
        plain = plain_json(dict(extra), f"{self._name}: commit(extra=...), where tensors go into small=,")
        copies = {name: value.detach().cpu().clone() for name, value in (small or {}).items()}
        with self._lock:
            self._check_usable()
            self._delete_doomed()
            self._commit(step, plain, copies)
            self._step, self._extra, self._small = step, plain, copies

    @abstractmethod
    def rollback(self) -> None:
        """Forget what happened to durable records since the last commit.

        Raises:
            StoreError: the store keeps no earlier values.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for what runs and let go of everything; what was not committed is lost. Idempotent."""

    @property
    def is_closed(self) -> bool:
        """Whether the store can no longer be used."""
        return self._closed is not None

    def trim(self) -> None:
        """Free the buffers that are kept to be used again."""
        for lane in self._lanes.values():
            lane.trim()

    # ------------------------------------------------------------------------------------------------------- counters

    @property
    def peak_resident_bytes(self) -> int:
        """The most memory that buffers took at once since `reset_counters`, beside the values that live in memory anyway."""
        return self._meter.peak_resident

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the store since `reset_counters`, whole pages."""
        return self._meter.read

    @property
    def bytes_written(self) -> int:
        """Bytes that went to the store since `reset_counters`, whole pages."""
        return self._meter.written

    def reset_counters(self) -> None:
        """Count from here on."""
        self._meter.reset()

    # ------------------------------------------------------------------------------------------------ for the subclass

    @property
    def _name(self) -> str:
        """How messages call the store."""
        return str(self.path) if self.path is not None else type(self).__name__

    def _lane(self, device: torch.device) -> DeviceLane:
        if device not in self._lanes:
            self._lanes[device] = DeviceLane(device, self._meter)
        return self._lanes[device]

    def _delete_doomed(self) -> None:
        while self._doomed:
            key = self._doomed.popleft()
            if key in self._records:
                self.delete([key])

    def _check_usable(self) -> None:
        if self._closed is not None:
            raise StoreError(f"{self._name}: {self._closed}")

    def _record(self, key: str) -> Record:
        self._check_usable()
        record = self._records.get(key)
        if record is None:
            raise StoreError(f"{self._name} has no record {key!r}; create() makes one")
        return record

    @abstractmethod
    def _create(self, key: str, info: TensorInfo) -> None: ...

    @abstractmethod
    def _delete(self, record: Any) -> None: ...

    @abstractmethod
    def _clear(self, record: Any) -> None: ...

    @abstractmethod
    def _write(self, values: Mapping[Any, Tensor], add: bool) -> None: ...

    @abstractmethod
    def _flush(self) -> None: ...

    @abstractmethod
    def _start(self, records: Sequence[Any], device: torch.device) -> Load: ...

    @abstractmethod
    def _commit(self, step: int, extra: dict[str, Any], small: dict[str, Tensor]) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
