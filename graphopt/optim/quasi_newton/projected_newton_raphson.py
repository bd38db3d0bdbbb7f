"""The projected Newton-Raphson method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.store import StateView
from graphopt.optim.core.vector_module import is_due
from graphopt.optim.quasi_newton.quasi_newton_h import QuasiNewtonH


@renamed(restart_interval="reset_interval", ptol_restart="tol_reset")
class ProjectedNewtonRaphson(QuasiNewtonH):
    """``H⁺ = H - H y (H y)ᵀ / ⟨y, H y⟩``, beside ``R⁺ = R + (s - R y) (H y)ᵀ / ⟨y, H y⟩``, which becomes the next H.

    H leaves out the directions in which the curvature is known, and R learns it; R is the inverse Hessian after n exact line
    searches on a quadratic with n elements, where H is 0. Then, after ``reset_interval`` pairs, H is the symmetric part of R.

    H and R stay if ``⟨y, H y⟩ <= tol ‖H y‖ ‖y‖``. Other arguments as `QuasiNewtonH`.

    Cost: O(n²) for n elements; keeps 2 n² + 2 n numbers.

    Args:
        reset_interval: the number of pairs after which H is made of R; ``"auto"`` for as many as there are elements, as nothing
            is left of H then.

    Reference: Pearson, "Variable metric methods of minimisation", The Computer Journal 12(2), 1969, algorithm 7.
    """

    def __init__(
        self,
        *,
        init_scale: Number | str = "auto",
        tol: Number = 1e-10,
        tol_reset: bool = True,
        reset_interval: int | str | None = "auto",
        beta: Number | None = None,
        update_freq: int = 1,
        scale_first: bool = True,
        scale_second: bool = False,
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(
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

    def starts_anew(self, count: int, num_elements: int, settings: Settings) -> bool:
        """Never, as R is not to be forgotten."""
        return False

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
        R, Hy = state.get("R", H), H @ y
        yHy = y.dot(Hy)
        if bool(yHy > settings.tol * Hy.norm() * y.norm()):
            R = R + torch.outer(s - R @ y, Hy / yHy)
            H = H - torch.outer(Hy, Hy) / yHy
        state["R"], num_pairs = R, state.get("num_pairs", 0) + 1
        # One pair less than elsewhere: H would be 0 in the next step.
        due = is_due(settings.reset_interval, num_pairs + (settings.reset_interval == "auto"), len(s))
        state["num_pairs"] = 0 if due else num_pairs
        return (R + R.T) / 2 if due else H
