"""Measure what decides whether the transfer of weights is hidden: how fast a store moves bytes, and how fast products are."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F

from graphopt.errors import OptionError, StoreError
from graphopt.runtime.stores import DiskStore, HostStore, Store
from graphopt.runtime.streaming.options import Streaming

_RECORD = 32 << 20  # bytes; a layer has tens to hundreds of MB
_NUM_RECORDS = 8
_SHORTEST = 0.2  # seconds that a measurement of the processor takes at least
_SIZE = {"cpu": 1024, "cuda": 8192}  # of the matrices: large enough for the best speed of either
_UNITS = {"bandwidth": "bytes per second", "flops": "operations per second"}


@dataclass(frozen=True)
class Machine:
    """Speeds; ``None`` where nobody has measured or given one.

    Attributes:
        read: bytes per second from the store to the device.
        written: bytes per second from the device to the store.
        flops: floating-point operations per second of a matrix product in the model's dtype.
        memory: bytes per second that the CPU reads and writes, as in a copy.
        is_duplex: whether both directions run at full speed at once.
        note: what a reader should know about the figures.
    """

    read: float | None = None
    written: float | None = None
    flops: float | None = None
    memory: float | None = None
    is_duplex: bool = False
    note: str = ""

    def transfer(self, read: int, written: int) -> float | None:
        """Seconds to move these bytes."""
        if read + written == 0:
            return 0.0
        if self.read is None or self.written is None:
            return None
        times = read / self.read, written / self.written
        return max(times) if self.is_duplex else sum(times)

    def compute(self, flops: int) -> float | None:
        """Seconds for these operations."""
        return None if self.flops is None else flops / self.flops


def given(
    bandwidth: float | tuple[float, float] | None, flops: float | None, options: Streaming, device: torch.device
) -> Machine:
    """A machine as the user describes it.

    Raises:
        OptionError: a speed that is not positive.
    """
    read, written = bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
    for name, value in (("bandwidth", read), ("bandwidth", written), ("flops", flops)):
        if value is not None and not value > 0:
            raise OptionError(f"plan({name}={value!r}): it is a speed in {_UNITS[name]}, above 0")
    return Machine(read, written, flops, None, _is_duplex(options, device))


def measured(options: Streaming, device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure this machine; takes a second or two, and on disk a quarter of a GB for as long.

    Args:
        options: which store; a disk store is made in a temporary folder beside the one that they name.
        device: where layers compute.
        dtype: of the model.

    Raises:
        StoreError: nothing can be written where the store is to be.
        OptionError: the device is not there.
    """
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise OptionError(
            f"plan(): {device} cannot be measured on this machine. Say how fast it is, plan(measure=False, bandwidth=25e9, "
            "flops=150e12), in bytes and operations per second; or leave both out for a plan without times"
        )
    memory, flops = _memory_speed(), _product_speed(device, dtype)
    note = ""
    if options.store == "cpu":
        if device.type == "cpu":
            return Machine(memory / 2, memory / 2, flops, memory)  # a copy of n bytes touches 2 n
        with HostStore(device=device) as store:
            read, written = _store_speed(store, device, _RECORD)
    else:
        read, written, is_direct = _disk_speed(cast(Path, options.path), device)
        note = "" if is_direct else "through the page cache: a store that is larger than memory will be slower"
    return Machine(read, written, flops, memory, _is_duplex(options, device), note)


def _is_duplex(options: Streaming, device: torch.device) -> bool:
    return options.store == "cpu" and device.type != "cpu"


def _disk_speed(path: Path, device: torch.device) -> tuple[float, float, bool]:
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        free = shutil.disk_usage(folder).free
        size = _RECORD if free > 8 * _NUM_RECORDS * _RECORD else _RECORD // 16
        with (
            tempfile.TemporaryDirectory(prefix="graphopt-plan-", dir=folder) as temporary,
            DiskStore(Path(temporary) / "store") as store,
        ):
            read, written = _store_speed(store, device, size)
            return read, written, store.direct
    except OSError as error:
        raise StoreError(
            f"plan() measures the disk in a temporary folder in {folder}, and cannot: {error.strerror or error}. Give a "
            "store_path on a disk that can be written to, or plan(measure=False)"
        ) from error


def _store_speed(store: Store, device: torch.device, size: int) -> tuple[float, float]:
    """Bytes per second from and to a store, records of one size one after the other."""
    keys = [f"record/{number}" for number in range(_NUM_RECORDS)]
    value = torch.empty(size, dtype=torch.uint8).random_().to(device)
    for key in keys:
        store.create(key, value.shape, value.dtype, durable=False)

    def write() -> None:
        for key in keys:
            store.write({key: value})
        store.flush()

    def read() -> None:
        for _ in store.visit([[key] for key in keys], prefetch=1, device=device):
            pass

    write()  # the first values of a file take longer: the file system prepares the space
    written = _seconds(write, device)
    return len(keys) * size / _seconds(read, device), len(keys) * size / written


def _product_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a linear layer."""
    size, dtype = _SIZE[device.type], dtype if dtype.is_floating_point else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    with torch.no_grad():
        return 2 * size**3 / _best(lambda: F.linear(left, right), device)


def _memory_speed() -> float:
    """Bytes per second that a copy in host memory reads and writes."""
    source = torch.ones(_RECORD, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * _RECORD / _best(lambda: target.copy_(source), torch.device("cpu"))


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs: others were disturbed."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < _SHORTEST:
        times.append(_seconds(run, device))
    return min(times)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _wait_for(device)
    start = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
