"""A closure that is not evaluated twice at one point."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from graphopt.optim.core.closures import number
from graphopt.optim.core.vectors import are_plain, flatten, unflatten

# The start of a step, the best point that a line search has seen, and the last one.
_MAX_POINTS = 3


class _Point(NamedTuple):
    params: list[Tensor]  # copies, or one vector of all
    loss: Any
    grads: tuple[list[int], list[Tensor]] | None  # of which parameters; copies, or one vector of all


class Memo:
    """What a deterministic closure has returned at the last points where it was evaluated.

    A line search ends where the next step begins; with a memo that point is evaluated once. Points are compared bit by bit, so
    parameters that something else has moved are evaluated anew. It keeps three copies of parameters and gradients.
    """

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._params: list[Tensor] = []  # whose points these are

    def remember(self, closure: Callable[..., Any], params: Sequence[Tensor]) -> Callable[..., Any]:
        """The closure, asked only where it has not been asked before.

        Args:
            closure: computes the loss, a function of ``params`` and of nothing else that changes.
            params: the parameters.
        """
        if len(params) != len(self._params) or not all(map(operator.is_, params, self._params)):
            self._points, self._params = [], list(params)

        @functools.wraps(closure)  # (its signature, too, which errors look at)
        def remembering(backward: bool = True) -> Any:
            here = _copied(params)
            point = self._find(here)
            if point is not None and not backward and not torch.is_grad_enabled():
                return point.loss
            if point is not None and backward and point.grads is not None:
                _give(params, *point.grads)
                return point.loss
            # Without an argument, so that closures of every other optimizer work, too.
            loss = closure() if backward else closure(False)
            self._keep(point, here, params, loss, backward)
            return loss

        return remembering

    def _find(self, here: Sequence[Tensor]) -> _Point | None:
        def is_here(point: _Point) -> bool:
            return len(point.params) == len(here) and all(map(_are_equal, point.params, here))

        return next(filter(is_here, reversed(self._points)), None)

    def _keep(
        self, known: _Point | None, here: list[Tensor], params: Sequence[Tensor], loss: Any, backward: bool
    ) -> None:
        grads = None
        if backward:
            indices = [index for index, param in enumerate(params) if param.grad is not None]
            grads = indices, _copied([cast(Tensor, params[index].grad) for index in indices])
        elif known is not None:
            grads = known.grads
        value = loss.detach().clone() if isinstance(loss, Tensor) else number(loss)
        others = [other for other in self._points if other is not known]
        self._points = [*others[1 - _MAX_POINTS :], _Point(here, value, grads)]


def _copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [flatten(tensors)] if tensors and are_plain(tensors) else [tensor.detach().clone() for tensor in tensors]


def _give(params: Sequence[Tensor], indices: Sequence[int], grads: Sequence[Tensor]) -> None:
    """Give parameters copies of gradients, and none to the others."""
    owners = [params[index] for index in indices]
    is_vector = bool(owners) and are_plain(owners) and len(grads) == 1
    parts = unflatten(grads[0], owners) if is_vector else [grad.clone() for grad in grads]
    for param in params:
        param.grad = None
    for owner, part in zip(owners, parts, strict=True):
        owner.grad = part


def _are_equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)
