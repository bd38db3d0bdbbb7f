"""Shampoo with the exact diagonals of its factors over samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import average, debias, state_dtype
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.truegrad.per_sample import PerSampleRule, Preconditioner


class TrueGradShampooState(NamedTuple):
    """For each axis longer than 1 the average of the squares, averaged over all other axes; one after another in a vector."""

    exp_avg_axis_sq: Tensor


class TrueGradShampoo(PerSampleRule):
    """The update, divided by roots of the diagonals of Shampoo's factors of the per-sample gradients.

    Shampoo multiplies the gradient of a matrix by ``L^(-1/4)`` and ``R^(-1/4)``, and that of a tensor with d axes by one
    factor to the power -1/(2d) for each axis. Of the per-sample gradients ``H_n`` of a matrix the factors are
    ``L = E_n[H_n H_nᵀ]`` and ``R = E_n[H_nᵀ H_n]``, whose diagonals are

        ``L_ii = Σ_j E_n[H_nij²]``,  ``R_jj = Σ_i E_n[H_nij²]``:

    sums over the other axis of S = n s, the mean of the squared per-sample gradients, which the statistic gives exactly and
    without any product of matrices. With means in place of sums, so that neither the size of a tensor nor the scale of the
    loss changes the length of the update, and with a_k the vector of axis k:

        ``a_k = beta a_k + (1 - beta) mean of S over all axes but k``,  update  ``inner(u) / (D + eps)``,

        ``D = Π_k â_k^p  mean(S)^(1/2 - d p)``,  ``p = exponent``,  ``â_k = a_k / (1 - beta^t)``.

    D is of degree 1 in the gradient for every p, and √S wherever S is constant. For p = 1/(2d) the last factor is 1. For
    p = 1/2 D is the root of the product of marginals, exact if S is one (as in Adafactor, arXiv:1804.04235, section 3; that
    this power is the better approximation of the full matrix is shown by Morwani et al., arXiv:2406.17748, 2024). A vector
    has one axis, so this is `TrueGradRMSprop` there. Axes of length 1 are left out, as they would only flatten the result.

    The memory is the sum of the lengths of the axes.

    Args:
        beta: of the averages.
        eps: added to the denominator; in units of the gradient.
        exponent: p; ``None`` for 1/(2d).
        preconditioner: what S is, as in `TrueGradAdam`.
        debiased: whether the averages are corrected for starting at zero.
        inner: modules that make of the update what is divided, such as a momentum.

    Raises:
        OptionError: an option is not valid.

    Reference: Gupta, Koren, Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv:1802.09568, 2018,
    algorithms 1 and 2 (with averages in place of sums over steps).
    """

    bounds = numbers(beta=DECAY, eps=NON_NEGATIVE, exponent=POSITIVE)
    State = TrueGradShampooState
    elementwise = False

    def __init__(
        self,
        beta: Number = 0.99,
        eps: Number = 1e-12,
        *,
        exponent: Number | None = None,
        preconditioner: Preconditioner = "mean_square",
        debiased: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(
            {"beta": beta, "eps": eps, "exponent": exponent, "preconditioner": preconditioner, "debiased": debiased},
            **({} if inner is None else {"inner": inner}),
        )

    def init(self, param: Tensor, settings: Settings) -> TrueGradShampooState:
        """Zeros."""
        size = sum(_lengths(param))
        return TrueGradShampooState(torch.zeros(size, dtype=state_dtype(param), device=param.device))

    def update(
        self, update: Tensor, state: TrueGradShampooState, settings: Settings, context: Context
    ) -> tuple[Tensor, TrueGradShampooState]:
        """One step."""
        lengths = _lengths(update)
        square = self.square(settings, context).reshape(lengths)
        exp_avg = average(state.exp_avg_axis_sq, torch.cat(_marginals(square)), settings.beta)
        debiased = (exp_avg / debias(settings.beta, context.count)).to(exp_avg.dtype) if settings.debiased else exp_avg
        factors = debiased.split(lengths)
        num_axes = len(lengths)
        exponent = 1 / (2 * num_axes) if settings.exponent is None else settings.exponent
        divisor = torch.ones_like(square)
        for axis, factor in enumerate(factors):
            divisor = divisor * (factor**exponent).reshape([-1 if other == axis else 1 for other in range(num_axes)])
        if settings.exponent is not None:
            mean = factors[0].sum() / max(1, lengths[0])
            # Where every square is 0, so is the update, and 0 to a negative power would make it NaN.
            divisor = divisor * torch.where(mean > 0, mean, torch.ones_like(mean)) ** (0.5 - num_axes * exponent)
        new = context.operands.get("inner", update) / (divisor.reshape(update.shape) + settings.eps)
        return new, TrueGradShampooState(exp_avg)


def _lengths(tensor: Tensor) -> list[int]:
    """The lengths of the axes that count."""
    return [length for length in tensor.shape if length != 1] or [1]


def _marginals(square: Tensor) -> list[Tensor]:
    """For each axis the mean over all others."""
    found = []
    for axis, length in enumerate(square.shape):
        others = [other for other in range(square.dim()) if other != axis]
        summed = square.sum(others) if others else square
        found.append(summed * (length / max(1, square.numel())))
    return found
