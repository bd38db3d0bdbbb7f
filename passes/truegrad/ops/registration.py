"""How an operator is registered: shape function, autograd formula, and what Inductor sees of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from graphopt import _compat

_decompositions: dict[Any, Callable[..., Any]] = {}


def differentiable(
    op: _compat.CustomOpDef, fake: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> None:
    """Give an operator its shape function and its backward."""
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup)


def decomposition(op: _compat.CustomOpDef) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Say in plain ATen what an operator computes; Inductor compiles that."""

    def collect(function: Callable[..., Any]) -> Callable[..., Any]:
        _decompositions[op._opoverload] = function
        return function

    return collect


@functools.cache
def register_decompositions() -> None:
    """Tell Inductor what the operators are made of; idempotent.

    They go into Inductor's own table: one that is handed to ``compile_fx`` would bypass both compile caches.
    """
    _compat.register_inductor_decompositions(_decompositions)


def no_memory(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of a shape that take the memory of one, in a form that Inductor understands."""
    zero = torch.ops.aten.full.default([], 0.0, dtype=like.dtype, device=like.device)
    return cast(Tensor, torch.ops.aten.expand.default(zero, shape))


def nothing_to_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The setup of an operator whose backward needs its gradient only."""
