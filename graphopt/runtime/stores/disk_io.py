"""The jobs that move records between memory and disk, and a group of records on its way."""

from __future__ import annotations

import ctypes
import errno
import functools
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import StoreError
from graphopt.runtime.stores.buffers import AlignedBuffer, BufferPool, Meter, padded
from graphopt.runtime.stores.device_lane import DeviceLane
from graphopt.runtime.stores.disk_record import PIECE, Chunk, DiskRecord, Piece, Placement, chunks, layout
from graphopt.runtime.stores.io_queue import IOQueue, Writing, drop, outcome, wait_for, when_done
from graphopt.runtime.stores.loads import Load

_ADVICE = {
    errno.ENOSPC: "the disk is full: free space on it, then rollback() and repeat the step",
    errno.EDQUOT: "the disk quota is used up: free space, then rollback() and repeat the step",
    errno.EACCES: "a store needs a folder that it may write to",
    errno.EROFS: "a store needs a folder that it may write to",
    errno.EIO: "the disk may be faulty: look at the system's log",
}
_SERIAL = 32768  # torch computes with one thread up to this many elements; more threads would disturb the computation


def io_error(error: OSError, doing: str) -> StoreError:
    """A `StoreError` that says what was being done and what to do now."""
    advice = _ADVICE.get(error.errno or 0)
    return StoreError(f"{doing} failed: {error.strerror or error}" + (f"; {advice}" if advice else ""))


class DiskIO:
    """Threads, buffers and jobs of one disk store. Submissions come one at a time: the store holds its lock.

    Args:
        meter: where to count.
        max_pending_bytes: how much of what was passed to `write` may wait for the disk.
    """

    def __init__(self, meter: Meter, max_pending_bytes: int) -> None:
        self.queue = IOQueue()
        self._meter = meter
        self._pools = {pinned: BufferPool(meter, pinned=pinned) for pinned in (False, True)}
        self._staging = {
            pinned: BufferPool(meter, pinned=pinned, limit=max(max_pending_bytes, 2 * PIECE))
            for pinned in (False, True)
        }

    def pool(self, *, pinned: bool) -> BufferPool:
        """Buffers for groups that are visited."""
        return self._pools[pinned]

    def trim(self) -> None:
        """Free all buffers that are not in use."""
        for pool in [*self._pools.values(), *self._staging.values()]:
            pool.trim()

    def trim_staging(self) -> None:
        """Free the buffers that `write` has used; not those of a device, which it takes long to pin."""
        self._staging[False].trim()

    # ---------------------------------------------------------------------------------------------------------- reads

    def read(self, placements: Iterable[Placement], buffer: AlignedBuffer) -> list[Future[None]]:
        """Begin to fill a buffer."""
        return [
            self.queue.read(
                functools.partial(self._read_chunk, chunk, buffer), [record.traffic for record in chunk.records]
            )
            for chunk in chunks(placements)
        ]

    def read_into(self, target: Tensor, placement: Placement) -> list[Future[None]]:
        """Begin to fill a contiguous tensor in any memory of the host."""
        record = placement.record
        return [
            self.queue.read(functools.partial(self._copy_chunk, chunk, target), [record.traffic])
            for chunk in chunks([placement])
        ]

    def _read_chunk(self, chunk: Chunk, buffer: AlignedBuffer) -> None:
        for record in chunk.records:
            if record.failed is not None:
                raise record.failed
        buffer.settle()
        self.fill(chunk, chunk.part(buffer.memory))

    def _copy_chunk(self, chunk: Chunk, target: Tensor) -> None:
        (piece,) = chunk.pieces
        pool = self._pools[False]
        buffer = pool.acquire(chunk.nbytes)
        try:
            self._read_chunk(replace(chunk, start=0), buffer)
            ctypes.memmove(target.data_ptr() + chunk.start, buffer.address + piece.start, piece.nbytes)
        finally:
            pool.release(buffer)

    def fill(self, chunk: Chunk, memory: memoryview) -> None:
        """Read a chunk."""
        try:
            chunk.file.read_into(memory, chunk.offset)
        except OSError as error:
            raise io_error(error, f"{chunk.file.path}: reading {chunk.names}") from error
        self._meter.move(read=chunk.nbytes)

    # --------------------------------------------------------------------------------------------------------- writes

    def write(
        self, values: Mapping[DiskRecord, Tensor], sources: Mapping[DiskRecord, int], lanes: Sequence[DeviceLane]
    ) -> None:
        """Copy values, and begin to write them to the records' current files.

        Args:
            values: one for each record, of any strides and on any device.
            sources: for records that are added to, the number of the file with the old value.
            lanes: of the devices of the values.
        """
        writing = self.queue.writing(record.traffic for record in values)
        staging = self._staging[bool(lanes)]
        placements, _ = layout((record, record.target) for record in values)
        flat: tuple[DiskRecord | None, Tensor] = (None, torch.empty(0))
        for chunk in chunks(placements):
            adds = any(record in sources for record in chunk.records)
            buffer = staging.acquire(chunk.nbytes * (2 if adds else 1))
            give_back = functools.partial(staging.release, buffer)
            try:
                buffer.settle()
                for piece in chunk.pieces:
                    if flat[0] is not piece.record:
                        flat = (piece.record, _flat(values[piece.record]))
                    _stage(flat[1], piece, buffer)
                events = [lane.mark() for lane in lanes]
            except BaseException:
                give_back()
                raise
            prepare = functools.partial(self._prepare, chunk, buffer, sources, events)
            self._submit(writing, chunk, buffer.memory[: chunk.nbytes], prepare, give_back)

    def write_back(
        self, placements: Iterable[Placement], buffer: AlignedBuffer, after: Sequence[Any]
    ) -> list[Future[None]]:
        """Begin to write parts of a buffer, once these events have passed."""
        placements = list(placements)
        writing = self.queue.writing(placement.record.traffic for placement in placements)
        prepare = functools.partial(_synchronize, after)
        return [
            self._submit(writing, chunk, chunk.part(buffer.memory), prepare, _nothing) for chunk in chunks(placements)
        ]

    def _submit(
        self,
        writing: Writing,
        chunk: Chunk,
        memory: memoryview,
        prepare: Callable[[], None],
        give_back: Callable[[], None],
    ) -> Future[None]:
        sums = [piece.record.checksums[piece.slot] for piece in chunk.pieces]
        attempts = [(record, record.attempt) for record in chunk.records]

        def job() -> None:
            try:
                self._write_chunk(chunk, memory, prepare, sums, attempts)
            finally:
                give_back()

        return writing.submit(job, [record.traffic for record in chunk.records])

    def _write_chunk(
        self,
        chunk: Chunk,
        memory: memoryview,
        prepare: Callable[[], None],
        sums: Sequence[list[int]],
        attempts: Sequence[tuple[DiskRecord, object]],
    ) -> None:
        """Write a chunk; an error is kept in its records, and raised by whoever waits for them."""
        try:
            prepare()
            for piece, of_record in zip(chunk.pieces, sums, strict=True):
                if piece.record.info.durable:
                    of_record[piece.index] = zlib.crc32(piece.part(memory))
            chunk.file.write_from(memory, chunk.offset)
            self._meter.move(written=chunk.nbytes)
            return
        except OSError as error:
            failure = io_error(error, f"{chunk.file.path}: writing {chunk.names}")
        except Exception as error:
            failure = StoreError(f"{chunk.file.path}: writing {chunk.names} failed: {error!r}")
        for record, attempt in attempts:
            if record.attempt is attempt:  # otherwise the record was written anew meanwhile
                record.failed = failure

    def _prepare(
        self, chunk: Chunk, buffer: AlignedBuffer, sources: Mapping[DiskRecord, int], after: Sequence[Any]
    ) -> None:
        """Make the first part of a buffer what is to be written; the rest is for old values."""
        _synchronize(after)
        for piece in chunk.pieces:
            if piece.record in sources:
                file, size = piece.record.files[sources[piece.record]], padded(piece.nbytes)
                old = Chunk(file, piece.offset, chunk.nbytes, size, [piece])
                self.fill(old, old.part(buffer.memory))
                value, before = piece.tensor(buffer, piece.start), piece.tensor(buffer, chunk.nbytes)
                for part, old_part in zip(value.split(_SERIAL), before.split(_SERIAL), strict=True):
                    part.add_(old_part)


class DiskLoad(Load):
    """A group of records of a disk store in a buffer.

    Args:
        records: each must have a value.
        begin_write: tells the store that records are about to be written; the store's lock must be held from then until the
            jobs are submitted.
        pool: where to take the buffer from.
    """

    def __init__(
        self,
        records: Sequence[DiskRecord],
        io: DiskIO,
        pool: BufferPool,
        begin_write: Callable[[Sequence[DiskRecord]], AbstractContextManager[None]],
    ) -> None:
        super().__init__(records)
        self._io, self._pool, self._begin_write = io, pool, begin_write
        placements, nbytes = layout((record, record.current or 0) for record in records)
        buffer = pool.acquire(nbytes)
        self._buffer: AlignedBuffer | None = buffer
        self._placed = {placement.record.key: placement for placement in placements}
        self._tensors = {
            record.key: buffer.tensor(self._placed[record.key].start, record.info.shape, record.info.dtype)
            for record in records
        }
        self._reads = io.read(placements, buffer)
        self._writes: list[Future[None]] = []
        self._returned = threading.Event()

    def arrive(self) -> dict[str, Tensor]:
        """As the base class says."""
        wait_for(self._reads)
        return dict(self._tensors)

    def write_back(self, keys: Sequence[str], after: Sequence[Any] = ()) -> None:
        """As the base class says."""
        assert self._buffer is not None
        placed = sorted((self._placed[key] for key in dict.fromkeys(keys)), key=lambda placement: placement.start)
        with self._begin_write([placement.record for placement in placed]):
            targets = [Placement(place.record, place.record.target, place.start) for place in placed]
            self._writes += self._io.write_back(targets, self._buffer, after)

    def wait_written(self) -> None:
        """As the base class says."""
        for future in self._writes:
            outcome(future)
        if self._buffer is None:
            self._returned.wait()

    def release(self, after: Sequence[Any] = ()) -> None:
        """As the base class says."""
        buffer, self._buffer, self._tensors = self._buffer, None, {}
        if buffer is None:
            return
        drop(self._reads)
        buffer.busy.extend(after)
        when_done(self._writes, functools.partial(self._give_back, buffer))

    def _give_back(self, buffer: AlignedBuffer) -> None:
        self._pool.release(buffer)
        self._returned.set()


def _nothing() -> None:
    pass


def _synchronize(events: Sequence[Any]) -> None:
    for event in events:
        event.synchronize()


def _flat(value: Tensor) -> Tensor:
    """The elements of a tensor, one after the other in memory."""
    return value.detach().resolve_conj().resolve_neg().contiguous().view(-1)


def _stage(flat: Tensor, piece: Piece, buffer: AlignedBuffer) -> None:
    """Copy a piece of a value to its place, and nothing of what was there before to the disk."""
    first = piece.index * PIECE
    if flat.device.type == "cuda":
        target = piece.tensor(buffer, piece.start)
        target.copy_(flat[first // flat.itemsize :][: target.numel()], non_blocking=True)
    else:  # torch would use all its threads for this, and wait for the slowest at each piece
        ctypes.memmove(buffer.address + piece.start, flat.data_ptr() + first, piece.nbytes)
    end = piece.start + piece.nbytes
    buffer.memory[end : padded(end)] = bytes(padded(end) - end)
