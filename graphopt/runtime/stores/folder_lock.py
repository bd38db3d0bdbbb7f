"""One process at a time in a folder."""

from __future__ import annotations

import fcntl
import functools
import os
import weakref
from pathlib import Path

from graphopt.errors import StoreError


class FolderLock:
    """Holds a folder until it is released or the process ends, however it ends.

    Raises:
        StoreError: another process holds it, or this one already.
        OSError: the lock file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "lock"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            who = "this process" if holder == str(os.getpid()) else f"the process with pid {holder}"
            raise StoreError(
                f"{folder} is in use by {who}: a store is open in one place at a time; close it there first"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._close = weakref.finalize(self, os.close, fd)
        _held.add(self)
        _watch_forks()

    def release(self) -> None:
        """Let go of the folder; idempotent."""
        self._close()


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


@functools.cache
def _watch_forks() -> None:
    """A child process inherits the lock, and would hold it after its parent was killed: workers of a data loader do."""
    os.register_at_fork(after_in_child=_release_all)


def _release_all() -> None:
    for lock in list(_held):
        lock.release()
