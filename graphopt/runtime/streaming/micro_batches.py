"""Cut the values of one call into micro-batches, and put them together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor

from graphopt.capture import CapturedGraph
from graphopt.regions import Rows

Sizes = Mapping[sympy.Symbol, int]


def read_sizes(graph: CapturedGraph) -> Callable[[Sequence[Any]], dict[sympy.Symbol, int]]:
    """A function from a graph's inputs to the values of all symbols in their sizes."""
    readers: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for position, fake in enumerate(graph.fake_inputs):
        if isinstance(fake, torch.SymInt) and (expression := expression_of(fake)).is_Symbol:
            readers.setdefault(cast(sympy.Symbol, expression), (position, None))
        for axis, size in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
            if isinstance(size, torch.SymInt) and (expression := expression_of(size)).is_Symbol:
                readers.setdefault(cast(sympy.Symbol, expression), (position, axis))

    def read(args: Sequence[Any]) -> dict[sympy.Symbol, int]:
        return {
            symbol: int(args[position] if axis is None else args[position].shape[axis])
            for symbol, (position, axis) in readers.items()
            if position < len(args)
        }

    return read


def expression_of(size: int | torch.SymInt) -> sympy.Expr:
    """A size as an expression in the symbols of the capture."""
    if isinstance(size, torch.SymInt):
        return cast(sympy.Expr, size.node.shape_env.replace(size.node.expr))
    return sympy.Integer(size)


def evaluate(expression: sympy.Expr, sizes: Sizes) -> int:
    """The value of a size."""
    if expression.is_Integer:
        return int(cast(Any, expression))
    if expression.is_Symbol:
        return sizes[cast(sympy.Symbol, expression)]
    return int(cast(Any, expression.subs({symbol: sizes[symbol] for symbol in expression.free_symbols})))


class Cut:
    """How one batch is cut.

    Attributes:
        bounds: first sample, and the one behind the last, of each micro-batch.
        sizes: all sizes of the call; ``sizes_of(m)`` are those that a micro-batch sees.
    """

    def __init__(self, sizes: Sizes, symbols: frozenset[sympy.Symbol], microbatch_size: int | None) -> None:
        self.sizes = dict(sizes)
        counts = {sizes[symbol] for symbol in symbols if symbol in sizes}
        num_samples = counts.pop() if len(counts) == 1 else None
        if microbatch_size is None or num_samples is None:
            self.bounds: list[tuple[int, int]] | None = None
        else:
            starts = range(0, num_samples, microbatch_size)
            self.bounds = [(start, min(start + microbatch_size, num_samples)) for start in starts]
        self._symbols = symbols

    def parts(self, whole: bool) -> list[int | None]:
        """The numbers of the micro-batches that a stage runs; ``[None]`` is the whole batch."""
        return [None] if whole or self.bounds is None else list(range(len(self.bounds)))

    def sizes_of(self, part: int | None) -> Sizes:
        """The sizes of one micro-batch."""
        if part is None or self.bounds is None:
            return self.sizes
        start, end = self.bounds[part]
        return {**self.sizes, **dict.fromkeys(self._symbols & self.sizes.keys(), end - start)}

    def narrow(self, value: Tensor, rows: Rows, part: int | None) -> Tensor:
        """The rows of one micro-batch, as a view."""
        if part is None or self.bounds is None:
            return value
        start, end = self.bounds[part]
        inner = evaluate(rows.inner, self.sizes)
        return value.narrow(rows.axis, start * inner, (end - start) * inner)


class Values:
    """Values between stages, each whole or in parts."""

    def __init__(self, cut: Cut, rows: Mapping[str, Rows]) -> None:
        self._cut, self._rows = cut, rows
        self._whole: dict[str, Tensor] = {}
        self._parts: dict[str, dict[int, Tensor]] = {}

    def put(self, name: str, part: int | None, value: Tensor) -> None:
        """Keep a value. One that belongs to all samples is kept once, from whichever part comes first."""
        if part is None or name not in self._rows:
            self._whole.setdefault(name, value)
        else:
            self._parts.setdefault(name, {})[part] = value

    def add(self, name: str, part: int | None, value: Tensor) -> None:
        """Add to what is kept: for gradients."""
        if part is None or name not in self._rows:
            old = self._whole.get(name)
            self._whole[name] = value if old is None else old + value
        else:
            parts = self._parts.setdefault(name, {})
            parts[part] = value if part not in parts else parts[part] + value

    def get(self, name: str, part: int | None) -> Tensor | None:
        """The value for one part, or the whole; ``None`` if there is none."""
        whole, parts, rows = self._whole.get(name), self._parts.get(name, {}), self._rows.get(name)
        if rows is None:
            return whole
        if part is None:
            joined = self._join(parts, rows)
            return whole if joined is None else joined if whole is None else whole + joined
        own = None if whole is None else self._cut.narrow(whole, rows, part)
        piece = parts.get(part)
        return own if piece is None else piece if own is None else own + piece

    def free(self, names: Iterable[str]) -> None:
        """Let go of values."""
        for name in names:
            self._whole.pop(name, None)
            self._parts.pop(name, None)

    def items(self, name: str) -> list[tuple[int | None, Tensor]]:
        """What is kept of a value, with its parts."""
        whole = [(None, self._whole[name])] if name in self._whole else []
        return [*whole, *self._parts.get(name, {}).items()]

    def _join(self, parts: Mapping[int, Tensor], rows: Rows) -> Tensor | None:
        if not parts or self._cut.bounds is None:
            return None
        like = next(iter(parts.values()))
        pieces = []
        for number, (start, end) in enumerate(self._cut.bounds):
            shape = list(like.shape)
            shape[rows.axis] = (end - start) * evaluate(rows.inner, self._cut.sizes)
            pieces.append(parts[number] if number in parts else like.new_zeros(shape))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, rows.axis)


def laid_out(value: Tensor, fake: Tensor, sizes: Sizes) -> Tensor:
    """``value`` with the strides that a region was compiled for; a copy only where they differ."""
    expected = [evaluate(expression_of(stride), sizes) for stride in fake.stride()]
    differs = any(
        size > 1 and own != wanted for size, own, wanted in zip(value.shape, value.stride(), expected, strict=True)
    )
    if not differs or any(size > 1 and wanted == 0 for size, wanted in zip(value.shape, expected, strict=True)):
        return value
    copied = torch.empty_strided(value.shape, expected, dtype=value.dtype, device=value.device)
    return copied.copy_(value)
