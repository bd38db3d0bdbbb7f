"""Page-aligned memory that disks read into and write from directly, and the pools that hand it out again and again."""

from __future__ import annotations

import functools
import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PAGE = 4096  # direct I/O needs memory, offsets and sizes in multiples of the block size; no disk has a larger one


def padded(nbytes: int) -> int:
    """The smallest number of whole pages that holds this many bytes, in bytes."""
    return -(-nbytes // PAGE) * PAGE


def nbytes_of(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a contiguous tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


class Meter:
    """Counters of one store that several threads write to."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection within may free a visit, which comes back to here
        self._resident = 0
        self.peak_resident = self.read = self.written = 0

    def hold(self, nbytes: int) -> None:
        """Count memory that was allocated, or freed where negative."""
        with self._lock:
            self._resident += nbytes
            self.peak_resident = max(self.peak_resident, self._resident)

    def move(self, *, read: int = 0, written: int = 0) -> None:
        """Count bytes that moved."""
        with self._lock:
            self.read += read
            self.written += written

    def reset(self) -> None:
        """Start anew; what is allocated now stays counted."""
        with self._lock:
            self.peak_resident, self.read, self.written = self._resident, 0, 0


class AlignedBuffer:
    """Anonymous memory that starts at a page.

    It lives as long as the buffer or a tensor that was made from it, and not at all in processes that are forked.

    Attributes:
        nbytes: size, whole pages.
        memory: the bytes.
        address: of the first of them.
        busy: events of a device that still reads or writes the memory.
    """

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self.nbytes = max(padded(nbytes), PAGE)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = _PinnedMap(-1, self.nbytes, flags) if pinned else mmap.mmap(-1, self.nbytes, flags)
        if self.nbytes >= 2 << 20:
            self._map.madvise(mmap.MADV_HUGEPAGE)  # touching fresh memory costs a fault for each page
        # A process that is forked while the disk moves data must not share these pages, or copies of them take the data:
        # see O_DIRECT in open(2). Nor should the workers of a data loader keep them in memory.
        self._map.madvise(mmap.MADV_DONTFORK)
        self.memory = memoryview(self._map)
        self.address = torch.frombuffer(self._map, dtype=torch.uint8).data_ptr()
        self.busy: list[Any] = []
        self._settling = threading.RLock()
        if isinstance(self._map, _PinnedMap):
            self._map.pin(self.address)

    def tensor(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor whose values start at byte ``start``.

        Each has a storage and a version of its own: where tensors are views of one, an update in place of any of them makes
        autograd refuse what it saved of all others.
        """
        numel = torch.Size(shape).numel()
        if numel == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=numel, offset=start).view(tuple(shape))

    def settle(self) -> None:
        """Wait until no device uses the memory; any number of threads may do so."""
        with self._settling:
            while self.busy:
                self.busy[-1].synchronize()
                self.busy.pop()


class BufferPool:
    """Buffers to be used again. Free ones are kept as long as the pool stays within the most that was ever in use at once.

    Args:
        meter: where to count the memory.
        pinned: whether a CUDA device copies from and to the buffers.
        limit: if given, `acquire` waits while more than this many bytes are in use.
    """

    def __init__(self, meter: Meter, *, pinned: bool = False, limit: int | None = None) -> None:
        self._meter, self._pinned, self._limit = meter, pinned, limit
        self._changed = threading.Condition()
        self._free: list[AlignedBuffer] = []
        self._in_use = self._most_in_use = 0

    def acquire(self, nbytes: int) -> AlignedBuffer:
        """A buffer of at least ``nbytes``, with any contents."""
        nbytes = max(padded(nbytes), PAGE)
        with self._changed:
            if self._limit is not None:
                limit = self._limit
                self._changed.wait_for(lambda: self._in_use == 0 or self._in_use + nbytes <= limit)
            fitting = [buffer for buffer in self._free if nbytes <= buffer.nbytes <= 2 * nbytes]
            if fitting:
                buffer = min(fitting, key=lambda buffer: buffer.nbytes)
                self._free.remove(buffer)
            else:
                self._drop_down_to(max(self._most_in_use - self._in_use - nbytes, 0))
                buffer = AlignedBuffer(nbytes, pinned=self._pinned)
                self._meter.hold(buffer.nbytes)
            self._in_use += buffer.nbytes
            self._most_in_use = max(self._most_in_use, self._in_use)
            return buffer

    def release(self, buffer: AlignedBuffer) -> None:
        """Take a buffer back. Devices may still use it: see `AlignedBuffer.settle`."""
        with self._changed:
            self._in_use -= buffer.nbytes
            self._free.append(buffer)
            self._changed.notify_all()

    def trim(self) -> None:
        """Free what is not in use."""
        with self._changed:
            self._drop_down_to(0)
            self._most_in_use = self._in_use

    def _drop_down_to(self, nbytes: int) -> None:
        self._free.sort(key=lambda buffer: buffer.nbytes, reverse=True)
        while sum(buffer.nbytes for buffer in self._free) > nbytes:
            buffer = self._free.pop(0)
            buffer.settle()
            self._meter.hold(-buffer.nbytes)


class _PinnedMap(mmap.mmap):
    """Memory that CUDA has pinned. Its own allocator of pinned memory rounds sizes up to a power of two."""

    _unpin: Callable[[], object] | None = None

    def pin(self, address: int) -> None:
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(address, len(self), 0)))
        self._unpin = functools.partial(runtime.cudaHostUnregister, address)

    def __del__(self) -> None:  # not a weakref.finalize: that one runs when the memory is unmapped already
        if self._unpin is not None:
            self._unpin()
