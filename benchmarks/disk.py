"""Folders for stores on a real disk, and how fast that disk is.

They lie in ``benchmarks/.stores``, or where the environment variable ``GRAPHOPT_BENCHMARK_FOLDER`` says.
"""

from __future__ import annotations

import atexit
import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from benchmarks.machine import ROOT

VARIABLE = "GRAPHOPT_BENCHMARK_FOLDER"
PIECE = 4 << 20  # bytes of one system call
NUM_THREADS = 2
RAW_BYTES = 256 << 20
REPEATS = 3
IN_MEMORY = ("tmpfs", "ramfs")


def new_folder() -> Path:
    """A folder that is removed when this process ends; those that killed processes have left are removed now.

    Raises:
        RuntimeError: it would lie in memory.
    """
    parent = Path(os.environ.get(VARIABLE) or ROOT / "benchmarks" / ".stores")
    parent.mkdir(parents=True, exist_ok=True)
    kind = file_system(parent)
    if kind in IN_MEMORY:
        raise RuntimeError(f"{parent} is on {kind}, that is in memory; set {VARIABLE} to a folder on a disk")
    for left in parent.iterdir():
        if left.name.isdigit() and not psutil.pid_exists(int(left.name)):
            shutil.rmtree(left, ignore_errors=True)
    own = parent / str(os.getpid())
    if not own.exists():
        own.mkdir()
        atexit.register(_remove, own, os.getpid())
    folder = own / str(len(list(own.iterdir())))
    folder.mkdir()
    return folder


def file_system(path: Path) -> str:
    """The kind of the file system that holds a path, such as ``"ext4"``."""
    mounts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def raw_speeds(folder: Path) -> dict[str, float]:
    """Bytes per second of direct reads and writes, by two threads and without anything else being done to the bytes.

    ``mixed`` is both at once, as many bytes of each.
    """
    path = folder / "raw.bin"
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_DIRECT", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError:  # a file system without direct I/O; then this measures the page cache as well
        descriptor = os.open(path, flags & ~getattr(os, "O_DIRECT", 0))
    buffers = [memoryview(mmap.mmap(-1, PIECE)) for _ in range(2 * NUM_THREADS)]
    half = RAW_BYTES // 2
    try:
        with ThreadPoolExecutor(2 * NUM_THREADS) as threads:

            def move(call: Callable[..., int], number: int, offsets: range) -> None:
                for offset in offsets[number % NUM_THREADS :: NUM_THREADS]:
                    call(descriptor, [buffers[number]], offset)

            def run(*parts: tuple[Callable[..., int], int, range]) -> float:
                start = time.perf_counter()
                list(threads.map(lambda part: move(*part), parts))
                return RAW_BYTES / (time.perf_counter() - start)

            both, first, second = (range(*bounds, PIECE) for bounds in ((0, RAW_BYTES), (0, half), (half, RAW_BYTES)))
            run((os.pwritev, 0, both), (os.pwritev, 1, both))  # the first values of a file take longer
            found: dict[str, list[float]] = {"read": [], "written": [], "mixed": []}
            for _ in range(REPEATS):
                found["read"].append(run((os.preadv, 0, both), (os.preadv, 1, both)))
                found["written"].append(run((os.pwritev, 0, both), (os.pwritev, 1, both)))
                reads, writes = ((os.preadv, n, first) for n in (0, 1)), ((os.pwritev, n, second) for n in (2, 3))
                found["mixed"].append(run(*reads, *writes))
    finally:
        os.close(descriptor)
        path.unlink()
    return {what: statistics.median(speeds) for what, speeds in found.items()}


def _remove(folder: Path, process_id: int) -> None:
    if os.getpid() == process_id:  # not in a fork of it
        shutil.rmtree(folder, ignore_errors=True)
