"""Polyak's step size."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import choose, dot, smaller
from graphopt.optim.core.bounds import ANY, POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.var import Var


@renamed(f_star="min_obj_value")
class PolyakStepSize(Module):
    """Multiply the update by the step size at which a linear model of the loss reaches its least value.

    ``alpha min((f - min_obj_value) / ⟨u, g⟩, max)`` with the loss f and its gradient g. It is 0 at and below the least value,
    and where the update does not descend (``⟨u, g⟩`` is not positive).

    Args:
        max: the largest step size before ``alpha``, or ``None``. Set it where the least value is not reached, as on
            minibatches: the step size grows without limit as the gradient vanishes.
        min_obj_value: the least value of the loss.
        use_grad: divide by ``⟨u, g⟩``; ``False``: by ``⟨u, u⟩``.
        parameterwise: a step size for each tensor, with its own product, as if the loss depended on nothing else; ``False``:
            one for all.
        alpha: multiplies the step size.

    Raises:
        OptionError: a number is out of range.

    Reference: Polyak, "Introduction to Optimization", 1987, section 5.3.2; Hazan, Kakade, "Revisiting the Polyak step size",
    arXiv:1905.00313, 2019, algorithm 1.
    """

    needs_closure = True
    bounds = numbers(max=POSITIVE, min_obj_value=ANY, alpha=ANY)

    def __init__(
        self,
        max: Number | None = None,
        min_obj_value: Number = 0.0,
        use_grad: bool = True,
        parameterwise: bool = False,
        alpha: Number = 1.0,
    ) -> None:
        super().__init__(
            {
                "max": max,
                "min_obj_value": min_obj_value,
                "use_grad": use_grad,
                "parameterwise": parameterwise,
                "alpha": alpha,
            }
        )

    def step(self, var: Var) -> Var:
        """Multiply."""
        updates = var.get_update()
        loss = torch.as_tensor(var.get_loss()).detach().reshape(())
        others = var.get_grad() if common(self, var.params, "use_grad") else updates
        products = [dot(u, other.to(u.dtype)) for u, other in zip(updates, others, strict=True)]
        if not common(self, var.params, "parameterwise"):
            total = torch.stack([product.to(products[0].device, torch.float64) for product in products]).sum()
            products = [total] * len(products)
        news = []
        for param, update, product in zip(var.params, updates, products, strict=True):
            settings = self.get_settings(param)
            excess = (loss - settings.min_obj_value).to(update.device, product.dtype)
            step_size = _quotient(excess, product.to(update.device))
            if settings.max is not None:
                step_size = smaller(step_size, settings.max)
            news.append((update * (step_size * settings.alpha)).to(update.dtype))
        var.update = news
        return var


def _quotient(excess: Tensor, product: Tensor) -> Tensor:
    """0 where either is not positive, and where the quotient is too large for a number."""
    quotient = excess / product
    descends = (excess > 0) & (product > 0) & quotient.isfinite()
    return choose(descends, quotient, torch.zeros_like(quotient))
