"""TGAdamW: AdamW whose second moment is the mean over samples of the squared per-sample gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt import _compat
from graphopt.errors import OptionError
from graphopt.optim.tgadamw_update import Tensors, Update, make_coefficients, plan
from graphopt.optim.truegrad_optimizer import Gradient, TrueGradOptimizer, new_count, state_dtype

# What a group lacks that comes from the state_dict of torch.optim.AdamW.
_DEFAULTS: dict[str, Any] = {
    "graft": True,
    "default_to_baseline": False,
    "enforce_baseline": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


class TGAdamW(TrueGradOptimizer):
    r"""AdamW with the true second moment: squares are taken per sample, then averaged.

    With g the gradient, s its ``SUM_GRAD_SQUARED``, n its ``NUM_SAMPLES``, and t counting steps::

        m = β1 m + (1 - β1) g                    exp_avg
        w = β2 w + (1 - β2) g²                   exp_avg_sq
        v = β3 v + (1 - β3) n s                  exp_avg_per_sample_sq
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

    Raises:
        OptionError: an option is not valid.
        UnsupportedError: a parameter is complex.

    Reference: Nestler, "TrueGrad", github.com/ClashLuke/TrueGrad, 2022. Loshchilov, Hutter, "Decoupled Weight Decay
    Regularization", arXiv:1711.05101, 2017, algorithm 2. Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling Adaptive
    Gradient Methods from Learning Rates", arXiv:2002.11803, 2020 (grafting).

    Example:
        >>> from graphopt.annotations import publish
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = TGAdamW([weight], lr=0.1, weight_decay=0.0, graft=False)
        >>> weight.grad = torch.tensor([0.5, 0.5])  # the mean of 0.5 and 0.5, the mean of 2 and -1
        >>> publish(weight, torch.tensor([0.125, 1.25]), num_samples=2)
        >>> optimizer.step()
        >>> weight.detach()  # a full step where the samples agree
        tensor([0.9000, 0.9684])
    """

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
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        default_to_adam: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "graft": graft,
            "default_to_baseline": default_to_baseline or default_to_adam,
            "enforce_baseline": enforce_baseline,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in _DEFAULTS.items():
                group.setdefault(option, default)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and the gradients; called once, with gradients enabled.

        Returns:
            What the closure returned, or ``None``.

        Raises:
            MissingAnnotation: parameters have no statistic; the text names them. Nothing was changed.
            StaleAnnotation: a gradient no longer belongs to its statistic. Nothing was changed.
            UnsupportedError: a gradient is sparse. Nothing was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all()
        return loss

    @_compat.disable_dynamo  # annotations are read in Python, and the kernels are compiled here
    def _update_all(self) -> None:
        gradients = self._gradients()
        numbers = {id(group): _numbers(group) for group in self.param_groups}
        updates = [self._prepare(gradient, numbers[id(gradient.group)]) for gradient in gradients]
        runs = plan(updates)  # compiles, so it can fail: before anything is changed
        counts = ("step", "num_statistics")
        counted = [update.state[name] for update in updates if update.tensors.statistic is not None for name in counts]
        if counted:  # torch's AdamW counts the steps of the others
            torch._foreach_add_(counted, 1)
        for run in runs:
            run()

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        lr, betas = group["lr"], group["betas"]
        if (isinstance(lr, Tensor) and lr.numel() != 1) or not float(lr) >= 0.0:
            raise OptionError(f"TGAdamW: lr={lr}; expected a number or a one-element tensor, at least 0")
        if len(betas) not in (2, 3) or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise OptionError(
                f"TGAdamW: betas={betas}; expected (beta1, beta2) or (beta1, beta2, beta3), for the averages of the "
                "gradient, its square and the statistic, each at least 0 and below 1"
            )
        for name in ("eps", "weight_decay"):
            if not float(group[name]) >= 0.0:
                raise OptionError(f"TGAdamW: {name}={group[name]}; expected a number, at least 0")

    def _prepare(self, gradient: Gradient, numbers: tuple[float, ...]) -> Update:
        """The tensors and coefficients of one parameter's update; creates the state where there is none."""
        group, param, grad, statistic, num_samples = gradient
        state = self._init_state(group, param, grad)
        num_statistics = 1 if statistic is None else state["num_statistics"].item() + 1
        coefficients = make_coefficients(*numbers, state["step"].item() + 1, num_statistics, num_samples)
        per_sample_sq = None if statistic is None else state["exp_avg_per_sample_sq"]
        tensors = Tensors(param, grad, statistic, state["exp_avg"], state.get("exp_avg_sq"), per_sample_sq)
        flat = tensors.flat()
        return Update(group, state, tensors if flat is None else flat, flat is not None, coefficients)

    def _init_state(self, group: dict[str, Any], param: Tensor, grad: Tensor) -> dict[str, Any]:
        # Which entries there are depends on the options alone, not on whether a statistic has arrived yet: a checkpoint
        # is loaded into the entries of a fresh optimizer.
        state: dict[str, Any] = self.state[param]
        dtype = state_dtype(param)
        if "exp_avg" not in state:
            state["step"] = new_count()
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        if "exp_avg_sq" not in state and (group["graft"] or group["default_to_baseline"] or group["enforce_baseline"]):
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            if state["step"] > 0:  # grafting was switched on later: as if the gradient had always been this one
                seen = 1 - float(group["betas"][1]) ** state["step"].item()
                state["exp_avg_sq"].add_(grad.to(dtype).square(), alpha=seen)
        if "exp_avg_per_sample_sq" not in state and not group["enforce_baseline"]:
            state["exp_avg_per_sample_sq"] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
            state["num_statistics"] = new_count()
        return state


def _numbers(group: dict[str, Any]) -> tuple[float, ...]:
    """lr, beta1, beta2, beta3, eps and weight_decay of a group, which may hold some of them as tensors."""
    beta1, beta2, *beta3 = group["betas"]
    numbers = (group["lr"], beta1, beta2, beta3[0] if beta3 else beta2, group["eps"], group["weight_decay"])
    return tuple([float(number) for number in numbers])
