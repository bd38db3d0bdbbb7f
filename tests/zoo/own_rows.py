"""The definition where samples meet inside a model: every sample has its own copy of every parameter.

A loop over samples is no oracle for batch normalisation, because a sample alone has other statistics. The definition is by
rows: g_n is the part of ``p.grad`` that comes from the rows in which sample n met p. `OwnRows` runs the model once on the whole
batch. Each function that is called with a parameter is called for one sample at a time instead, with that sample's copy, and the
results are joined; a normalisation over the batch first normalises without its parameters. Autograd then gives each copy
its gradient, which flows through the joint statistics to all that lies before them.

Nothing here imports graphopt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.oracle import Statistic


def own_rows(model: nn.Module, batch: dict[str, Any], loss: Callable[[Any], Tensor], num: int) -> dict[str, Statistic]:
    """The statistics of a model with samples on the first axis of everything that meets a parameter.

    Args:
        model: applies its parameters as they are, in functions of torch.
        batch: keyword arguments of ``forward``.
        loss: scalar, of what the model returns for the batch.
        num: number of samples; no other first axis may have this size.
    """
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    copies = {param: [param.detach().clone().requires_grad_() for _ in range(num)] for param in params.values()}
    with _OwnCopies(copies, num):
        total = loss(model(**batch))
    found = {}
    for name, param in params.items():
        grads = torch.autograd.grad(total, copies[param], allow_unused=True, retain_graph=True)
        if any(grad is not None for grad in grads):
            rows = torch.stack([torch.zeros_like(param) if grad is None else grad for grad in grads])
            found[name] = Statistic(rows.sum(0), rows.square().sum(0))
    return found


class _OwnCopies(TorchFunctionMode):
    """Calls functions of parameters once for each sample."""

    def __init__(self, copies: dict[nn.Parameter, list[Tensor]], num: int) -> None:
        super().__init__()
        self._copies, self._num = copies, num

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = [*args, *kwargs.values()]
        if not any(isinstance(value, nn.Parameter) for value in values) or not any(map(self._has_samples, values)):
            return func(*args, **kwargs)
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        each = [
            func(*(self._of(n, a) for a in args), **{key: self._of(n, a) for key, a in kwargs.items()})
            for n in range(self._num)
        ]
        return torch.cat(each)

    def _has_samples(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and not isinstance(value, nn.Parameter)
            and value.ndim > 0
            and len(value) == self._num
        )

    def _of(self, n: int, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return self._copies[value][n] if value in self._copies else value
        return value[n : n + 1] if self._has_samples(value) else value

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter,
        *options: Any,
        **named: Any,
    ) -> Tensor:
        output = F.batch_norm(input, running_mean, running_var, None, None, *options, **named)
        weights, biases = (
            torch.stack(self._copies[p]).reshape(self._num, -1, *[1] * (input.ndim - 2)) for p in (weight, bias)
        )
        return output * weights + biases
