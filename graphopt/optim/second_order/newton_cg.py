"""Newton's method without a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.closures import common, number, restored
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.second_order.derivatives import check_curvature
from graphopt.optim.second_order.hessian_products import HVPMethod, check_method, hessian_product


class NewtonCG(Module):
    """Solve ``(H + reg I) x = u`` by conjugate gradients, H the Hessian of the closure and u the update; x is the new update.

    It ends when the residual is at most ``tol ‖u‖``, or with the first direction of negative curvature, along which it makes a
    last step: forwards, as far as with the opposite curvature, or to the solution if that descends, too, and the loss there
    is lower (two evaluations of the loss). So x descends where u is the gradient, and leads away from saddle points.

    Args:
        maxiter: most products with H in a step; ``None`` for as many as there are elements.
        tol: of the residual, relative to u.
        reg: added to the diagonal of H.
        hvp_method: how H is multiplied: ``"autograd"`` and ``"forward_over_reverse"`` exactly; ``"forward"`` or ``"central"``
            by differences of gradients, which also works behind gradient approximations.
        h: of differences the length of the step, in units of the parameters.
        warm_start: start from the solution of the step before rather than from 0.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used, or the loss has no curvature along u.
        UnsupportedError: in a step, if an operator in the loss cannot be differentiated as ``hvp_method`` asks for.

    Cost: one gradient and at most ``maxiter`` products with the Hessian, of about two gradients each (``"forward"``: one);
    ``"autograd"`` keeps the graph of the gradient meanwhile.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, algorithm 7.1.
    """

    needs_closure = True
    bounds = numbers(tol=NON_NEGATIVE, reg=NON_NEGATIVE, h=POSITIVE)

    def __init__(
        self,
        maxiter: int | None = None,
        tol: Number = 1e-4,
        reg: Number = 1e-8,
        hvp_method: HVPMethod = "forward",
        h: Number = 1e-3,
        warm_start: bool = False,
    ) -> None:
        super().__init__(
            {"maxiter": maxiter, "tol": tol, "reg": reg, "hvp_method": hvp_method, "h": h, "warm_start": warm_start}
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_method(self.place, settings["hvp_method"])
        maxiter = settings["maxiter"]
        if maxiter is not None and (not isinstance(maxiter, int) or maxiter < 1):
            raise OptionError(f"{self.place}: maxiter={maxiter!r}; expected an integer of at least 1, or None")

    def step(self, var: Var) -> Var:
        """Solve."""
        params = var.params
        maxiter, tol, reg, method, h, warm_start = (
            common(self, params, name) for name in ("maxiter", "tol", "reg", "hvp_method", "h", "warm_start")
        )
        multiply = hessian_product(self, var, method, float(h))
        update = var.get_update()
        right = flatten(update)
        state = self.global_state
        start = state.get("prev_solution") if warm_start else None
        if start is not None and start.shape != right.shape:
            start = None
        solutions = conjugate_gradients(
            with_curvature(self, multiply, float(reg), right),
            right,
            start,
            float(tol),
            right.numel() if maxiter is None else maxiter,
        )
        solution = solutions[0] if len(solutions) == 1 else best_of(solutions, var)
        if warm_start:
            state["prev_solution"] = solution
        var.update = unflatten(solution, update)
        return var


def with_curvature(
    module: Module, multiply: Callable[[Tensor], Tensor], reg: float, right: Tensor
) -> Callable[[Tensor], Tensor]:
    """Multiply by ``H + reg I``; raises if the first product shows no curvature at all, with which reg alone would decide."""
    is_first = True

    def product(vector: Tensor) -> Tensor:
        nonlocal is_first
        curved = multiply(vector).to(right.dtype)
        if is_first:
            check_curvature(module, curved, vector)
            is_first = False
        return curved + reg * vector

    return product


def best_of(candidates: Sequence[Tensor], var: Var) -> Tensor:
    """The update that leads to the lowest loss."""
    losses = []
    with restored(var.params) as starts:
        for candidate in candidates:
            for param, start, part in zip(var.params, starts, unflatten(candidate, var.params), strict=True):
                param.copy_(start - part)
            loss = number(var.evaluate(backward=False))
            losses.append(loss if math.isfinite(loss) else math.inf)
    return candidates[losses.index(min(losses))]


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor | None,
    tol: float,
    maxiter: int,
    precondition: Callable[[Tensor], Tensor] = lambda residual: residual,
) -> list[Tensor]:
    """Solve a symmetric system, up to the first direction of negative curvature.

    Args:
        multiply: multiplies a vector by the matrix.
        right: the right-hand side, shape (n,).
        start: where to start; ``None`` for 0.
        tol: the least residual, relative to ``right``.
        maxiter: the most products.
        precondition: multiplies a vector by a positive definite matrix that is about the inverse.

    Returns:
        The solution; two to choose from if the last direction was one of negative curvature.
    """
    length = float(right.norm())
    if length == 0:
        return [right]
    solution, residual = torch.zeros_like(right), right
    if start is not None:
        remaining = right - multiply(start)
        if float(remaining.norm()) < length:  # otherwise it is no better than 0
            solution, residual = start, remaining
    direction = precondition(residual)
    square = residual.dot(direction)
    for index in range(maxiter):
        if float(residual.norm()) <= tol * length:
            break
        product = multiply(direction)
        curvature = direction.dot(product)
        if not bool(curvature > 0):
            return _ends(solution, direction, right, square / curvature, is_first=index == 0)
        step_size = square / curvature
        solution = solution + step_size * direction
        residual = residual - step_size * product
        scaled = precondition(residual)
        new_square = residual.dot(scaled)
        direction, square = scaled + direction * (new_square / square), new_square
    return [solution]


def _ends(solution: Tensor, direction: Tensor, right: Tensor, step_size: Tensor, is_first: bool) -> list[Tensor]:
    """Ways to end with a direction of negative curvature; ``step_size`` is negative.

    It leads to the solution of the system, which is no minimum along that direction and may be a saddle, but the best step
    where the curvature changes its sign soon. The same step forwards descends, away from it.
    """
    if not bool(torch.isfinite(step_size)):
        return [right if is_first else solution]
    forwards, backwards = solution - step_size * direction, solution + step_size * direction
    return [forwards, backwards] if bool(backwards.dot(right) > 0) else [forwards]
