"""TGAdamW: AdamW whose second moment is the mean over samples of the squared per-sample gradient."""

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt.optim.truegrad_optimizer import Options, TrueGradOptimizer


class TGAdamW(TrueGradOptimizer):
    r"""AdamW with the true second moment: squares are taken per sample, then averaged.

    With g the gradient, s its ``SUM_GRAD_SQUARED``, n its ``NUM_SAMPLES``, and t counting steps::

        m = β1 m + (1 - β1) g                    exp_avg
        w = β2 w + (1 - β2) g²                   exp_avg_sq
        v = β3 v + (1 - β3) n s                  exp_avg_per_sample_sq, see preconditioner
        b = m / max(√(w / (1 - β2^t)), ε)        Adam's direction, the baseline
        u = m / max(√(v / (1 - β3^k)), ε)        the direction; k = num_statistics counts the statistics seen
        θ = θ - lr λ θ - lr / (1 - β1^t) u f     f = ‖b‖ / (‖u‖ + ε) for each tensor if graft, else 1

    **The scale of the statistic.** For a mean loss over n samples, n s is the mean of the squared per-sample
    gradients. It does not depend on the batch size, so that batches of different sizes average with equal weight. It
    is at least g², with equality where all samples agree: without grafting the step is at most Adam's, and falls below
    it where the samples disagree. It grows with the loss as g² does, so a sum loss or a loss scale changes nothing. (s
    alone would let the step grow with the square root of the batch size.) With grafting a constant factor cancels.

    Gradients and statistics are paired by `graphopt.annotations`: whatever ``zero_grad``, ``GradScaler`` and clipping
    did to ``p.grad`` has been done to the statistic when it is read here.

    Args:
        params: parameters, ``named_parameters()`` (errors will then name them), or groups with options of their own.
        lr: learning rate, a number or a tensor of one element.
        betas: (β1, β2, β3), for the averages of gradient, squared gradient and statistic; with two, β3 = β2.
        eps: ε, lower limit of both roots, in units of the gradient; only the baseline step adds it, as torch does.
        weight_decay: λ, decoupled, applied once per parameter and step.
        graft: give the step of every tensor the norm of Adam's. Without it there is no ``exp_avg_sq``, unless one of
            the next two options needs it.
        default_to_baseline: for a parameter without statistic take the step of `torch.optim.AdamW`. Otherwise that is
            an error, unless the gradient is zero everywhere: then so is the statistic.
        enforce_baseline: take the step of `torch.optim.AdamW` for all parameters, and keep no
            ``exp_avg_per_sample_sq``.
        maximize: ascend instead of descend.
        foreach: treat small tensors of equal size together; ``False`` for one tensor after another.
        capturable: only ``False``.
        differentiable: only ``False``.
        fused: run dense tensors of more than 4096 elements through compiled kernels. They are compiled in the first
            step, before anything is changed, and never again, whatever the number and sizes of the tensors and the
            learning rates become. With ``foreach`` and ``fused`` both ``None``: from 2**20 elements on, and with a
            warning where compiling fails; fewer are treated as with ``foreach``.
        default_to_adam: another name for ``default_to_baseline``, from TrueGrad's README.
        preconditioner: what v averages. ``"mean_square"``: n s, the mean of the squared per-sample gradients of a mean
            loss. ``"variance"``: max(n s - g², 0), their variance; it needs two samples or more, and is zero where all
            samples agree, so ε or grafting then bounds the step. ``"squared_mean"``: g², the square of the mean; it
            needs no statistic, and is the baseline, normalised by β3 and with ε as a limit. (mean_square
            is the sum of the two others.)
        weight_decay_cls: a `WeightDecayChain`, or one link of it, in the place of λ θ; ``None`` for λ θ.

    Raises:
        OptionError: an option is not valid.
        UnsupportedError: a parameter is complex.

    Reference: Nestler, "TrueGrad", github.com/ClashLuke/TrueGrad, 2022. Loshchilov, Hutter, "Decoupled Weight Decay
    Regularization", arXiv:1711.05101, 2017, algorithm 2. Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling Adaptive
    Gradient Methods from Learning Rates", arXiv:2002.11803, 2020 (grafting). Roulet, Agarwala, "Per-example gradients: a
    new frontier for understanding and improving optimizers", arXiv:2510.00236, 2025 (which square is better).

    Example:
        >>> import torch
        >>> from graphopt.annotations import publish
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = TGAdamW([weight], lr=0.1, weight_decay=0.0, graft=False)
        >>> weight.grad = torch.tensor([0.5, 0.5])  # the mean of 0.5 and 0.5, the mean of 2 and -1
        >>> publish(weight, torch.tensor([0.125, 1.25]), num_samples=2)
        >>> optimizer.step()
        >>> weight.detach()  # a full step where the samples agree
        tensor([0.9000, 0.9684])
    """

    _baseline_name = "AdamW"
    _betas_form = (
        "(beta1, beta2) or (beta1, beta2, beta3), for the averages of the gradient, its square and the statistic"
    )
    _shared = ("exp_avg",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | tuple[float, float, float] = (0.9, 0.999, 0.999),
        eps: float = 1e-12,
        weight_decay: float = 1e-2,
        graft: bool = True,
        default_to_baseline: bool = False,
        enforce_baseline: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, graft, default_to_baseline, enforce_baseline, **options)

    def _betas(self, betas: Any) -> tuple[float, float, float, float] | None:
        if not isinstance(betas, (tuple, list)) or len(betas) not in (2, 3):
            return None
        return betas[0], betas[1], betas[0], betas[-1]
