"""Quasi-Newton methods that keep the inverse Hessian: BFGS, DFP, SR1."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.optim.core.context import Settings
from graphopt.optim.core.store import StateView
from graphopt.optim.quasi_newton.quasi_newton_h import QuasiNewtonH


class BFGS(QuasiNewtonH):
    """``H⁺ = (I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ``, ``ρ = 1 / ⟨s, y⟩``.

    H stays as it is if ``⟨s, y⟩ <= tol ‖s‖ ‖y‖``, so it stays positive.

    Arguments as `QuasiNewtonH`. Without a line search it takes small learning rates; best behind it is `StrongWolfe`.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, equation 6.17.
    """

    def update_H(  # noqa: D102
        self,
        H: Tensor,
        s: Tensor,
        y: Tensor,
        p: Tensor,
        g: Tensor,
        p_prev: Tensor,
        g_prev: Tensor,
        state: StateView,
        settings: Settings,
    ) -> Tensor:
        sy = s.dot(y)
        if bool(sy <= settings.tol * s.norm() * y.norm()):
            return H
        Hy = H @ y
        half = s * ((1 + y.dot(Hy) / sy) / (2 * sy)) - Hy / sy
        cross = torch.outer(s, half)
        return H + (cross + cross.T)  # the formula above without products of matrices


class DFP(QuasiNewtonH):
    """``H⁺ = H + s sᵀ / ⟨s, y⟩ - H y yᵀ H / ⟨y, H y⟩``; H stays if ``⟨s, y⟩ <= tol ‖s‖ ‖y‖``.

    Arguments as `QuasiNewtonH`. It depends more on accurate line searches than `BFGS`: ``StrongWolfe(c2=0.1)``.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, equation 6.15.
    """

    def update_H(  # noqa: D102
        self,
        H: Tensor,
        s: Tensor,
        y: Tensor,
        p: Tensor,
        g: Tensor,
        p_prev: Tensor,
        g_prev: Tensor,
        state: StateView,
        settings: Settings,
    ) -> Tensor:
        sy, Hy = s.dot(y), H @ y
        yHy = y.dot(Hy)
        if bool(sy <= settings.tol * s.norm() * y.norm()) or bool(yHy <= 0):
            return H
        return H + torch.outer(s, s) / sy - torch.outer(Hy, Hy) / yHy


class SR1(QuasiNewtonH):
    """``H⁺ = H + z zᵀ / ⟨z, y⟩``, ``z = s - H y``; H stays if ``|⟨z, y⟩| <= tol ‖z‖ ‖y‖``. H may become indefinite.

    Arguments as `QuasiNewtonH`.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, equations 6.25 and 6.26.
    """

    def update_H(  # noqa: D102
        self,
        H: Tensor,
        s: Tensor,
        y: Tensor,
        p: Tensor,
        g: Tensor,
        p_prev: Tensor,
        g_prev: Tensor,
        state: StateView,
        settings: Settings,
    ) -> Tensor:
        z = s - H @ y
        zy = z.dot(y)
        if bool(zy.abs() <= settings.tol * z.norm() * y.norm()):
            return H
        return H + torch.outer(z, z) / zy
