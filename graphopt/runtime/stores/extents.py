"""Which parts of a file are in use."""

from __future__ import annotations

import bisect
from collections.abc import Iterable


class Extents:
    """Offsets of the records in a file, or in several files of one layout: first fit, neighbours that are free are joined.

    Args:
        used: offset and size of what is in use from the start.
    """

    def __init__(self, used: Iterable[tuple[int, int]] = ()) -> None:
        self.end = 0
        self._free: list[tuple[int, int]] = []  # (offset, size), sorted, never adjacent
        for offset, size in sorted(used):
            if offset > self.end:
                self._free.append((self.end, offset - self.end))
            self.end = max(self.end, offset + size)

    def take(self, size: int) -> int:
        """The offset of ``size`` bytes that are in use from now on; 0 for no bytes."""
        if size == 0:
            return 0
        for position, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[position : position + 1] = [(offset + size, free - size)] if free > size else []
                return offset
        offset, self.end = self.end, self.end + size
        return offset

    def give_back(self, offset: int, size: int) -> None:
        """Make a part free that `take` has returned."""
        if size == 0:
            return
        position = bisect.bisect(self._free, (offset, 0))
        if position < len(self._free) and self._free[position][0] == offset + size:
            size += self._free.pop(position)[1]
        if position and sum(self._free[position - 1]) == offset:
            offset, before = self._free.pop(position - 1)
            size += before
            position -= 1
        if offset + size == self.end:
            self.end = offset
        else:
            self._free.insert(position, (offset, size))
