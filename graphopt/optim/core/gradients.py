"""What is looked at in gradients before a step changes anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.errors import UnsupportedError
from graphopt.optim.core.module import Module

# Gradients of together at most so many elements are looked at unasked: that takes less time than the step's own calls.
CHECK_UP_TO = 2**19


def check_layouts(params: Sequence[Tensor], grads: Sequence[Tensor], name: Callable[[Tensor], str]) -> None:
    """Raise `UnsupportedError` for a sparse gradient."""
    for param, grad in zip(params, grads, strict=True):
        if grad.layout is not torch.strided:
            raise UnsupportedError(
                f"{name(param)}: its gradient is sparse ({grad.layout}), which no module reads. Build the embedding "
                "with sparse=False, or give this parameter to torch.optim.SparseAdam"
            )


def check_sharding(modules: Sequence[Module], params: Sequence[Tensor], name: Callable[[Tensor], str]) -> None:
    """Raise `UnsupportedError` for a parameter that is spread over processes, where a module needs all of it."""
    sharded = next(filter(_compat.is_distributed, params), None)
    needy = next((module for module in _that_see_all(modules) if not module.takes_sharded), None)
    if sharded is not None and needy is not None:
        raise UnsupportedError(
            f"{needy.place}: {name(sharded)} is a DTensor, spread over processes, but the module works on whole tensors. "
            "Nothing was changed. Use DistributedDataParallel instead of sharding, give such parameters to another chain with "
            "m.Split, or take a module that runs on parts, such as m.Muon or m.Adam"
        )


def _that_see_all(modules: Sequence[Module]) -> Iterator[Module]:
    """A chain and its children, without those that are given some of the parameters; these are asked when they are."""
    for module in modules:
        yield module
        if not module.selects_params:
            yield from _that_see_all(list(module.descendants()))


def is_cheap_to_check(grads: Sequence[Tensor]) -> bool:
    """Whether looking for NaN costs nothing to speak of."""
    return all(grad.device.type == "cpu" for grad in grads) and sum(map(Tensor.numel, grads)) <= CHECK_UP_TO


def find_nonfinite(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor] | None:
    """The parameters whose gradients hold NaN or infinities.

    Returns:
        ``None`` if there are none in any process; else those in this one.
    """
    if _sum_is_finite(grads):
        return None
    bad = [
        param
        for param, grad in zip(params, grads, strict=True)
        if not bool(torch.isfinite(_compat.local_part(grad)).all())  # (a sum of finite numbers may be infinite)
    ]
    # Another process may have found some; an error in one alone would let the others wait for it.
    found = _compat.sum_over_processes(torch.tensor(len(bad), device=grads[0].device), _spread(grads))
    return bad if found > 0 else None


def _sum_is_finite(grads: Sequence[Tensor]) -> bool:
    """Whether the sum of all elements is finite, in all processes; one pass and few calls where gradients are small."""
    kinds = {(type(grad), grad.dtype, grad.device) for grad in grads}
    if len(kinds) == 1 and type(grads[0]) is Tensor and sum(map(Tensor.numel, grads)) <= CHECK_UP_TO:
        flat: Tensor = torch._C._nn.flatten_dense_tensors(list(grads))
        return bool(torch.isfinite(flat.sum()))
    sums: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        sums.setdefault(grad.device, []).append(_compat.local_part(grad).sum().to(torch.float32))
    spread = _spread(grads)
    return all([bool(_compat.sum_over_processes(torch.stack(some).sum(), spread).isfinite()) for some in sums.values()])


def _spread(grads: Sequence[Tensor]) -> Tensor:
    """One of the gradients, a DTensor if there is one."""
    return next((grad for grad in grads if _compat.local_part(grad) is not grad), grads[0])
