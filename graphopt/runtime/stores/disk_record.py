"""Where records lie on disk, and which of them go through one system call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from graphopt.errors import StoreError
from graphopt.runtime.stores.buffers import AlignedBuffer, padded
from graphopt.runtime.stores.direct_io import DataFile
from graphopt.runtime.stores.io_queue import Traffic
from graphopt.runtime.stores.loads import Record

# Two threads that move pieces of 4 MiB reach what a disk gives to `dd bs=32M`: smaller ones cost more system calls, larger
# ones more memory on the way. The checksums in a manifest are those of such pieces, so another size is another format.
PIECE = 4 << 20


@dataclass(eq=False, kw_only=True)
class DiskRecord(Record):
    """A record that lies at one offset in each of its files.

    A durable record has two files, of which the live one holds what was last committed. A scratch record has one.

    Attributes:
        current: the file that reads come from; ``None`` without a value.
        live: the file that the last commit named.
        committed: whether the last commit knows the record.
        checksums: for each file, those of the pieces of the value.
        failed: what went wrong when the value was written.
        attempt: identifies the last write.
    """

    files: Sequence[DataFile]
    offset: int
    current: int | None = None
    live: int | None = None
    committed: bool = False
    checksums: list[list[int]] = field(default_factory=lambda: [[], []])
    failed: StoreError | None = None
    attempt: Any = None
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def written(self) -> bool:
        """Whether it has a value."""
        return self.current is not None

    @property
    def size(self) -> int:
        """Bytes in a file."""
        return padded(self.info.nbytes)

    @property
    def num_pieces(self) -> int:
        """Parts of `PIECE` bytes, of which the last may be smaller."""
        return -(-self.info.nbytes // PIECE)

    @property
    def target(self) -> int:
        """The file that the next value goes to."""
        return 0 if self.live is None else 1 - self.live


@dataclass(frozen=True)
class Placement:
    """A record in one of its files, and where it goes in memory."""

    record: DiskRecord
    slot: int
    start: int


@dataclass(frozen=True)
class Piece:
    """Part of a chunk that belongs to one record.

    Attributes:
        index: number of the piece within its record.
        start: first byte within the chunk.
        nbytes: bytes that mean something.
    """

    record: DiskRecord
    slot: int
    index: int
    start: int
    nbytes: int

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.record.offset + self.index * PIECE

    def part(self, memory: memoryview) -> memoryview:
        """Its bytes in the memory of the chunk."""
        return memory[self.start : self.start + self.nbytes]

    def tensor(self, buffer: AlignedBuffer, start: int) -> Tensor:
        """Its values in a buffer, flat."""
        dtype = self.record.info.dtype
        return buffer.tensor(start, (self.nbytes // dtype.itemsize,), dtype)


@dataclass
class Chunk:
    """Bytes that lie together in a file and in memory."""

    file: DataFile
    offset: int
    start: int
    nbytes: int
    pieces: list[Piece]

    @property
    def records(self) -> list[DiskRecord]:
        """The records that it holds parts of."""
        return list(dict.fromkeys(piece.record for piece in self.pieces))

    @property
    def names(self) -> str:
        """The records in words."""
        names = [repr(record.key) for record in self.records]
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    def part(self, memory: memoryview) -> memoryview:
        """Its bytes in the memory that the placements refer to."""
        return memory[self.start : self.start + self.nbytes]


def layout(records: Iterable[tuple[DiskRecord, int]]) -> tuple[list[Placement], int]:
    """Place records in memory in the order in which they lie on disk, so that neighbours stay neighbours.

    Args:
        records: each with the number of its file.

    Returns:
        The placements, and the bytes that they need.
    """
    placements, end = [], 0
    for record, slot in sorted(records, key=lambda pair: (str(pair[0].files[pair[1]].path), pair[0].offset)):
        placements.append(Placement(record, slot, end))
        end += record.size
    return placements, end


def chunks(placements: Iterable[Placement]) -> list[Chunk]:
    """Cut records into pieces, and join pieces that are neighbours both on disk and in memory."""
    found: list[Chunk] = []
    for placement in placements:
        record, file = placement.record, placement.record.files[placement.slot]
        for index, at in enumerate(range(0, record.size, PIECE)):
            size, offset, start = min(PIECE, record.size - at), record.offset + at, placement.start + at
            last = found[-1] if found else Chunk(file, -1, -1, 0, [])
            adjacent = (last.file, last.offset + last.nbytes, last.start + last.nbytes) == (file, offset, start)
            if not adjacent or last.nbytes + size > PIECE:
                last = Chunk(file, offset, start, 0, [])
                found.append(last)
            useful = min(PIECE, record.info.nbytes - at)
            last.pieces.append(Piece(record, placement.slot, index, last.nbytes, useful))
            last.nbytes += size
    return found
