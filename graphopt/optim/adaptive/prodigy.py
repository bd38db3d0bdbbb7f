"""Prodigy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import average, choose, debias, dot, norm, root, scalar, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.context import Context, Everything, Number, Settings
from graphopt.optim.core.module import Rule


class ProdigyState(NamedTuple):
    """What is remembered of a parameter, at least float32.

    Attributes:
        exp_avg: average of ``d u``, like the parameter.
        exp_avg_sq: average of ``(d u)²``, like the parameter.
        s: weighted sum of gradients, like the parameter.
        p0: the parameter before its first step.
        r: the tensor's part of the numerator of the estimate, shape ().
        d: the estimate of the distance, shape (); the same for all parameters.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    s: Tensor
    p0: Tensor
    r: Tensor
    d: Tensor


class Prodigy(Rule):
    """`Adam` that finds its learning rate: it estimates the distance ``d`` to the solution from the way gone so far.

    With one ``d`` for all tensors, ``β3 = √beta2`` if it is not given and ``γ = lr`` (times Adam's correction, if
    ``debiased``): ``m = beta1 m + (1 - beta1) d u``, ``v = beta2 v + (1 - beta2) (d u)²``,
    ``r = β3 r + γ d² ⟨u, θ0 - θ⟩``, ``s = β3 s + γ d² u``, update ``γ d (m / (√v + d eps) + weight_decay θ)``, then
    ``d = max(d, d_coef r / ‖s‖₁)``. (The paper's factors ``1 - β3`` of r and s cancel.)

    It is the learning rate of its chain, so that schedulers weigh the sums, too, and must be last in it. The estimate is made
    of updates as they come in: in front of it, only put what leaves them gradients. ``lr`` enters the sums as that of the first
    parameter of the step.

    Args:
        lr: factor of the step size; 1 is the method's own.
        beta1: of the average.
        beta2: of the average of squares.
        beta3: of the sums; ``None`` for the root of ``beta2``.
        eps: added to the denominator; in units of the gradient.
        weight_decay: the decoupled weight decay; it follows the step size.
        d0: the first estimate of the distance, in units of the parameters; small.
        d_coef: factor of later estimates.
        debiased: whether Adam's averages are corrected for starting at zero.

    Raises:
        OptionError: a number is out of range.

    Cost: one pass over all tensors more than `Adam`, for the estimate.

    Reference: Mishchenko, Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", arXiv:2306.06101, 2023,
    algorithm 4.
    """

    bounds = numbers(
        lr=NON_NEGATIVE,
        beta1=DECAY,
        beta2=DECAY,
        beta3=DECAY,
        eps=NON_NEGATIVE,
        weight_decay=NON_NEGATIVE,
        d0=POSITIVE,
        d_coef=POSITIVE,
    )
    State = ProdigyState
    is_learning_rate = True
    must_be_last = True

    def __init__(
        self,
        lr: Number = 1.0,
        beta1: Number = 0.9,
        beta2: Number = 0.999,
        beta3: Number | None = None,
        eps: Number = 1e-8,
        *,
        weight_decay: Number = 0.0,
        d0: Number = 1e-6,
        d_coef: Number = 1.0,
        debiased: bool = False,
    ) -> None:
        super().__init__(
            {
                "lr": lr,
                "beta1": beta1,
                "beta2": beta2,
                "beta3": beta3,
                "eps": eps,
                "weight_decay": weight_decay,
                "d0": d0,
                "d_coef": d_coef,
                "debiased": debiased,
            }
        )

    def init(self, param: Tensor, settings: Settings) -> ProdigyState:
        """Zeros; the first step fills in ``θ0`` and ``d0``."""
        return ProdigyState(zeros(param), zeros(param), zeros(param), zeros(param), scalar(param), scalar(param))

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """The estimate, before and after."""
        device = everything.updates[0].device
        before = torch.stack(
            [
                _first(context, torch.ones_like(state.d) * settings.d0, state.d).to(device)
                for context, state in zip(everything.contexts, everything.states, strict=True)
            ]
        ).max()  # (a parameter that joins later has only d0)
        numerators, denominators = [], []
        for update, context, state in zip(everything.updates, everything.contexts, everything.states, strict=True):
            r, s = _sums(update, state, settings, context, before)
            numerators.append(r.to(device, before.dtype))
            denominators.append(norm(s, 1).to(device, before.dtype))
        numerator, denominator = torch.stack(numerators).sum(), torch.stack(denominators).sum()
        safe = choose(denominator > 0, denominator, torch.ones_like(denominator))
        after = before.maximum(numerator * settings.d_coef / safe)
        return {"before": before, "after": after}

    def update(
        self, update: Tensor, state: ProdigyState, settings: Settings, context: Context
    ) -> tuple[Tensor, ProdigyState]:
        """One step."""
        d, after = (context.measured[name].to(update.device, update.dtype) for name in ("before", "after"))
        exp_avg = average(state.exp_avg, update * d, settings.beta1)
        exp_avg_sq = average(state.exp_avg_sq, update * update * (d * d), settings.beta2)
        param = context.param.to(update.dtype)
        r, s = _sums(update, state, settings, context, d)
        new = exp_avg / (exp_avg_sq.sqrt() + d * settings.eps) + param * settings.weight_decay
        p0 = _first(context, param, state.p0)
        return new * (d * _rate(settings, context)), ProdigyState(
            exp_avg, exp_avg_sq, s, p0, r.to(state.r.dtype), after.to(state.d.dtype)
        )


def _first(context: Context, first: Tensor, later: Tensor) -> Tensor:
    """What holds in the first step, or in a later one."""
    return choose(context.count == 1, first.to(later.dtype), later)


def _rate(settings: Settings, context: Context) -> Number:
    """The learning rate, with Adam's correction."""
    rate: Number = settings.lr
    if settings.debiased:
        correction = root(debias(settings.beta2, context.count)) / debias(settings.beta1, context.count)
        rate = correction * rate
    return rate


def _sums(
    update: Tensor, state: ProdigyState, settings: Settings, context: Context, d: Tensor
) -> tuple[Tensor, Tensor]:
    """The new weighted sums r and s."""
    param = context.param.to(update.dtype)
    decay = root(settings.beta2) if settings.beta3 is None else settings.beta3
    d = d.to(update.device, update.dtype)
    weight = d * d * _rate(settings, context)
    way = _first(context, param, state.p0) - param
    return state.r * decay + dot(update, way) * weight, state.s * decay + update * weight
