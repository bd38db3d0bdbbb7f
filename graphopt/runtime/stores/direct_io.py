"""Files that are read and written past the page cache where the file system allows it."""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path

from graphopt.runtime.stores.buffers import PAGE, AlignedBuffer


class DataFile:
    """A file of whole pages; offsets, sizes and memory passed to it start and end at pages.

    Its errors are ``OSError``: the caller knows what was being read or written.

    Args:
        path: the file, made if it does not exist.
        unlink: whether to remove its name at once, so that it ends with the process whatever happens.

    Attributes:
        direct: whether the page cache is circumvented. Otherwise what was read is dropped from the cache at once, and what
            was written when it is synchronised.
        size: its size in bytes; no smaller than what `allocate` was asked for.
    """

    def __init__(self, path: Path, *, unlink: bool = False) -> None:
        self.path = path
        self._fd, self.direct = _open(path)
        self._close = weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size
        if unlink:
            os.unlink(path)

    def allocate(self, size: int) -> None:
        """Make the file at least this large, with the space reserved on disk where the file system can do that."""
        if size <= self.size:
            return
        try:
            os.posix_fallocate(self._fd, self.size, size - self.size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            os.ftruncate(self._fd, size)
        self.size = size

    def read_into(self, memory: memoryview, offset: int) -> None:
        """Fill ``memory`` from ``offset`` on."""
        done = 0
        while done < len(memory):
            moved = os.preadv(self._fd, [memory[done:]], offset + done)
            if moved == 0:
                raise OSError(errno.EIO, f"the file ends before byte {offset + len(memory)}")
            done = self._resume(done + moved, len(memory))
        if not self.direct:
            os.posix_fadvise(self._fd, offset, len(memory), os.POSIX_FADV_DONTNEED)

    def write_from(self, memory: memoryview, offset: int) -> None:
        """Write ``memory`` at ``offset``."""
        done = 0
        while done < len(memory):
            moved = os.pwritev(self._fd, [memory[done:]], offset + done)
            if moved == 0:
                raise OSError(errno.EIO, "nothing could be written")
            done = self._resume(done + moved, len(memory))

    def sync(self) -> None:
        """Return when what was written would survive a power cut."""
        os.fdatasync(self._fd)
        if not self.direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close it; idempotent."""
        self._close()

    def _resume(self, done: int, total: int) -> int:
        """Where to go on after a short transfer: direct I/O cannot start within a page."""
        return done // PAGE * PAGE if self.direct and done < total else done


def _open(path: Path) -> tuple[int, bool]:
    """A file descriptor, and whether it is for direct I/O."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644), False
    try:
        os.preadv(fd, [AlignedBuffer(PAGE).memory], 0)  # some file systems refuse only now
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644), False
    return fd, True
