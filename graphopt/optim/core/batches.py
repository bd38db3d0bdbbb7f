"""A rule of single tensors, run for many of equal shape at once: their operators are called once for all."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import state_dtype
from graphopt.optim.core.context import Context, Settings
from graphopt.optim.core.var import Var

if TYPE_CHECKING:
    from graphopt.optim.core.module import Rule

# Tensors of at most so many elements are put side by side: calls cost more than copying them together.
_SMALL = {"cpu": 2**16, "cuda": 2**22}
# Fewer are stepped one by one: a call under vmap takes several times as long as one without.
MIN_TENSORS = 6


class _Batch(NamedTuple):
    """Tensors of one shape with the same settings.

    Attributes:
        indices: their numbers in `Var.params`.
        sources: parameters of which each one's settings are those of one.
        fields: the names of the `State`.
        buffers: the state of all, with one more axis in front.
        entries: for each field, then for each tensor, the dictionary of its state.
        keys: likewise the name there.
        views: likewise the part of the buffer that stands there.
    """

    indices: list[int]
    sources: list[Tensor]
    fields: tuple[str, ...]
    buffers: list[Tensor]
    entries: list[dict[str, Any]]
    keys: list[str]
    views: list[Tensor]


class Batches:
    """The batches of one rule.

    Args:
        rule: what is run, bound.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._planned_for: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._batches: list[_Batch] = []
        self._alone: list[int] = []

    def run(
        self,
        var: Var,
        updates: Sequence[Tensor],
        operands: Mapping[str, Sequence[Tensor]],
        measured: Mapping[str, Tensor],
        news: list[Tensor],
    ) -> list[int]:
        """Step all tensors that have enough others of their shape.

        Args:
            var: the parameters.
            updates: what arrives from the module before.
            operands: what the children of the rule made of it.
            measured: what `Rule.measure` returned.
            news: the results are put here.

        Returns:
            The numbers of the tensors that are left to be stepped one by one.
        """
        settings = self._settings_of_batches(var)
        if settings is None:
            self._plan(var, updates)
            settings = [self._rule.plain_settings(batch.sources[0]) for batch in self._batches]
        for batch, shared in zip(self._batches, settings, strict=True):
            self._step(batch, shared, var, updates, operands, measured, news)
        return self._alone

    def _settings_of_batches(self, var: Var) -> list[Settings] | None:
        """The settings of each batch; ``None`` if the batches are no longer right."""
        assert var.counts is not None
        if not (_are(var.params, self._planned_for) and _are(var.counts, self._counts)):
            return None
        found = []
        for batch in self._batches:
            if not all(map(operator.is_, map(dict.get, batch.entries, batch.keys), batch.views)):
                return None
            settings = [self._rule.plain_settings(source) for source in batch.sources]
            if any(not _are_equal(settings[0], others) for others in settings[1:]):
                return None
            if getattr(self._rule.state_type(settings[0]), "_fields", ()) != batch.fields:
                return None
            found.append(settings[0])
        return found

    def _plan(self, var: Var, updates: Sequence[Tensor]) -> None:
        assert var.counts is not None
        self._planned_for, self._batches, self._alone = [], [], []
        known: dict[Any, Settings] = {}
        classes: list[Settings] = []  # of settings that are equal
        groups: defaultdict[Any, list[int]] = defaultdict(list)
        for index, (param, update) in enumerate(zip(var.params, updates, strict=True)):
            if (
                type(param) not in (Tensor, torch.nn.Parameter)
                or not 0 < param.numel() <= _SMALL.get(param.device.type, 0)
                or self._rule.reads
            ):
                self._alone.append(index)
                continue
            source = var.source_of(param)
            if source not in known:
                settings = self._rule.plain_settings(param)
                known[source] = next((other for other in classes if _are_equal(other, settings)), settings)
                classes.append(known[source])
            grad = var.grads[index]
            form = (param.shape, param.dtype, param.device, update.dtype, grad.dtype)
            groups[id(known[source]), form, id(var.counts[index])].append(index)
        for indices in groups.values():
            batch = self._gather(indices, var) if len(indices) >= MIN_TENSORS else None
            if batch is None:
                self._alone += indices
            else:
                self._batches.append(batch)
        self._alone.sort()
        self._planned_for, self._counts = (
            list(var.params),
            list(var.counts),
        )  # not before: an error would leave half a plan

    def _gather(self, indices: list[int], var: Var) -> _Batch | None:
        """Move the state of tensors into buffers; ``None`` if it is not alike."""
        params = [var.params[index] for index in indices]
        states = [self._rule.get_state(param, self._rule.plain_settings(param)) for param in params]
        fields = getattr(states[0], "_fields", ())
        columns = list(zip(*states, strict=True))
        if any(len({(tensor.shape, tensor.dtype) for tensor in column}) > 1 for column in columns):
            return None
        buffers = [torch.stack(column) for column in columns]
        entries, keys, views = [], [], []
        binding = self._rule.binding
        assert binding is not None
        for name, buffer in zip(fields, buffers, strict=True):
            for param, view in zip(params, buffer.unbind(), strict=True):
                entry, prefix = binding.store.entry(param)
                key = f"{prefix}{binding.path}.{name}"
                entry[key] = view
                entries.append(entry)
                keys.append(key)
                views.append(view)
        sources = list({var.source_of(param): param for param in params}.values())
        return _Batch(indices, sources, fields, buffers, entries, keys, views)

    def _step(
        self,
        batch: _Batch,
        settings: Settings,
        var: Var,
        updates: Sequence[Tensor],
        operands: Mapping[str, Sequence[Tensor]],
        measured: Mapping[str, Tensor],
        news: list[Tensor],
    ) -> None:
        assert var.counts is not None
        rule, count = self._rule, var.counts[batch.indices[0]]
        kind: Any = rule.state_type(settings)

        def stack(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack([tensors[index] for index in batch.indices])

        def step(
            update: Tensor, state: list[Tensor], param: Tensor, grad: Tensor, others: dict[str, Tensor]
        ) -> tuple[Tensor, tuple[Tensor, ...]]:
            context = Context(
                param=param,
                grad=grad.to(state_dtype(grad)),
                count=count,
                numel=math.prod(param.shape),
                operands=others,
                measured=measured,
                loss=var.loss if isinstance(var.loss, Tensor) else None,
            )
            new, state_after = rule.update(update, kind(*state) if kind else (), settings, context)
            return new.to(update.dtype), tuple(state_after)

        new, states = torch.func.vmap(step, randomness="different")(
            stack(updates),
            batch.buffers,
            stack(var.params),
            stack(var.grads),
            {name: stack(tensors) for name, tensors in operands.items()},
        )
        for buffer, state in zip(batch.buffers, states, strict=True):
            if state.data_ptr() != buffer.data_ptr():  # (what stays as it is comes back as it went in)
                buffer.copy_(state)
        for index, part in zip(batch.indices, new.unbind(), strict=True):
            news[index] = part


def _are(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return len(left) == len(right) and all(map(operator.is_, left, right))


def _are_equal(left: Settings, right: Settings) -> bool:
    """Tensors are equal only to themselves: their values may change."""
    return all(
        right[name] is value
        or (not (isinstance(value, Tensor) or isinstance(right[name], Tensor)) and right[name] == value)
        for name, value in left.items()
    )
