"""Levenberg and Marquardt's method for sums of squares, with a trust region."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.bounds import POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.second_order.cubic_regularization import loss_behind
from graphopt.optim.second_order.nystrom import check_count
from graphopt.optim.second_order.residuals import check_derivatives, linearize

_SLACK = 0.01  # of the length of a step, relative to the trust region
_LEAST_RATIO = 1e-4  # of the fall of the loss to that of the model, for a step to be made


class LevenbergMarquardt(Module):
    """Minimise ``½ ‖r + J s‖²`` among the steps with ``‖D s‖ ≤ Δ``, for residuals r with derivatives J; the update is -s.

    So ``s = -(JᵀJ + λ D²)⁻¹ Jᵀr`` with the λ that Δ asks for, 0 if the whole step fits. D are the largest norms so far of the
    columns of J, which makes it independent of units. A step that does not lower the loss is not made: Δ shrinks, and
    it is tried again with the same derivatives. So the loss never rises. Where ``maxiter`` trials fail the parameters stay.

    The closure returns the residuals, a real tensor of any shape with at least one axis, and is only called with ``False``.
    The loss is half of the sum of their squares: `Modular.step` returns it, and modules behind this one see it and its
    gradients.

    Args:
        init: Δ at first, as a multiple of ``‖D x‖`` for the parameters x; Δ itself where that is 0.
        maxiter: most trials in one step.
        vectorize: compute many rows of J at once; operators that do not allow it are computed row by row.

    Raises:
        ClosureError: in a step, if the closure returns no residuals.
        ModuleError: in a step, if the residuals cannot be differentiated, or do not depend on the parameters.

    Cost: m residuals, n elements: one evaluation, m backwards through it, at least one evaluation more, O(m n min(m, n)), m n
    numbers. State: D (n numbers) and Δ.

    Reference: Moré, "The Levenberg-Marquardt algorithm: implementation and theory", Numerical Analysis, Lecture Notes in
    Mathematics 630, 1978, algorithm 7.1, with the exact solution of the subproblem of section 5.
    """

    needs_closure = True
    replaces_update = True
    bounds = numbers(init=POSITIVE)

    def __init__(self, init: Number = 100.0, maxiter: int = 20, vectorize: bool = True) -> None:
        super().__init__({"init": init, "maxiter": maxiter, "vectorize": vectorize})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Counts."""
        check_count(self.place, "maxiter", settings["maxiter"])

    def step(self, var: Var) -> Var:
        """Solve, until the loss falls."""
        init, maxiter, vectorize = (common(self, var.params, name) for name in ("init", "maxiter", "vectorize"))
        residuals, matrix = linearize(self, var, vectorize)
        check_derivatives(self, residuals, matrix)
        params, state = var.params, self.global_state
        var.update = unflatten(matrix.new_zeros(matrix.shape[1]), params)
        if not bool(matrix.any()):
            return var
        norms = torch.linalg.vector_norm(matrix, dim=0)
        scale = state.get("scale")
        if scale is None or scale.shape != norms.shape:
            state.clear()
            scale = torch.where(norms == 0, 1.0, norms)
        state["scale"] = scale = torch.maximum(scale, norms)
        is_first = "trust_region" not in state
        region = state.get("trust_region", 0.0) or float(init) * (float((scale * flatten(params)).norm()) or 1.0)
        left, singular, right = torch.linalg.svd(matrix / scale, full_matrices=False)
        is_kept = singular > singular[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
        singular, right = singular[is_kept], right[is_kept]
        inside = left[:, is_kept].T @ residuals
        loss, eps = float(residuals.dot(residuals)) / 2, torch.finfo(matrix.dtype).eps
        for _ in range(maxiter):
            step, damping = _in_region(singular, inside, region)
            length = float(step.norm())
            if is_first:
                region, is_first = min(region, length), False
            along = float((singular * step).square().sum()) / 2  # what the linear model falls by, without λ
            promised = along + damping * length**2
            if promised <= 0 or length == 0:
                break
            update = unflatten((right.T @ step) / scale, params)
            fall = loss - loss_behind(var, update)
            if fall <= promised / 4:
                slope = 2 * along + damping * length**2
                # To the minimum of the parabola through both losses, unless they differ too much for one.
                shrink = 0.5 if fall >= 0 else 0.5 * slope / (slope - fall)
                region = max(shrink, 0.1) * min(region, 10 * length)
            elif damping == 0 or fall >= 0.75 * promised:
                region = 2 * length
            if fall >= _LEAST_RATIO * promised:
                var.update = update
                break
            if promised <= eps * loss:
                break  # the loss cannot tell any more
        state["trust_region"] = region
        return var


def _in_region(singular: Tensor, inside: Tensor, region: float) -> tuple[Tensor, float]:
    """The minimum of ``½ ‖b - S q‖²`` among all ``‖q‖ ≤ Δ`` (1.1 Δ are near enough), and its λ.

    Args:
        singular: the diagonal of S, positive.
        inside: b.
        region: Δ.

    Returns:
        q, and the λ with ``q = S b / (S² + λ)``.
    """
    square, product = singular.square(), singular * inside
    damping = 0.0
    for _ in range(100):
        step = product / (square + damping)
        length = float(step.norm())
        excess = length - region
        if abs(excess) <= _SLACK * region or (damping == 0 and excess <= 0):
            break
        # Newton's method for 1/‖q(λ)‖ = 1/Δ, which from the left never leaves that side.
        slope = float((step.square() / (square + damping)).sum())
        damping = max(0.0, damping + (excess / region) * length**2 / slope) if math.isfinite(length) else 1.0
    return step, damping
