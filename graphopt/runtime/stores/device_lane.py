"""Copies between host memory and a CUDA device, beside the computation.

Three streams meet: the caller's computes, one copies to the device, one copies from it. Every rule below is there because
without it a step now and then computes with old or half-copied weights:

* the computation waits for the copy that brings a weight (`DeviceLoad.wait`),
* a copy to the device waits for the copy from it that wrote the same host memory (`Load.busy`), and a copy from it for those
  that still read that memory,
* memory on the device is filled anew only after the computation that read it and the copy that took results from it,
* memory on the host is written by the CPU or the disk only after the copies that read it (`AlignedBuffer.settle`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

import torch
from torch import Tensor

from graphopt.runtime.stores.buffers import Meter, padded
from graphopt.runtime.stores.io_queue import outcome
from graphopt.runtime.stores.loads import Load, Record


class DeviceLane:
    """The streams of one CUDA device, and its memory for groups of records."""

    def __init__(self, device: torch.device, meter: Meter) -> None:
        self.device, self._meter = device, meter
        self._uploads, self._downloads = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._lock = threading.RLock()
        self._free: list[DeviceBuffer] = []

    def mark(self) -> Any:
        """An event that passes when all that was given to the caller's stream so far is done."""
        return torch.cuda.current_stream(self.device).record_event()

    def hold(self, event: Any) -> None:
        """Make the caller's stream wait for an event."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def upload(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Any]) -> Any:
        """Copy from the second to the first tensor of each pair once the events have passed; the event of its end."""
        return self._copy(self._uploads, pairs, after)

    def download(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Any]) -> Any:
        """As `upload`, in the other direction."""
        return self._copy(self._downloads, pairs, after)

    def acquire(self, nbytes: int) -> DeviceBuffer:
        """Memory on the device; `DeviceBuffer.busy` says when it may be overwritten."""
        with self._lock:
            for buffer in sorted(self._free, key=lambda buffer: buffer.nbytes):
                if nbytes <= buffer.nbytes <= 2 * nbytes:
                    self._free.remove(buffer)
                    return buffer
            self._drop()
        self._meter.hold(nbytes)
        return DeviceBuffer(self._allocate(nbytes))

    def release(self, buffer: DeviceBuffer) -> None:
        """Take memory back; what still uses it is in its ``busy``."""
        self._use(buffer)
        with self._lock:
            self._free.append(buffer)

    def trim(self) -> None:
        """Free all memory that is not in use."""
        with self._lock:
            self._drop()

    def _allocate(self, nbytes: int) -> Tensor:
        with torch.cuda.stream(self._uploads):  # the first to write it, so that torch may hand it on without waiting
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _copy(self, stream: Any, pairs: Sequence[tuple[Tensor, Tensor]], after: Sequence[Any]) -> Any:
        for event in after:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        return stream.record_event()

    def _use(self, buffer: DeviceBuffer) -> None:
        """Tell torch's allocator which streams use the memory besides the one that it was allocated on."""
        buffer.memory.record_stream(torch.cuda.current_stream(self.device))
        buffer.memory.record_stream(self._downloads)

    def _drop(self) -> None:
        for buffer in self._free:
            self._meter.hold(-buffer.nbytes)
        self._free.clear()


class DeviceBuffer:
    """Memory for one group on a device.

    Attributes:
        busy: events after which it may be overwritten.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.nbytes = memory, memory.numel()
        self.busy: list[Any] = []

    def tensor(self, start: int, like: Record) -> Tensor:
        """The value of a record that starts at byte ``start``."""
        numel, info = like.info.shape.numel(), like.info
        if numel == 0:
            return torch.empty(info.shape, dtype=info.dtype, device=self.memory.device)
        part = self.memory[start : start + info.nbytes].view(info.dtype).view(info.shape)
        return (
            part.data
        )  # a version of its own: an update of one in place does not concern what autograd saved of the others


class DeviceLoad(Load):
    """A group that goes through host memory to a device.

    Args:
        host: the same group on its way to the host.
        lane: the device.
        uploads: where to wait for the host's part and begin the copy; ``None`` if there is nothing to wait for.
    """

    def __init__(self, records: Sequence[Record], host: Load, lane: DeviceLane, uploads: Executor | None) -> None:
        super().__init__(records)
        starts, end = [], 0
        for record in records:
            starts.append(end)
            end += padded(record.info.nbytes)
        self._host, self._lane, self._buffer = host, lane, lane.acquire(end)
        self._tensors = {
            record.key: self._buffer.tensor(start, record) for record, start in zip(records, starts, strict=True)
        }
        self._event: Any = None  # the end of the copy to the device
        self._after: list[Any] = []  # copies from the device
        self._released = False
        self._uploading: Future[None] | None = None
        if uploads is None:
            self._upload()
        else:
            self._uploading = uploads.submit(self._upload)

    def arrive(self) -> dict[str, Tensor]:
        """As the base class says; the caller's stream waits, not its thread."""
        if self._uploading is not None:
            self._uploading.result()
        self._lane.hold(self._event)
        return dict(self._tensors)

    def write_back(self, keys: Sequence[str], after: Sequence[Any] = ()) -> None:
        """As the base class says, by way of the host."""
        into = self._host.arrive()
        pairs = [(into[key], self._tensors[key]) for key in keys]
        event = self._lane.download(pairs, [self._lane.mark(), *after, *self._host.busy()])
        self._after.append(event)
        self._host.write_back(keys, [event])

    def wait_written(self) -> None:
        """As the base class says."""
        for event in self._after:
            event.synchronize()
        self._host.wait_written()

    def release(self, after: Sequence[Any] = ()) -> None:
        """As the base class says."""
        if self._released:
            return
        self._released = True
        if self._uploading is not None and not self._uploading.cancel():
            outcome(self._uploading)
        uploaded = [] if self._event is None else [self._event]
        self._host.release([*uploaded, *self._after, *after])
        self._buffer.busy = [*uploaded, *self._after, *after, self._lane.mark()]
        self._lane.release(self._buffer)

    def _upload(self) -> None:
        arrived = self._host.arrive()
        pairs = [(tensor, arrived[key]) for key, tensor in self._tensors.items()]
        self._event = self._lane.upload(pairs, [*self._host.busy(), *self._buffer.busy])
