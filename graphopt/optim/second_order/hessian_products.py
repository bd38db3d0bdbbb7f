"""Products of the Hessian with vectors, by automatic differentiation or by differences of gradients; and the matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

from graphopt.errors import OptionError, UnsupportedError
from graphopt.optim.core.closures import restored
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.second_order.derivatives import (
    check_graph,
    check_twice_differentiable,
    gradients_with_graph,
    graph_of_loss,
    jacobian,
    second_derivatives,
)

HVPMethod = Literal["autograd", "forward_over_reverse", "forward", "central"]
METHODS = ("autograd", "forward_over_reverse", "forward", "central")
_OTHER_NAMES = {"batched_autograd": "autograd", "fd_forward": "forward", "fd_central": "central"}  # torchzero 0.4


def check_method(place: str, method: Any, option: str = "hvp_method") -> None:
    """Raise `OptionError` if there is no such method."""
    if method not in METHODS and method not in _OTHER_NAMES:
        raise OptionError(f"{place}: {option}={method!r}; expected one of {', '.join(METHODS)}")


def hessian_product(
    module: Module, var: Var, method: HVPMethod, h: float, option: str = "hvp_method"
) -> Callable[[Tensor], Tensor]:
    """The function that multiplies a vector by the Hessian of the closure, at the present parameters.

    Args:
        module: for errors.
        var: parameters and closure. Loss and gradient are known afterwards.
        method: ``"autograd"``: exact, one backward for each product, through a graph that lives as long as the function.
            ``"forward_over_reverse"``: exact, too, one evaluation and backward for each product, with derivatives along the
            vector (forward-mode automatic differentiation); no graph outlives a product.
            ``"forward"`` and ``"central"``: ``(∇f(θ + ε v) - ∇f(θ)) / ε`` and ``(∇f(θ + ε v) - ∇f(θ - ε v)) / 2 ε``, by one
            and two evaluations of the closure.
        h: of differences the length of ``ε v``, in units of the parameters. In 16-bit parameters, which would not move by a small
            one, at least the root of their precision times the length of all parameters.
        option: the name under which the user has chosen the method, for errors.

    Raises:
        ModuleError: the gradients of the closure are not those of its loss, so that autograd cannot be used.
        UnsupportedError: an operator in the loss cannot be differentiated twice; also raised by the function.
    """
    method = cast(HVPMethod, _OTHER_NAMES.get(method, method))
    if method == "autograd":
        return _by_autograd(module, var, option)
    if method == "forward_over_reverse":
        return _forward_over_reverse(module, var, option)
    grad = flatten(var.get_grad())
    narrow = [torch.finfo(param.dtype).eps for param in var.params if param.dtype in (torch.bfloat16, torch.float16)]
    if narrow:
        h = max(h, max(narrow) ** 0.5 * float(flatten(var.params).norm()))

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


def hessian_matrix(
    module: Module, var: Var, method: HVPMethod, h: float, vectorize: bool, option: str = "hessian_method"
) -> Tensor:
    """The Hessian of the closure at the present parameters, a symmetric matrix of shape (n, n).

    Args:
        module: for errors.
        var: parameters and closure. Loss and gradient are known afterwards.
        method: as of `hessian_product`. ``"autograd"`` costs one evaluation and n backwards, the others n products.
        h: of differences the length of the step, in units of the parameters.
        vectorize: whether ``"autograd"`` computes many rows at once.
        option: the name under which the user has chosen the method, for errors.

    Raises:
        ModuleError: the gradients of the closure are not those of its loss, so that autograd cannot be used.
        UnsupportedError: an operator in the loss cannot be differentiated twice.
    """
    if method == "autograd":
        grads = _differentiable_gradients(module, var, option)
        dtype = flatten(grads).dtype
        with torch.enable_grad():
            vector = torch.cat([grad.reshape(-1).to(dtype) for grad in grads])
        with second_derivatives(module, _instead(option)):
            matrix = jacobian(vector, var.params, vectorize)
    else:
        multiply = hessian_product(module, var, method, h, option)
        grad = flatten(var.get_grad())
        matrix = torch.empty(grad.numel(), grad.numel(), dtype=grad.dtype, device=grad.device)
        for index in range(grad.numel()):
            unit = torch.zeros_like(grad)
            unit[index] = 1
            matrix[:, index] = multiply(unit)
    return (matrix + matrix.T) / 2


def _instead(option: str) -> str:
    return f"Use {option}='central' (or 'forward'), which evaluate gradients only, or a module that needs no curvature"


def _differentiable_gradients(module: Module, var: Var, option: str) -> tuple[Tensor, ...]:
    loss = graph_of_loss(module, var, f"{option}='autograd'", f"{option}='forward' or 'central'")
    grads = gradients_with_graph(loss, var.params)
    check_twice_differentiable(module, grads, _instead(option))
    var.learn_start(loss.detach(), [grad.detach() for grad in grads])
    return grads


def _by_autograd(module: Module, var: Var, option: str) -> Callable[[Tensor], Tensor]:
    grads = _differentiable_gradients(module, var, option)
    curved = [grad for grad in grads if grad.requires_grad]

    def product(vector: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(vector)
        parts = unflatten(vector, var.params)
        weights = [part.to(grad.dtype) for grad, part in zip(grads, parts, strict=True) if grad.requires_grad]
        with second_derivatives(module, _instead(option)):
            return flatten(
                torch.autograd.grad(curved, var.params, grad_outputs=weights, retain_graph=True, materialize_grads=True)
            )

    return product


def _forward_over_reverse(module: Module, var: Var, option: str) -> Callable[[Tensor], Tensor]:
    choice, instead = f"{option}='forward_over_reverse'", f"{option}='forward' or 'central'"
    check_graph(module, var, choice, instead)
    var.get_grad()

    def product(vector: Tensor) -> Tensor:
        tangents = [part.to(param.dtype) for param, part in zip(var.params, unflatten(vector, var.params), strict=True)]
        try:
            with forward_mode.dual_level():
                # The closure knows the parameters themselves, so it is they that become dual numbers, until the level ends.
                with torch.no_grad():
                    for param, tangent in zip(var.params, tangents, strict=True):
                        param.copy_(forward_mode.make_dual(param.detach().clone(), tangent))
                loss = graph_of_loss(module, var, choice, instead)
                grads = torch.autograd.grad(loss, var.params, materialize_grads=True)
                found = [forward_mode.unpack_dual(grad).tangent for grad in grads]
                return flatten(
                    [torch.zeros_like(grad) if part is None else part for grad, part in zip(grads, found, strict=True)]
                )
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ("forward AD", "forward mode AD", "jvp")):
                raise
            raise UnsupportedError(
                f"{module.place}: {choice}, but an operator in the loss has no derivative along a vector "
                f"({str(error).partition(chr(10))[0]}); nothing was changed. Use {option}='autograd', 'forward' or 'central'"
            ) from error

    return product
