"""Modules that let those behind them start anew."""

from __future__ import annotations

from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var


class GradToNone(Module):
    """Forget the gradient: the next module that asks for it evaluates the closure, at the present parameters.

    The update stays as it is, if there is one. Without a closure the gradient is that of ``p.grad``, and nothing happens.
    """

    treats_each_alone = True

    def step(self, var: Var) -> Var:
        """Forget it."""
        if var.closure is not None:
            var.forget_grads()
        return var


class UpdateToNone(Module):
    """Forget the update: the next module starts from the gradient."""

    treats_each_alone = True

    def step(self, var: Var) -> Var:
        """Forget it."""
        var.update = None
        return var
