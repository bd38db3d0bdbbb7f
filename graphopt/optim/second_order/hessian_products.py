"""Products of the Hessian with vectors, by automatic differentiation or by differences of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.errors import ModuleError, OptionError
from graphopt.optim.core.closures import restored
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten

HVPMethod = Literal["autograd", "forward", "central"]
METHODS = ("autograd", "forward", "central")


def check_method(place: str, method: Any) -> None:
    """Raise `OptionError` if there is no such method."""
    if method not in METHODS:
        raise OptionError(f"{place}: hvp_method={method!r}; expected one of {', '.join(METHODS)}")


def hessian_product(module: Module, var: Var, method: HVPMethod, h: float) -> Callable[[Tensor], Tensor]:
    """The function that multiplies a vector by the Hessian of the closure, at the present parameters.

    Args:
        module: for errors.
        var: parameters and closure. Loss and gradient are known afterwards.
        method: ``"autograd"``: exact, one backward for each product, through a graph that lives as long as the function.
            ``"forward"`` and ``"central"``: ``(∇f(θ + ε v) - ∇f(θ)) / ε`` and ``(∇f(θ + ε v) - ∇f(θ - ε v)) / 2 ε``, by one
            and two evaluations of the closure.
        h: of differences the length of ``ε v``, in units of the parameters.

    Raises:
        ModuleError: the gradients of the closure are not those of its loss, so that autograd cannot be used.
    """
    if method == "autograd":
        return _by_autograd(module, var)
    grad = flatten(var.get_grad())

    def gradient_at(starts: Sequence[Tensor], move: Sequence[Tensor], sign: float) -> Tensor:
        for param, start, part in zip(var.params, starts, move, strict=True):
            param.copy_(start + sign * part)
        var.evaluate(backward=True)
        return flatten(var.read_grads())

    @torch.no_grad()
    def product(vector: Tensor) -> Tensor:
        length = float(vector.norm())
        if length == 0:
            return torch.zeros_like(vector)
        size = h / length
        move = unflatten(vector * size, var.params)
        with restored(var.params) as starts:
            above = gradient_at(starts, move, 1.0)
            if method == "forward":
                return (above - grad) / size
            return (above - gradient_at(starts, move, -1.0)) / (2 * size)

    return product


def _by_autograd(module: Module, var: Var) -> Callable[[Tensor], Tensor]:
    if not var.closure_has_graph:
        raise ModuleError(
            f"{module.place}: hvp_method='autograd' behind a module that has replaced the closure by one with other gradients; "
            "nothing was changed. Use hvp_method='forward' or 'central', which evaluate those gradients"
        )
    loss = var.evaluate(backward=False, with_graph=True)
    with torch.enable_grad():
        if not loss.requires_grad:
            raise ModuleError(
                f"{module.place}: hvp_method='autograd', but the loss of closure(False) does not require gradients; nothing "
                "was changed. Take torch.no_grad() out of the closure, or use hvp_method='forward'"
            )
        grads = torch.autograd.grad(loss, var.params, create_graph=True, materialize_grads=True)
    var.learn_start(loss.detach(), [grad.detach() for grad in grads])
    curved = [grad for grad in grads if grad.requires_grad]

    def product(vector: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(vector)
        parts = unflatten(vector, var.params)
        weights = [part.to(grad.dtype) for grad, part in zip(grads, parts, strict=True) if grad.requires_grad]
        return flatten(
            torch.autograd.grad(curved, var.params, grad_outputs=weights, retain_graph=True, materialize_grads=True)
        )

    return product
