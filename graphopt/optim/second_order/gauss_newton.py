"""Gauss and Newton's method for sums of squares."""

from __future__ import annotations

import torch

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import unflatten
from graphopt.optim.second_order.residuals import check_derivatives, linearize


class GaussNewton(Module):
    """Minimise ``½ ‖r + J s‖² + ½ reg ‖s‖²`` for residuals r with derivatives J; the update is -s, of least norm.

    The closure returns the residuals, a real tensor of any shape with at least one axis, and is only called with ``False``.
    The loss is half of the sum of their squares: `Modular.step` returns it, and modules behind this one, such as
    line searches, see it and its gradients. The step always descends, but it may be too long.

    Args:
        reg: the weight of the squared step; 0 for the exact step, which is that of least norm where J has no full rank.
        vectorize: compute many rows of J at once; operators that do not allow it are computed row by row.

    Raises:
        ClosureError: in a step, if the closure returns no residuals.
        ModuleError: in a step, if the residuals cannot be differentiated, or do not depend on the parameters.

    Cost: m residuals, n elements: one evaluation, m backwards through it, O(m n min(m, n)), m n numbers. No state.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, section 10.3, equation 10.23.
    """

    needs_closure = True
    replaces_update = True
    bounds = numbers(reg=NON_NEGATIVE)

    def __init__(self, reg: Number = 0.0, vectorize: bool = True) -> None:
        super().__init__({"reg": reg, "vectorize": vectorize})

    def step(self, var: Var) -> Var:
        """Solve."""
        reg, vectorize = (common(self, var.params, name) for name in ("reg", "vectorize"))
        residuals, matrix = linearize(self, var, vectorize)
        check_derivatives(self, residuals, matrix)
        if matrix.numel() == 0:
            var.update = unflatten(matrix.new_zeros(matrix.shape[1]), var.params)
            return var
        left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
        is_kept = singular > singular[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps
        left, singular, right = left[:, is_kept], singular[is_kept], right[is_kept]
        solution = right.T @ (singular / (singular.square() + float(reg)) * (left.T @ residuals))
        var.update = unflatten(solution, var.params)
        return var
