"""Batches for the two losses of GradInit: S, and S~, half of which overlaps with S."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import OptionError

Overlap = Literal["halves", "thirds", "none"]

_ENDED = object()


class Draws:
    """Draws what an iteration of GradInit needs from a stream of batches.

    Args:
        batches: pytrees of tensors with samples on their first axis; iterated again when they end, if that is possible.
        accumulate: how many batches make one draw.
        overlap: how the batch of the look-ahead step is made of that of the gradient and a fresh one: its first ``"halves"``
            joined; each batch cut into ``"thirds"``, of which the gradient takes the first two and the look-ahead step the last
            two; or ``"none"``, a fresh batch.

    Raises:
        OptionError: ``batches`` is not iterable, or an option has no meaning.
    """

    def __init__(self, batches: Iterable[Any], accumulate: int = 1, overlap: Overlap = "halves") -> None:
        if overlap not in get_args(Overlap):
            raise OptionError(f"learn_init(overlap={overlap!r}): it is one of {list(get_args(Overlap))}")
        if accumulate > 1 and overlap == "halves" and accumulate % 2:
            raise OptionError(
                f"learn_init(accumulate={accumulate}, overlap='halves'): half of the batches are drawn anew for the look-ahead "
                "step, so their number is even"
            )
        try:
            self._iterator: Iterator[Any] = iter(batches)
        except TypeError:
            raise OptionError(f"batches is {type(batches).__name__}, which cannot be iterated over") from None
        self._batches = batches
        self._accumulate = accumulate
        self._overlap = overlap
        self._last: list[Any] = []
        self._waiting: list[Any] = []
        self.num_drawn = 0

    def again(self, batches: list[Any]) -> None:
        """Let batches that were drawn be the next ones."""
        self._waiting = [*batches, *self._waiting]

    def take(self) -> Any:
        """The next batch."""
        if self._waiting:
            return self._waiting.pop(0)
        batch = next(self._iterator, _ENDED)
        if batch is _ENDED:
            self._iterator = iter(self._batches)  # an iterator gives itself, and has ended still
            batch = next(self._iterator, _ENDED)
        if batch is _ENDED:
            raise OptionError(
                f"batches ended after {self.num_drawn}. The model was not changed. Give what can be iterated over again (a list, "
                "a DataLoader), or fewer steps: an iteration takes a batch for the gradient, and one for the look-ahead step"
            )
        self.num_drawn += 1
        return batch

    def draw(self) -> list[Any]:
        """S: what the gradient is computed from, one entry for each backward pass."""
        drawn = [self.take() for _ in range(self._accumulate)]
        if self._overlap == "thirds":
            parts = [_cut(batch, 3) for batch in drawn]
            self._last = [join(second, third) for _, second, third in parts]
            return [join(first, second) for first, second, _ in parts]
        self._last = drawn
        return drawn

    def look_ahead(self) -> list[Any]:
        """S~: what the loss after the step is computed from."""
        if self._overlap == "thirds":
            return self._last
        if self._overlap == "none":
            return [self.take() for _ in range(self._accumulate)]
        if self._accumulate > 1:
            half = self._accumulate // 2
            return [*self._last[:half], *(self.take() for _ in range(half))]
        (last,) = self._last
        kept, _ = _cut(last, 2)
        _, fresh = _cut(self.take(), 2)
        return [join(kept, fresh)]


def count_samples(batch: Any) -> int:
    """Samples of a batch: the size of the first axis that its tensors share."""
    leaves = pytree.tree_leaves(_opened(batch))
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    shared = sizes - {1} or sizes
    if len(shared) != 1:
        raise OptionError(
            f"the tensors of a batch have {sorted(sizes) or 'no'} rows on their first axis, so nobody knows how to cut it into "
            "halves. Put samples on the first axis of every tensor, or use overlap='none'"
        )
    return int(shared.pop())


def join(first: Any, second: Any) -> Any:
    """One batch with the samples of both."""
    num_first, num_second = count_samples(first), count_samples(second)
    leaves, structure = pytree.tree_flatten(_opened(first))
    others, other_structure = pytree.tree_flatten(_opened(second))
    if structure != other_structure:
        raise OptionError("two batches have different structures, and cannot be joined; use overlap='thirds' or 'none'")
    joined = []
    for one, other in zip(leaves, others, strict=True):
        if not _has_samples(one, num_first):
            joined.append(one)
            continue
        if not _has_samples(other, num_second) or one.shape[1:] != other.shape[1:]:
            raise OptionError(
                f"batches with tensors of shapes {tuple(one.shape)} and {tuple(getattr(other, 'shape', ()))} cannot be joined "
                "for the look-ahead step. Pad them to one length, or use overlap='thirds' or 'none'"
            )
        joined.append(torch.cat([one, other]))
    return _closed(pytree.tree_unflatten(joined, structure), first)


def _cut(batch: Any, num: int) -> list[Any]:
    """A batch in parts that are as equal as possible; what has no samples is in all of them."""
    rows = count_samples(batch)
    if rows < num:
        raise OptionError(f"a batch of {rows} cannot be cut into {num} parts; use larger batches, or overlap='none'")
    edges = [rows * part // num for part in range(num + 1)]

    def part_of(start: int, end: int) -> Any:
        part = pytree.tree_map(lambda leaf: leaf[start:end] if _has_samples(leaf, rows) else leaf, _opened(batch))
        return _closed(part, batch)

    return [part_of(start, end) for start, end in pairwise(edges)]


def _opened(batch: Any) -> Any:
    """What pytree can look into: `transformers.BatchEncoding` is a `UserDict`, which it takes for a leaf."""
    return batch.data if isinstance(batch, UserDict) else batch


def _closed(data: Any, like: Any) -> Any:
    """The opposite of `_opened`."""
    if not isinstance(like, UserDict):
        return data
    closed = copy.copy(like)
    closed.data = data
    return closed


def _has_samples(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == rows
