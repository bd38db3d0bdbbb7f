"""Tensors of one kind with the same numbers, and one step of them: in kernels, in torch's own, or in foreach calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from graphopt import _compat
from graphopt.annotations import Key
from graphopt.optim.core.context import Settings
from graphopt.optim.core.flat import kernels
from graphopt.optim.core.flat.bucket import Bucket
from graphopt.optim.core.flat.foreach import Foreach
from graphopt.optim.core.flat.program import GRAD, NUMEL, OUT, PARAM, UPDATE, Kind, Program, read_settings
from graphopt.optim.core.flat.ragged import ROW_WIDTH, Ragged
from graphopt.optim.core.flat.torch_kernels import Tensors, TorchKernel
from graphopt.optim.core.module import Rule
from graphopt.optim.core.var import Var
from graphopt.optim.flat_kernels import flatten
from graphopt.optim.step_size.lr import LR

Way = Literal["kernel", "torch", "foreach"]

# Elements in a bucket from which a kernel for rows is compiled: the one for long tensors cannot tell small ones apart.
_COMPILE_ROWS_FROM = 2**18


class Unit(NamedTuple):
    """One long tensor: its number in `Var.params`, and its state in its own shape."""

    number: int
    states: dict[str, Tensor]


class KindRun:
    """Tensors of one kind with the same numbers.

    Args:
        kind: what they have in common.
        program: what is run; ``None`` for the way ``"torch"``.
        rules: the rules that it was traced from.
        reads: the annotations that these read.
        way: how it is run.
        units: the long tensors.
        members: numbers in `Var.params` of the small ones.
        bucket: their buffers.
        torch_kernel: for the way ``"torch"``.
        count: the step count that all share.
        sources: parameters of which each tensor's settings are those of one.
        capturable: whether numbers stay on the device.
    """

    def __init__(
        self,
        kind: Kind,
        program: Program | None,
        rules: Sequence[Rule],
        reads: Sequence[Key[Any]],
        way: Way,
        units: list[Unit],
        members: list[int],
        bucket: Bucket | None,
        torch_kernel: TorchKernel | None,
        count: Tensor,
        sources: list[Tensor],
        capturable: bool,
    ) -> None:
        self.kind, self.way = kind, way
        self.units, self.members, self.bucket = units, members, bucket
        self.count, self.sources = count, sources
        self._rules, self._reads = rules, reads
        self._program, self._torch_kernel = program, torch_kernel
        self._capturable = capturable
        self.numbers, _ = read_settings(rules, settings_of(sources[0]))
        self._constants: tuple[tuple[Any, ...], list[Tensor]] | None = None
        self._foreach: Foreach | None = None
        self._ragged: GraphModule | None = None
        # torch's kernels count for each tensor that they are given.
        num_tensors = len(units) + (bucket is not None) if way == "torch" else 0
        self._torch_steps = [count.to(kind.device, torch.float32, copy=True) - 1 for _ in range(num_tensors)]

    def compile(self) -> None:
        """Compile what a step will need."""
        if self.way == "kernel":
            if self.units or (self.bucket is not None and not self._made.keeps_apart):
                long_kernel(self._made, self.kind.device)
            if self._has_rows:
                rows_kernel(self._made, self.kind.device)

    @property
    def indices(self) -> list[int]:
        """Numbers in `Var.params` of all tensors."""
        return [*[unit.number for unit in self.units], *self.members]

    def step(self, var: Var, outs: list[Tensor | None]) -> None:
        """Make one step; what is handed on rather than subtracted goes to ``outs``."""
        if self.way == "torch":
            self._step_torch(var)
            return
        row = self._row(var)
        elements = [self._elements(unit, var, outs) for unit in self.units]
        if self.way == "foreach":
            if elements:
                self._foreach = self._foreach or Foreach(self._made)
                self._foreach(row, *zip(*elements, strict=True))
        else:
            for unit, tensors in zip(self.units, elements, strict=True):
                self._step_long(unit, tensors, row, var)
        if self.bucket is not None:
            self._step_bucket(self.bucket, row, var, outs)

    # ---------------------------------------------------------------------------------------------------- the three ways

    def _step_long(self, unit: Unit, tensors: list[Tensor], row: Tensor, var: Var) -> None:
        made = self._made
        is_flat = all(t.dim() == 1 for t, is_scalar in zip(tensors, made.scalars, strict=True) if not is_scalar)
        if is_flat and kernels.MIN_ELEMENTS <= var.params[unit.number].numel() <= kernels.MAX_ELEMENTS:
            long_kernel(made, self.kind.device)([row, *tensors])
        else:
            _write(made, made.body(row, *tensors), tensors)

    def _step_bucket(self, bucket: Bucket, row: Tensor, var: Var, outs: list[Tensor | None]) -> None:
        made = self._made
        tensors = [
            bucket.buffers[name] if name in bucket.buffers else self._gather(bucket, name, dtype, var)
            for name, dtype in zip(made.elements, made.dtypes, strict=True)
        ]
        if self._has_rows:
            rows_kernel(made, self.kind.device)([row, *bucket.rows, *tensors])
        elif made.keeps_apart:
            if self._ragged is None:  # traced, because interpreting takes longer than the small tensors do
                self._ragged = _compat.make_fx(Ragged(made, bucket.rows))(row, *tensors)
            _write(made, self._ragged(row, *tensors), tensors)
        elif self.way == "kernel":
            long_kernel(made, self.kind.device)([row, *[tensor.view(-1) for tensor in tensors]])
        else:
            _write(made, made.body(row, *tensors), tensors)
        if self.kind.writes_param:
            bucket.scatter(PARAM, [var.params[index] for index in self.members])
        else:
            for index, view in zip(self.members, bucket.split(tensors[made.elements.index(OUT)]), strict=True):
                outs[index] = view

    def _step_torch(self, var: Var) -> None:
        kernel = self._torch_kernel
        assert kernel is not None
        everything, all_grads = var.params, var.grads
        params = [everything[unit.number] for unit in self.units]
        grads = [all_grads[unit.number] for unit in self.units]
        states = [[unit.states[name] for unit in self.units] for name in kernel.states]
        members = [everything[index] for index in self.members]
        if self.bucket is not None:
            params.append(self.bucket.gather(PARAM, members, self.kind.param_dtype))
            grads.append(self.bucket.gather(GRAD, [all_grads[index] for index in self.members], self.kind.grad_dtype))
            for name, tensors in zip(kernel.states, states, strict=True):
                tensors.append(self.bucket.buffers[name])
        settings = {path_of(rule): rule.get_settings(self.sources[0]) for rule in self._rules}
        kernel.run(Tensors(params, grads, states, self._torch_steps, settings, self.kind.maximize))
        if self.bucket is not None:
            self.bucket.scatter(PARAM, members)

    @property
    def _made(self) -> Program:
        assert self._program is not None
        return self._program

    @property
    def _has_rows(self) -> bool:
        return (
            self.way == "kernel"
            and self.bucket is not None
            and self._made.keeps_apart
            and self.bucket.num_rows * ROW_WIDTH >= _COMPILE_ROWS_FROM
        )

    # ------------------------------------------------------------------------------------------------ what they are given

    def _row(self, var: Var) -> Tensor:
        """The numbers of a step, through the prologue."""
        constants = (*self.numbers, *self.note_numbers(var, self.indices[0]))
        device = self.kind.device if self._capturable else torch.device("cpu")
        if self._constants is None or not _same(self._constants[0], constants):
            tensors = [
                value.detach().reshape(()).to(device, torch.float64)
                if isinstance(value, Tensor)
                else torch.tensor(float(value), dtype=torch.float64, device=device)
                for value in constants
            ]
            self._constants = constants, tensors
        count = self.count.to(device) if self._capturable else self.count
        row: Tensor | None = self._made.prologue(count, *self._constants[1])
        if row is None:
            return torch.zeros(1, dtype=torch.float64, device=self.kind.device)
        if self.way == "foreach" and not self._capturable:
            return row  # its numbers become arguments
        return row.to(self.kind.device, non_blocking=True)

    def note_numbers(self, var: Var, index: int) -> tuple[Any, ...]:
        """The annotations of a parameter that are numbers."""
        return tuple(v for v in var.notes_of(index, self._reads).values() if not isinstance(v, Tensor))

    def _elements(self, unit: Unit, var: Var, outs: list[Tensor | None]) -> list[Tensor]:
        """The tensors of the program for one long tensor, one-dimensional where that is possible."""
        made, index = self._made, unit.number
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
        if self.way == "foreach":
            # Tensors of shape () would be widened by numbers of float64.
            shaped = zip(found, made.scalars, strict=True)
            return [t.view(1) if t.dim() == 0 and not is_scalar else t for t, is_scalar in shaped]
        written = {made.elements[target] for target in made.targets}
        whole = [
            (name, tensor)
            for name, tensor, is_scalar in zip(made.elements, found, made.scalars, strict=True)
            if not is_scalar
        ]
        read_only = [position for position, (name, _) in enumerate(whole) if name not in written]
        views = flatten([tensor for _, tensor in whole], read_only)
        if views is None:
            return found
        flat = iter(views)
        return [t if is_scalar else next(flat) for t, is_scalar in zip(found, made.scalars, strict=True)]  # type: ignore[misc]

    def _gather(self, bucket: Bucket, name: str, dtype: torch.dtype, var: Var) -> Tensor:
        if name == NUMEL:
            return bucket.rows.numel
        if name == OUT:
            return bucket.new(dtype)  # those that follow may keep it
        source: Sequence[Tensor]
        if name == PARAM:
            source = var.params
        elif name == GRAD:
            source = var.grads
        elif name == UPDATE:
            assert var.update is not None
            source = var.update
        else:
            return bucket.gather(name, [var.notes_of(index, self._reads)[name] for index in self.members], dtype)
        return bucket.gather(name, [source[index] for index in self.members], dtype)


class Subtraction(KindRun):
    """``param -= lr * update``: what is left to do behind modules that are no run of element-wise rules, without a compiler."""

    @staticmethod
    def suits(rules: Sequence[Rule], kind: Kind, numbers: Sequence[Any]) -> bool:
        """Whether that is all that the rules do."""
        return (
            type(rules[0]) is LR
            and len(rules) == 1
            and kind.writes_param
            and not kind.takes_grad
            and not isinstance(numbers[0], Tensor)
            and kind.param_dtype in (torch.float32, torch.float64)
            and torch.promote_types(kind.grad_dtype, torch.float32) == kind.param_dtype
        )

    def compile(self) -> None:
        """Nothing is compiled."""

    def step(self, var: Var, outs: list[Tensor | None]) -> None:
        """Make one step."""
        assert var.update is not None
        params = [var.params[index] for index in self.indices]
        updates = [var.update[index] for index in self.indices]
        rate = self.numbers[0]
        if isinstance(rate, Tensor):  # since the last step
            torch._foreach_sub_(params, list(torch._foreach_mul(updates, rate)))
        else:
            torch._foreach_sub_(params, updates, alpha=rate)


def settings_of(param: Tensor) -> Callable[[Rule], Settings]:
    """The hyper-parameters of rules for a parameter."""
    return lambda rule: rule.get_settings(param)


def path_of(rule: Rule) -> str:
    """The rule's name in its chain."""
    binding = rule.binding
    assert binding is not None
    return binding.path


@functools.cache
def long_kernel(program: Program, device: torch.device) -> kernels.Kernel:
    """The kernel for long tensors, compiled once."""
    return kernels.compile_long(program, device)


@functools.cache
def rows_kernel(program: Program, device: torch.device) -> kernels.Kernel:
    """The kernel for rows of small tensors, compiled once."""
    return kernels.compile_rows(program, device)


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether numbers are as they were; those in tensors may have been written to."""
    return all(a == b and not isinstance(a, Tensor) for a, b in zip(left, right, strict=True))


def _write(made: Program, outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    for target, output in zip(made.targets, outputs, strict=True):
        tensors[target].copy_(output)
