"""What the TG optimizers share: options, reading the statistic, the state, and the step."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt import annotations
from graphopt.annotations import SUM_GRAD_SQUARED
from graphopt.errors import MissingAnnotation, OptionError, StaleAnnotation, UnsupportedError
from graphopt.optim.base_optimizer import BaseOptimizer, new_count, state_dtype
from graphopt.optim.foreach import foreach
from graphopt.optim.truegrad_update import AVERAGES, Numbers, Preconditioner, Tensors, Update, make_coefficients, plan
from graphopt.optim.weight_decay import WeightDecay, WeightDecayChain

_MAX_NAMES = 10

_MISSING = """\
{optimizer}.step(): {num_missing} of {num_params} parameters with a gradient have no {key}: {names}.
It is provided by {provider}, and exists between backward() and the zero_grad() that follows.
Nothing was changed. Either
  - call graphopt.transform(model) before training; graphopt.records(model) says what the pass skipped, and why; or
  - pass default_to_baseline=True: {baseline} for the parameters that lack the statistic; or
  - put these parameters into a group with enforce_baseline=True."""


# What a group lacks that comes from the state_dict of one of torch's optimizers.
_DEFAULTS: dict[str, Any] = {
    "graft": True,
    "default_to_baseline": False,
    "enforce_baseline": False,
    "preconditioner": "mean_square",
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


class Options(TypedDict, total=False):
    """The keyword-only options of all TG optimizers."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    default_to_adam: bool
    preconditioner: Preconditioner
    weight_decay_cls: WeightDecayChain | WeightDecay | None


class Gradient(NamedTuple):
    """A parameter that has a gradient, and what its update needs to know."""

    group: dict[str, Any]
    param: Tensor
    grad: Tensor
    statistic: Tensor | None  # SUM_GRAD_SQUARED; None: take the baseline step
    num_samples: int


class TrueGradOptimizer(BaseOptimizer):
    """An optimizer that normalises by the statistic of `SUM_GRAD_SQUARED`, and has a baseline that does not.

    A subclass says which averages it keeps and what its betas mean; the maths is in `graphopt.optim.truegrad_update`.
    """

    updates_each_parameter_alone = True  # so layers can be streamed (`graphopt.passes.LayerToLayer`)
    _why_not_complex = "squares of per-sample gradients are defined for real ones"
    _baseline_name: ClassVar[str]
    _normalizes_first: ClassVar[bool] = False  # the momentum follows the normalisation
    # Names of averages, as in `Tensors`: of both directions, of the baseline, of the per-sample direction.
    _shared: ClassVar[tuple[str, ...]] = ()
    _of_baseline: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)
    _per_sample: ClassVar[tuple[str, ...]] = ("exp_avg_per_sample_sq",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: float | tuple[float, ...],
        eps: float,
        weight_decay: float,
        graft: bool,
        default_to_baseline: bool,
        enforce_baseline: bool,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        default_to_adam: bool = False,
        preconditioner: Preconditioner = "mean_square",
        weight_decay_cls: WeightDecayChain | WeightDecay | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "graft": graft,
            "default_to_baseline": default_to_baseline or default_to_adam,
            "enforce_baseline": enforce_baseline,
            "preconditioner": preconditioner,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, weight_decay_cls)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in _DEFAULTS.items():
                group.setdefault(option, default)

    def check(self) -> None:
        """Raise what ``step`` would raise about gradients and statistics; without an error this does nothing."""
        self._gradients()

    @abstractmethod
    def _betas(self, betas: Any) -> tuple[float, float, float, float] | None:
        """Read the option.

        Returns:
            The betas of momentum and square, of the baseline and of the per-sample direction; ``None`` where the
            option has not the form that `_betas_form` describes.
        """

    _betas_form: ClassVar[str]

    def _update_all(self) -> None:
        gradients = self._gradients()
        numbers = {id(group): self._numbers(group) for group in self.param_groups}
        decay = self.weight_decay_cls
        if decay is not None and decay.is_plain:
            decay = None  # the update has it
        updates, pulls = [], []
        for gradient in gradients:
            pull = None
            if decay is not None:
                decay.init(gradient.param, self.state[gradient.param])
                pull = torch.empty_like(gradient.param, dtype=state_dtype(gradient.param), requires_grad=False)
                pulls.append(pull)
            updates.append(self._prepare(gradient, numbers[id(gradient.group)], pull))
        runs = plan(type(self).__name__, updates)  # compiles, so it can fail: before anything is changed
        if decay is not None and pulls:
            params = [gradient.param for gradient in gradients]
            foreach("copy_", pulls, decay(params, [self.state[param] for param in params]))
        counted = [update.state["step"] for update in updates if not update.is_adamw]  # torch's AdamW counts its own
        counted += [u.state["num_statistics"] for u in updates if u.tensors.exp_avg_per_sample_sq is not None]
        if counted:
            torch._foreach_add_(counted, 1)
        for run in runs:
            run()

    def _check_options(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if group["differentiable"]:
            raise OptionError(
                f"{name}: differentiable=True is not supported, the update is made in place. Use a step of "
                "graphopt.optim.functional, or torch.optim.AdamW(differentiable=True)"
            )
        if group["capturable"]:
            raise OptionError(
                f"{name}: capturable=True is not supported. Each step pairs gradients with their statistics in Python, "
                "which a replayed CUDA graph would leave out. Capture forward and backward only"
            )
        if group["fused"] and group["foreach"]:
            raise OptionError(f"{name}: fused=True and foreach=True exclude each other; pass one of them")
        if group["preconditioner"] not in get_args(Preconditioner):
            known = ", ".join(map(repr, get_args(Preconditioner)))
            raise OptionError(f"{name}: preconditioner={group['preconditioner']!r}; expected one of {known}")
        super()._check_options(group)
        betas = self._betas(group["betas"])
        if betas is None or not all(0.0 <= float(beta) < 1.0 for beta in betas):
            raise OptionError(
                f"{name}: betas={group['betas']}; expected {self._betas_form}, each at least 0 and below 1"
            )

    def _gradients(self) -> list[Gradient]:
        """Every parameter that has a gradient, with its statistic.

        Raises:
            MissingAnnotation: parameters have no statistic, in groups that need one; the text names them.
            StaleAnnotation: a gradient was changed in a way that is not a rescaling.
            OptionError: the variance is asked for, but there are not 2 samples.
            UnsupportedError: a gradient is sparse.
        """
        gradients, missing = [], []
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided:
                    raise UnsupportedError(
                        f"{type(self).__name__}.step(): the gradient of {self._name(param)} is sparse ({grad.layout}), "
                        "and there are no per-sample squares of those. Build the layer with sparse=False, or give this "
                        "parameter to torch.optim.SparseAdam"
                    )
                statistic, num_samples = None, 1
                if not group["enforce_baseline"] and group["preconditioner"] != "squared_mean":
                    statistic, num_samples = self._statistic(param)
                    if statistic is None and not group["default_to_baseline"]:
                        # torch.distributed.checkpoint makes a step with zero gradients before there is any statistic.
                        if grad.any():
                            missing.append(param)
                        statistic = grad.to(state_dtype(param))
                    elif statistic is not None and num_samples < 2 and group["preconditioner"] == "variance":
                        self._refuse_variance(param, num_samples)
                # Without a count (assigned by hand, as BackPACK does) the statistic stands as it is.
                gradients.append(Gradient(group, param, grad, statistic, num_samples or 1))
        if missing:
            names = "; ".join(self._name(param) for param in missing[:_MAX_NAMES])
            raise MissingAnnotation(
                _MISSING.format(
                    optimizer=type(self).__name__,
                    baseline=self._baseline_name,
                    num_missing=len(missing),
                    num_params=len(gradients),
                    key=SUM_GRAD_SQUARED.name,
                    names=names + ("; ..." if len(missing) > _MAX_NAMES else ""),
                    provider=SUM_GRAD_SQUARED.provider,
                )
            )
        return gradients

    def _statistic(self, param: Tensor) -> tuple[Tensor | None, int]:
        try:
            statistic, num_samples = annotations.find_statistic(param)
        except StaleAnnotation as error:
            raise StaleAnnotation(f"{type(self).__name__}.step(), {self._name(param)}: {error}") from error
        if statistic is None:
            return None, 0
        if statistic.shape != param.shape or statistic.device != param.device:
            raise OptionError(
                f"{type(self).__name__}.step(), {self._name(param)}: {SUM_GRAD_SQUARED.name} has shape "
                f"{tuple(statistic.shape)} on {statistic.device}, expected the parameter's shape on {param.device}"
            )
        return statistic, num_samples

    def _refuse_variance(self, param: Tensor, num_samples: int) -> None:
        found = "1 sample" if num_samples else "an unknown number of samples (num_samples was not set)"
        raise OptionError(
            f"{type(self).__name__}.step(), {self._name(param)}: preconditioner='variance' needs the gradients of at least "
            f"2 samples and found {found}. Accumulate micro-batches before the step, drop the last batch if it is of one "
            "sample (DataLoader(drop_last=True)), or pass preconditioner='mean_square'"
        )

    def _numbers(self, group: dict[str, Any]) -> Numbers:
        """The options of a group, which may hold some of them as tensors."""
        betas = self._betas(group["betas"])
        assert betas is not None, "the options were checked"
        numbers = (group["lr"], *betas, group["eps"], group["weight_decay"])
        return Numbers._make([float(number) for number in numbers])

    def _prepare(self, gradient: Gradient, numbers: Numbers, pull: Tensor | None) -> Update:
        """The tensors and coefficients of one parameter's update; creates the state where there is none."""
        group, param, grad, statistic, num_samples = gradient
        state = self._init_state(gradient, numbers)
        is_baseline = statistic is None and (group["enforce_baseline"] or group["preconditioner"] != "squared_mean")
        used = self._shared + self._of_baseline + (() if is_baseline else self._per_sample)
        num_statistics = 1.0 if is_baseline else state["num_statistics"].item() + 1
        coefficients = make_coefficients(
            numbers, state["step"].item() + 1, num_statistics, num_samples, self._normalizes_first, is_baseline
        )
        averages = [state.get(name) if name in used else None for name in AVERAGES]
        tensors = Tensors(param, grad, statistic, pull, *averages)
        flat = tensors.flat()
        return Update(group, state, tensors if flat is None else flat, flat is not None, coefficients)

    def _init_state(self, gradient: Gradient, numbers: Numbers) -> dict[str, Any]:
        # Which entries there are depends on the options alone, not on whether a statistic has arrived yet: a checkpoint
        # is loaded into the entries of a fresh optimizer.
        group, param = gradient.group, gradient.param
        state: dict[str, Any] = self.state[param]
        if "step" not in state:
            state["step"] = new_count()
        for name in self._shared:
            if name not in state:
                state[name] = _zeros(param)
        if group["graft"] or group["default_to_baseline"] or group["enforce_baseline"]:
            new = [name for name in self._of_baseline if name not in state]
            for name in new:
                state[name] = _zeros(param)
            if new and state["step"] > 0:  # grafting was switched on later
                _start_late(state, gradient, numbers)
        if not group["enforce_baseline"] and any(name not in state for name in self._per_sample):
            for name in self._per_sample:
                state[name] = _zeros(param)
            state["num_statistics"] = new_count()
        return state


def _zeros(param: Tensor) -> Tensor:
    return torch.zeros_like(param, dtype=state_dtype(param), requires_grad=False)


def _start_late(state: dict[str, Any], gradient: Gradient, numbers: Numbers) -> None:
    """Fill the averages of the baseline as if the gradient had always been this one."""
    grad = gradient.grad.to(state["exp_avg_sq"].dtype)
    num_steps = state["step"].item()
    state["exp_avg_sq"].copy_(grad.square()).mul_(1 - numbers.beta_sq**num_steps)
    if "exp_avg_normalized" in state:
        ascent = -grad if gradient.group["maximize"] else grad
        normalized = ascent / ascent.abs().clamp_(min=numbers.eps)
        state["exp_avg_normalized"].copy_(normalized).mul_(1 - numbers.beta**num_steps)
