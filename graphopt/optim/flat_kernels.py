"""Compiled element-wise kernels over flat tensors: one compile per kind of tensor, whatever their number and sizes.

A graph over all tensors of a model takes longer to compile the more tensors there are. A kernel over one flat tensor
of dynamic size takes as long as one tensor takes, and is called for each. What changes between calls (sizes, learning
rates, step counts) is an input of the kernel, so nothing is compiled twice.
"""

from collections.abc import Callable, Collection, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

# Inductor reduces few elements in another way, and guards on their number (torch 2.13: `2 <= size <= 4096`); Dynamo
# specialises sizes 0 and 1. So kernels get more elements than this. For fewer they would not beat eager calls anyway.
MAX_SMALL = 4096

# Elements of the tensors that a kernel is compiled with: far enough above MAX_SMALL for Inductor to emit parallel
# loops.
NUM_SAMPLE_ELEMENTS = 2**20

# Otherwise a state that is updated and then reduced is computed twice, from inputs that are read twice.
_INDUCTOR_OPTIONS: dict[str, Any] = {"realize_reads_threshold": 2}


def compile_flat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function over flat tensors of one dynamic length.

    Args:
        function: plain tensor code without defaults, closures or graph breaks; it may write to its arguments. Numbers
            that change are passed as entries of a tensor, flags as Python values.

    Returns:
        The compiled function, with a compile cache of its own.
    """
    # Dynamo counts recompiles per code object: without a copy, all kernels of one function share one recompile_limit.
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    known = torch._inductor.list_options()
    options = {name: value for name, value in _INDUCTOR_OPTIONS.items() if name in known}
    compiled: Callable[..., Any] = torch.compile(copy, dynamic=True, fullgraph=True, options=options)
    return compiled


def flatten(tensors: Sequence[Tensor | None], read_only: Collection[int]) -> list[Tensor | None] | None:
    """One-dimensional views of tensors of one shape, all with the same order of elements.

    Args:
        tensors: the tensors; ``None`` stays ``None``. The strides of the first decide the order of elements.
        read_only: indices of tensors that nobody will write to; they get copies where their strides differ.

    Returns:
        The views, or ``None`` where there are none: gaps or overlaps in memory, strides that differ, tensor subclasses
        (what is true of a DTensor's local part need not be true of the whole).
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not all([type(tensor) in (Tensor, torch.nn.Parameter) for tensor in given]):
        return None
    if all([tensor.is_contiguous() for tensor in given]):
        return [None if tensor is None else tensor.view(-1) for tensor in tensors]
    order = sorted(range(given[0].dim()), key=given[0].stride, reverse=True)
    views: list[Tensor | None] = []
    for index, tensor in enumerate(tensors):
        view = None if tensor is None else tensor.permute(order)
        if view is not None and not view.is_contiguous() and index not in read_only:
            return None
        views.append(None if view is None else view.reshape(-1))
    return views
