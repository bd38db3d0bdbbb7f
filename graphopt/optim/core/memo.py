"""A closure that is not evaluated twice at one point."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.closures import number

# The start of a step, the best point that a line search has seen, and the last one.
_MAX_POINTS = 3


class _Point(NamedTuple):
    params: list[Tensor]
    loss: Any
    grads: list[Tensor | None] | None


class Memo:
    """What a deterministic closure has returned at the last points where it was evaluated.

    A line search ends where the next step begins; with a memo that point is evaluated once. Points are compared bit by bit, so
    parameters that something else has moved are evaluated anew. It keeps three copies of parameters and gradients.
    """

    def __init__(self) -> None:
        self._points: list[_Point] = []

    def remember(self, closure: Callable[..., Any], params: Sequence[Tensor]) -> Callable[..., Any]:
        """The closure, asked only where it has not been asked before.

        Args:
            closure: computes the loss, a function of ``params`` and of nothing else that changes.
            params: the parameters.
        """

        @functools.wraps(closure)  # (its signature, too, which errors look at)
        def remembering(backward: bool = True) -> Any:
            point = self._find(params)
            if point is not None and not backward and not torch.is_grad_enabled():
                return point.loss
            if point is not None and backward and point.grads is not None:
                for param, grad in zip(params, point.grads, strict=True):
                    param.grad = None if grad is None else grad.clone()
                return point.loss
            # Without an argument, so that closures of every other optimizer work, too.
            loss = closure() if backward else closure(False)
            self._keep(point, params, loss, backward)
            return loss

        return remembering

    def _find(self, params: Sequence[Tensor]) -> _Point | None:
        for point in reversed(self._points):
            if len(point.params) == len(params) and all(
                old.shape == param.shape and torch.equal(old, param)
                for old, param in zip(point.params, params, strict=True)
            ):
                return point
        return None

    def _keep(self, known: _Point | None, params: Sequence[Tensor], loss: Any, backward: bool) -> None:
        grads = None
        if backward:
            grads = [None if param.grad is None else param.grad.detach().clone() for param in params]
        elif known is not None:
            grads = known.grads
        value = loss.detach().clone() if isinstance(loss, Tensor) else number(loss)
        point = _Point([param.detach().clone() for param in params], value, grads)
        others = [other for other in self._points if other is not known]
        self._points = [*others[1 - _MAX_POINTS :], point]
