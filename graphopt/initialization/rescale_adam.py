"""Adam for scales, with one first moment for each of GradInit's two objectives."""

from __future__ import annotations

import torch
from torch import Tensor


class RescaleAdam:
    """Adam whose gradients come from two objectives: each has a first moment of its own, the second moment is shared.

    With g the gradient with respect to the scales, clipped to [-clip, clip], k = 1 for the loss after a step and 2 for the norm
    of the gradient, t_k the number of steps taken for k, and t = t_1 + t_2:

        m_k = beta1 m_k + (1 - beta1) g
        v   = beta2 v + (1 - beta2) g^2
        scale <- clamp(scale - lr m_k / (1 - beta1^t_k) / (sqrt(v / (1 - beta2^t)) + eps), min_scale, max_scale)

    In log space the same is done to log(scale), whose gradient is scale * g, unclipped.

    Args:
        scales: (n,), the start.
        is_active: (n,), bool: which scales move.
        lr: step size.
        betas: of the two moments.
        eps: added to the root.
        clip: bound of each gradient; ``None``: unbounded.
        min_scale: (n,).
        max_scale: the same for all; ``None``: unbounded.
        in_log_space: see above.

    Reference: Zhu et al., arXiv:2102.08098, 2021, and the authors' code, https://github.com/zhuchen03/gradinit.
    """

    def __init__(
        self,
        scales: Tensor,
        is_active: Tensor,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip: float | None = None,
        min_scale: Tensor,
        max_scale: float | None = None,
        in_log_space: bool = False,
    ) -> None:
        self.scales = scales.to(torch.float64).clone()
        self._is_active = is_active
        self._lr, self._betas, self._eps, self._clip = lr, betas, eps, clip
        self._min_scale, self._max_scale, self._in_log_space = min_scale.to(torch.float64), max_scale, in_log_space
        self._exp_avg = [torch.zeros_like(self.scales), torch.zeros_like(self.scales)]
        self._exp_avg_sq = torch.zeros_like(self.scales)
        self._steps = [0, 0]

    def step(self, grad: Tensor, *, is_constraint: bool) -> None:
        """Move the scales.

        Args:
            grad: (n,), of the objective with respect to the scales.
            is_constraint: which objective.
        """
        beta1, beta2 = self._betas
        grad = grad.to(self.scales)
        if self._in_log_space:
            grad = grad * self.scales
        elif self._clip is not None:
            grad = grad.clamp(-self._clip, self._clip)
        self._steps[is_constraint] += 1
        exp_avg = self._exp_avg[is_constraint].lerp_(grad, 1 - beta1)
        self._exp_avg_sq.lerp_(grad.square(), 1 - beta2)
        corrected = exp_avg / (1 - beta1 ** self._steps[is_constraint])
        root = (self._exp_avg_sq / (1 - beta2 ** sum(self._steps))).sqrt()
        change = torch.where(self._is_active, self._lr * corrected / (root + self._eps), 0)
        moved = self.scales * torch.exp(-change) if self._in_log_space else self.scales - change
        moved = torch.maximum(moved, self._min_scale)
        if self._max_scale is not None:
            moved = moved.clamp(max=self._max_scale)
        self.scales = torch.where(self._is_active, moved, self.scales)
