"""The base class of line searches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from graphopt.errors import ModuleError, NonFiniteError, OptionError
from graphopt.optim.core.closures import number, restored
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import inner_product, move, scaled


class _NoneLeft(Exception):
    """The evaluations are used up."""


class LineSearch(Module):
    """Multiply the update by a step size that the loss along it decides.

    A subclass overrides `search`, which evaluates the loss by `evaluate` and `evaluate_with_slope`. They move the parameters,
    which are put back, bit for bit, before the next module runs; so an `LR` behind the search scales the step that was found.

    Args:
        defaults: hyper-parameters and their values.
        maxiter: how often the loss may be evaluated in one search. When these are used up, the step size with the lowest loss
            is taken; 0 if none lowers it. ``None``: no limit.
        **children: modules, or lists of them, that this one runs.

    Attributes:
        uses_gradient: whether the gradient at the step size 0 is needed, so that it is evaluated with the loss.

    Raises:
        OptionError: ``maxiter`` is not positive.

    Example:
        >>> from graphopt.optim import LineSearch, Modular
        >>> class OfTwo(LineSearch):
        ...     def search(self, update, var):
        ...         return min((0.5, 2.0), key=lambda step_size: self.evaluate(step_size, var))
        >>> weight = torch.tensor([3.0], requires_grad=True)
        >>> def closure(backward=True):
        ...     loss = (weight**2).sum()
        ...     if backward:
        ...         weight.grad = None
        ...         loss.backward()
        ...     return loss
        >>> _ = Modular([weight], OfTwo()).step(closure)
        >>> weight.data
        tensor([0.])
    """

    needs_closure = True
    uses_gradient: ClassVar[bool] = False

    def __init__(
        self, defaults: Mapping[str, Any] | None = None, *, maxiter: int | None = None, **children: Any
    ) -> None:
        super().__init__(defaults, **children)
        if maxiter is not None and (not isinstance(maxiter, int) or maxiter < 1):
            raise OptionError(f"{type(self).__name__}: maxiter={maxiter!r}; expected an integer of at least 1, or None")
        self.maxiter = maxiter
        self._starts: list[Tensor] | None = None
        self._tried: dict[float, float] = {}
        self._num_evaluations = 0

    def search(self, update: Sequence[Tensor], var: Var) -> float:
        """Find the step size.

        Args:
            update: the direction; a positive step size is subtracted along it.
            var: the parameters; ``var.get_loss()`` is the loss at the step size 0, ``var.grads`` the gradient there.

        Returns:
            A finite number, also 0 (stay) or a negative one (go backwards).
        """
        raise NotImplementedError(f"{type(self).__name__} has no search(self, update, var)")

    def evaluate(self, step_size: float, var: Var, backward: bool = False) -> float:
        """The loss at a step size.

        Args:
            step_size: how many updates are subtracted from the parameters.
            var: as passed to `search`.
            backward: whether the gradients there are computed as well; ``var.read_grads()`` returns them.
        """
        if self._starts is None:
            raise ModuleError(f"{self.place}: evaluate() was called outside of search()")
        if self.maxiter is not None and self._num_evaluations >= self.maxiter:
            raise _NoneLeft
        self._num_evaluations += 1
        step_size = float(step_size)
        with torch.no_grad():
            # Rounded as the step that is made afterwards, so that its loss is the one that was seen here.
            move(var.params, self._starts, var.get_update(), step_size)
        loss = number(var.evaluate(backward))
        self._tried[step_size] = loss
        return loss

    def evaluate_with_slope(self, step_size: float, var: Var) -> tuple[float, float]:
        """The loss at a step size, and its derivative with respect to the step size; evaluates gradients.

        Args:
            step_size: how many updates are subtracted from the parameters.
            var: as passed to `search`.
        """
        loss = self.evaluate(step_size, var, backward=True)
        return loss, -inner_product(var.see_grads(), var.get_update())

    def slope(self, var: Var) -> float:
        """The derivative of the loss with respect to the step size at 0; negative if the update descends."""
        return -inner_product(var.get_grad(), var.get_update())

    def best_step_size(self) -> float:
        """Of those that were tried in this search, and 0, the one with the lowest loss."""
        return min(self._tried, key=lambda size: _or_infinity(self._tried[size]))

    def step(self, var: Var) -> Var:
        """Search, and scale the update."""
        update, loss = var.get_update(), number(var.get_loss(backward=self.uses_gradient))
        self._num_evaluations, self._tried = 0, {0.0: loss}
        with restored(var.params) as self._starts:
            try:
                step_size = float(self.search(update, var))
            except _NoneLeft:
                step_size = self.best_step_size()
            finally:
                self._starts = None
        if not math.isfinite(step_size):
            raise NonFiniteError(f"{self.place}: search() returned {step_size}; expected a finite step size")
        var.update = scaled(update, step_size)
        return var


def _or_infinity(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
