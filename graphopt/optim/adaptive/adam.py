"""Adam."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, debias, root, zeros
from graphopt.optim.core.bounds import ANY, DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.core.renamed import renamed


class AdamState(NamedTuple):
    """Averages, each like the parameter, at least float32."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class AMSGradState(NamedTuple):
    """Averages, and the largest debiased square so far."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor


@renamed(debias="debiased")
class Adam(Rule):
    """The gradient's average, divided by the root of its square's average.

    ``m = beta1 m + (1 - beta1) u``, ``v = beta2 v + (1 - beta2) u²``, update ``alpha m̂ / (√v̂ + eps)``, with
    ``m̂ = m / (1 - beta1^t)`` and ``v̂ = v / (1 - beta2^t)``.

    Args:
        beta1: of the average.
        beta2: of the average of squares.
        eps: added to the denominator; in units of the gradient.
        amsgrad: divide by the largest average of squares so far (Reddi et al., arXiv:1904.09237, 2018).
        alpha: multiplies the update.
        debiased: whether the averages are corrected for starting at zero.
        eps_inside: add ``eps`` to ``√v`` rather than to ``√v̂``, that is before the correction (the paper's section 2).

    Raises:
        OptionError: a number is out of range.

    Reference: Kingma, Ba, "Adam", arXiv:1412.6980, 2014, algorithm 1.
    """

    bounds = numbers(beta1=DECAY, beta2=DECAY, eps=NON_NEGATIVE, alpha=ANY)
    State = AdamState

    def __init__(
        self,
        beta1: Number = 0.9,
        beta2: Number = 0.999,
        eps: Number = 1e-8,
        *,
        amsgrad: bool = False,
        alpha: Number = 1.0,
        debiased: bool = True,
        eps_inside: bool = False,
    ) -> None:
        super().__init__(
            {
                "beta1": beta1,
                "beta2": beta2,
                "eps": eps,
                "amsgrad": amsgrad,
                "alpha": alpha,
                "debiased": debiased,
                "eps_inside": eps_inside,
            }
        )

    def state_type(self, settings: Settings) -> type[tuple[Any, ...]]:
        """With ``amsgrad`` there is one more average."""
        return AMSGradState if settings.amsgrad else AdamState

    def init(self, param: Tensor, settings: Settings) -> AdamState | AMSGradState:
        """Zeros."""
        if settings.amsgrad:
            return AMSGradState(zeros(param), zeros(param), zeros(param))
        return AdamState(zeros(param), zeros(param))

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        exp_avg = average(state.exp_avg, update, settings.beta1)
        exp_avg_sq = average(state.exp_avg_sq, update * update, settings.beta2)
        square = exp_avg_sq
        if settings.amsgrad:
            square = exp_avg_sq.maximum(state.max_exp_avg_sq)
        step_size: Number = settings.alpha
        scale: Number = 1.0
        if settings.debiased:
            step_size = settings.alpha / debias(settings.beta1, context.count)
            scale = root(debias(settings.beta2, context.count))
        if settings.eps_inside:
            new = exp_avg * (step_size * scale) / (square.sqrt() + settings.eps)
        else:
            new = exp_avg * step_size / (square.sqrt() / scale + settings.eps)
        if settings.amsgrad:
            return new, AMSGradState(exp_avg, exp_avg_sq, square)
        return new, AdamState(exp_avg, exp_avg_sq)
