"""`Mirror`: what turns a class of ``torch.nn`` into one whose parameters carry the statistic."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.nn.traced_call import run
from graphopt.nn.truegrad_parameter import enlist

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object  # a mixin: it stands in front of a class of torch.nn, whose bases it must not repeat


@dataclass(frozen=True)
class Arrangement:
    """The arguments of one call, and where they hold samples.

    Attributes:
        arguments: by name; a call without a batch has been given a batch of one.
        axes: by name, the axis that counts samples, ``None`` for an argument without samples.
        unbatch: takes the batch of one away from the result again.
    """

    arguments: dict[str, Any]
    axes: dict[str, int | None]
    unbatch: Callable[[Any], Any] | None = None


class Mirror(_Base):
    """Mixin: ``forward`` computes what the class behind it computes, and its backward the statistic as well.

    Attributes:
        sample_axis: which axis of the inputs counts samples; may be set on an instance. Modules with ``batch_first`` ignore it.
        num_axes: how many axes an input has that holds a batch; one less is a single sample, as in ``torch.nn``.
    """

    sample_axis: int = 0
    num_axes: ClassVar[int] = 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As in ``torch.nn``."""
        plain = super().forward
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        arguments = by_name(plain, args, kwargs)
        if arguments is None or not is_real(arguments):
            return plain(*args, **kwargs)
        arranged = self._arrange(arguments)
        result = run(self, self._enter, arranged.arguments, arranged.axes)
        return result if arranged.unbatch is None else arranged.unbatch(result)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in ``torch.nn``."""
        super().register_parameter(name, param)
        self.enlist()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.enlist()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.enlist()
        return result

    def _enter(self, arguments: dict[str, Any]) -> Any:
        """The forward of ``torch.nn``, on arranged arguments; this is what gets traced."""
        return super().forward(**arguments)

    def _arrange(self, arguments: dict[str, Any]) -> Arrangement:
        """Every tensor has samples on ``sample_axis``."""
        axis = self.sample_axis
        axes: dict[str, int | None] = dict.fromkeys(arguments, axis)
        first = _first(arguments)
        if first.ndim >= self._num_axes(first):
            return Arrangement(arguments, axes)
        return one_sample(arguments, axes, lambda result: remove_axis(result, axis))

    def _num_axes(self, input: Tensor) -> int:
        return self.num_axes

    def enlist(self) -> None:
        """Let the parameters count as `TrueGradParameter`; for code that has changed the class, or the parameters."""
        for param in self._parameters.values():
            if param is not None:
                enlist(param, self, is_mirror)


def is_mirror(module: nn.Module) -> bool:
    """Whether the module is one of graphopt's; `graphopt.restore` has nothing to undo in it."""
    return isinstance(module, Mirror)


def one_sample(arguments: dict[str, Any], axes: dict[str, int | None], unbatch: Callable[[Any], Any]) -> Arrangement:
    """Give a call without a batch a batch of one."""
    batched = dict(arguments)
    for name, axis in axes.items():
        if axis is not None and name in batched:
            batched[name] = pytree.tree_map_only(Tensor, functools.partial(torch.unsqueeze, dim=axis), batched[name])
    return Arrangement(batched, axes, unbatch)


def remove_axis(result: Any, axis: int) -> Any:
    """Take a batch of one away again."""
    return pytree.tree_map_only(Tensor, lambda value: value.squeeze(axis), result)


def by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments by name; ``None`` if they do not fit, which is ``forward``'s to report."""
    names = _parameters(getattr(forward, "__func__", forward))
    if len(args) > len(names) or any(name in names[: len(args)] or name not in names for name in kwargs):
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


def is_real(arguments: dict[str, Any]) -> bool:
    """Whether there is a tensor, and none that stands for others."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)] if len(arguments) > 1 else []
    tensors = tensors or [value for value in arguments.values() if isinstance(value, Tensor)]
    return bool(tensors) and not any(map(_compat.is_transformed, tensors))


@functools.cache
def _parameters(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def _first(arguments: dict[str, Any]) -> Tensor:
    return next(value for value in arguments.values() if isinstance(value, Tensor))
