"""Gradients from exact derivatives along random directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from graphopt.errors import ModuleError, OptionError, UnsupportedError
from graphopt.optim.core.bounds import FRACTION, POSITIVE, numbers
from graphopt.optim.core.closures import check_loss, common, number
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.along_directions import AlongDirections
from graphopt.optim.grad_approximation.grad_approximator import Loss, Target

_FORMULAS = {"forward": "forward2", "central": "central2"}


class ForwardGradient(AlongDirections):
    """The mean over random directions z of ``z ⟨∇f, z⟩``, by forward-mode automatic differentiation: no graph is kept.

    During ``closure(False)`` the parameters carry z as tangents, so that the loss carries ``⟨∇f, z⟩``. The closure must compute
    it by operations that have forward-mode derivatives.

    Cost: for k samples k evaluations of the loss and its derivative (each about twice that of the loss alone); with
    differences k + 1 (``"forward"``) or 2k (``"central"``) evaluations of the loss.

    Args:
        n_samples: the number of directions.
        distribution: ``"gaussian"``, ``"uniform"``, ``"sphere"`` or ``"rademacher"`` (signs).
        beta: directions are ``beta`` times those of the step before plus ``1 - beta`` times new ones, divided by the standard
            deviation of that.
        pre_generate: draw the directions once in a step, otherwise for each evaluation.
        jvp: how ``⟨∇f, z⟩`` is computed: ``"autograd"``; ``"forward"`` or ``"central"`` by differences, as `RandomizedFDM`.
        h: of differences the step, in units of the parameter.
        seed: of the directions; ``None`` takes torch's global generator.
        target: what the estimate replaces, see `GradApproximator`.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if the loss carries no derivative.
        UnsupportedError: in a step, if an operation has no forward-mode derivative.

    Reference: Baydin et al., "Gradients without Backpropagation", arXiv:2202.08587, 2022, algorithm 1.
    """

    bounds = numbers(beta=FRACTION, h=POSITIVE)

    def __init__(
        self,
        n_samples: int = 1,
        distribution: str = "gaussian",
        beta: Number = 0.0,
        pre_generate: bool = True,
        jvp: Literal["autograd", "forward", "central"] = "autograd",
        h: Number = 1e-3,
        seed: int | None = None,
        target: Target = "closure",
    ) -> None:
        super().__init__(
            {"jvp": jvp, "h": h},
            n_samples=n_samples,
            distribution=distribution,
            beta=beta,
            pre_generate=pre_generate,
            seed=seed,
            target=target,
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        if settings["jvp"] != "autograd" and settings["jvp"] not in _FORMULAS:
            raise OptionError(f"{self.place}: jvp={settings['jvp']!r}; expected one of autograd, forward, central")
        super().check_settings(settings)

    def approximate(
        self, closure: Callable[[bool], Any], params: Sequence[Tensor], loss: Loss, var: Var
    ) -> tuple[list[Tensor], Loss, Loss]:
        """One derivative for each direction."""
        jvp = common(self, params, "jvp")
        if jvp != "autograd":
            return self.by_differences(closure, params, loss, var, _FORMULAS[jvp])
        samples = self.directions(var)
        starts = [param.detach().clone() for param in params]
        sums = [torch.zeros_like(z) for z in samples[0]]
        for sample in samples:
            tangents = [z.to(param.dtype) for z, param in zip(sample, params, strict=True)]
            value, derivative = self._derivative(closure, params, starts, tangents)
            loss = value if loss is None else loss
            for total, z in zip(sums, tangents, strict=True):
                total.add_(z, alpha=derivative / len(samples))
        return sums, loss, None

    def _derivative(
        self,
        closure: Callable[[bool], Any],
        params: Sequence[Tensor],
        starts: Sequence[Tensor],
        tangents: Sequence[Tensor],
    ) -> tuple[Loss, float]:
        """The loss, and its derivative along the tangents."""
        with forward_ad.dual_level():
            for param, start, tangent in zip(params, starts, tangents, strict=True):
                param.copy_(forward_ad.make_dual(start, tangent))  # in place: it is the tensor that the closure knows
            try:
                loss = closure(False)
            except NotImplementedError as error:
                reason = str(error).partition("\n")[0]
                if not re.search("forward (mode )?AD", reason):
                    raise
                raise UnsupportedError(
                    f"{self.place}: an operation of the loss has no forward-mode derivative. {reason} Nothing was changed. Use "
                    "jvp='central', which evaluates the loss alone; attention has one under "
                    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
                ) from error
            check_loss(loss, self.place)
            slope: Tensor | None = forward_ad.unpack_dual(loss).tangent if isinstance(loss, Tensor) else None
            if slope is None:
                raise ModuleError(
                    f"{self.place}: the loss carries no forward-mode derivative: it is a number, detached from the parameters, "
                    "or does not depend on them; nothing was changed. Return the tensor as it was computed, or use jvp='central'"
                )
            assert isinstance(loss, Tensor)
            return forward_ad.unpack_dual(loss).primal.detach().clone(), number(slope)
