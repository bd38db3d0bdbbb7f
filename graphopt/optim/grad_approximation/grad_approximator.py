"""The base class of modules that approximate gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphopt.errors import ModuleError, NonFiniteError, OptionError
from graphopt.optim.core.closures import number, restored
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var

Target = Literal["closure", "grad", "update"]
Loss = Tensor | float | None
_TARGETS = ("closure", "grad", "update")


class GradApproximator(Module):
    """Estimate gradients from values of the loss; the closure is called with ``backward=False`` only.

    A subclass overrides `approximate`. It may move the parameters: they are put back, bit for bit, when it returns.

    Args:
        defaults: hyper-parameters and their values.
        target: what the estimate replaces. ``"closure"``: the closure, so that all modules that follow, line searches and
            Newton methods among them, see a function whose gradient is the estimate. ``"grad"``: the gradient at the
            present parameters. ``"update"``: the update only.
        **children: modules, or lists of them, that this one runs.

    Attributes:
        moves_params: whether `approximate` may leave the parameters changed, so that they are copied before and put back.

    Raises:
        OptionError: ``target`` is none of these.

    Example:
        >>> import torch
        >>> from graphopt.optim import GradApproximator, Modular, m
        >>> class OfSphere(GradApproximator):
        ...     def approximate(self, closure, params, loss, var):
        ...         return [2 * p for p in params], None, closure(False)
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> _ = Modular([weight], OfSphere(), m.LR(0.25)).step(lambda backward=True: (weight**2).sum())
        >>> weight.data
        tensor([0.5000, 1.0000])
    """

    needs_closure = True
    replaces_update = True
    moves_params: ClassVar[bool] = True

    def __init__(
        self, defaults: Mapping[str, Any] | None = None, *, target: Target = "closure", **children: Any
    ) -> None:
        if target not in _TARGETS:
            raise OptionError(f"{type(self).__name__}: target={target!r}; expected one of {', '.join(_TARGETS)}")
        super().__init__(defaults, **children)
        self.target = target

    def approximate(
        self, closure: Callable[[bool], Any], params: Sequence[Tensor], loss: Loss, var: Var
    ) -> tuple[list[Tensor], Loss, Loss]:
        """Estimate the gradient.

        Args:
            closure: the loss at the present values of the parameters; to be called with ``False``.
            params: the parameters. They may be written to.
            loss: the loss at the parameters, if it is known.
            var: what else is known.

        Returns:
            One gradient for each parameter; the loss, or ``None`` if it was not evaluated; and an estimate of it, or ``None``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no approximate(self, closure, params, loss, var)")

    def pre_step(self, var: Var) -> None:
        """Called once in each step, before the first `approximate`; for what stays fixed while other modules evaluate."""

    def step(self, var: Var) -> Var:
        """Replace the target."""
        self.pre_step(var)
        original = var.clone(clone_update=False)

        def evaluate(backward: bool = False) -> Any:
            if backward:
                raise ModuleError(
                    f"{self.place} approximates gradients and called closure(True); call closure(False) in approximate()"
                )
            return original.evaluate(backward=False)

        def estimate(loss: Loss) -> tuple[list[Tensor], Loss, Loss]:
            with torch.no_grad(), restored(var.params) if self.moves_params else nullcontext():
                return self.approximate(evaluate, var.params, loss, var)

        if self.target == "closure":

            def approximating(backward: bool = True) -> Any:
                if not backward:
                    return original.evaluate(backward=False)
                grads, loss, loss_approx = estimate(None)
                for param, grad in zip(var.params, grads, strict=True):
                    param.grad = grad.detach().to(param.dtype)
                return loss_approx if loss is None else loss

            var.replace_closure(approximating)
            return var
        grads, loss, loss_approx = estimate(var.loss)
        start = loss_approx if loss is None else loss
        if start is not None and not math.isfinite(number(start)):
            raise NonFiniteError(f"{self.place}: the loss is {number(start)} before the step; nothing was changed")
        var.loss = loss if var.loss is None else var.loss
        var.loss_approx = loss_approx
        if self.target == "grad":
            var.grads, var.update = grads, None
        else:
            var.update = [grad.clone() for grad in grads]
        return var
