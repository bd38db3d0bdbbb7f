"""Momentum that is damped by the curvature of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graphopt.optim.core.arithmetic import norm_of_all, state_dtype, zeros
from graphopt.optim.core.bounds import ANY, NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.second_order.hessian_products import HVPMethod, check_method, hessian_product


class MatrixMomentum(Module):
    """Momentum with the matrix ``beta (I - mu H)`` in place of a number: ``u_t = g_t + (I - mu H) beta u_(t-1)``.

    H is the Hessian of the closure at the present parameters, g the incoming update. Directions of large curvature forget
    fast, flat ones keep what they have gathered. ``mu`` should be below 2 over the largest curvature.

    Args:
        mu: how much curvature damps; in units of the parameter squared per loss.
        beta: what is left of the update before where there is no curvature.
        hvp_method: how H is multiplied: ``"autograd"`` exactly, ``"forward"`` or ``"central"`` by differences of gradients;
            and what else `hessian_product` knows.
        h: of differences the length of the step, in units of the parameters.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used.

    Cost: one product with the Hessian in each step but the first: one evaluation of the gradient for ``"forward"``, two for
    ``"central"``; a second backward, through the graph of the gradient, for ``"autograd"``. State: the update before.

    Reference: Orr, Leen, "Using Curvature Information for Fast Stochastic Search", NIPS 9, 1996, equation 6.
    """

    needs_closure = True
    bounds = numbers(mu=ANY, beta=ANY, h=POSITIVE)

    def __init__(
        self, mu: Number = 0.1, beta: Number = 1.0, hvp_method: HVPMethod = "forward", h: Number = 1e-3
    ) -> None:
        super().__init__({"mu": mu, "beta": beta, "hvp_method": hvp_method, "h": h})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names of methods."""
        check_method(self.place, settings["hvp_method"])

    def step(self, var: Var) -> Var:
        """Make the step."""
        params = var.params
        states = [self.state[param] for param in params]
        if not any("prev_update" in state for state in states):
            var.update = [update.clone() for update in var.get_update()]
        else:
            momenta = [
                state.get("prev_update", zeros(param)) * self.get_settings(param).beta
                for state, param in zip(states, params, strict=True)
            ]
            # Before anybody asks for the gradient, which is known afterwards.
            multiply = hessian_product(self, var, common(self, params, "hvp_method"), float(common(self, params, "h")))
            curved = unflatten(multiply(flatten(momenta)), params)
            updates = var.get_update()
            var.update = [
                (update + momentum - rate * product).to(update.dtype)
                for update, momentum, rate, product in zip(updates, momenta, self.rates(var), curved, strict=True)
            ]
        for param, state, update in zip(params, states, var.get_update(), strict=True):
            state["prev_update"] = update.to(state_dtype(param), copy=True)
        self.remember(var)
        return var

    def rates(self, var: Var) -> Sequence[Number]:
        """For each parameter the factor of the Hessian."""
        return [self.get_settings(param).mu for param in var.params]

    def remember(self, var: Var) -> None:
        """Keep what the next step needs beside the update."""


class AdaptiveMatrixMomentum(MatrixMomentum):
    """`MatrixMomentum` whose ``mu`` is ``mu_mul ‖Δθ‖ / (‖Δg‖ + eps)``, from the changes in the last step of all tensors.

    That is one over the curvature along the last step (with gradients of one function; of minibatches, noise makes it smaller).

    Args:
        mu_mul: multiplies the estimate.
        beta: what is left of the update before where there is no curvature.
        eps: added to the change of the gradient; in its units.
        hvp_method: as of `MatrixMomentum`.
        h: as of `MatrixMomentum`.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used.

    Cost: as `MatrixMomentum`. State: the update, the parameters and the gradient before.
    """

    bounds = numbers(mu_mul=ANY, beta=ANY, eps=NON_NEGATIVE, h=POSITIVE)

    def __init__(
        self,
        mu_mul: Number = 1.0,
        beta: Number = 1.0,
        eps: Number = 1e-4,
        hvp_method: HVPMethod = "forward",
        h: Number = 1e-3,
    ) -> None:
        Module.__init__(self, {"mu_mul": mu_mul, "beta": beta, "eps": eps, "hvp_method": hvp_method, "h": h})

    def rates(self, var: Var) -> Sequence[Number]:
        """The estimate, times the parameter's factor."""
        ways, changes = [], []
        for param, grad in zip(var.params, var.get_grad(), strict=True):
            state = self.state[param]
            if "prev_param" in state:
                ways.append(param.detach().to(state["prev_param"].dtype) - state["prev_param"])
                changes.append(grad.to(state["prev_grad"].dtype) - state["prev_grad"])
        way, change = norm_of_all(ways), norm_of_all(changes)
        rates: list[Number] = []
        for param in var.params:
            settings = self.get_settings(param)
            divisor = change.to(param.device) + settings.eps
            one = torch.ones_like(divisor)
            quotient = way.to(param.device) / torch.where(divisor > 0, divisor, one)
            rates.append(quotient * settings.mu_mul)
        return rates

    def remember(self, var: Var) -> None:
        """Parameters and gradients."""
        for param, grad in zip(var.params, var.get_grad(), strict=True):
            state, dtype = self.state[param], state_dtype(param)
            state["prev_param"] = param.detach().to(dtype, copy=True)
            state["prev_grad"] = grad.to(dtype, copy=True)
