"""Self-scaling variable metric methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import FRACTION, is_number
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.store import StateView
from graphopt.optim.quasi_newton.quasi_newton_h import QuasiNewtonH


@renamed(restart_interval="reset_interval", ptol_restart="tol_reset")
class SSVM(QuasiNewtonH):
    """``H⁺ = γ (H - H y yᵀ H / τ + θ v vᵀ) + s sᵀ / σ``, ``v = √τ (s / σ - H y / τ)``, ``σ = ⟨s, y⟩``, ``τ = ⟨y, H y⟩``.

    H is scaled by ``γ`` in each step, between ``σ / τ`` and ``ε / σ``, ``ε = ⟨s, H⁻¹ s⟩``; ``θ`` leads from `DFP` (0) to `BFGS`
    (1). For quadratics the condition number of H beside that of the inverse Hessian then never grows.

    H stays if ``σ <= tol ‖s‖ ‖y‖``. Other arguments as `QuasiNewtonH`.

    Args:
        switch: a pair ``(φ, θ)`` of numbers from 0 to 1, ``γ = φ ε / σ + (1 - φ) σ / τ``; or the number of a rule:

            1 (optimally conditioned): if ``ε <= σ`` then ``γ = ε / σ``, ``θ = 0``; if ``σ >= τ`` then ``γ = σ / τ``, ``θ = 1``;
            otherwise ``γ = 1``, ``θ = σ (ε - σ) / (ε τ - σ²)``.

            2 (optimally conditioned): ``γ = √(ε / τ)``, ``θ = 1 / (1 + √(τ ε) / σ)``.

            3: as 1, but ``θ = σ (τ - σ) / (ε τ - σ²)`` in the last case.

            4: ``γ`` as 2, ``θ = ½``.

    Raises:
        OptionError: an option is not valid.

    Reference: Oren, Spedicato, "Optimal conditioning of self-scaling variable metric algorithms", Mathematical Programming 10,
    1976. As there, ``ε / σ`` is taken from the gradient ``g`` in front of the step, ``⟨g, s⟩ / ⟨g, H y⟩``, which holds where
    the step was a multiple of ``H g``, and is never less than ``σ / τ``.
    """

    def __init__(
        self,
        switch: int | tuple[float, float] = 3,
        *,
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

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """A number from 1 to 4, or two from 0 to 1."""
        super().check_settings(settings)
        switch = settings["switch"]
        if isinstance(switch, (tuple, list)):
            if len(switch) == 2 and all(is_number(value) and value in FRACTION for value in switch):
                return
        elif isinstance(switch, int) and not isinstance(switch, bool) and 1 <= switch <= 4:
            return
        raise OptionError(f"{self.place}: switch={switch!r}; expected 1, 2, 3, 4, or two numbers (φ, θ) in {FRACTION}")

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
        sigma, Hy = s.dot(y), H @ y
        tau = y.dot(Hy)
        if bool(sigma <= settings.tol * s.norm() * y.norm()) or bool(tau <= 0):
            return H
        low, high = sigma / tau, g_prev.dot(s) / g_prev.dot(Hy)
        if not bool(high >= low):  # the step was along something else, or by rounding, or it is NaN
            high = low
        gamma, theta = _scale_and_share(settings.switch, low, high)
        v = (s / sigma - Hy / tau) * tau.sqrt()
        return gamma * (H - torch.outer(Hy, Hy) / tau + theta * torch.outer(v, v)) + torch.outer(s, s) / sigma


def _scale_and_share(switch: Any, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | float]:
    """γ and θ, of ``low = σ / τ`` and ``high = ε / σ``, where low <= high: all of the rules depend on these alone."""
    if isinstance(switch, (tuple, list)):
        phi, theta = switch
        return phi * high + (1 - phi) * low, theta
    if switch in (2, 4):
        return (low * high).sqrt(), 0.5 if switch == 4 else 1 / (1 + (high / low).sqrt())
    if bool(high <= 1):
        return high, 0.0
    if bool(low >= 1):
        return low, 1.0
    over = high - 1 if switch == 1 else 1 / low - 1  # (ε - σ) / σ, or (τ - σ) / σ
    return torch.ones_like(low), over / (high / low - 1)
