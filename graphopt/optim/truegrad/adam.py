"""Adam with the true second moment."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, debias, root, zeros
from graphopt.optim.core.bounds import ANY, DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.truegrad.per_sample import PerSampleRule, Preconditioner


class TrueGradAdamState(NamedTuple):
    """Averages of the update and of the squared per-sample gradients, like the parameter."""

    exp_avg: Tensor
    exp_avg_per_sample_sq: Tensor


class TrueGradAMSGradState(NamedTuple):
    """Averages, and the largest (not yet debiased) average of squares so far."""

    exp_avg: Tensor
    exp_avg_per_sample_sq: Tensor
    max_exp_avg_per_sample_sq: Tensor


class TrueGradAdam(PerSampleRule):
    """The gradient's average, divided by the root of the average of squared per-sample gradients.

    ``m = beta1 m + (1 - beta1) u``, ``v = beta2 v + (1 - beta2) n s``, update ``alpha m̂ / (√v̂ + eps)``, with s the
    ``SUM_GRAD_SQUARED`` of the gradient, n its ``NUM_SAMPLES``, ``m̂ = m / (1 - beta1^t)`` and ``v̂ = v / (1 - beta2^t)``.
    For a mean loss n s is at least the squared gradient, so the step is at most Adam's, and smaller where samples disagree.
    `graphopt.optim.TGAdamW` with ``graft=False`` has the larger of √v̂ and ``eps`` in place of the sum.

    Args:
        beta1: of the average of updates.
        beta2: of the average of squares.
        eps: added to the denominator; in units of the gradient.
        preconditioner: what is averaged: ``"mean_square"`` n s; ``"variance"`` max(n s - g², 0), which needs two samples or
            more; ``"squared_mean"`` g², which makes it Adam.
        amsgrad: divide by the largest average of squares so far (Reddi et al., arXiv:1904.09237, 2018).
        alpha: multiplies the update.
        debiased: whether the averages are corrected for starting at zero.

    Raises:
        OptionError: an option is not valid.

    Reference: Nestler, "TrueGrad", github.com/ClashLuke/TrueGrad, 2022. Kingma, Ba, "Adam", arXiv:1412.6980, 2014,
    algorithm 1.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY, eps=NON_NEGATIVE, alpha=ANY)
    State = TrueGradAdamState

    def __init__(
        self,
        beta1: Number = 0.9,
        beta2: Number = 0.999,
        eps: Number = 1e-12,
        *,
        preconditioner: Preconditioner = "mean_square",
        amsgrad: bool = False,
        alpha: Number = 1.0,
        debiased: bool = True,
    ) -> None:
        super().__init__(
            {
                "beta1": beta1,
                "beta2": beta2,
                "eps": eps,
                "preconditioner": preconditioner,
                "amsgrad": amsgrad,
                "alpha": alpha,
                "debiased": debiased,
            }
        )

    def state_type(self, settings: Settings) -> type[tuple[Any, ...]]:
        """With ``amsgrad`` there is one more average."""
        return TrueGradAMSGradState if settings.amsgrad else TrueGradAdamState

    def init(self, param: Tensor, settings: Settings) -> TrueGradAdamState | TrueGradAMSGradState:
        """Zeros."""
        if settings.amsgrad:
            return TrueGradAMSGradState(zeros(param), zeros(param), zeros(param))
        return TrueGradAdamState(zeros(param), zeros(param))

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        exp_avg = average(state.exp_avg, update, settings.beta1)
        exp_avg_sq = average(state.exp_avg_per_sample_sq, self.square(settings, context), settings.beta2)
        largest = exp_avg_sq.maximum(state.max_exp_avg_per_sample_sq) if settings.amsgrad else exp_avg_sq
        step_size: Number = settings.alpha
        scale: Number = 1.0
        if settings.debiased:
            step_size = settings.alpha / debias(settings.beta1, context.count)
            scale = root(debias(settings.beta2, context.count))
        new = exp_avg * step_size / (largest.sqrt() / scale + settings.eps)
        if settings.amsgrad:
            return new, TrueGradAMSGradState(exp_avg, exp_avg_sq, largest)
        return new, TrueGradAdamState(exp_avg, exp_avg_sq)
