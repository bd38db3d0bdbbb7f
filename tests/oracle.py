"""What the passes must compute, computed the slow way: a loop over samples, or a copy of each parameter for each position.

Nothing here imports graphopt. Models are given as they are written (not transformed), best in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Axes = int | None | Mapping[int | str, int | None]


@dataclass(frozen=True)
class Statistic:
    """What one parameter must carry after backward."""

    grad: Tensor
    sum_grad_squared: Tensor


def loop_over_samples(
    model: nn.Module,
    args: tuple[Any, ...],
    loss: Callable[[Any], Tensor],
    *,
    reduction: str = "mean",
    axes: Axes = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Statistic]:
    """Run the model on one sample at a time.

    Args:
        model: gives each sample the same result, whatever else is in the batch.
        args: the batch.
        loss: scalar, of what the model returns for one sample.
        reduction: how the losses of samples make the loss of the batch, ``"mean"`` or ``"sum"``.
        axes: where inputs count samples: one axis for all, or by position or keyword (default 0; ``None`` for inputs without).
        kwargs: the rest of the batch.

    Returns:
        By name, for each trainable parameter that the loss depends on.
    """
    samples = list(split_samples(args, kwargs or {}, axes))
    weight = {"mean": 1 / len(samples), "sum": 1.0}[reduction]
    return from_losses(model, (weight * loss(model(*own, **named)) for own, named in samples))


def from_losses(model: nn.Module, losses: Iterable[Tensor]) -> dict[str, Statistic]:
    """The statistics, given what each sample adds to the loss of the batch; each scalar is differentiated by itself."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    found: dict[str, Statistic] = {}
    for loss in losses:
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                before = found.get(name, Statistic(torch.zeros_like(grad), torch.zeros_like(grad)))
                found[name] = Statistic(before.grad + grad, before.sum_grad_squared + grad.square())
    return found


def split_samples(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: Axes = 0
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """One batch of one for each sample; everything that is not a tensor with samples goes to all of them."""
    inputs: dict[int | str, Any] = {**dict(enumerate(args)), **kwargs}
    axis_of = {key: axes.get(key, 0) if isinstance(axes, Mapping) else axes for key in inputs}

    def counts(value: Any, axis: int | None) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and axis is not None

    sizes = {
        leaf.shape[axis_of[key]]
        for key, value in inputs.items()
        for leaf in pytree.tree_leaves(value)
        if counts(leaf, axis_of[key])
    }
    (num,) = sizes
    for n in range(num):
        one = {
            key: pytree.tree_map(lambda v, a=axis_of[key], n=n: v.narrow(a, n, 1) if counts(v, a) else v, value)
            for key, value in inputs.items()
        }
        yield tuple(one[position] for position in range(len(args))), {name: one[name] for name in kwargs}


def copy_per_position(
    model: nn.Module, args: tuple[Any, ...], loss: Callable[[Any], Tensor]
) -> dict[str, tuple[Statistic, int]]:
    """The other statistic (``per="token"``): every row to which a parameter is applied has a copy of its own.

    Args:
        model: applies its parameters as they are (no views of them) in the functions that `_OwnCopies` knows.
        args: the batch.
        loss: scalar, of what the model returns for the batch.

    Returns:
        By name, the statistic and the number of rows.
    """
    names = {param: name for name, param in model.named_parameters() if param.requires_grad}
    with _OwnCopies() as mode:
        total = loss(model(*args))
    found: dict[str, tuple[Statistic, int]] = {}
    grads = torch.autograd.grad(total, [copy for _, copy in mode.copies])
    for (param, _), grad in zip(mode.copies, grads, strict=True):
        if param not in names:
            continue
        rows = grad.reshape(-1, *param.shape)
        statistic, count = found.get(names[param], (Statistic(torch.zeros_like(param), torch.zeros_like(param)), 0))
        grad, square = statistic.grad + rows.sum(0), statistic.sum_grad_squared + rows.square().sum(0)
        found[names[param]] = Statistic(grad.detach(), square.detach()), count + len(rows)
    return found


class _OwnCopies(TorchFunctionMode):
    """Gives each row to which a parameter is applied a leaf of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[nn.Parameter, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is None or not any(isinstance(a, nn.Parameter) for a in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        return handler(self, *args, **kwargs)

    def own(self, param: Tensor | None, *rows: int) -> Tensor:
        """(*rows, *param.shape), each row a copy."""
        assert isinstance(param, nn.Parameter)
        copy = param.detach().expand(*rows, *param.shape).clone().requires_grad_()
        self.copies.append((param, copy))
        return copy


def _linear(mode: _OwnCopies, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = (mode.own(weight, *input.shape[:-1]) @ input[..., None])[..., 0]
    return output if bias is None else output + mode.own(bias, *input.shape[:-1])


def _addmm(mode: _OwnCopies, bias: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    return (input[:, None] @ mode.own(weight, len(input)))[:, 0] + mode.own(bias, len(input))


def _embedding(
    mode: _OwnCopies, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any
) -> Tensor:
    table = mode.own(weight, *ids.shape)
    rows = table.gather(-2, ids[..., None, None].expand(*ids.shape, 1, weight.shape[1]))[..., 0, :]
    return rows if padding_idx is None else torch.where((ids == padding_idx)[..., None], rows.detach(), rows)


def _layer_norm(
    mode: _OwnCopies,
    input: Tensor,
    shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    rows = input.shape[: input.ndim - len(shape)]
    output = F.layer_norm(input, shape, None, None, eps)
    output = output if weight is None else output * mode.own(weight, *rows)
    return output if bias is None else output + mode.own(bias, *rows)


def _conv2d(
    mode: _OwnCopies, input: Tensor, weight: Tensor, bias: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    plain = F.conv2d(input, weight.detach(), None, stride, padding, dilation, groups)
    patches = F.unfold(input, weight.shape[2:], dilation, padding, stride).transpose(1, 2)  # (N, L, I)
    rows = patches.shape[:2]
    output = (mode.own(weight, *rows).flatten(3) @ patches[..., None])[..., 0] + mode.own(bias, *rows)
    return output.transpose(1, 2).reshape(plain.shape)


def _binary(operation: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(mode: _OwnCopies, left: Any, right: Any) -> Tensor:
        sides = [left, right]
        for position, (side, other) in enumerate(((left, right), (right, left))):
            if isinstance(side, nn.Parameter):
                sides[position] = mode.own(side, *other.shape[: other.ndim - side.ndim])
        return operation(*sides)

    return apply


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.conv2d: _conv2d,
    torch.conv2d: _conv2d,
    **dict.fromkeys([torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__], _binary(torch.add)),
    **dict.fromkeys([torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], _binary(torch.mul)),
}
