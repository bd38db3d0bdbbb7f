"""Gradients projected on what is conjugate to the last steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.store import StateView
from graphopt.optim.quasi_newton.quasi_newton_h import QuasiNewtonH


@renamed(restart_interval="reset_interval")
class ProjectedGradientMethod(QuasiNewtonH):
    """``H g``, ``H⁺ = H - H y (H y)ᵀ / ⟨y, H y⟩``, where H begins anew with the identity after ``reset_interval`` steps.

    Conjugate gradients that keep all directions instead of one; for the same steps with exact line searches on quadratics. Best
    before ``StrongWolfe(c2=0.1)``.

    H stays if ``⟨y, H y⟩ <= tol ‖H y‖ ‖y‖``.

    Cost: O(n²) for n elements; keeps n² + 2 n numbers.

    Args:
        tol: H begins anew, too, if no element of the change y of the update is above, or if the parameters have not moved.
        reset_interval: a number of steps; ``"auto"`` for as many as there are elements, as nothing is left of H then. ``None``
            for never.
        scale_first: divide the first update by the sum of its absolute values, if that is above 1; so after each new beginning.
        concat_params: one matrix for all parameters, or else one for each.
        inner: modules that make of the update what H is multiplied with.

    Raises:
        OptionError: an option is not valid.

    Reference: Pearson, "Variable metric methods of minimisation", The Computer Journal 12(2), 1969.
    """

    bounds = numbers(tol=NON_NEGATIVE)

    def __init__(
        self,
        *,
        tol: Number = 1e-10,
        reset_interval: int | str | None = "auto",
        scale_first: bool = False,
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(
            init_scale=1.0,
            tol=tol,
            reset_interval=reset_interval,
            scale_first=scale_first,
            concat_params=concat_params,
            inner=inner,
        )

    def starts_anew(self, count: int, num_elements: int, settings: Settings) -> bool:
        """One step earlier than elsewhere: H would be 0 in the next one."""
        return super().starts_anew(count + (settings.reset_interval == "auto"), num_elements, settings)

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
        Hy = H @ y
        yHy = y.dot(Hy)
        if bool(yHy <= settings.tol * Hy.norm() * y.norm()):
            return H
        return H - torch.outer(Hy, Hy) / yHy
