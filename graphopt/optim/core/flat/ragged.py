"""A program for many small tensors side by side: each fills whole rows of a matrix, and has its own reductions.

What has shape () for one tensor (a norm, a remembered number) is a vector here, with one entry for each tensor; where it meets
elements, each row takes the entry of its tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from graphopt.optim.core.flat.program import Program

aten = torch.ops.aten

ROW_WIDTH = 128


class Rows(NamedTuple):
    """Which row belongs to which tensor.

    Attributes:
        owner: for each row the number of its tensor, (num_rows,), int64.
        num_valid: how many elements of each row are elements of the tensor, (num_rows,), int64.
        numel: elements of each tensor, (num_tensors,), float64.
    """

    owner: Tensor
    num_valid: Tensor
    numel: Tensor


class _PerTensor(NamedTuple):
    """One value for each tensor."""

    values: Tensor


class Ragged(Interpreter):
    """Runs the body of a program on matrices of rows.

    Args:
        program: its scalar elements are vectors here.
        rows: the layout.
    """

    def __init__(self, program: Program, rows: Rows) -> None:
        super().__init__(program.body)
        self._program = program
        self._rows = rows

    def __call__(self, row: Tensor, *elements: Tensor) -> list[Tensor]:
        """Run it; returns what replaces the targets."""
        given = [
            _PerTensor(element) if is_scalar else element
            for element, is_scalar in zip(elements, self._program.scalars, strict=True)
        ]
        outputs: list[Any] = super().run(row, *given)
        return [
            self._as(output, self._program.scalars[target])
            for output, target in zip(outputs, self._program.targets, strict=True)
        ]

    def run_node(self, n: Node) -> Any:
        """Run one operator on what it finds: elements, values for each tensor, or numbers."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        flat = [*args, *kwargs.values()]
        if n.target in _REDUCERS and isinstance(args[0], Tensor) and args[0].dim() == 2:
            return self._reduce(n.target, args[0])
        if not any(isinstance(arg, _PerTensor) for arg in flat):
            return super().run_node(n)
        elements = next((arg for arg in flat if isinstance(arg, Tensor) and arg.dim() == 2), None)
        if elements is not None:
            return n.target(  # type: ignore[operator]
                *[self._spread(arg, elements.dtype) for arg in args],
                **{key: self._spread(arg, elements.dtype) for key, arg in kwargs.items()},
            )
        plain = [arg.values if isinstance(arg, _PerTensor) else arg for arg in args]
        return _PerTensor(
            n.target(  # type: ignore[operator]
                *plain, **{key: arg.values if isinstance(arg, _PerTensor) else arg for key, arg in kwargs.items()}
            )
        )

    def _spread(self, value: Any, dtype: torch.dtype | None = None) -> Any:
        """A value for each tensor as one for each row; numbers of shape () do not widen elements, so these must not either."""
        if not isinstance(value, _PerTensor):
            return value
        spread = value.values[self._rows.owner].unsqueeze(1)
        return (
            spread.to(dtype) if dtype is not None and dtype.is_floating_point and spread.is_floating_point() else spread
        )

    def _as(self, output: Any, is_scalar: bool) -> Tensor:
        num_tensors, num_rows = self._rows.numel.shape[0], self._rows.owner.shape[0]
        if is_scalar:
            return output.values if isinstance(output, _PerTensor) else output.expand(num_tensors)
        output = self._spread(output)
        return output.expand(num_rows, ROW_WIDTH)  # type: ignore[no-any-return]

    def _reduce(self, target: Any, elements: Tensor) -> _PerTensor:
        neutral, name = _REDUCERS[target]
        columns = torch.arange(ROW_WIDTH, device=elements.device)
        is_valid = columns < self._rows.num_valid.unsqueeze(1)
        elements = torch.where(is_valid, elements, neutral)
        rows = getattr(elements, name)(dim=1)
        start = torch.full((self._rows.numel.shape[0],), neutral, dtype=rows.dtype, device=rows.device)
        if name == "sum":
            return _PerTensor(start.index_add(0, self._rows.owner, rows))
        return _PerTensor(start.scatter_reduce(0, self._rows.owner, rows, reduce=name))


_REDUCERS = {
    aten.sum.default: (0.0, "sum"),
    aten.amax.default: (-torch.inf, "amax"),
    aten.amin.default: (torch.inf, "amin"),
}
