"""Sophia with Hutchinson's estimate of the curvature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import average, larger, smaller, zeros
from graphopt.optim.core.bounds import DECAY, POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.grad_approximation.random_directions import check_distribution, draw, generators
from graphopt.optim.second_order.hessian_products import HVPMethod, check_method, hessian_product


class SophiaH(Module):
    """An average of updates, divided by one of the Hessian's diagonal and clipped, element by element.

    ``m = beta1 m + (1 - beta1) u``; in the first and then every ``update_freq``-th step
    ``h = beta2 h + (1 - beta2) mean(z ⊙ H z)`` over random z with a covariance of one; update
    ``clip(m / max(precond_scale h, eps), -clip, clip)``. Where the curvature is not positive that is ``clip sign(m)``.

    Args:
        beta1: of the average of updates.
        beta2: of the average of diagonals.
        update_freq: after how many steps the diagonal is estimated anew.
        precond_scale: multiplies the diagonal; the paper's γ.
        clip: the largest magnitude of the update; the paper's ρ, here before the learning rate.
        eps: the least that is divided by; in units of the curvature.
        hvp_method: how H is multiplied: ``"autograd"`` exactly, ``"forward"`` or ``"central"`` by differences of gradients;
            and what else `hessian_product` knows.
        h: of differences the length of the step, in units of the parameters.
        n_samples: the number of vectors z in an estimate.
        distribution: of z: ``"gaussian"`` as in the paper, ``"rademacher"`` (signs: the diagonal of a diagonal matrix is
            then exact), ``"uniform"`` or ``"sphere"``.
        seed: of z; ``None`` takes torch's global generator, which several processes that train one model must have seeded
            alike.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used.

    Cost: every ``update_freq``-th step ``n_samples`` products with the Hessian, see `MatrixMomentum`.

    Reference: Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training", arXiv:2305.14342, 2023, algorithms 1 and 3.
    """

    needs_closure = True
    bounds = numbers(beta1=DECAY, beta2=DECAY, precond_scale=POSITIVE, clip=POSITIVE, eps=POSITIVE, h=POSITIVE)

    def __init__(
        self,
        beta1: Number = 0.96,
        beta2: Number = 0.99,
        update_freq: int = 10,
        precond_scale: Number = 1.0,
        clip: Number = 1.0,
        eps: Number = 1e-12,
        hvp_method: HVPMethod = "autograd",
        h: Number = 1e-3,
        n_samples: int = 1,
        distribution: str = "gaussian",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            {
                "beta1": beta1,
                "beta2": beta2,
                "update_freq": update_freq,
                "precond_scale": precond_scale,
                "clip": clip,
                "eps": eps,
                "hvp_method": hvp_method,
                "h": h,
                "n_samples": n_samples,
                "distribution": distribution,
                "seed": seed,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_method(self.place, settings["hvp_method"])
        check_distribution(self.place, settings["distribution"])
        for name in ("update_freq", "n_samples"):
            value = settings[name]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"{self.place}: {name}={value!r}; expected an integer of at least 1")

    def step(self, var: Var) -> Var:
        """Make the step."""
        assert var.counts is not None
        states = [self.state[param] for param in var.params]
        step = int(max(var.counts, default=torch.ones(())))
        is_new = not all("hessian" in state for state in states)
        diagonals: list[Tensor] | None = None
        if is_new or (step - 1) % common(self, var.params, "update_freq") == 0:
            diagonals = self._estimate(var, step)  # first: with autograd it makes the gradient known
        updates = var.get_update()
        news = []
        for index, (param, update, state) in enumerate(zip(var.params, updates, states, strict=True)):
            settings = self.get_settings(param)
            if "hessian" not in state:
                state["exp_avg"], state["hessian"] = zeros(param), zeros(param)
            state["exp_avg"] = average(state["exp_avg"], update, settings.beta1)
            if diagonals is not None:
                state["hessian"] = average(state["hessian"], diagonals[index], settings.beta2)
            new = state["exp_avg"] / larger(state["hessian"] * settings.precond_scale, settings.eps)
            news.append(larger(smaller(new, settings.clip), -settings.clip).to(update.dtype))
        var.update = news
        return var

    def _estimate(self, var: Var, step: int) -> list[Tensor]:
        """The diagonal of the Hessian, as tensors like the parameters."""
        params = var.params
        method, h, num, distribution, seed = (
            common(self, params, name) for name in ("hvp_method", "h", "n_samples", "distribution", "seed")
        )
        multiply = hessian_product(self, var, method, float(h))
        total = torch.zeros_like(flatten(params))
        for index in range(num):
            vector = flatten(draw(params, distribution, generators(params, seed, step, index)))
            total += vector * multiply(vector)
        return unflatten(total / num, params)
