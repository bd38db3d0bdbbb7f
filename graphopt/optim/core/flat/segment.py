"""A run of element-wise rules in an optimizer: sorts its tensors into kinds, and runs the program of each."""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.optim.core.context import Settings
from graphopt.optim.core.flat import kernels, program, torch_kernels
from graphopt.optim.core.flat.bucket import Bucket
from graphopt.optim.core.flat.kind_run import KindRun, Subtraction, Unit, Way, path_of, settings_of
from graphopt.optim.core.flat.program import Kind, Program, every_rule
from graphopt.optim.core.flat.ragged import ROW_WIDTH
from graphopt.optim.core.module import Rule
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import are_plain

Mode = Literal["auto", "loop", "foreach", "fused"]

# Elements from which kernels are compiled unasked: some 1000 steps win back the seconds that compiling takes.
COMPILE_FROM = 2**19
# Tensors of at most so many elements share a bucket: copying them there and back costs less than calls of their own.
_SMALL = {"cpu": 2**14, "cuda": 2**20}
# From so many tensors on, operators are called once for all of them.
_FOREACH_FROM = 33

_UNCOMPILED = (
    "the optimizer runs uncompiled, several times slower, because compiling {rules} failed ({type}: {error}). "
    "Pass foreach=True to go on so without this warning, or fused=True to make it an error"
)


class FlatSegment:
    """A run of element-wise rules.

    Args:
        rules: the rules, bound.
        mode: how to run them; ``"auto"`` chooses by the number of elements.
        writes_param: whether to subtract the result from the parameters.
        capturable: whether numbers stay on the device.
    """

    def __init__(self, rules: Sequence[Rule], mode: Mode, writes_param: bool, capturable: bool) -> None:
        self.rules = list(rules)
        self._structure = program.structure(rules)
        self.mode = mode
        self.writes_param = writes_param
        self.capturable = capturable
        self._reads = list({key.name: key for rule in every_rule(rules) for key in rule.reads}.values())
        self._plan: list[KindRun] = []
        self._loop: list[int] = []
        self._planned_for: list[Tensor] = []
        self._planned_with: tuple[Any, ...] = ()
        self._state_entries: list[dict[str, Any]] = []  # where the state of all tensors is
        self._state_keys: list[str] = []  # and under which names
        self._state: list[Tensor] = []  # what was there

    def forget(self) -> None:
        """Sort the tensors anew at the next step; needed when their state has been replaced."""
        self._plan, self._planned_for = [], []

    def run(self, var: Var) -> Var:
        """Run the rules; move the parameters, or leave the result in ``var.update``."""
        takes_grad = var.update is None
        if not var.params:
            return var
        if not self._is_current(var, takes_grad):
            self._make_plan(var, takes_grad)
        outs: list[Tensor | None] = [None] * len(var.params)
        for kind_run in self._plan:
            kind_run.step(var, outs)
        if self._loop:
            self._run_loop(var, outs)
        if self.writes_param:
            var.skip_update = True
        else:
            var.update = [out for out in outs if out is not None]
            if var.maximize:  # for the modules that follow; here kernels have done it themselves
                var.grads, var.maximize = [-grad for grad in var.grads], False
        return var

    # --------------------------------------------------------------------------------------------------------- the plan

    def _is_current(self, var: Var, takes_grad: bool) -> bool:
        if len(var.params) != len(self._planned_for) or self._planned_with != (takes_grad, var.maximize):
            return False
        if not all(map(operator.is_, var.params, self._planned_for)):
            return False
        current = map(dict.get, self._state_entries, self._state_keys)
        return all(map(operator.is_, current, self._state)) and all(
            self._has_same_settings(run, var) for run in self._plan
        )

    def _has_same_settings(self, run: KindRun, var: Var) -> bool:
        """Whether the tensors of a kind still share their settings; new numbers are taken over."""
        indices = run.indices
        assert var.counts is not None
        if run.count is not var.counts[indices[0]]:
            return False
        if self._reads and len({run.note_numbers(var, index) for index in indices}) > 1:
            return False
        read = [program.read_settings(self.rules, settings_of(source)) for source in run.sources]
        numbers = read[0][0]
        if any(others != numbers or choices != run.kind.choices for others, choices in read):
            return False
        run.numbers = numbers
        return True

    def _make_plan(self, var: Var, takes_grad: bool) -> None:
        self._plan, self._loop, self._state_entries, self._state_keys, self._state = [], [], [], [], []
        self._planned_for = []  # a plan that an error of the closure cut off must not be taken for one
        mode = self._choose_mode(var)
        groups: defaultdict[Any, list[int]] = defaultdict(list)
        for index, param in enumerate(var.params):
            if mode == "loop" or type(param) not in (Tensor, torch.nn.Parameter) or param.numel() == 0:
                self._loop.append(index)
                continue
            numbers, choices = program.read_settings(self.rules, settings_of(param))
            notes = tuple((name, _note_dtype(value)) for name, value in var.notes_of(index, self._reads).items())
            kind = Kind(
                self._structure,
                choices,
                param.dtype,
                var.grads[index].dtype,
                param.device,
                self.writes_param,
                takes_grad,
                var.maximize,
                notes,
            )
            same = tuple(id(number) if isinstance(number, Tensor) else number for number in numbers)
            assert var.counts is not None
            note_numbers = tuple(v for v in var.notes_of(index, self._reads).values() if not isinstance(v, Tensor))
            groups[kind, same, id(var.counts[index]), note_numbers].append(index)
        for (kind, _, _, _), indices in groups.items():
            self._plan_kind(kind, indices, var, mode)
        self._planned_for, self._planned_with = list(var.params), (takes_grad, var.maximize)

    def _choose_mode(self, var: Var) -> str:
        if self.mode != "auto":
            return self.mode
        if self.capturable:
            return "foreach"
        if self.writes_param and var.update is None:
            kernel = torch_kernels.recognize(self.rules, settings_of(var.params[0]), path_of)
            kinds = {(param.device, param.dtype) for param in var.params}
            if kernel is not None and all(torch_kernels.supports(kernel, *kind) for kind in kinds):
                return "auto-fused"  # nothing is compiled
        if sum(param.numel() for param in var.params) >= COMPILE_FROM:
            return "auto-fused"
        return "foreach" if len(var.params) >= _FOREACH_FROM else "loop"

    def _plan_kind(self, kind: Kind, indices: list[int], var: Var, mode: str) -> None:
        params = [var.params[index] for index in indices]
        way: Way = "kernel" if mode in ("fused", "auto-fused") else "foreach"
        torch_kernel = None
        if way == "kernel" and kind.writes_param and kind.takes_grad:
            torch_kernel = torch_kernels.recognize(self.rules, settings_of(params[0]), path_of)
            if torch_kernel is not None and torch_kernels.supports(torch_kernel, kind.device, kind.param_dtype):
                way = "torch"
        numbers, _ = program.read_settings(self.rules, settings_of(params[0]))
        only_subtracts = (
            not self.capturable and Subtraction.suits(self.rules, kind, numbers) and _are_alike(var, indices)
        )
        made = None if way == "torch" or only_subtracts else _program(kind, self.rules, settings_of(params[0]))
        states = [self._state_of(param) for param in params]
        assert var.counts is not None
        count = var.counts[indices[0]]
        sources = list({var.source_of(param): param for param in params}.values())

        def make(way: Way) -> KindRun:
            small = [] if only_subtracts else _small(params, way, kind.device)
            bucket = self._make_bucket(made, params, states, small, way) if small else None
            units = [Unit(indices[i], states[i]) for i in range(len(params)) if i not in set(small)]
            members = [indices[i] for i in small]
            return (Subtraction if only_subtracts else KindRun)(
                kind,
                made,
                self.rules,
                self._reads,
                way,
                units,
                members,
                bucket,
                torch_kernel,
                count,
                sources,
                self.capturable,
            )

        run = make(way)
        try:
            run.compile()
        except Exception as error:
            if mode == "fused":
                self.forget()
                raise
            names = ", ".join(type(rule).__name__ for rule in self.rules)
            warnings.warn(_UNCOMPILED.format(rules=names, type=type(error).__name__, error=error), stacklevel=2)
            run = make("foreach")
        self._plan.append(run)
        for param, state in zip(params, states, strict=True):
            for name, tensor in state.items():
                entry, key = _place(self.rules, param, name)
                self._state_entries.append(entry)
                self._state_keys.append(key)
                self._state.append(tensor)

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        """The state of a parameter by path and name; made where there is none."""
        found: dict[str, Tensor] = {}
        for rule in every_rule(self.rules):
            state = rule.get_state(param, rule.get_settings(param))
            for name, value in zip(getattr(state, "_fields", ()), state, strict=True):
                found[f"{path_of(rule)}.{name}"] = value
        return found

    def _make_bucket(
        self, made: Program | None, params: list[Tensor], states: list[dict[str, Tensor]], small: list[int], way: Way
    ) -> Bucket:
        """Move the state of small tensors into a bucket."""
        inside = {name: [states[i][name] for i in small] for name in states[small[0]]}
        min_rows = -(-kernels.MIN_ELEMENTS // ROW_WIDTH) if way == "kernel" else 0
        bucket = Bucket([params[i] for i in small], inside, () if made is None else made.scalar_names, min_rows)
        for name, views in bucket.views.items():
            for i, view in zip(small, views, strict=True):
                states[i][name] = view
                entry, key = _place(self.rules, params[i], name)
                entry[key] = view
        return bucket

    # ------------------------------------------------------------------------------------------------------- one by one

    def _run_loop(self, var: Var, outs: list[Tensor | None]) -> None:
        if var.update is None:
            var.get_grad()  # not in the part alone, where nobody else would learn of it
        part = var.part(self._loop)
        for rule in self.rules:
            part = rule.step(part)
        updates = part.get_update()
        if self.writes_param:
            apply_updates(part.params, updates)
        for index, update in zip(self._loop, updates, strict=True):
            outs[index] = update


def apply_updates(params: Sequence[Tensor], updates: Sequence[Tensor]) -> None:
    """Subtract updates from parameters, rounding once."""
    if len(params) > 1 and are_plain([*params, *updates]):
        torch._foreach_sub_(list(params), list(updates))
        return
    for param, update in zip(params, updates, strict=True):
        update = _compat.placed_like(update, param)
        if param.dtype == update.dtype:
            param.sub_(update)
        else:
            param.copy_(param.to(torch.promote_types(param.dtype, update.dtype)) - update)


def _are_alike(var: Var, indices: Sequence[int]) -> bool:
    """Whether the updates have the dtypes of their parameters."""
    assert var.update is not None
    return all(var.update[index].dtype == var.params[index].dtype for index in indices)


def _note_dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) else None


def _small(params: Sequence[Tensor], way: Way, device: torch.device) -> list[int]:
    """Which tensors share a bucket."""
    if way != "kernel" and device.type != "cpu":
        return []  # torch's own kernels take many tensors at once there
    limit = _SMALL.get(device.type, 0)
    small = [index for index, param in enumerate(params) if param.numel() <= limit]
    return small if len(small) > 1 or way == "kernel" else []


def _place(rules: Sequence[Rule], param: Tensor, name: str) -> tuple[dict[str, Any], str]:
    """The dictionary and the key of a parameter's state."""
    binding = rules[0].binding
    assert binding is not None
    entry, prefix = binding.store.entry(param)
    return entry, prefix + name


_programs: dict[Any, Program] = {}


def _program(kind: Kind, rules: Sequence[Rule], settings_of: Callable[[Rule], Settings]) -> Program:
    """The program of a kind, traced once for all optimizers."""
    key = (kind, tuple(path_of(rule) for rule in every_rule(rules)))
    if key not in _programs:
        _programs[key] = program.trace(kind, rules, settings_of, path_of)
    return _programs[key]
