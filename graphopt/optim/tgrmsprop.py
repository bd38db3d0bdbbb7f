"""TGRMSProp: debiased RMSProp with the true second moment."""

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt.optim.truegrad_optimizer import Options, TrueGradOptimizer


class TGRMSProp(TrueGradOptimizer):
    r"""RMSProp with the true second moment and Adam's correction of its bias, and without momentum.

    With g the gradient, s its ``SUM_GRAD_SQUARED``, n its ``NUM_SAMPLES``, t counting steps and k counting statistics
    (``num_statistics``)::

        w = β1 w + (1 - β1) g²                    exp_avg_sq
        v = β2 v + (1 - β2) n s                   exp_avg_per_sample_sq, see preconditioner
        b = g / max(√(w / (1 - β1^t)), ε)         the baseline
        u = g / max(√(v / (1 - β2^k)), ε)
        θ = θ - lr λ θ - lr u f                   f = ‖b‖ / (‖u‖ + ε) for each tensor if graft, else 1

    It is `TGLaProp` without momentum. (`torch.optim.RMSprop` leaves the bias in: its first step is 1 / √(1 - β) times as
    long.) The baseline step is ``θ = θ - lr λ θ - lr b``. On the scale of the statistic see `TGAdamW`.

    Args:
        params: parameters, ``named_parameters()`` (errors will then name them), or groups with options of their own.
        lr: learning rate, a number or a tensor of one element.
        betas: (β1, β2), for the squares of the baseline and of the per-sample direction; one number, or a tuple of one,
            stands for both. (`torch.optim.lr_scheduler.OneCycleLR` takes ``betas`` for a momentum: pass it
            ``cycle_momentum=False``.)
        eps: ε, lower limit of both roots, in units of the gradient.
        weight_decay: λ, decoupled, applied once per parameter and step.
        graft: give the step of every tensor the norm of the baseline's. Without it there is no ``exp_avg_sq``, unless one
            of the next two options needs it.
        default_to_baseline: for a parameter without statistic take the baseline step. Otherwise that is an error, unless
            the gradient is zero everywhere: then so is the statistic.
        enforce_baseline: take the baseline step for all parameters, and keep no average of the statistic.
        **options: as in `TGAdamW`: maximize, foreach, capturable, differentiable, fused, default_to_adam,
            preconditioner, weight_decay_cls.

    Raises:
        OptionError: an option is not valid.
        UnsupportedError: a parameter is complex.

    Reference: Tieleman, Hinton, "Lecture 6.5: rmsprop", COURSERA: Neural Networks for Machine Learning, 2012. Nestler,
    "TrueGrad", github.com/ClashLuke/TrueGrad, 2022.

    Example:
        >>> import torch
        >>> from graphopt.annotations import publish
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = TGRMSProp([weight], lr=0.1, weight_decay=0.0, graft=False)
        >>> weight.grad = torch.tensor([0.5, 0.5])  # the mean of 0.5 and 0.5, the mean of 2 and -1
        >>> publish(weight, torch.tensor([0.125, 1.25]), num_samples=2)
        >>> optimizer.step()
        >>> weight.detach()  # a full step where the samples agree
        tensor([0.9000, 0.9684])
    """

    _baseline_name = "debiased RMSProp"
    _betas_form = "beta, (beta,) or (beta1, beta2), for the squares of the baseline and of the per-sample direction"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: float | tuple[float] | tuple[float, float] = (0.9,),
        eps: float = 1e-12,
        weight_decay: float = 1e-2,
        graft: bool = True,
        default_to_baseline: bool = False,
        enforce_baseline: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, graft, default_to_baseline, enforce_baseline, **options)

    def _betas(self, betas: Any) -> tuple[float, float, float, float] | None:
        if isinstance(betas, (int, float, Tensor)):
            betas = (betas,)
        if not isinstance(betas, (tuple, list)) or len(betas) not in (1, 2):
            return None
        return 0.0, betas[0], 0.0, betas[-1]
