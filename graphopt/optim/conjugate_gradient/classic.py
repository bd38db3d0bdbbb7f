"""Conjugate gradient methods that differ in β; ``y = g - g_prev``, and ``d_prev`` was subtracted, as all updates are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.optim.conjugate_gradient.conjugate_gradient_base import ConjugateGradientBase
from graphopt.optim.core.renamed import renamed


@renamed(restart_interval="reset_interval")
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


@renamed(restart_interval="reset_interval")
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


class HestenesStiefel(ConjugateGradientBase):
    """``β = -⟨g, y⟩ / ⟨d_prev, y⟩``.

    Arguments as `ConjugateGradientBase`.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, equation 5.46.
    """

    def get_beta(self, p: Tensor, g: Tensor, prev_g: Tensor, prev_d: Tensor) -> Tensor:
        """Of the formula."""
        y = g - prev_g
        return -g.dot(y) / prev_d.dot(y)


class DaiYuan(ConjugateGradientBase):
    """``β = -⟨g, g⟩ / ⟨d_prev, y⟩``.

    Arguments as `ConjugateGradientBase`. Where line searches satisfy the Wolfe conditions all directions descend.

    Reference: Dai, Yuan, "A nonlinear conjugate gradient method with a strong global convergence property", SIAM J. Optim.
    10(1), 1999, equation 1.8.
    """

    def get_beta(self, p: Tensor, g: Tensor, prev_g: Tensor, prev_d: Tensor) -> Tensor:
        """Of the formula."""
        return -g.dot(g) / prev_d.dot(g - prev_g)


class LiuStorey(ConjugateGradientBase):
    """``β = ⟨g, y⟩ / ⟨d_prev, g_prev⟩``.

    Arguments as `ConjugateGradientBase`.

    Reference: Liu, Storey, "Efficient generalized conjugate gradient algorithms, part 1: theory", J. Optim. Theory Appl. 69,
    1991.
    """

    def get_beta(self, p: Tensor, g: Tensor, prev_g: Tensor, prev_d: Tensor) -> Tensor:
        """Of the formula."""
        return g.dot(g - prev_g) / prev_d.dot(prev_g)


@renamed(restart_interval="reset_interval")
class ConjugateDescent(ConjugateGradientBase):
    """``β = ⟨g, g⟩ / ⟨d_prev, g_prev⟩``.

    As with `FletcherReeves`, short steps along a bad direction are followed by more of the same, unless it begins anew.

    Args:
        clip_beta: take 0 for a negative β.
        reset_interval: β is 0 after so many steps; ``"auto"`` for one more than there are elements.
        concat_params: one direction for all parameters, or else one for each.
        inner: modules that make u of the incoming update.

    Reference: Fletcher, "Practical Methods of Optimization, volume 1: Unconstrained Optimization", Wiley, 1987.
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
        return g.dot(g) / prev_d.dot(prev_g)


class HagerZhang(ConjugateGradientBase):
    """``β = -⟨y - 2 d_prev ⟨y, y⟩ / ⟨d_prev, y⟩, g⟩ / ⟨d_prev, y⟩``, at least ``-1 / (‖d_prev‖ min(0.01, ‖g_prev‖))``.

    Directions descend whatever the line search: ``⟨d, g⟩ >= 7/8 ⟨g, g⟩``. Arguments as `ConjugateGradientBase`.

    Reference: Hager, Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line search", SIAM J.
    Optim. 16(1), 2005, equations 1.3, 1.5 and 1.6.
    """

    def get_beta(self, p: Tensor, g: Tensor, prev_g: Tensor, prev_d: Tensor) -> Tensor:
        """Of the formula."""
        y = g - prev_g
        dy = prev_d.dot(y)
        beta = (2 * prev_d.dot(g) * y.dot(y) / dy - y.dot(g)) / dy
        return torch.maximum(beta, -1 / (prev_d.norm() * prev_g.norm().clamp(max=0.01)))


class HybridHS_DY(ConjugateGradientBase):
    """The lesser of those of `HestenesStiefel` and `DaiYuan`, and at least 0.

    Arguments as `ConjugateGradientBase`.

    Reference: Dai, Yuan, "An efficient hybrid conjugate gradient method for unconstrained optimization", Annals of Operations
    Research 103, 2001.
    """

    def get_beta(self, p: Tensor, g: Tensor, prev_g: Tensor, prev_d: Tensor) -> Tensor:
        """Of the formula."""
        y = g - prev_g
        dy = -prev_d.dot(y)
        return torch.minimum(g.dot(y) / dy, g.dot(g) / dy).clamp(min=0)
