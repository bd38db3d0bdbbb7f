"""Powell's symmetric version of Broyden's method."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.optim.core.context import Settings
from graphopt.optim.core.store import StateView
from graphopt.optim.quasi_newton.quasi_newton_h import QuasiNewtonH


class PSB(QuasiNewtonH):
    """``B⁺ = B + (r sᵀ + s rᵀ) / ⟨s, s⟩ - ⟨r, s⟩ s sᵀ / ⟨s, s⟩²``, ``r = y - B s``; the update is ``B⁻¹ g``.

    B is the symmetric matrix nearest to the old one that maps ``s`` to ``y``. It needs no curvature along ``s``, and may become
    indefinite. Arguments as `QuasiNewtonH`.

    Cost: O(n³) for n elements, to solve with B; keeps n² + 2 n numbers.

    Reference: Powell, "A new algorithm for unconstrained optimization", in "Nonlinear Programming", Academic Press, 1970.
    """

    def update_B(  # noqa: D102
        self,
        B: Tensor,
        s: Tensor,
        y: Tensor,
        p: Tensor,
        g: Tensor,
        p_prev: Tensor,
        g_prev: Tensor,
        state: StateView,
        settings: Settings,
    ) -> Tensor:
        unit = s / s.norm()
        r = (y - B @ s) / s.norm()
        half = r - unit * (r.dot(unit) / 2)
        cross = torch.outer(half, unit)
        return B + (cross + cross.T)  # in this order it stays symmetric bit for bit
