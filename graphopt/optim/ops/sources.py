"""Modules whose update is something that is there already: the gradient, the parameter, a constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.bounds import ANY, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class Identity(Rule):
    """The update as it is."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update, state


NoOp = Identity


class Update(Identity):
    """The update as it is; says in a list of operands that it is meant."""


class Clone(Rule):
    """A copy of the update."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update.clone(), state


class Grad(Rule):
    """The gradient, whatever the modules before made of it."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return context.grad.to(update.dtype, copy=True), state  # those that follow may write to it


class Params(Rule):
    """The parameter."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return context.param.to(update.dtype, copy=True), state


class Zeros(Rule):
    """Zeros."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return torch.zeros_like(update), state


class Ones(Rule):
    """Ones."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return torch.ones_like(update), state


class Fill(Rule):
    """One number in every place.

    Args:
        value: the number, or a function of the number of steps made before.
    """

    bounds = numbers(value=ANY)

    def __init__(self, value: Number) -> None:
        super().__init__({"value": value})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return torch.zeros_like(update) + settings.value, state


class GradSign(Rule):
    """The magnitude of the update with the sign of the gradient, ``|u| sign(g)``.

    Behind `Adam` it is Grams: Cao, Li, Song, "Gradient Descent with Adaptive Momentum Scaling", arXiv:2412.17107, 2024.
    """

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update.abs() * context.grad.sign(), state


class UpdateSign(Rule):
    """The magnitude of the gradient with the sign of the update, ``|g| sign(u)``."""

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return context.grad.abs() * update.sign(), state
