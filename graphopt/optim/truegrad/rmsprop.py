"""RMSprop with the true second moment."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import average, debias, root, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.truegrad.per_sample import PerSampleRule, Preconditioner


class TrueGradRMSpropState(NamedTuple):
    """The average of the squared per-sample gradients, like the parameter."""

    exp_avg_per_sample_sq: Tensor


class TrueGradRMSprop(PerSampleRule):
    """The update, divided by the root of the average of squared per-sample gradients.

    ``v = smoothing v + (1 - smoothing) n s``, update ``inner(u) / (√v̂ + eps)``, with s the ``SUM_GRAD_SQUARED`` of the
    gradient, n its ``NUM_SAMPLES`` and ``v̂ = v / (1 - smoothing^t)``. `graphopt.optim.TGRMSProp` with ``graft=False`` has the
    larger of √v̂ and ``eps`` in place of the sum.

    Args:
        smoothing: of the average of squares.
        eps: added to the denominator; in units of the gradient.
        preconditioner: what is averaged, as in `TrueGradAdam`.
        debiased: whether the average is corrected for starting at zero.
        inner: modules that make of the update what is divided; with an average, this is `TrueGradAdam`.

    Raises:
        OptionError: an option is not valid.

    Reference: Tieleman, Hinton, "Lecture 6.5: rmsprop", COURSERA: Neural Networks for Machine Learning, 2012. Nestler,
    "TrueGrad", github.com/ClashLuke/TrueGrad, 2022.
    """

    bounds = numbers(smoothing=DECAY, eps=NON_NEGATIVE)
    State = TrueGradRMSpropState

    def __init__(
        self,
        smoothing: Number = 0.99,
        eps: Number = 1e-12,
        *,
        preconditioner: Preconditioner = "mean_square",
        debiased: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(
            {"smoothing": smoothing, "eps": eps, "preconditioner": preconditioner, "debiased": debiased},
            **({} if inner is None else {"inner": inner}),
        )

    def init(self, param: Tensor, settings: Settings) -> TrueGradRMSpropState:
        """Zeros."""
        return TrueGradRMSpropState(zeros(param))

    def update(
        self, update: Tensor, state: TrueGradRMSpropState, settings: Settings, context: Context
    ) -> tuple[Tensor, TrueGradRMSpropState]:
        """One step."""
        exp_avg_sq = average(state.exp_avg_per_sample_sq, self.square(settings, context), settings.smoothing)
        scale: Number = root(debias(settings.smoothing, context.count)) if settings.debiased else 1.0
        new = context.operands.get("inner", update) / (exp_avg_sq.sqrt() / scale + settings.eps)
        return new, TrueGradRMSpropState(exp_avg_sq)
