"""Any function of the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ModuleError, OptionError
from graphopt.optim.core.context import Context, Settings
from graphopt.optim.core.module import Module, Rule
from graphopt.optim.core.var import Var


class UnaryLambda(Module):
    """Apply a function to the list of all updates: ``u = fn(u)``.

    It may write to them. It is not saved with the state: give the same to the optimizer that loads.

    Args:
        fn: takes a list of tensors and returns as many, of the same shapes.

    Raises:
        OptionError: ``fn`` cannot be called.
        ModuleError: in a step, if it returned something else.
    """

    def __init__(self, fn: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
        super().__init__()
        _check_callable("UnaryLambda", fn)
        self.fn = fn

    def step(self, var: Var) -> Var:
        """Apply it."""
        updates = var.get_update()
        shapes = [update.shape for update in updates]
        news = self.fn(updates)
        if not isinstance(news, (list, tuple)) or len(news) != len(shapes):
            got = f"{len(news)} tensors" if isinstance(news, (list, tuple)) else type(news).__name__
            raise ModuleError(f"{self.place}: fn returned {got}; expected a list of {len(shapes)}, one for each update")
        for new, shape in zip(news, shapes, strict=True):
            _check_shape(self.place, "fn", new, shape)
        var.update = list(news)
        return var

    def __repr__(self) -> str:
        return f"UnaryLambda({_name(self.fn)})"


class UnaryParameterwiseLambda(Rule):
    """Apply a function to the update of each parameter: ``u = fn(u)``.

    It is not saved with the state: give the same to the optimizer that loads.

    Args:
        fn: takes a tensor and returns one of the same shape; it must not write to it.

    Raises:
        OptionError: ``fn`` cannot be called.
        ModuleError: in a step, if it returned something else.
    """

    elementwise = False  # it sees shapes

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        _check_callable("UnaryParameterwiseLambda", fn)
        self.fn = fn

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return _check_shape(self.place, "fn", self.fn(update), update.shape), state

    def __repr__(self) -> str:
        return f"UnaryParameterwiseLambda({_name(self.fn)})"


class CustomUnaryOperation(Rule):
    """Apply a method of `torch.Tensor` that takes no arguments to the update of each parameter: ``u = u.<name>()``.

    Args:
        name: such as ``"tanh"``; it keeps the shape.

    Raises:
        OptionError: there is no such method, or it writes to the tensor.
        ModuleError: in a step, if it returned something else than a tensor of the same shape.
    """

    elementwise = False  # as ``cumsum`` and the like, it may see shapes

    def __init__(self, name: str) -> None:
        super().__init__()
        if not isinstance(name, str) or not callable(getattr(torch.Tensor, name, None)):
            raise OptionError(
                f"CustomUnaryOperation: name={name!r}; expected that of a method of torch.Tensor, such as 'tanh'"
            )
        if name.endswith("_"):
            raise OptionError(f"CustomUnaryOperation: {name!r} writes to the tensor; write {name.rstrip('_')!r}")
        self.name = name

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return _check_shape(self.place, f"{self.name}()", getattr(update, self.name)(), update.shape), state

    def __repr__(self) -> str:
        return f"CustomUnaryOperation({self.name!r})"


def _check_callable(place: str, fn: object) -> None:
    if not callable(fn):
        raise OptionError(f"{place}: fn={fn!r}; expected a function, such as torch.tanh")


def _check_shape(place: str, what: str, new: Any, shape: torch.Size) -> Tensor:
    if isinstance(new, Tensor) and new.shape == shape:
        return new
    got = f"a tensor of shape {tuple(new.shape)}" if isinstance(new, Tensor) else repr(new)
    raise ModuleError(f"{place}: {what} returned {got} for an update of shape {tuple(shape)}; expected the same shape")


def _name(fn: object) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
