"""The life of a statistic: its companion, one backward pass, publication.

A parameter's companion is a leaf of the parameter's shape that holds one number (``zeros(()).expand(shape)``). The rewritten
graph never reads it; it hands it a gradient, the statistic, which autograd accumulates over the uses of the parameter and over
micro-batches exactly as it accumulates ``p.grad``. When a backward pass ends, what it added is published.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from graphopt import _compat
from graphopt.annotations import clear, publish, reconcile

_statistics: WeakIdKeyDictionary = WeakIdKeyDictionary()
_running: dict[int, list[Statistic]] = {}  # backward pass -> what it has touched so far


class Statistic:
    """The sum of squared per-sample gradients of one parameter, between two ``zero_grad``."""

    def __init__(self, param: Tensor) -> None:
        self._param = weakref.ref(param)
        self.companion = _companion(param)
        self.num_samples = 0
        self._task = -1
        self._entered = 0
        self._frames: set[str] = set()
        self._grad_before: tuple[Tensor | None, int] = (None, 0)
        self._problem: str | None = None

    @classmethod
    def of(cls, param: Tensor) -> Statistic:
        """The parameter's statistic, made anew if the parameter was moved or cast."""
        statistic = cast("Statistic | None", _statistics.get(param))
        if statistic is None or not _fits(statistic.companion, param):
            statistic = _statistics[param] = cls(param)
        return statistic

    def forget_if_cleared(self) -> None:
        """Drop the statistic if ``p.grad`` is gone; called before a forward, so that the memory is free during it."""
        param = self._param()
        if self.companion.grad is not None and param is not None and param.grad is None:
            clear([param])
            self._reset()

    def enter(self, task: int, num_samples: int, frame: str) -> None:
        """A backward pass reaches a graph that uses the parameter, with gradients for ``num_samples`` samples."""
        param = self._param()
        if param is None:
            return
        if task != self._task:
            self._task, self._entered, self._frames = task, 0, set()
            if param.grad is None:
                clear([param])
                self._reset()
            else:
                reconcile([param])
            grad = self.companion.grad
            self._grad_before = (grad, grad._version if grad is not None else 0)
            _running.setdefault(task, []).append(self)
        self._entered += num_samples
        self._frames.add(frame)

    def publish(self) -> None:
        """The backward pass has ended: publish what it added, unless it asked for other gradients than this one."""
        param, grad = self._param(), self.companion.grad
        self._task = -1
        before, version = self._grad_before
        self._grad_before = (None, 0)
        if param is None or param.grad is None or grad is None or (grad is before and grad._version == version):
            return
        self.num_samples += self._entered
        if len(self._frames) > 1:
            self._problem = (
                f"a parameter of shape {tuple(param.shape)} is used on both sides of a graph break, so its per-sample "
                "contributions were squared before they were added: the sum is not exact. Remove the break "
                "(TORCH_LOGS=graph_breaks shows it) or leave the parameter out with TrueGrad(where=...)"
            )
        publish(param, grad, self.num_samples, on_clear=self._reset, problem=self._problem)

    def _reset(self) -> None:
        self.companion.grad = None
        self.num_samples = 0
        self._problem = None


def enter_backward(statistics: Iterable[Statistic], num_samples: Iterable[int], frame: str) -> None:
    """Called inside a backward pass, before the first gradient reaches the companions."""
    task = _compat.current_graph_task()
    if task not in _running:
        _running[task] = []
        _compat.call_after_backward(lambda: _leave_backward(task))
    for statistic, count in zip(statistics, num_samples, strict=True):
        statistic.enter(task, count, frame)


def _leave_backward(task: int) -> None:
    for statistic in _running.pop(task, []):
        statistic.publish()


def _companion(param: Tensor) -> Tensor:
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=param.device).expand(param.shape).requires_grad_()


def _fits(companion: Tensor, param: Tensor) -> bool:
    return (
        companion.shape == param.shape
        and companion.device == param.device
        and companion.dtype == torch.promote_types(param.dtype, torch.float32)
    )
