"""Conjugate gradient methods that differ in β; ``y = g - g_prev``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.optim.conjugate_gradient.conjugate_gradient_base import ConjugateGradientBase


class PolakRibiere(ConjugateGradientBase):
    """``β = ⟨g, y⟩ / ⟨g_prev, g_prev⟩``, at least 0.

    Args:
        clip_beta: take 0 for a negative β, which restarts.
        reset_interval: β is 0 after so many steps; ``"auto"`` for one more than there are elements.
        concat_params: one direction for all parameters, or else one for each.
        inner: modules that make u of the incoming update.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, equations 5.44 and 5.45.
    """

    def __init__(
        self,
        *,
        clip_beta: bool = True,
        reset_interval: int | str | None = None,
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(clip_beta=clip_beta, reset_interval=reset_interval, concat_params=concat_params, inner=inner)

    def get_beta(self, p: Tensor, g: Tensor, prev_g: Tensor, prev_d: Tensor) -> Tensor:
        """Of the formula."""
        return g.dot(g - prev_g) / prev_g.dot(prev_g)


class FletcherReeves(ConjugateGradientBase):
    """``β = ⟨g, g⟩ / ⟨g_prev, g_prev⟩``.

    Args:
        clip_beta: of no effect, as β is positive.
        reset_interval: β is 0 after so many steps; ``"auto"`` for one more than there are elements.
        concat_params: one direction for all parameters, or else one for each.
        inner: modules that make u of the incoming update.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, equation 5.41a.
    """

    def __init__(
        self,
        *,
        clip_beta: bool = False,
        reset_interval: int | str | None = "auto",
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(clip_beta=clip_beta, reset_interval=reset_interval, concat_params=concat_params, inner=inner)

    def get_beta(self, p: Tensor, g: Tensor, prev_g: Tensor, prev_d: Tensor) -> Tensor:
        """Of the formula."""
        return g.dot(g) / prev_g.dot(prev_g)
