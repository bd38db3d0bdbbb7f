"""Updates at a right angle to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import choose, dot, dot_of_all, norm, norm_of_all
from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Everything, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.stabilization.slices import check_fixed


class OrthoGrad(Rule):
    """Take the direction of the parameters out of the update: ``u - θ ⟨θ, u⟩ / (⟨θ, θ⟩ + eps)``, scaled back to ``‖u‖``.

    Put it in front of any optimizer: without that direction a loss cannot be lowered by making all weights larger. An update
    of which less than the root of the dtype's precision is left becomes zero, since that is rounding.

    Args:
        eps: added to the square that is divided by, in units of the squared parameter.
        renormalize: whether to scale what is left to the norm that the update had.
        tensorwise: projections and norms of each tensor, as in the paper; ``False``: of all tensors as one vector.

    Raises:
        OptionError: a number is out of range, or ``tensorwise`` differs between parameters.

    Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", arXiv:2501.04697, 2025,
    section 5 and appendix.
    """

    bounds = numbers(eps=NON_NEGATIVE)

    def __init__(self, eps: Number = 1e-8, renormalize: bool = True, *, tensorwise: bool = False) -> None:
        super().__init__({"eps": eps, "renormalize": renormalize, "tensorwise": tensorwise})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what must be the same for all tensors."""
        check_fixed(self, settings, ("tensorwise", "renormalize"))

    @property
    def measures(self) -> bool:
        """Whether all tensors are one vector."""
        return not self.defaults["tensorwise"]

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """How much of the parameters is subtracted, and what the rest is multiplied by."""
        updates = list(everything.updates)
        params = [c.param.to(u.dtype) for c, u in zip(everything.contexts, updates, strict=True)]
        share = _share(dot_of_all(params, updates), dot_of_all(params, params), settings)
        if not settings.renormalize:
            return {"share": share}
        rest = [u - p * share.to(u.device, u.dtype) for u, p in zip(updates, params, strict=True)]
        return {"share": share, "factor": _factor(updates, rest, norm_of_all)}

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        param = context.param.to(update.dtype)
        if self.measures:
            measured = {name: value.to(update.device, update.dtype) for name, value in context.measured.items()}
            rest = update - param * measured["share"]
            return (rest * measured["factor"] if settings.renormalize else rest), state
        rest = update - param * _share(dot(param, update), dot(param, param), settings)
        return (
            rest * _factor([update], [rest], lambda tensors: norm(tensors[0])) if settings.renormalize else rest
        ), state


def _share(product: Tensor, square: Tensor, settings: Settings) -> Tensor:
    """``product / (square + eps)``; 0 for parameters that are zero."""
    divisor = square + settings.eps
    return product / choose(divisor > 0, divisor, torch.ones_like(divisor))


def _factor(before: Sequence[Tensor], after: Sequence[Tensor], norm_of: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """The quotient of norms, or 0."""
    length = norm_of(after)
    is_rounding = length <= norm_of(before) * torch.finfo(length.dtype).eps ** 0.5
    # Norms of what is not zero: the derivative of a root is infinite at zero, and stays so behind torch.where.
    above, below = (
        norm_of([choose(is_rounding.to(t.device), torch.ones_like(t), t) for t in tensors])
        for tensors in (before, after)
    )
    return choose(is_rounding, torch.zeros_like(length), above / below)
