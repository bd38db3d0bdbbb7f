"""The base class of modules that look at gradients uphill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import norm_of_all, state_dtype
from graphopt.optim.core.closures import number, restored
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var


class SharpnessAware(Module):
    """Let all modules that follow see the gradient at a point uphill: ``∇f(θ + ε)``, ``ε = rho T² g / ‖T g‖``, ``g = ∇f(θ)``.

    A subclass overrides `sizes`, which is T, and has the hyper-parameter ``rho``.

    The norm is that of all tensors as one vector. The loss remains ``f(θ)``, which is also what the step returns: a line search
    that follows looks for less of it along the direction that it is given. Where the gradient is zero, so is ε.
    """

    needs_closure = True
    replaces_update = True

    def sizes(self, param: Tensor, settings: Settings) -> Number:
        """How long the perturbation of each element may be, in relation to others."""
        raise NotImplementedError(f"{type(self).__name__} has no sizes(self, param, settings)")

    def step(self, var: Var) -> Var:
        """Replace the closure."""
        original, params = var.clone(clone_update=False), var.params

        def sharp(backward: bool = True) -> Any:
            loss = original.evaluate(backward)
            if not backward or not math.isfinite(number(loss)):
                return loss
            with torch.no_grad(), restored(params) as starts:
                for param, start, move in zip(params, starts, self._uphill(original), strict=True):
                    param.copy_(start + move)
                original.evaluate(backward=True)
            return loss.detach() if isinstance(loss, Tensor) else loss

        var.replace_closure(sharp)
        return var

    def _uphill(self, var: Var) -> Sequence[Tensor]:
        """ε for each parameter, by the gradients in ``p.grad``."""
        settings = [self.get_settings(param) for param in var.params]
        grads = [grad.to(state_dtype(grad)) for grad in var.read_grads()]
        sizes = [self.sizes(param.detach(), own) for param, own in zip(var.params, settings, strict=True)]
        scaled = [size * grad for size, grad in zip(sizes, grads, strict=True)]
        length = norm_of_all(scaled)
        inverse = torch.where(length > 0, 1 / length, torch.zeros_like(length))
        return [
            size * part * (own.rho * inverse.to(part.device, part.dtype))
            for size, part, own in zip(sizes, scaled, settings, strict=True)
        ]
