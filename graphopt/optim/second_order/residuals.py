"""Sums of squares: closures that return residuals, and their derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ClosureError, ModuleError, NonFiniteError
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Closure, Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.second_order.derivatives import jacobian

_RIGHT_CLOSURE = """\
def closure(backward=True):
    return model(inputs) - targets  # not squared, not summed"""


def linearize(module: Module, var: Var, vectorize: bool) -> tuple[Tensor, Tensor]:
    """The residuals that the closure returns, and their derivatives, at the present parameters.

    From then on the closure of ``var`` is that of ``½ ‖r‖²``, as a number, with gradients where they are asked for, so that
    modules that follow may evaluate it. Loss and gradient ``Jᵀr`` are known.

    Args:
        module: for errors.
        var: parameters and closure.
        vectorize: compute many rows of the derivatives at once.

    Returns:
        r, shape (m,), and J, shape (m, n).

    Raises:
        ClosureError: the closure returned something else than real residuals.
        ModuleError: the closure has been replaced by one of other gradients, or its result has no graph.
    """
    if not var.closure_has_graph:
        raise ModuleError(
            f"{module.place} differentiates residuals, but a module before it has replaced the closure; nothing was changed. "
            f"Put {type(module).__name__} first"
        )
    closure = var.closure
    residuals = _check(module, var.evaluate(backward=False, with_graph=True, is_loss=False))
    if not residuals.requires_grad:
        raise ModuleError(
            f"{module.place}: the residuals of closure(False) do not require gradients; nothing was changed. Take "
            "torch.no_grad() out of the closure"
        )
    with torch.enable_grad():
        vector = residuals.reshape(-1).to(torch.promote_types(residuals.dtype, torch.float32))
    matrix = jacobian(vector, var.params, vectorize)
    dtype = flatten(var.params).dtype
    vector, matrix = vector.detach().to(dtype), matrix.detach().to(dtype)
    grad = matrix.T @ vector
    start = var.loss
    assert closure is not None
    var.replace_closure(_of_squares(module, closure, var))
    var.closure_has_graph = True
    grads = [part.to(param.dtype) for part, param in zip(unflatten(grad, var.params), var.params, strict=True)]
    var.learn_start(0.5 * vector.dot(vector), grads)
    if start is not None:
        var.loss = start
    return vector, matrix


def _of_squares(module: Module, closure: Closure, var: Var) -> Closure:
    params = var.params

    def loss_of_squares(backward: bool = True) -> Tensor:
        with torch.set_grad_enabled(backward or torch.is_grad_enabled()):
            residuals = _check(module, closure(False))
            loss = 0.5 * residuals.to(torch.promote_types(residuals.dtype, torch.float32)).square().sum()
            if backward:
                for param, grad in zip(params, torch.autograd.grad(loss, params, materialize_grads=True), strict=True):
                    param.grad = grad
        return loss

    return loss_of_squares


def _check(module: Module, residuals: Any) -> Tensor:
    if isinstance(residuals, Tensor) and residuals.dim() > 0 and not residuals.is_complex():
        return residuals
    if isinstance(residuals, (int, float)) or (isinstance(residuals, Tensor) and residuals.dim() == 0):
        got = "one number, as if it were the loss"
    else:
        got = f"a tensor of {residuals.dtype}" if isinstance(residuals, Tensor) else repr(residuals)
    raise ClosureError(
        f"{module.place}: the closure returned {got}; expected the residuals, a real tensor with at least one axis, half of "
        f"whose sum of squares is the loss. Nothing was changed. Write\n{_RIGHT_CLOSURE}"
    )


def check_derivatives(module: Module, residuals: Tensor, matrix: Tensor) -> None:
    """Raise if the residuals do not depend on the parameters, or if their derivatives are not finite."""
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(
            f"{module.place}: the derivatives of the residuals hold NaN or infinities; nothing was changed. Start from "
            "parameters where they are finite (the root of 0 and norms of zeros have none)"
        )
    if not bool(matrix.any()) and bool(residuals.any()) and matrix.numel():
        raise ModuleError(
            f"{module.place}: the derivatives of all residuals are zero, so that there is no step; nothing was changed. Start "
            "from other parameters"
        )
