"""Fake one-dimensional tensors of one symbolic size, and graphs over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from graphopt import _compat


class FakeSizes:
    """A fake mode with symbolic sizes.

    Args:
        *hints: one number of elements for each symbol; the compiler optimises for it.
    """

    def __init__(self, *hints: int) -> None:
        self.mode = _compat.FakeTensorMode(shape_env=_compat.ShapeEnv(), static_shapes=False)
        self.sizes = [_compat.symbolic_size(self.mode, hint, f"size{index}") for index, hint in enumerate(hints)]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, tensors that are made are fake."""
        with self.mode, _compat.enable_python_dispatcher(), torch.no_grad():
            yield

    def graph(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    ) -> GraphModule:
        """Trace a function of fake tensors into ATen operators."""
        with _compat.enable_python_dispatcher(), torch.no_grad():
            traced: GraphModule = _compat.make_fx(
                function, decomposition_table=dict(decompositions or {}), tracing_mode="fake"
            )(*inputs)
        traced.graph.eliminate_dead_code()
        traced.recompile()
        return traced
