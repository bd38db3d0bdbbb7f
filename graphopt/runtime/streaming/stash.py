"""What passes between stages, kept from forward until backward: on the device, in host memory or on disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.regions import Rows
from graphopt.runtime.streaming.micro_batches import Cut, Values
from graphopt.runtime.streaming.stages import Stage

if TYPE_CHECKING:
    from graphopt.runtime.streaming.stream import Stream

_numbers = itertools.count()


class Stash:
    """The values that the stages of one call read, each kept once.

    On disk go those that hold samples; what belongs to all of them (a mask, a table of positions) or takes no memory stays on
    the device.
    """

    def __init__(self, stream: Stream, cut: Cut, rows: Mapping[str, Rows]) -> None:
        self._stream, self._cut, self._rows = stream, cut, rows
        self._place = stream.options.stash
        self._number = next(_numbers)
        self._kept: dict[str, list[tuple[int | None, Tensor]]] = {}
        self._records: dict[str, list[tuple[int | None, str]]] = {}

    def keep(self, name: str, values: Values) -> None:
        """Keep a value; does nothing if it is kept already."""
        if name in self._kept or name in self._records:
            return
        items = values.items(name)
        if self._place == "disk" and name in self._rows and all(_takes_memory(value) for _, value in items):
            self._records[name] = [(part, self._write(name, part, value)) for part, value in items]
        elif self._place == "cpu":
            self._kept[name] = [(part, value.to("cpu")) for part, value in items]
        else:
            self._kept[name] = items

    def keys_of(self, names: Iterable[str]) -> list[str]:
        """The records that hold these values."""
        return [key for name in names for _, key in self._records.get(name, [])]

    def loaded(self, names: Iterable[str], tensors: Mapping[str, Tensor]) -> Values:
        """These values on the device; ``tensors`` are the records that were brought."""
        found = Values(self._cut, self._rows)
        for name in names:
            for part, value in self._kept.get(name, []):
                found.put(name, part, value.to(self._stream.device))
            for part, key in self._records.get(name, []):
                found.put(name, part, tensors[key])
        return found

    def free(self, stage: Stage, stages: Sequence[Stage]) -> None:
        """Let go of what no stage in front of ``stage`` reads."""
        needed = {name for earlier in stages if earlier.index < stage.index for name in earlier.values}
        for name in [name for name in stage.values if name not in needed]:
            self._kept.pop(name, None)
            self._delete(self._records.pop(name, []))

    def __del__(self) -> None:  # a call whose backward never comes
        if (
            not self._stream.store.is_closed
        ):  # the collector may run anywhere, also where the store is waiting for itself
            self._stream.store.delete_later([key for records in self._records.values() for _, key in records])

    def _write(self, name: str, part: int | None, value: Tensor) -> str:
        key = f"stash/{self._number}/{name}/{part}"
        self._stream.store.create(key, value.shape, value.dtype, durable=False)
        self._stream.store.write({key: value})
        return key

    def _delete(self, records: Sequence[tuple[int | None, str]]) -> None:
        if not self._stream.store.is_closed:
            self._stream.store.delete([key for _, key in records])


def _takes_memory(value: Tensor) -> bool:
    return all(stride != 0 or size < 2 for stride, size in zip(value.stride(), value.shape, strict=True))
