"""A run of element-wise rules in an optimizer: sorts its tensors into kinds, and runs the program of each."""

from __future__ import annotations

import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.optim.core.context import Settings
from graphopt.optim.core.flat import kernels, program, torch_kernels
from graphopt.optim.core.flat.bucket import Bucket
from graphopt.optim.core.flat.foreach import Foreach
from graphopt.optim.core.flat.program import GRAD, NUMEL, OUT, PARAM, UPDATE, Kind, Program, every_rule, is_dynamic
from graphopt.optim.core.flat.ragged import ROW_WIDTH, Ragged
from graphopt.optim.core.module import Rule
from graphopt.optim.core.var import Var
from graphopt.optim.flat_kernels import flatten

Mode = Literal["auto", "loop", "foreach", "fused"]

# Elements from which kernels are compiled unasked: some 1000 steps win back the seconds that compiling takes.
COMPILE_FROM = 2**19
# Tensors of at most so many elements share a bucket: copying them there and back costs less than calls of their own.
_SMALL = {"cpu": 2**14, "cuda": 2**20}
# From so many tensors on, operators are called once for all of them.
_FOREACH_FROM = 33
# Elements in buckets from which a kernel for rows is compiled as well.
_COMPILE_ROWS_FROM = 2**18

_UNCOMPILED = (
    "the optimizer runs uncompiled, several times slower, because compiling {rules} failed ({type}: {error}). "
    "Pass foreach=True to go on so without this warning, or fused=True to make it an error"
)


@dataclass
class _Unit:
    """One long tensor."""

    index: int  # in Var.params
    states: dict[str, Tensor]  # its state, in its own shape


@dataclass
class _KindRun:
    """Tensors of one kind with the same numbers."""

    kind: Kind
    program: Program
    rules: Sequence[Rule]
    sources: list[Any]  # parameters whose settings all others share
    numbers: tuple[Any, ...]
    count: Tensor
    mode: str
    units: list[_Unit]
    members: list[int]  # indices in Var.params of the tensors in the bucket
    bucket: Bucket | None
    torch_kernel: torch_kernels.TorchKernel | None
    torch_steps: list[Tensor] = field(default_factory=list)
    refs: list[tuple[dict[str, Any], str]] = field(default_factory=list)  # where the state is
    tensors: list[Tensor] = field(default_factory=list)  # what is there


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
        self.mode = mode
        self.writes_param = writes_param
        self.capturable = capturable
        self._reads = list({key.name: key for rule in every_rule(rules) for key in rule.reads}.values())
        self._plan: list[_KindRun] = []
        self._loop: list[int] = []
        self._planned_for: list[Tensor] = []
        self._planned_with: tuple[Any, ...] = ()

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
            self._run_kind(kind_run, var, outs)
        if self._loop:
            self._run_loop(var, outs)
        if self.writes_param:
            var.skip_update = True
        else:
            var.update = [out for out in outs if out is not None]
        return var

    # --------------------------------------------------------------------------------------------------------- the plan

    def _is_current(self, var: Var, takes_grad: bool) -> bool:
        if len(var.params) != len(self._planned_for) or self._planned_with != (takes_grad, var.maximize):
            return False
        if not all(map(operator.is_, var.params, self._planned_for)):
            return False
        for kind_run in self._plan:
            current = [entry.get(key) for entry, key in kind_run.refs]
            if not all(map(operator.is_, current, kind_run.tensors)):
                return False
            indices = [*[unit.index for unit in kind_run.units], *kind_run.members]
            if kind_run.count is not var.counts[indices[0]]:  # type: ignore[index]
                return False
            if self._reads and len({self._note_numbers(var, index) for index in indices}) > 1:
                return False
            if any(self._numbers(source, kind_run.rules) != kind_run.numbers for source in kind_run.sources):
                values = {self._numbers(source, kind_run.rules) for source in kind_run.sources}
                if len(values) > 1:
                    return False
                kind_run.numbers = values.pop()
        return True

    def _numbers(self, param: Tensor, rules: Sequence[Rule]) -> tuple[Any, ...]:
        """The numeric hyper-parameters of all rules for one parameter."""
        values: list[Any] = []
        for rule in every_rule(rules):
            settings = rule.get_settings(param)
            values += [value for name, value in settings.items() if is_dynamic(rule, name, value)]
        return tuple(values)

    def _note_numbers(self, var: Var, index: int) -> tuple[Any, ...]:
        return tuple(v for v in var.notes_of(index, self._reads).values() if not isinstance(v, Tensor))

    def _make_plan(self, var: Var, takes_grad: bool) -> None:
        self._plan, self._loop = [], []
        self._planned_for, self._planned_with = list(var.params), (takes_grad, var.maximize)
        mode = self._choose_mode(var)
        groups: defaultdict[Any, list[int]] = defaultdict(list)
        for index, param in enumerate(var.params):
            if mode == "loop" or type(param) not in (Tensor, torch.nn.Parameter) or param.numel() == 0:
                self._loop.append(index)
                continue
            notes = tuple((name, _note_dtype(value)) for name, value in var.notes_of(index, self._reads).items())
            kind = Kind(
                program.signature(self.rules, lambda rule, p=param: rule.get_settings(p)),  # type: ignore[misc]
                param.dtype,
                var.grads[index].dtype,
                param.device,
                self.writes_param,
                takes_grad,
                var.maximize,
                notes,
            )
            numbers = tuple(id(n) if isinstance(n, Tensor) else n for n in self._numbers(param, self.rules))
            assert var.counts is not None
            groups[kind, numbers, id(var.counts[index]), self._note_numbers(var, index)].append(index)
        for (kind, _, _, _), indices in groups.items():
            self._plan_kind(kind, indices, var, mode)

    def _choose_mode(self, var: Var) -> str:
        if self.mode != "auto":
            return self.mode
        if self.capturable:
            return "foreach"
        if (
            self.writes_param
            and var.update is None
            and torch_kernels.recognize(self.rules, self._first_settings(var), _path)
        ):
            return "auto-fused"  # nothing is compiled
        if sum(param.numel() for param in var.params) >= COMPILE_FROM:
            return "auto-fused"
        return "foreach" if len(var.params) >= _FOREACH_FROM else "loop"

    def _first_settings(self, var: Var) -> Callable[[Rule], Settings]:
        first = var.params[0]
        return lambda rule: rule.get_settings(first)

    def _plan_kind(self, kind: Kind, indices: list[int], var: Var, mode: str) -> None:
        params = [var.params[index] for index in indices]
        first = params[0]
        settings_of = lambda rule: rule.get_settings(first)  # noqa: E731
        made = _program(kind, self.rules, settings_of)
        torch_kernel = None
        if mode in ("fused", "auto-fused"):
            if kind.writes_param and kind.takes_grad:
                torch_kernel = torch_kernels.recognize(self.rules, settings_of, _path)
                if torch_kernel is not None and not torch_kernels.supports(torch_kernel, kind.device, kind.param_dtype):
                    torch_kernel = None
            if torch_kernel is None:
                mode = self._compile(kind, made, mode, first.device)
            else:
                mode = "torch"
        # A state tensor for each parameter, made where there is none.
        states = [{} for _ in params]  # type: list[dict[str, Tensor]]
        for param, state in zip(params, states, strict=True):
            for rule in every_rule(self.rules):
                values = rule.get_state(param, rule.get_settings(param))
                for name, value in zip(getattr(values, "_fields", ()), values, strict=True):
                    state[f"{_path(rule)}.{name}"] = value
        limit = _SMALL.get(kind.device.type, 0)
        if mode != "kernel" and kind.device.type != "cpu":
            limit = 0  # torch's own kernels take many tensors at once there
        small = [i for i, param in enumerate(params) if param.numel() <= limit]
        if len(small) < 2 and mode != "kernel":
            small = []
        bucket = None
        if small:
            names = [name for name in made.elements if name in states[0]]
            bucket = Bucket(
                made,
                [params[i] for i in small],
                {name: [states[i][name] for i in small] for name in names},
                -(-kernels.MIN_ELEMENTS // ROW_WIDTH) if mode == "kernel" else 0,
            )
            for name, views in bucket.views.items():
                for i, view in zip(small, views, strict=True):
                    states[i][name] = view
                    _set_state(self.rules, params[i], name, view)
        in_bucket = set(small)
        units = [_Unit(indices[i], states[i]) for i in range(len(params)) if i not in in_bucket]
        refs, tensors = [], []
        for param, state in zip(params, states, strict=True):
            for name, tensor in state.items():
                refs.append(_reference(self.rules, param, name))
                tensors.append(tensor)
        sources = list({var.source_of(param): param for param in params}.values())
        assert var.counts is not None
        count = var.counts[indices[0]]
        kind_run = _KindRun(
            kind,
            made,
            self.rules,
            sources,
            self._numbers(first, self.rules),
            count,
            mode,
            units,
            [indices[i] for i in small],
            bucket,
            torch_kernel,
            refs=refs,
            tensors=tensors,
        )
        if mode == "torch":
            device = kind.device
            number = len(units) + (bucket is not None)
            kind_run.torch_steps = [count.to(device, torch.float32, copy=True) - 1 for _ in range(number)]
        self._plan.append(kind_run)

    def _compile(self, kind: Kind, made: Program, mode: str, device: torch.device) -> str:
        try:
            _long_kernel(made, device)
        except Exception as error:
            if mode == "fused":
                raise
            names = ", ".join(type(rule).__name__ for rule in self.rules)
            warnings.warn(_UNCOMPILED.format(rules=names, type=type(error).__name__, error=error), stacklevel=2)
            return "foreach"
        return "kernel"

    # ------------------------------------------------------------------------------------------------------ running it

    def _run_kind(self, run: _KindRun, var: Var, outs: list[Tensor | None]) -> None:
        made = run.program
        if run.mode == "torch":
            self._run_torch(run, var)
            return
        row = self._row(run, var)
        elements = [self._elements(run, unit, var, outs) for unit in run.units]
        if run.mode == "foreach":
            if elements:
                Foreach(made)(row, *zip(*elements, strict=True))
            if run.bucket is not None:
                self._run_bucket(run, var, outs, row)
            return
        kernel = _long_kernel(made, run.kind.device)
        for unit, tensors in zip(run.units, elements, strict=True):
            numel = var.params[unit.index].numel()
            if not kernels.MIN_ELEMENTS <= numel <= kernels.MAX_ELEMENTS or (
                tensors[0].dim() != 1 and not made.scalars[0]
            ):
                _write(made, made.body(row, *tensors), tensors)
            else:
                kernel([row, *tensors])
        if run.bucket is not None:
            self._run_bucket(run, var, outs, row)

    def _run_bucket(self, run: _KindRun, var: Var, outs: list[Tensor | None], row: Tensor) -> None:
        bucket, made = run.bucket, run.program
        assert bucket is not None
        params = [var.params[index] for index in run.members]
        tensors = []
        for name, dtype, buffer in zip(made.elements, made.dtypes, bucket.buffers, strict=True):
            if buffer is None:
                buffer = self._gather(run, bucket, name, dtype, var, params)
            tensors.append(buffer)
        is_compiled = run.mode == "kernel"
        if made.keeps_apart:
            if is_compiled and bucket.num_rows * ROW_WIDTH >= _COMPILE_ROWS_FROM:
                _rows_kernel(made, run.kind.device)([row, *bucket.rows, *tensors])
            else:
                _write(made, Ragged(made, bucket.rows)(row, *tensors), tensors)
        elif is_compiled:
            _long_kernel(made, run.kind.device)([row, *[tensor.view(-1) for tensor in tensors]])
        else:
            _write(made, made.body(row, *tensors), tensors)
        if PARAM in made.elements and made.elements.index(PARAM) in made.targets:
            bucket.scatter(PARAM, params)
        if OUT in made.elements:
            for index, view in zip(run.members, bucket.split(tensors[made.elements.index(OUT)]), strict=True):
                outs[index] = view

    def _gather(
        self, run: _KindRun, bucket: Bucket, name: str, dtype: torch.dtype, var: Var, params: Sequence[Tensor]
    ) -> Tensor:
        grads, updates = var.grads, var.update
        tensors: Sequence[Tensor]
        if name == NUMEL:
            return bucket.rows.numel
        if name == OUT:
            return bucket.new(dtype)  # those that follow may keep it
        if name == PARAM:
            tensors = params
        elif name == GRAD:
            tensors = [grads[index] for index in run.members]
        elif name == UPDATE:
            assert updates is not None
            tensors = [updates[index] for index in run.members]
        else:
            tensors = [var.notes_of(index, self._reads)[name] for index in run.members]
        return bucket.gather(name, tensors, dtype)

    def _run_torch(self, run: _KindRun, var: Var) -> None:
        kernel = run.torch_kernel
        assert kernel is not None
        everything, all_grads = var.params, var.grads
        params = [everything[unit.index] for unit in run.units]
        grads = [all_grads[unit.index] for unit in run.units]
        states = [[unit.states[name] for unit in run.units] for name in kernel.states]
        members = [everything[index] for index in run.members]
        if run.bucket is not None:
            params.append(run.bucket.gather(PARAM, members, run.kind.param_dtype))
            grads.append(run.bucket.gather(GRAD, [all_grads[index] for index in run.members], run.kind.grad_dtype))
            for name, tensors in zip(kernel.states, states, strict=True):
                buffer = run.bucket.buffers[run.program.elements.index(name)]
                assert buffer is not None
                tensors.append(buffer)
        source = run.sources[0]
        settings = {_path(rule): rule.get_settings(source) for rule in self.rules}
        kernel.run(params, grads, states, run.torch_steps, settings, run.kind.maximize)
        if run.bucket is not None:
            run.bucket.scatter(PARAM, members)

    def _row(self, run: _KindRun, var: Var) -> Tensor:
        """The numbers of a step, through the prologue."""
        device = run.kind.device
        values: list[Any] = [run.count, *run.numbers]
        first = run.units[0].index if run.units else run.members[0]
        values += self._note_numbers(var, first)
        host = torch.tensor([float(v) if not isinstance(v, Tensor) else 0.0 for v in values], dtype=torch.float64)
        numbers = list(host.unbind())
        for index, value in enumerate(values):
            if isinstance(value, Tensor):
                numbers[index] = value.reshape(()).to(torch.float64)
        if self.capturable:
            numbers = [number.to(device) for number in numbers]
        row: Tensor | None = run.program.prologue(*numbers)
        if row is None:
            row = torch.zeros(1, dtype=torch.float64)
        row = row.detach()
        if run.mode == "foreach" and not self.capturable:
            return row  # its numbers become arguments
        return row.to(device, non_blocking=True)

    def _elements(self, run: _KindRun, unit: _Unit, var: Var, outs: list[Tensor | None]) -> list[Tensor]:
        """The tensors of the program for one long tensor, one-dimensional where that is possible."""
        made, index = run.program, unit.index
        param = var.params[index]
        notes = var.notes_of(index, self._reads)
        found: list[Tensor] = []
        for name, dtype in zip(made.elements, made.dtypes, strict=True):
            if name == PARAM:
                found.append(param)
            elif name == GRAD:
                found.append(var.grads[index])
            elif name == UPDATE:
                assert var.update is not None
                found.append(var.update[index])
            elif name == NUMEL:
                found.append(torch.tensor(float(param.numel()), dtype=dtype, device=param.device))
            elif name == OUT:
                out = torch.empty_like(param, dtype=dtype)
                outs[index] = out
                found.append(out)
            else:
                found.append(unit.states[name] if name in unit.states else notes[name])
        if run.mode == "foreach":
            return found
        shaped = [t for t, is_scalar in zip(found, made.scalars, strict=True) if not is_scalar]
        written = {made.elements[target] for target in made.targets}
        names = [name for name, is_scalar in zip(made.elements, made.scalars, strict=True) if not is_scalar]
        views = flatten(shaped, read_only=[i for i, name in enumerate(names) if name not in written])
        if views is None:
            return found
        flat = iter(views)
        return [t if is_scalar else next(flat) for t, is_scalar in zip(found, made.scalars, strict=True)]  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------------------- one by one

    def _run_loop(self, var: Var, outs: list[Tensor | None]) -> None:
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
    for param, update in zip(params, updates, strict=True):
        if param.dtype == update.dtype:
            param.sub_(update)
        else:
            param.copy_(param.to(torch.promote_types(param.dtype, update.dtype)) - update)


def _write(made: Program, outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for target, output in zip(made.targets, outputs, strict=True):
        tensors[target].copy_(output)


def _note_dtype(value: Any) -> torch.dtype | None:
    return value.dtype if isinstance(value, Tensor) else None


def _path(rule: Rule) -> str:
    binding = rule.binding
    assert binding is not None
    return binding.path


def _reference(rules: Sequence[Rule], param: Tensor, name: str) -> tuple[dict[str, Any], str]:
    binding = rules[0].binding
    assert binding is not None
    entry, prefix = binding.store.entry(param)
    return entry, prefix + name


def _set_state(rules: Sequence[Rule], param: Tensor, name: str, value: Tensor) -> None:
    entry, key = _reference(rules, param, name)
    entry[key] = value


_programs: dict[Any, Program] = {}
_kernels: dict[Any, kernels.Kernel] = {}


def _program(kind: Kind, rules: Sequence[Rule], settings_of: Callable[[Rule], Settings]) -> Program:
    """The program of a kind, traced once for all optimizers."""
    key = (kind, tuple(_path(rule) for rule in every_rule(rules)))
    if key not in _programs:
        _programs[key] = program.trace(kind, rules, settings_of, _path)
    return _programs[key]


def _long_kernel(made: Program, device: torch.device) -> kernels.Kernel:
    key = (id(made), "long")
    if key not in _kernels:
        _kernels[key] = kernels.compile_long(made, device)
    return _kernels[key]


def _rows_kernel(made: Program, device: torch.device) -> kernels.Kernel:
    key = (id(made), "rows")
    if key not in _kernels:
        _kernels[key] = kernels.compile_rows(made, device)
    return _kernels[key]
