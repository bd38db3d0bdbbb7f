"""Quasi-Newton methods with symmetric H between DFP and BFGS: FletcherVMM, Horisho."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.store import StateView
from graphopt.optim.quasi_newton.quasi_newton_h import QuasiNewtonH


@renamed(restart_interval="reset_interval", ptol_restart="tol_reset")
class FletcherVMM(QuasiNewtonH):
    """``H⁺ = H - (s yᵀ H + H y sᵀ) / ⟨s, y⟩ + (1 + ⟨y, H y⟩ / ⟨s, y⟩) s sᵀ / ⟨s, y⟩``, which is `BFGS`.

    With ``switch``, as the paper advises where no line search is exact, that only if ``⟨s, y⟩ >= ⟨y, H y⟩``, and otherwise
    the formula of `DFP`: eigenvalues of H then move towards those of the inverse Hessian, and do not overshoot.

    H stays if ``⟨s, y⟩ <= tol ‖s‖ ‖y‖``. Other arguments as `QuasiNewtonH`.

    Args:
        switch: whether the formula of `DFP` is used in its turn.

    Reference: Fletcher, "A new approach to variable metric algorithms", The Computer Journal 13(3), 1970, equation 5 and
    section 4.
    """

    def __init__(
        self,
        *,
        switch: bool = False,
        init_scale: Number | str = "auto",
        tol: Number = 1e-10,
        tol_reset: bool = True,
        reset_interval: int | str | None = None,
        beta: Number | None = None,
        update_freq: int = 1,
        scale_first: bool = True,
        scale_second: bool = False,
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(
            {"switch": switch},
            init_scale=init_scale,
            tol=tol,
            tol_reset=tol_reset,
            reset_interval=reset_interval,
            beta=beta,
            update_freq=update_freq,
            scale_first=scale_first,
            scale_second=scale_second,
            concat_params=concat_params,
            inner=inner,
        )

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
        if bool(sy <= settings.tol * s.norm() * y.norm()):
            return H
        if settings.switch and bool((sy < yHy) & (yHy > 0)):
            return H + torch.outer(s, s) / sy - torch.outer(Hy, Hy) / yHy
        cross = torch.outer(s, Hy) / sy
        return H - (cross + cross.T) + torch.outer(s, s) * ((1 + yHy / sy) / sy)


class Horisho(QuasiNewtonH):
    """``H⁺ = H + ((1 + 2 t / σ) s sᵀ - s (H y)ᵀ - H y sᵀ - H y (H y)ᵀ) / (σ + t)``, ``σ = ⟨s, y⟩``, ``t = ⟨y, H y⟩``.

    A mean of `DFP` and `BFGS` with the weights ``t`` and ``σ``, by Hoshino (the name is that of torchzero). His paper multiplies
    H with the gradient at the minimum along the last step: ``inner=GradientCorrection()``.

    H stays if ``σ <= tol ‖s‖ ‖y‖``, so it stays positive. Arguments as `QuasiNewtonH`.

    Reference: Hoshino, "A formulation of variable metric methods", IMA Journal of Applied Mathematics 10(3), 1972.
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
        cross = torch.outer(s, Hy)
        change = torch.outer(s, s) * (1 + 2 * yHy / sy) - (cross + cross.T) - torch.outer(Hy, Hy)
        return H + change / (sy + yHy)
