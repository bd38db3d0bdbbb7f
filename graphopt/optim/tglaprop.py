"""TGLaProp: LaProp, whose momentum is of normalised gradients, with the true second moment."""

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt.optim.truegrad_optimizer import Options, TrueGradOptimizer


class TGLaProp(TrueGradOptimizer):
    r"""LaProp with the true second moment: squares are taken per sample, then averaged.

    Adam divides its momentum by the root of the second moment; LaProp divides each gradient, and then lets the momentum
    average what comes out. With g the gradient, s its ``SUM_GRAD_SQUARED``, n its ``NUM_SAMPLES``, t counting steps and k
    counting statistics (``num_statistics``)::

        w = β2 w + (1 - β2) g²                                    exp_avg_sq
        b = β1 b + (1 - β1) g / max(√(w / (1 - β2^t)), ε)         exp_avg_normalized: the baseline, LaProp
        v = β4 v + (1 - β4) n s                                   exp_avg_per_sample_sq, see preconditioner
        u = β3 u + (1 - β3) g / max(√(v / (1 - β4^k)), ε)         exp_avg_per_sample_normalized
        b̂ = b / (1 - β1^t)    û = u / (1 - β3^k)
        θ = θ - lr λ θ - lr û f                                   f = ‖b̂‖ / (‖û‖ + ε) for each tensor if graft, else 1

    The baseline step is ``θ = θ - lr λ θ - lr b̂``. On the scale of the statistic see `TGAdamW`.

    Args:
        params: parameters, ``named_parameters()`` (errors will then name them), or groups with options of their own.
        lr: learning rate, a number or a tensor of one element.
        betas: (β1, β2, β3, β4), for momentum and square of the baseline, and of the per-sample direction; with two, β3 = β1
            and β4 = β2.
        eps: ε, lower limit of both roots, in units of the gradient.
        weight_decay: λ, decoupled, applied once per parameter and step.
        graft: give the step of every tensor the norm of LaProp's. Without it the baseline's averages are not kept, unless
            one of the next two options needs them.
        default_to_baseline: for a parameter without statistic take the baseline step. Otherwise that is an error, unless
            the gradient is zero everywhere: then so is the statistic.
        enforce_baseline: take the baseline step for all parameters, and keep no averages of the statistic.
        **options: as in `TGAdamW`: maximize, foreach, capturable, differentiable, fused, default_to_adam,
            preconditioner, weight_decay_cls.

    Raises:
        OptionError: an option is not valid.
        UnsupportedError: a parameter is complex.

    Reference: Ziyin, Wang, Ueda, "LaProp: Separating Momentum and Adaptivity in Adam", arXiv:2002.04839, 2020,
    algorithm 1, with ε as a limit instead of a summand. Nestler, "TrueGrad", github.com/ClashLuke/TrueGrad, 2022.

    Example:
        >>> import torch
        >>> from graphopt.annotations import publish
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = TGLaProp([weight], lr=0.1, weight_decay=0.0, graft=False)
        >>> weight.grad = torch.tensor([0.5, 0.5])  # the mean of 0.5 and 0.5, the mean of 2 and -1
        >>> publish(weight, torch.tensor([0.125, 1.25]), num_samples=2)
        >>> optimizer.step()
        >>> weight.detach()  # a full step where the samples agree
        tensor([0.9000, 0.9684])
    """

    _baseline_name = "LaProp"
    _betas_form = (
        "(beta1, beta2) or (beta1, beta2, beta3, beta4), for momentum and square of the baseline, then of the per-sample "
        "direction"
    )
    _normalizes_first = True
    _of_baseline = ("exp_avg_sq", "exp_avg_normalized")
    _per_sample = ("exp_avg_per_sample_sq", "exp_avg_per_sample_normalized")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | tuple[float, float, float, float] = (0.9, 0.99),
        eps: float = 1e-12,
        weight_decay: float = 1e-2,
        graft: bool = True,
        default_to_baseline: bool = False,
        enforce_baseline: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, graft, default_to_baseline, enforce_baseline, **options)

    def _betas(self, betas: Any) -> tuple[float, float, float, float] | None:
        if not isinstance(betas, (tuple, list)) or len(betas) not in (2, 4):
            return None
        return betas[0], betas[1], betas[-2], betas[-1]
