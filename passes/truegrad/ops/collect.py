"""``graphopt::collect`` and ``graphopt::deliver``: per-sample gradients of anything, a slice of samples at a time.

A parameter that meets samples in several operators, or that is computed with before it does, needs one gradient for each
sample at the same time: N times its memory, if they are accumulated as autograd does. Here the operators' output gradients
and operands are brought to one place instead, and the per-sample gradients are made there, a few at a time.

`collect` stands in front of all uses and returns **slots**: for each use one of the shape of its result, and one for each of
its operands, without memory. `deliver` stands behind a use; its backward sends the gradient of the result, and the operands
themselves, as the gradients of the slots. When they have all arrived, the backward of `collect` runs a **program** for each
sample, what the uses compute from the parameters and from one sample's operands, and differentiates it: in slices of samples
by ``torch.func.vmap`` where all its operators allow it, else one at a time.

The program is the source text of a function ``forward(self, *params, *operands)`` that returns a list: it is part of the
graph, so compile caches see it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.passes.truegrad.ops.registration import decomposition, differentiable
from graphopt.passes.truegrad.ops.statistics import NORM, SQUARE, in_order, split, square_sum, squared_norms

# What the text of a program may name.
NAMES: dict[str, Any] = {
    "torch": torch,
    "device": torch.device,
    "inf": math.inf,
    "nan": math.nan,
    "NoneType": type(None),
}


@torch.library.custom_op("graphopt::collect", mutates_args=())
def collect(
    params: Sequence[Tensor],
    companions: Sequence[Tensor],
    wanted: str,
    program: str,
    sizes: Sequence[int],
    dtypes: str,
    grouping: Sequence[int],
    num_outputs: int,
    num: int,
    max_bytes: int,
) -> list[Tensor]:
    """Slots for the outputs, then for the operands, of a program.

    Args:
        params: what is differentiated.
        companions: those of the first parameter, then of the second, and so on, each in the order of ``wanted``.
        wanted: names of statistics.
        program: source text.
        sizes: for each slot, its number of axes and its sizes.
        dtypes: of the slots, separated by commas; integers travel as float64.
        grouping: for each slot ``(axis, outer, inner)``; an axis of -1 for operands without samples.
        num_outputs: how many of the slots are outputs.
        num: number of samples.
        max_bytes: how much memory per-sample gradients may take at a time.
    """
    return _make_slots(params, sizes, dtypes)


def _make_slots(params: Sequence[Tensor], sizes: Sequence[int], dtypes: str) -> list[Tensor]:
    slots, position = [], 0
    for name in dtypes.split(","):
        ndim = int(sizes[position])
        shape = list(sizes[position + 1 : position + 1 + ndim])
        position += 1 + ndim
        dtype = getattr(torch, name)
        carrier = dtype if dtype.is_floating_point or dtype.is_complex else torch.float64
        zero = torch.ops.aten.full.default([], 0.0, dtype=carrier, device=params[0].device)
        slots.append(torch.ops.aten.expand.default(zero, shape))
    return slots


def _collect_fake(
    params: Sequence[Tensor], companions: Sequence[Tensor], wanted: str, program: str, sizes: Sequence[int], dtypes: str, *_: Any
) -> list[Tensor]:  # fmt: skip
    return _make_slots(params, sizes, dtypes)


def _collect_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    params, companions, ctx.wanted, ctx.program, _, ctx.dtypes, ctx.grouping, *ctx.numbers = inputs
    ctx.num_companions = len(companions)
    ctx.save_for_backward(*params)


def _collect_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    params = list(ctx.saved_tensors)
    num_outputs, num, max_bytes = ctx.numbers
    found = torch.ops.graphopt.collected_gradients(
        list(grads), params, ctx.wanted, ctx.program, ctx.dtypes, list(ctx.grouping), num_outputs, num, max_bytes
    )
    rest = (None,) * 8
    return found[: len(params)], found[len(params) :], *rest


differentiable(collect, _collect_fake, _collect_setup, _collect_backward)


@torch.library.custom_op("graphopt::deliver", mutates_args=())
def deliver(value: Tensor, slots: Sequence[Tensor], operands: Sequence[Tensor]) -> Tensor:
    """``value``; its gradient goes to the first slot too, and the operands to the others."""
    return value.clone()


def _deliver_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2])


def _deliver_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    operands = ctx.saved_tensors
    carried = [o if o.is_floating_point() or o.is_complex() else o.to(torch.float64) for o in operands]
    return grad, [grad, *(o.detach() for o in carried)], [None] * len(operands)


differentiable(deliver, lambda value, slots, operands: torch.empty_like(value), _deliver_setup, _deliver_backward)


@torch.library.custom_op("graphopt::collected_gradients", mutates_args=())
def collected_gradients(
    slots: Sequence[Tensor],
    params: Sequence[Tensor],
    wanted: str,
    program: str,
    dtypes: str,
    grouping: Sequence[int],
    num_outputs: int,
    num: int,
    max_bytes: int,
) -> list[Tensor]:
    """The gradients of the parameters, then the statistics of each; arguments as in `collect`, with what arrived in the slots."""
    given = [slot.detach().to(getattr(torch, name)) for slot, name in zip(slots, dtypes.split(","), strict=True)]
    layouts = [tuple(grouping[3 * index : 3 * index + 3]) for index in range(len(given))]
    rows = [_by_sample(value, layout, num) for value, layout in zip(given, layouts, strict=True)]
    params = [param.detach() for param in params]
    statistics = split(wanted)
    totals = [torch.zeros_like(param, dtype=_wide(param)) for param in params]
    squares = [torch.zeros_like(total) for total in totals]
    norms = [torch.zeros(num, dtype=total.dtype, device=total.device) for total in totals]
    size = sum(param.numel() * param.element_size() for param in params)
    chunk = max(1, min(num, max_bytes // max(1, size)))
    start = 0
    with _compat.disable_autocast():
        for each in _gradients_in_slices(compiled(program), params, rows, layouts, num_outputs, num, chunk):
            count = each[0].shape[0]
            for index, gradient in enumerate(each):
                totals[index] += gradient.sum(0)
                squares[index] += square_sum(gradient)
                if NORM in statistics:
                    norms[index][start : start + count] = squared_norms(gradient)
            start += count
    found = [total.to(param.dtype) for total, param in zip(totals, params, strict=True)]
    for square, norm in zip(squares, norms, strict=True):
        found += in_order(wanted, {SQUARE: square, NORM: norm})
    return found


@collected_gradients.register_fake
def _(
    slots: Sequence[Tensor], params: Sequence[Tensor], wanted: str, program: str, dtypes: str, grouping: Sequence[int],
    num_outputs: int, num: int, max_bytes: int,
) -> list[Tensor]:  # fmt: skip
    found = [torch.empty_like(param) for param in params]
    for param in params:
        shapes = {SQUARE: param.shape, NORM: (num,)}
        found += [param.new_empty(shapes[name], dtype=_wide(param)) for name in split(wanted)]
    return found


def _gradients_in_slices(
    program: Callable[..., list[Tensor]],
    params: list[Tensor],
    rows: list[Tensor],
    layouts: list[tuple[int, ...]],
    num_outputs: int,
    num: int,
    chunk: int,
) -> Any:
    """Yield (C, *shape) for each parameter, a slice of samples at a time."""
    dims = tuple(0 if layout[0] >= 0 else None for layout in layouts)

    def pairing(own: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
        """The scalar whose gradient is one sample's."""
        each = [_batch_of_one(value, layout) for value, layout in zip(values, layouts, strict=True)]
        outputs = program(None, *own, *each[num_outputs:])
        if any(y.shape != g.shape for y, g in zip(outputs, each[:num_outputs], strict=True)):
            shapes = [(tuple(y.shape), tuple(g.shape)) for y, g in zip(outputs, each[:num_outputs], strict=True)]
            raise ValueError(
                f"graphopt::collect: shapes of one sample's outputs and of their gradients differ: {shapes}"
            )
        return torch.stack([(y * g).sum() for y, g in zip(outputs, each[:num_outputs], strict=True)]).sum()

    together = True
    for start in range(0, num, chunk):
        part = tuple(v if dim is None else v[start : start + chunk] for v, dim in zip(rows, dims, strict=True))
        if together:
            try:
                batched = torch.func.vmap(torch.func.grad(pairing), in_dims=(None, dims))
                with _compat.quiet_vmap():
                    each = batched(tuple(params), part)
            except RuntimeError:  # an operator that vmap cannot batch; whatever is wrong otherwise shows below
                if start > 0:
                    raise
                together = False
        if not together:
            each = _one_by_one(pairing, params, part, dims)
        yield each


def _one_by_one(
    pairing: Callable[..., Tensor], params: list[Tensor], part: tuple[Tensor, ...], dims: tuple[int | None, ...]
) -> list[Tensor]:
    count = next(len(value) for value, dim in zip(part, dims, strict=True) if dim == 0)
    one = torch.func.grad(pairing)  # not torch.autograd, which does not record inside an operator
    found = [
        one(tuple(params), tuple(v if dim is None else v[n] for v, dim in zip(part, dims, strict=True)))
        for n in range(count)
    ]
    return [torch.stack(column) for column in zip(*found, strict=True)]


def _by_sample(value: Tensor, layout: tuple[int, ...], num: int) -> Tensor:
    """(..., outer * N * inner, ...) -> (N, ..., outer, inner, ...)."""
    axis, outer, inner = layout
    if axis < 0:
        return value
    unfolded: Tensor = value.unflatten(axis, (outer, num, inner))
    return unfolded.movedim(axis + 1, 0)


def _batch_of_one(value: Tensor, layout: tuple[int, ...]) -> Tensor:
    """(..., outer, inner, ...) -> (..., outer * inner, ...)."""
    return value if layout[0] < 0 else value.flatten(layout[0], layout[0] + 1)


def _wide(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


@functools.lru_cache(maxsize=1024)
def compiled(program: str) -> Callable[..., list[Tensor]]:
    """The function whose source text is ``program``."""
    scope = dict(NAMES)
    exec(program, scope)
    return cast(Callable[..., list[Tensor]], scope["forward"])


@decomposition(collect)
def _plain_collect(
    params: Sequence[Tensor], companions: Sequence[Tensor], wanted: str, program: str, sizes: Sequence[int], dtypes: str, *_: Any
) -> list[Tensor]:  # fmt: skip
    return _make_slots(params, sizes, dtypes)


@decomposition(deliver)
def _plain_deliver(value: Tensor, slots: Sequence[Tensor], operands: Sequence[Tensor]) -> Tensor:
    return value
