"""SOAP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.optim.adaptive.kronecker import Axes, axes_of, check_axes, eigh, multiply_axis
from graphopt.optim.core.arithmetic import average, debias, larger, root, state_dtype, when
from graphopt.optim.core.bounds import ANY, DECAY, FRACTION, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class SOAPState(NamedTuple):
    """Averages, in the coordinates of the bases and with merged axes, and two vectors of matrices, one for each axis."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    covariances: Tensor
    bases: Tensor


class SOAP(Rule):
    """Adam in the eigenbases of Shampoo's matrices.

    Each axis i has an average of products, ``L_i = β L_i + (1 - β) u_i u_iᵀ`` with ``β = shampoo_beta`` and ``u_i`` the update
    as a matrix whose rows are the slices of that axis, and a basis ``Q_i`` of nearly its eigenvectors. Of a matrix the
    update is, with a and v Adam's averages of ``Q_Lᵀ u Q_R`` and of its square,

        ``alpha · Q_L (â / (√v̂ + eps)) Q_Rᵀ``.

    Each ``precond_freq``-th step ends with new bases, ``Q, _ = QR(L Q)`` with columns in descending order of ``Qᵀ L Q``; ``a``
    is rotated into them, and ``v`` follows the order of the columns. The first step only computes bases, from the
    eigenvectors of ``L_i``, and the update is 0; Adam counts from the second. A tensor of which no axis has a
    basis is updated by Adam from the first step.

    Args:
        beta1: of the average of updates.
        beta2: of the average of squares.
        shampoo_beta: of the averages of products; ``None`` for sums.
        precond_freq: bases change in each so many steps.
        merge_small: regard neighbouring axes as one, except the first, as long as that is not longer than ``max_dim``: kernels
            of a convolution become matrices with a row for each channel of the output.
        max_dim: longer axes have no basis.
        precondition_1d: whether parameters of one axis have a basis.
        eps: added to the denominator; in units of the gradient.
        decay: the sums of products are multiplied by it in each step before something is added.
        alpha: multiplies the update.
        bias_correction: whether the averages of Adam are corrected for starting at zero.

    Raises:
        OptionError: an option is not valid.

    Cost: for an axis of length d of a tensor with n elements three products of order n d per step, and in each
    ``precond_freq``-th step a product and a QR decomposition of order d³. The state is 2 d² + 2 n numbers.

    Reference: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321, 2024, algorithms 3 and 4.
    """

    takes_sharded = False
    bounds = numbers(beta1=DECAY, beta2=DECAY, shampoo_beta=DECAY, eps=NON_NEGATIVE, decay=FRACTION, alpha=ANY)
    State = SOAPState
    elementwise = False
    batches = True

    def __init__(
        self,
        beta1: Number = 0.95,
        beta2: Number = 0.95,
        shampoo_beta: Number | None = 0.95,
        precond_freq: int = 10,
        *,
        merge_small: bool = True,
        max_dim: int = 2000,
        precondition_1d: bool = True,
        eps: Number = 1e-8,
        decay: Number | None = None,
        alpha: Number = 1.0,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(
            {
                "beta1": beta1,
                "beta2": beta2,
                "shampoo_beta": shampoo_beta,
                "precond_freq": precond_freq,
                "merge_small": merge_small,
                "max_dim": max_dim,
                "precondition_1d": precondition_1d,
                "eps": eps,
                "decay": decay,
                "alpha": alpha,
                "bias_correction": bias_correction,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what is no number of steps or of elements."""
        check_axes(self, settings, "precond_freq")

    def init(self, param: Tensor, settings: Settings) -> SOAPState:
        """Zeros, and identity matrices as bases."""
        axes = axes_of(param, settings)
        exp_avg = torch.zeros(axes.shape, dtype=state_dtype(param), device=param.device)
        return SOAPState(exp_avg, exp_avg.clone(), axes.zeros(param), axes.identity(param))

    def update(
        self, update: Tensor, state: SOAPState, settings: Settings, context: Context
    ) -> tuple[Tensor, SOAPState]:
        """One step."""
        axes = axes_of(update, settings)
        tensor = update.reshape(axes.shape)
        if not axes.kept:
            direction, exp_avg, exp_avg_sq = _adam(tensor, state, settings, context.count)
            return direction.reshape(update.shape), state._replace(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        covariances = axes.accumulate(state.covariances, tensor, settings.shampoo_beta, settings.decay)

        def begin() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            bases = [eigh(matrix.detach())[1].flip(-1) for matrix in axes.unpack(covariances)]
            return torch.zeros_like(tensor), state.exp_avg, state.exp_avg_sq, axes.pack(bases)

        def go_on() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            bases = axes.unpack(state.bases)
            projected = axes.multiply(tensor, bases, transposed=True)
            num_steps = larger(context.count - 1, 1.0)
            direction, exp_avg, exp_avg_sq = _adam(projected, state, settings, num_steps)
            new = axes.multiply(direction, bases)
            averages = when(
                (context.count - 1) % settings.precond_freq == 0,
                lambda: _turn(axes, exp_avg, exp_avg_sq, covariances, bases),
                lambda: (exp_avg, exp_avg_sq, state.bases),
            )
            return (new, *averages)

        new, exp_avg, exp_avg_sq, bases = when(context.count == 1, begin, go_on)
        return new.reshape(update.shape), SOAPState(exp_avg, exp_avg_sq, covariances, bases)


def _adam(tensor: Tensor, state: SOAPState, settings: Settings, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Adam makes of a tensor, and its averages."""
    exp_avg = average(state.exp_avg, tensor, settings.beta1)
    exp_avg_sq = average(state.exp_avg_sq, tensor * tensor, settings.beta2)
    step_size: Number = settings.alpha
    scale: Number = 1.0
    if settings.bias_correction:
        step_size = step_size / debias(settings.beta1, count)
        scale = root(debias(settings.beta2, count))
    return exp_avg * step_size / (exp_avg_sq.sqrt() / scale + settings.eps), exp_avg, exp_avg_sq


def _turn(
    axes: Axes, exp_avg: Tensor, exp_avg_sq: Tensor, covariances: Tensor, bases: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The averages in new bases, and these: one power iteration from the old ones."""
    news = []
    for axis, matrix, basis in zip(axes.kept, axes.unpack(covariances), bases, strict=True):
        # Bases are constants for derivatives: that of an eigenvector does not exist where eigenvalues are equal.
        moved = matrix.detach() @ basis
        order = (basis * moved).sum(0).argsort(descending=True, stable=True)
        exp_avg_sq = exp_avg_sq.index_select(axis, order)
        new = torch.linalg.qr(moved.index_select(1, order).nan_to_num(0.0, 0.0, 0.0))[0]
        exp_avg = multiply_axis(exp_avg, new.mT @ basis, axis)
        news.append(new)
    return exp_avg, exp_avg_sq, axes.pack(news)
