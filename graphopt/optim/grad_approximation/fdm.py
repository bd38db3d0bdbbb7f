"""Finite differences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.bounds import POSITIVE, numbers
from graphopt.optim.core.closures import number
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.differences import check_formula, difference, uses_centre
from graphopt.optim.grad_approximation.grad_approximator import GradApproximator, Loss, Target


class FDM(GradApproximator):
    """One difference quotient for each element: ``g_i = Σ_j w_j f(θ + o_j h e_i) / h``.

    For n elements it evaluates the loss n+1 (``forward2``, ``backward2``), 2n (``central2``), 2n+1 (``forward3``,
    ``backward3``) or 4n times (``central4``); one less where the loss itself is known.

    Args:
        h: the step, in units of the parameter.
        formula: which values are weighed how, see `graphopt.optim.grad_approximation.differences`.
        target: what the estimate replaces, see `GradApproximator`.

    Raises:
        OptionError: ``h`` is not positive, or there is no such formula.

    Cost: one to four evaluations of the loss for each element, by the formula.
    """

    bounds = numbers(h=POSITIVE)

    def __init__(self, h: Number = 1e-3, formula: str = "central2", *, target: Target = "closure") -> None:
        super().__init__({"h": h, "formula": formula}, target=target)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """There must be such a formula."""
        check_formula(self.place, settings["formula"])

    def approximate(
        self, closure: Callable[[bool], Any], params: Sequence[Tensor], loss: Loss, var: Var
    ) -> tuple[list[Tensor], Loss, Loss]:
        """Move one element after another."""
        means: list[float] = []
        grads = []
        for param in params:
            settings = self.get_settings(param)
            formula, step = settings.formula, float(settings.h)
            if loss is None and uses_centre(formula):
                loss = closure(False)
            centre = None if loss is None else number(loss)
            moved, grad = param.detach(), torch.zeros_like(param, requires_grad=False)
            for index in itertools.product(*map(range, param.shape)):
                start = moved[index].clone()

                def value_at(offset: int) -> float:
                    moved[index] = start + offset * step  # noqa: B023 (called before the next turn)
                    return number(closure(False))

                derivative, mean = difference(formula, centre, value_at)
                moved[index] = start
                grad[index] = derivative / step
                means.append(mean)
            grads.append(grad)
        return grads, loss, sum(means) / len(means) if means else loss
