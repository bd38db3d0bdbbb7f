"""LaProp with the true second moment."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, debias, root, zeros
from graphopt.optim.core.bounds import ANY, DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.truegrad.per_sample import PerSampleRule, Preconditioner


class TrueGradLaPropState(NamedTuple):
    """Averages of the squared per-sample gradients and of the normalised updates, like the parameter."""

    exp_avg_per_sample_sq: Tensor
    exp_avg_per_sample_normalized: Tensor


class TrueGradLaProp(PerSampleRule):
    """The average of updates, each divided by the root of the average of squared per-sample gradients.

    ``v = beta2 v + (1 - beta2) n s``, ``m = beta1 m + (1 - beta1) u / (√v̂ + eps)``, update ``alpha m̂``, with s the
    ``SUM_GRAD_SQUARED`` of the gradient, n its ``NUM_SAMPLES``, ``v̂ = v / (1 - beta2^t)`` and ``m̂ = m / (1 - beta1^t)``.
    Adam divides its momentum, LaProp what the momentum averages. `graphopt.optim.TGLaProp` with ``graft=False`` has the
    larger of √v̂ and ``eps`` in place of the sum.

    Args:
        beta1: of the average of normalised updates.
        beta2: of the average of squares.
        eps: added to the denominator; in units of the gradient.
        preconditioner: what is averaged, as in `TrueGradAdam`.
        alpha: multiplies the update. (The paper's algorithm averages the updates times the learning rate; with a learning
            rate that changes, a schedule acts a little later there.)
        debiased: whether the averages are corrected for starting at zero.

    Raises:
        OptionError: an option is not valid.

    Reference: Ziyin, Wang, Ueda, "LaProp: Separating Momentum and Adaptivity in Adam", arXiv:2002.04839, 2020, algorithm 1.
    Nestler, "TrueGrad", github.com/ClashLuke/TrueGrad, 2022.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY, eps=NON_NEGATIVE, alpha=ANY)
    State = TrueGradLaPropState

    def __init__(
        self,
        beta1: Number = 0.9,
        beta2: Number = 0.99,
        eps: Number = 1e-12,
        *,
        preconditioner: Preconditioner = "mean_square",
        alpha: Number = 1.0,
        debiased: bool = True,
    ) -> None:
        super().__init__(
            {
                "beta1": beta1,
                "beta2": beta2,
                "eps": eps,
                "preconditioner": preconditioner,
                "alpha": alpha,
                "debiased": debiased,
            }
        )

    def init(self, param: Tensor, settings: Settings) -> TrueGradLaPropState:
        """Zeros."""
        return TrueGradLaPropState(zeros(param), zeros(param))

    def update(
        self, update: Tensor, state: TrueGradLaPropState, settings: Settings, context: Context
    ) -> tuple[Tensor, TrueGradLaPropState]:
        """One step."""
        exp_avg_sq = average(state.exp_avg_per_sample_sq, self.square(settings, context), settings.beta2)
        step_size: Number = settings.alpha
        scale: Number = 1.0
        if settings.debiased:
            step_size = settings.alpha / debias(settings.beta1, context.count)
            scale = root(debias(settings.beta2, context.count))
        normalized = update / (exp_avg_sq.sqrt() / scale + settings.eps)
        exp_avg = average(state.exp_avg_per_sample_normalized, normalized.to(exp_avg_sq.dtype), settings.beta1)
        return exp_avg * step_size, TrueGradLaPropState(exp_avg_sq, exp_avg)
