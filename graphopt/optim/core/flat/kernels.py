"""Programs as compiled kernels: one for long tensors, one at a time, and one for many small ones side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter

from graphopt import _compat
from graphopt.optim.core.flat.phases import Phase, cut
from graphopt.optim.core.flat.program import NUM_SAMPLE_ELEMENTS, Program
from graphopt.optim.core.flat.ragged import ROW_WIDTH, Ragged, Rows
from graphopt.optim.core.flat.tracing import FakeSizes

# Inductor reduces few elements in another way, and the kernel is not valid for both.
MIN_ELEMENTS = 4097
MAX_ELEMENTS = 2**31 - 1  # its indices have 32 bits

# Otherwise a state that is updated and then reduced is computed twice, from inputs that are read twice.
_OPTIONS: dict[str, Any] = {"realize_reads_threshold": 2}

Kernel = Callable[[list[Tensor]], Any]
"""Takes ``[row, *elements]`` and writes to the elements that are targets."""


def compile_long(program: Program, device: torch.device) -> Kernel:
    """A kernel for one-dimensional tensors of `MIN_ELEMENTS` to `MAX_ELEMENTS` elements."""
    phases = cut(program)
    calls = [_compile_phase(phase, program, device) for phase in phases]
    if len(phases) == 1 and not phases[0].numbers:
        (phase,), (call,) = phases, calls
        return lambda inputs: call([inputs[0], *[inputs[1 + index] for index in phase.elements]])

    def kernel(inputs: list[Tensor]) -> None:
        row, elements = inputs[0], inputs[1:]
        numbers: list[Tensor] = []
        for phase, call in zip(phases, calls, strict=True):
            numbers += call([row, *[numbers[i] for i in phase.numbers], *[elements[i] for i in phase.elements]])

    return kernel


def _compile_phase(phase: Phase, program: Program, device: torch.device) -> Kernel:
    fakes = FakeSizes(NUM_SAMPLE_ELEMENTS)
    (size,) = fakes.sizes
    with fakes.active():
        numbers = [torch.empty((), dtype=dtype, device=device) for dtype in phase.number_dtypes]
        elements = [
            torch.empty(() if program.scalars[index] else (size,), dtype=program.dtypes[index], device=device)
            for index in phase.elements
        ]
        row = _row(program, device)
    run, first = Interpreter(phase.graph_module).run, 1 + len(numbers)

    def function(*inputs: Tensor) -> list[Tensor]:
        outputs = list(run(*inputs))
        for target, output in zip(phase.targets, outputs, strict=False):
            inputs[first + target].copy_(output)
        return outputs[len(phase.targets) :]

    return _compile(fakes, function, [row, *numbers, *elements])


def compile_rows(program: Program, device: torch.device) -> Kernel:
    """A kernel for rows of small tensors: takes ``[row, *Rows, *elements]``, elements (num_rows, ROW_WIDTH)."""
    fakes = FakeSizes(NUM_SAMPLE_ELEMENTS // ROW_WIDTH, NUM_SAMPLE_ELEMENTS // ROW_WIDTH // 8)
    num_rows, num_tensors = fakes.sizes
    with fakes.active():
        row = _row(program, device)
        rows = Rows(
            torch.empty(num_rows, dtype=torch.int64, device=device),
            torch.empty(num_rows, dtype=torch.int64, device=device),
            torch.empty(num_tensors, dtype=torch.float64, device=device),
        )
        elements = [
            torch.empty((num_tensors,) if is_scalar else (num_rows, ROW_WIDTH), dtype=dtype, device=device)
            for dtype, is_scalar in zip(program.dtypes, program.scalars, strict=True)
        ]

    def run(row: Tensor, owner: Tensor, num_valid: Tensor, numel: Tensor, *elements: Tensor) -> tuple[()]:
        outputs = Ragged(program, Rows(owner, num_valid, numel))(row, *elements)
        for target, output in zip(program.targets, outputs, strict=True):
            elements[target].copy_(output)
        return ()

    return _compile(fakes, run, [row, *rows, *elements])


def _row(program: Program, device: torch.device) -> Tensor:
    return torch.empty(num_derived(program), dtype=torch.float64, device=device)


def num_derived(program: Program) -> int:
    """How many numbers the prologue hands to the body."""
    output = next(node for node in program.prologue.graph.nodes if node.op == "output").args[0]
    return 1 if output is None else len(output.args[0])


def _compile(fakes: FakeSizes, function: Callable[..., Any], inputs: list[Tensor]) -> Kernel:
    graph_module = fakes.graph(function, inputs, _decompositions())
    return _compat.compile_kernel(graph_module, inputs, fakes.mode, _OPTIONS)


@functools.cache
def _decompositions() -> dict[Any, Any]:
    return _compat.inductor_decompositions()
