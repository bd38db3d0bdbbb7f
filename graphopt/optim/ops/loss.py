"""Modules that look at the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import larger, state_dtype
from graphopt.optim.core.bounds import ANY, NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.closures import number, restored
from graphopt.optim.core.context import Number
from graphopt.optim.core.flat.segment import apply_updates
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var


class FillLoss(Module):
    """The loss times ``alpha`` in every place, whatever came before.

    Args:
        alpha: multiplies the loss.
        backward: whether the evaluation also computes the gradients, if there are none yet and a module behind it asks for them.

    Cost: an evaluation of the loss, if there is none yet.
    """

    bounds = numbers(alpha=ANY)
    needs_closure = True

    def __init__(self, alpha: Number = 1.0, backward: bool = True) -> None:
        super().__init__({"alpha": alpha})
        self.backward = backward

    def step(self, var: Var) -> Var:
        """Fill."""
        loss = _loss_of(var, self.backward)
        var.update = [
            torch.zeros_like(param, dtype=state_dtype(param)) + _to(loss * self.get_settings(param).alpha, param)
            for param in var.params
        ]
        return var


class _ByLoss(Module):
    """Scales by ``max(alpha loss, min_value)``."""

    needs_closure = True

    def __init__(self, alpha: Number, min_value: Number, backward: bool) -> None:
        super().__init__({"alpha": alpha, "min_value": min_value})
        self.backward = backward

    def scale(self, var: Var, combine: Callable[[Tensor, Tensor], Tensor]) -> Var:
        """Combine the update of each tensor and the number."""
        updates = var.get_update()
        loss = _loss_of(var, self.backward)
        news = []
        for update, param in zip(updates, var.params, strict=True):
            settings = self.get_settings(param)
            factor = larger(loss * settings.alpha, settings.min_value)
            news.append(combine(update, _to(factor, update)))
        var.update = news
        return var


class MulByLoss(_ByLoss):
    """Multiply the update by the loss: ``u max(alpha loss, min_value)``.

    Args:
        alpha: multiplies the loss.
        min_value: the least factor.
        backward: whether the evaluation also computes the gradients, if neither they nor the loss are known.

    Raises:
        OptionError: a number is out of range.

    Cost: an evaluation of the loss, if there is none yet.
    """

    bounds = numbers(alpha=ANY, min_value=NON_NEGATIVE)

    def __init__(self, alpha: Number = 1.0, min_value: Number = 1e-8, backward: bool = True) -> None:
        super().__init__(alpha, min_value, backward)

    def step(self, var: Var) -> Var:
        """Multiply."""
        return self.scale(var, torch.mul)


class DivByLoss(_ByLoss):
    """Divide the update by the loss: ``u / max(alpha loss, min_value)``.

    Args:
        alpha: multiplies the loss.
        min_value: the least denominator.
        backward: whether the evaluation also computes the gradients, if neither they nor the loss are known.

    Raises:
        OptionError: a number is out of range.

    Cost: an evaluation of the loss, if there is none yet.
    """

    bounds = numbers(alpha=ANY, min_value=POSITIVE)

    def __init__(self, alpha: Number = 1.0, min_value: Number = 1e-8, backward: bool = True) -> None:
        super().__init__(alpha, min_value, backward)

    def step(self, var: Var) -> Var:
        """Divide."""
        return self.scale(var, torch.div)


class NegateOnLossIncrease(Module):
    """Look at the loss behind the step, and turn the update around if it is higher there (or NaN) than in front.

    The update stays if ``f(θ - u) <= f(θ)``; otherwise it becomes ``-u``, or with ``backtrack=False`` zero, so that no step
    raises the loss. It is the last module of a chain: what follows would change the step that was looked at.

    Args:
        backtrack: go the other way; ``False``: stay.

    Cost: one evaluation of the loss.
    """

    needs_closure = True

    def __init__(self, backtrack: bool = True) -> None:
        super().__init__({"backtrack": backtrack})

    def step(self, var: Var) -> Var:
        """Look."""
        updates = var.get_update()
        before = number(var.get_loss(backward=False))
        with restored(var.params):
            with torch.no_grad():
                apply_updates(var.params, updates)  # as the step itself will, so that its loss is this one
            after = number(var.evaluate(backward=False))
        if not after <= before:
            backtracks = [self.get_settings(param).backtrack for param in var.params]
            var.update = [-u if back else torch.zeros_like(u) for u, back in zip(updates, backtracks, strict=True)]
        return var


def _loss_of(var: Var, backward: bool) -> Tensor:
    loss = var.get_loss(backward)
    return loss.detach().reshape(()) if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)


def _to(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device, state_dtype(like))
