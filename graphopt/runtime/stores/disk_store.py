"""A store on disk that a crash at any moment leaves at its last commit.

How it works: a durable record has the same place in two files. The manifest says which of them is live, a write goes to the
other, and a commit makes the data files durable before it replaces the manifest. Scratch records lie in a third file whose
name is removed at once. All of it moves past the page cache, between the disk and buffers that are used again.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import StoreError
from graphopt.runtime.stores.buffers import BufferPool
from graphopt.runtime.stores.device_lane import DeviceLoad
from graphopt.runtime.stores.direct_io import DataFile
from graphopt.runtime.stores.disk_io import DiskIO, DiskLoad, io_error
from graphopt.runtime.stores.disk_record import Chunk, DiskRecord, Placement, chunks, layout
from graphopt.runtime.stores.extents import Extents
from graphopt.runtime.stores.folder_lock import FolderLock
from graphopt.runtime.stores.io_queue import outcome, wait_for
from graphopt.runtime.stores.loads import Load, TensorInfo
from graphopt.runtime.stores.manifest import (
    RESTORE,
    Manifest,
    RecordEntry,
    differences,
    dtype_name,
    dtype_of,
    plain_json,
)
from graphopt.runtime.stores.store import Store

_MANIFEST, _DATA, _SCRATCH = "manifest.json", ("data-0.bin", "data-1.bin"), "scratch.bin"
_OWN_NAMES = {_MANIFEST, _MANIFEST + ".new", *_DATA, _SCRATCH, "lock"}


class DiskStore(Store):
    """Tensors in a folder. At most a few groups of them are in memory at a time.

    Args:
        path: the folder.
        create: whether the store must be new (``True``) or exist (``False``); ``None`` makes it if there is none.
        verify: read everything once and compare it with its checksums.
        signature: what JSON can hold of the model that the store belongs to; it is kept at creation and compared later.
        max_pending_bytes: how much of what was passed to `write` may wait for the disk before `write` waits.

    Raises:
        StoreError: the folder cannot be used, is in use, is damaged, or belongs to another model.
    """

    kind = "disk"
    path: Path

    _records: dict[str, DiskRecord]

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        create: bool | None = None,
        verify: bool = True,
        signature: Mapping[str, Any] | None = None,
        max_pending_bytes: int = 256 << 20,
    ) -> None:
        super().__init__()
        self.path = Path(path).absolute()
        self._pid = os.getpid()
        self._records = {}
        self._removed: dict[str, DiskRecord] = {}  # committed records that were deleted since
        self._files: list[DataFile] = []
        self._io = DiskIO(self._meter, max_pending_bytes)
        self._signature = None if signature is None else plain_json(dict(signature), "DiskStore(signature=...)")
        try:
            self._check_folder(create)
            self.path.mkdir(parents=True, exist_ok=True)
            self._folder_lock = FolderLock(self.path)
        except OSError as error:
            raise io_error(error, f"{self.path}: opening the store") from error
        try:
            self._open(verify)
        except BaseException as error:
            self._let_go()
            if isinstance(error, OSError):
                raise io_error(error, f"{self.path}: opening the store") from error
            raise
        self.reset_counters()

    @property
    def direct(self) -> bool:
        """Whether the page cache is circumvented, which the file system may not allow."""
        return all(file.direct for file in self._files)

    @property
    def signature(self) -> Any:
        """What was passed when the store was made."""
        return self._signature

    def __repr__(self) -> str:
        nbytes = sum(record.info.nbytes for record in self._records.values())
        how = "closed" if self._closed else "direct" if self.direct else "through the page cache"
        return f"DiskStore({str(self.path)!r}, {len(self._records)} records, {nbytes / 1e9:.3g} GB, step {self.step}, {how})"

    def read(self, key: str) -> Tensor:
        """As the base class says."""
        with self._lock:
            record = self._readable(key)
            value = torch.empty(record.info.shape, dtype=record.info.dtype)
            reads = self._io.read_into(value, Placement(record, record.current or 0, 0))
        wait_for(reads)
        return value

    def rollback(self) -> None:
        """Forget what happened to durable records since the last commit; those created since stay, without a value."""
        with self._lock:
            self._check_usable()
            self._settle()
            for key, record in self._removed.items():
                if key in self._records:
                    self._delete(self._records[key])
                self._records[key] = record
            self._removed.clear()
            for record in self._records.values():
                back = record.live if record.info.durable else None if record.failed else record.current
                record.version += back != record.current or record.failed is not None
                record.current, record.failed, record.attempt = back, None, None

    def trim(self) -> None:
        """As the base class says."""
        super().trim()
        self._io.trim()

    def close(self) -> None:
        """As the base class says."""
        if self._closed is None:
            self._closed = "the store is closed; open it again"
        if (
            self._pid == os.getpid()
        ):  # the threads of a parent process do not exist here, so nothing could wait for them
            self._io.queue.close()
            self.trim()
            self._let_go()

    def _let_go(self) -> None:
        for file in self._files:
            file.close()
        self._folder_lock.release()

    # ------------------------------------------------------------------------------------------------------- opening

    def _check_folder(self, create: bool | None) -> None:
        exists = (self.path / _MANIFEST).exists()
        if exists and create:
            raise StoreError(f"{self.path} holds a store already; create=None opens it, another folder starts anew")
        if not exists and create is False:
            raise StoreError(f"{self.path} holds no store; create=None or True makes one")
        if not exists and self.path.exists():
            foreign = sorted(set(os.listdir(self.path)) - _OWN_NAMES)
            if foreign:
                raise StoreError(
                    f"{self.path} is no store, and not empty ({foreign[0]!r} is in it); give a folder of its own"
                )

    def _open(self, verify: bool) -> None:
        path = self.path / _MANIFEST
        manifest = Manifest.load(path) if path.exists() else None
        if manifest is None:
            for name in _DATA:  # of a store whose making was interrupted
                (self.path / name).unlink(missing_ok=True)
        for name in _DATA:
            self._files.append(DataFile(self.path / name))
        self._files.append(DataFile(self.path / _SCRATCH, unlink=True))
        if manifest is None:
            Manifest(signature=self._signature).save(path)
        else:
            self._check_signature(manifest)
            self._step, self._extra, self._small = manifest.step, manifest.extra, manifest.small
            self._records = {key: self._restore(key, entry) for key, entry in manifest.records.items()}
            self._check_sizes()
            if verify:
                self._verify()
        self._extents = Extents((record.offset, record.size) for record in self._records.values())
        self._scratch_extents = Extents()

    def _check_signature(self, manifest: Manifest) -> None:
        stored, given = manifest.signature, self._signature
        self._signature = stored
        if given is not None and stored != given:
            found = list(islice(differences(stored, given), 6))
            shown = "; ".join(found[:5]) + ("; and more" if len(found) > 5 else "")
            raise StoreError(f"{self.path} belongs to another model: {shown}. Build that model, or give another folder")

    def _restore(self, key: str, entry: RecordEntry) -> DiskRecord:
        info = TensorInfo(torch.Size(entry.shape), dtype_of(entry.dtype), True)
        record = DiskRecord(key=key, info=info, files=self._durable, offset=entry.offset, committed=True)
        record.current = record.live = entry.live
        if entry.live is not None:
            digits = entry.checksums
            record.checksums[entry.live] = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
        return record

    def _check_sizes(self) -> None:
        for slot, file in enumerate(self._durable):
            lost = [r.key for r in self._records.values() if r.live == slot and r.offset + r.size > file.size]
            if lost:
                raise StoreError(
                    f"{file.path} is damaged: it ends at byte {file.size}, and {_list(lost)} lie behind; {RESTORE}"
                )

    def _verify(self) -> None:
        """Compare every value with its checksums, with two pieces in memory."""
        placements, _ = layout((record, record.live) for record in self._records.values() if record.live is not None)
        pool, damaged = BufferPool(self._meter), dict[str, None]()

        def check(chunk: Chunk) -> None:
            buffer = pool.acquire(chunk.nbytes)
            memory = buffer.memory[: chunk.nbytes]
            self._io.fill(chunk, memory)
            for piece in chunk.pieces:
                if zlib.crc32(piece.part(memory)) != piece.record.checksums[piece.slot][piece.index]:
                    damaged[piece.record.key] = None
            pool.release(buffer)

        with ThreadPoolExecutor(2, "graphopt-verify") as threads:  # ends here, so that a process may fork after opening
            for _ in threads.map(check, chunks(placements)):
                pass
        pool.trim()
        if damaged:
            raise StoreError(
                f"{self.path} is damaged: the value of {_list(list(damaged))} is not what was committed at step {self.step}; "
                f"{RESTORE}"
            )

    # ------------------------------------------------------------------------------------------------------- records

    @property
    def _durable(self) -> Sequence[DataFile]:
        return self._files[:2]

    def _check_usable(self) -> None:
        super()._check_usable()
        if self._pid != os.getpid():
            raise StoreError(f"{self.path} was opened by process {self._pid}; open it in this one, after the fork")

    def _record(self, key: str) -> DiskRecord:
        super()._record(key)
        return self._records[key]

    def _readable(self, key: str) -> DiskRecord:
        record = self._record(key)
        if record.failed is not None:
            raise record.failed
        if record.current is None:
            raise StoreError(f"{self.path}: {key!r} has no value, since it was never written or was cleared")
        return record

    def _create(self, key: str, info: TensorInfo) -> None:
        extents, files = (self._extents, self._durable) if info.durable else (self._scratch_extents, self._files[2:])
        record = DiskRecord(key=key, info=info, files=files, offset=0)
        record.offset = extents.take(record.size)
        self._records[key] = record

    def _delete(self, record: DiskRecord) -> None:
        for future in [*record.traffic.reads, *record.traffic.writes]:
            outcome(future)
        del self._records[record.key]
        if record.committed:
            self._removed[record.key] = record
        else:
            self._free(record)

    def _free(self, record: DiskRecord) -> None:
        (self._extents if record.info.durable else self._scratch_extents).give_back(record.offset, record.size)

    def _clear(self, record: DiskRecord) -> None:
        record.current, record.failed, record.attempt = None, None, None

    # -------------------------------------------------------------------------------------------------------- values

    def _start(self, records: Sequence[DiskRecord], device: torch.device) -> Load:
        for record in records:
            self._readable(record.key)
        if device.type == "cpu":
            return DiskLoad(records, self._io, self._io.pool(pinned=False), self._begin_write)
        host = DiskLoad(records, self._io, self._io.pool(pinned=True), self._begin_write)
        try:
            return DeviceLoad(records, host, self._lane(device), self._io.queue.uploads)
        except BaseException:
            host.release()
            raise

    def _write(self, values: Mapping[DiskRecord, Tensor], add: bool) -> None:
        sources = {record: self._readable(record.key).current or 0 for record in values if add and record.written}
        devices = dict.fromkeys(value.device for value in values.values() if value.device.type == "cuda")
        with self._begin_write(list(values)):
            self._io.write(values, sources, [self._lane(device) for device in devices])

    @contextmanager
    def _begin_write(self, records: Sequence[DiskRecord]) -> Iterator[None]:
        """While this is entered, the jobs that write new values of the records are submitted."""
        with self._lock:
            self._check_usable()
            for record in records:
                if self._records.get(record.key) is not record:
                    raise StoreError(f"{self.path}: {record.key!r} was deleted, and cannot be written")
            self._reserve()
            for record in records:
                record.version += 1
                record.failed, record.attempt, record.current = None, object(), record.target
                record.checksums[record.target] = [0] * record.num_pieces
            try:
                yield
            except BaseException as error:
                for record in records:
                    record.failed = StoreError(f"{self.path}: writing {record.key!r} was interrupted: {error!r}")
                raise

    def _reserve(self) -> None:
        """Take the space of all records from the file system: one call for all that were created since, in one go."""
        try:
            for file in self._durable:
                file.allocate(self._extents.end)
            self._files[2].allocate(self._scratch_extents.end)
        except OSError as error:
            nbytes = 2 * self._extents.end + self._scratch_extents.end
            raise io_error(error, f"{self.path}: reserving {nbytes / 1e9:.3g} GB in all") from error

    # ------------------------------------------------------------------------------------------------------- commits

    def _settle(self) -> None:
        for record in self._records.values():
            for future in record.traffic.writes:
                outcome(future)

    def _flush(self) -> None:
        self._settle()
        self._io.trim_staging()
        for record in self._records.values():
            if record.failed is not None:
                raise record.failed

    def _commit(self, step: int, extra: dict[str, Any], small: dict[str, Tensor]) -> None:
        self._flush()
        durable = [record for record in self._records.values() if record.info.durable]
        manifest = Manifest(step, extra, small, self._signature, {record.key: _entry(record) for record in durable})
        try:
            for file in self._durable:
                file.sync()
            manifest.save(self.path / _MANIFEST)
        except OSError as error:
            raise io_error(error, f"{self.path}: the commit of step {step}") from error
        except StoreError:
            self._closed = f"the last commit, of step {step}, was cut short; close the store and open it again"
            raise
        for record in durable:
            record.live, record.committed = record.current, True
        for record in self._removed.values():
            self._free(record)
        self._removed.clear()


def _entry(record: DiskRecord) -> RecordEntry:
    checksums = [] if record.current is None else record.checksums[record.current]
    return RecordEntry(
        shape=list(record.info.shape),
        dtype=dtype_name(record.info.dtype),
        offset=record.offset,
        live=record.current,
        checksums="".join(f"{checksum:08x}" for checksum in checksums),
    )


def _list(keys: Sequence[str]) -> str:
    return ", ".join(map(repr, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
