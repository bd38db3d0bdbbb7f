"""The life of a statistic: its companion, one backward pass, publication.

A parameter's companion is a leaf of the parameter's shape that holds one number (``zeros(()).expand(shape)``). The rewritten
graph never reads it; it hands it a gradient, the statistic, which autograd accumulates over the uses of the parameter and over
micro-batches exactly as it accumulates ``p.grad``. When a backward pass ends, what it added is published.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from graphopt import _compat
from graphopt.annotations import SAMPLE_GRAD_NORM, SUM_POSITION_GRAD_SQUARED, Key, clear, publish, reconcile

EAGER_CALL = "graphopt.nn: "  # how the names of calls begin that were not captured together with the rest of the model
PATCHED_CALL = "graphopt.patch_model: "

_statistics: WeakIdKeyDictionary = WeakIdKeyDictionary()
_running: dict[int, list[Statistic]] = {}  # backward pass -> what it has touched so far


class Statistic:
    """The sum of squared per-sample gradients of one parameter, between two ``zero_grad``.

    Attributes:
        kinds: functions that say which subclass serves a parameter, or ``None``: `graphopt.runtime.data_parallel` and
            `graphopt.runtime.fully_sharded` add theirs.
        apart: functions that say whether a parameter may be used by one call only in a backward pass, even if all calls are of
            one graph: `graphopt.nn.patching` adds its own, since a patched module may be any part of a model.
    """

    kinds: ClassVar[list[Callable[[Tensor], type[Statistic] | None]]] = []
    apart: ClassVar[list[Callable[[Tensor], bool]]] = []

    def __init__(self, param: Tensor) -> None:
        self._param = weakref.ref(param)
        self.companion = _companion(param)
        self.num_samples = 0
        self.name: str | None = None  # in the record of the graph that was called with the parameter
        self._task = -1
        self._entered = 0
        self._frames: set[str] = set()
        self._grad_before: tuple[Tensor | None, int] = (None, 0)
        self._problem: str | None = None
        self._positions: Tensor | None = None  # companion of SUM_POSITION_GRAD_SQUARED, made when it is asked for
        self._norms: Tensor | None = None  # SAMPLE_GRAD_NORM of what has been published
        self._entered_norms: list[tuple[int, Tensor]] = []  # number of the call, and its companion

    @classmethod
    def of(cls, param: Tensor) -> Statistic:
        """The parameter's statistic, made anew if the parameter was moved or cast."""
        kind = next((found for find in cls.kinds if (found := find(param)) is not None), Statistic)
        statistic = cast("Statistic | None", _statistics.get(param))
        if type(statistic) is not kind or not _fits(statistic.companion, param):
            statistic = _statistics[param] = kind(param)
        return statistic

    @staticmethod
    def name_in_graph(param: Tensor) -> str | None:
        """The name under which a graph's record knows the parameter; ``None`` if no graph has been called with it."""
        statistic = cast("Statistic | None", _statistics.get(param))
        return None if statistic is None else statistic.name

    def forget_if_cleared(self) -> None:
        """Drop the statistic if ``p.grad`` is gone; called before a forward, so that the memory is free during it."""
        param = self._param()
        if self.companion.grad is not None and param is not None and param.grad is None:
            clear([param])
            self._reset()

    def companion_of(self, key: Key[Any], num_samples: int) -> Tensor:
        """The leaf that receives one statistic; for norms a new one at each call, since they are joined, not added."""
        param = self._param()
        assert param is not None
        if key is SAMPLE_GRAD_NORM:
            return torch.zeros((), dtype=self.companion.dtype, device=param.device).expand(num_samples).requires_grad_()
        if key is SUM_POSITION_GRAD_SQUARED:
            if self._positions is None:
                self._positions = _companion(param)
            return self._positions
        return self.companion

    def enter(self, task: int, num_samples: int, frame: str, call: int = 0, norms: Tensor | None = None) -> None:
        """A backward pass reaches a graph that uses the parameter, with gradients for ``num_samples`` samples."""
        param = self._param()
        if param is None:
            return
        if task != self._task:
            self._task, self._entered, self._frames, self._entered_norms = task, 0, set(), []
            self._begin(param)
            grad = self.companion.grad
            self._grad_before = (grad, grad._version if grad is not None else 0)
            _running.setdefault(task, []).append(self)
        self._entered += num_samples
        self._frames.add(f"{PATCHED_CALL}{call}" if any(holds(param) for holds in self.apart) else frame)
        if norms is not None:
            self._entered_norms.append((call, norms))

    def eager_call(self) -> tuple[str, int] | None:
        """The module that saw the running pass, if it saw nothing else of the model, and how many samples it counted."""
        names = [
            frame.removeprefix(EAGER_CALL).rpartition(" ")[0] for frame in self._frames if frame.startswith(EAGER_CALL)
        ]
        return (names[0], self._entered) if len(names) == len(self._frames) == 1 else None

    def refuse(self, problem: str) -> None:
        """Publish with an error in place of the value."""
        self._problem = problem

    def leave(self, task: int) -> None:
        """The backward pass has ended: publish what it added, unless it asked for other gradients than this one."""
        param = self._param()
        if self._count(param) and param is not None:
            self._publish(param, self.companion.grad, self.num_samples)

    def _begin(self, param: Tensor) -> None:
        """The first graph of a backward pass: what was published follows the gradient."""
        if param.grad is None:
            clear([param])
            self._reset()
        else:
            reconcile([param])

    def _count(self, param: Tensor | None) -> bool:
        """Count the samples of the pass that has ended; false if it added nothing."""
        grad = self.companion.grad
        self._task = -1
        before, version = self._grad_before
        self._grad_before = (None, 0)
        if param is None or not self._has_gradient(param) or grad is None:
            return False
        if grad is before and grad._version == version:
            return False
        self._add_entered(param)
        return True

    def _add_entered(self, param: Tensor) -> None:
        self.num_samples += self._entered
        if len(self._frames) > 1:
            self._problem = _squared_too_early(param, self._frames)

    def _has_gradient(self, param: Tensor) -> bool:
        return param.grad is not None

    def _publish(self, param: Tensor, value: Tensor | None, num_samples: int) -> None:
        assert value is not None
        publish(
            param,
            value,
            num_samples,
            others=self._others(),
            on_clear=self._reset,
            on_rescale=self._rescale_parts,
            problem=self._problem,
        )

    def _others(self) -> dict[Key[Any], Tensor]:
        """The further statistics that were asked for."""
        found: dict[Key[Any], Tensor] = {}
        if self._positions is not None and self._positions.grad is not None:
            found[SUM_POSITION_GRAD_SQUARED] = self._positions.grad
        parts = [] if self._norms is None else [self._norms]
        for _, leaf in sorted(self._entered_norms, key=lambda entry: entry[0]):
            squared = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            parts.append(squared.detach().clamp(min=0).sqrt())  # cancellation may leave a squared norm just below 0
            leaf.grad = None
        self._entered_norms = []
        if parts:
            found[SAMPLE_GRAD_NORM] = self._norms = torch.cat(parts)
        return found

    def _rescale_parts(self, factor: Tensor) -> None:
        """``p.grad`` was rescaled by ``factor``, and what is published by its square: so must be what is kept beside it."""

    def _reset(self) -> None:
        self.companion.grad = None
        self.num_samples = 0
        self._problem = None
        self._norms, self._entered_norms = None, []
        if self._positions is not None:
            self._positions.grad = None


class Entry(NamedTuple):
    """One parameter in one call of a graph."""

    statistic: Statistic
    num_samples: int
    norms: Tensor | None  # the companion that receives the norms of this call's samples


def enter_backward(entries: Iterable[Entry], frame: str, call: int) -> None:
    """Called inside a backward pass, before the first gradient reaches the companions.

    Args:
        entries: the parameters that have companions.
        frame: contributions from calls of one name are added before squaring.
        call: number of the call, which orders the norms.
    """
    task = _compat.current_graph_task()
    if task not in _running:
        _running[task] = []
        _compat.call_after_backward(lambda: _leave_backward(task))
    for entry in entries:
        entry.statistic.enter(task, entry.num_samples, frame, call, entry.norms)


def _leave_backward(task: int) -> None:
    statistics = _running.pop(task, [])
    _compare_calls(statistics)
    for statistic in statistics:
        statistic.leave(task)


def _compare_calls(statistics: list[Statistic]) -> None:
    """Calls that see one module each must agree on how many samples a backward pass has; a whole graph knows."""
    calls = [(statistic, *call) for statistic in statistics if (call := statistic.eager_call()) is not None]
    if len({num_samples for _, _, num_samples in calls}) > 1:
        counts = ", ".join(sorted({f"{name} {num_samples}" for _, name, num_samples in calls}))
        for statistic, _, _ in calls:
            statistic.refuse(
                f"modules of graphopt.nn disagree on how many samples one backward pass has ({counts}), so some of them got rows "
                "that are not samples: positions that all samples share, patches, a part of the batch. "
                "graphopt.transform(model) or graphopt.patch_model(model) follow the samples through the whole model; "
                "module.sample_axis says which axis of a module's input counts them"
            )


def _squared_too_early(param: Tensor, frames: set[str]) -> str:
    shape = tuple(param.shape)
    if calls := sorted(frame for frame in frames if frame.startswith(EAGER_CALL)):
        names = ", ".join(call.removeprefix(EAGER_CALL) for call in calls)
        return (
            f"a parameter of shape {shape} was used by {len(frames)} calls of graphopt.nn within one backward pass ({names}), "
            "each of which squared its own contributions before they were added: the sum is not exact. Use "
            "graphopt.transform(model) or graphopt.patch_model(model), which see all uses of a parameter, or call backward() for "
            "each call by itself"
        )
    if any(frame.startswith(PATCHED_CALL) for frame in frames):
        return (
            f"a parameter of shape {shape}, served by graphopt.patch_model, was used by {len(frames)} calls of graphs within one "
            "backward pass, each of which squared its own contributions before they were added: the sum is exact only if no "
            "two calls saw the same samples. Patch the model that makes the calls, call backward() for each of them, or, if they "
            "saw different samples, use graphopt.transform(model)"
        )
    return (
        f"a parameter of shape {shape} is used on both sides of a graph break, so its per-sample "
        "contributions were squared before they were added: the sum is not exact. Remove the break "
        "(TORCH_LOGS=graph_breaks shows it) or leave the parameter out with TrueGrad(where=...)"
    )


def _companion(param: Tensor) -> Tensor:
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.zeros((), dtype=dtype, device=param.device).expand(param.shape).requires_grad_()


def _fits(companion: Tensor, param: Tensor) -> bool:
    return (
        companion.shape == param.shape
        and companion.device == param.device
        and companion.dtype == torch.promote_types(param.dtype, torch.float32)
    )
