"""Shampoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from graphopt.optim.adaptive.kronecker import (
    accumulate,
    axes_of,
    check_axes,
    inverse_exponent,
    is_due,
    power,
)
from graphopt.optim.core.arithmetic import when, zeros
from graphopt.optim.core.bounds import DECAY, FRACTION, NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class ShampooState(NamedTuple):
    """Of each axis the matrix of products and its root, one after another in two vectors.

    Of a tensor without such matrices ``covariances`` is the sum of squares, like the parameter, and there are no roots.
    """

    covariances: Tensor
    roots: Tensor


class Shampoo(Rule):
    """The update, multiplied along each axis by a root of the inverse of what the updates so far were on that axis.

    For a matrix ``L = L + u uᵀ``, ``R = R + uᵀ u``, both starting as the identity, and the update is
    ``L^(-1/4) inner(u) R^(-1/4)``. For k axes, with ``u_i`` the update as a matrix whose rows are the slices of axis i:
    ``L_i = L_i + u_i u_iᵀ``, and axis i is multiplied by ``L_i^(-1/(2k))``. An axis that is longer than ``max_dim`` has no
    matrix and does not count in k, so that the length of the update depends on that of the gradients in the same way for all
    shapes. If no axis has one: ``s = s + u²``, update ``inner(u) / (√s + adagrad_eps)``.

    The length of the update shrinks as sums grow, and has little to do with that of other methods: usually it takes the
    direction from this module and the length from another, ``m.GraftModules(m.Shampoo(), m.RMSprop())``.

    Args:
        update_freq: roots are computed in the first step and in each so many steps.
        beta: average the products instead, ``L = beta L + (1 - beta) u uᵀ``.
        decay: the matrices are multiplied by it in each step before something is added.
        exp_override: the power is ``-1 / exp_override`` instead of -1/(2k).
        merge_small: regard neighbouring axes as one, except the first, as long as that is not longer than ``max_dim``: kernels
            of a convolution become matrices with a row for each channel of the output.
        max_dim: longer axes have no matrix.
        precondition_1d: whether parameters of one axis have a matrix.
        adagrad_eps: added to the denominator where there is no matrix; in units of the gradient.
        inner: modules that make of the update what is multiplied.

    Raises:
        OptionError: an option is not valid.

    Cost: for an axis of length d of a tensor with n elements two products of order n d per step, and in each
    ``update_freq``-th step an eigendecomposition of order d³. The state is 2 d² numbers.

    Reference: Gupta, Koren, Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", arXiv:1802.09568, 2018,
    algorithms 1 and 2; Anil et al., "Scalable Second Order Optimization for Deep Learning", arXiv:2002.09018, 2020, for
    ``update_freq``, ``merge_small`` and ``max_dim``.
    """

    takes_sharded = False
    bounds = numbers(beta=DECAY, decay=FRACTION, exp_override=POSITIVE, adagrad_eps=NON_NEGATIVE)
    State = ShampooState
    elementwise = False
    batches = True

    def __init__(
        self,
        update_freq: int = 10,
        beta: Number | None = None,
        decay: Number | None = None,
        *,
        exp_override: Number | None = None,
        merge_small: bool = True,
        max_dim: int = 2000,
        precondition_1d: bool = True,
        adagrad_eps: Number = 1e-8,
        inner: Any = None,
    ) -> None:
        super().__init__(
            {
                "update_freq": update_freq,
                "beta": beta,
                "decay": decay,
                "exp_override": exp_override,
                "merge_small": merge_small,
                "max_dim": max_dim,
                "precondition_1d": precondition_1d,
                "adagrad_eps": adagrad_eps,
            },
            **({} if inner is None else {"inner": inner}),
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what is no number of steps or of elements."""
        check_axes(self, settings, "update_freq")

    def init(self, param: Tensor, settings: Settings) -> ShampooState:
        """Identity matrices; zeros where there are none."""
        axes = axes_of(param, settings)
        identity = axes.identity(param)
        return ShampooState(identity.clone() if axes.kept else zeros(param), identity)

    def update(
        self, update: Tensor, state: ShampooState, settings: Settings, context: Context
    ) -> tuple[Tensor, ShampooState]:
        """One step."""
        axes = axes_of(update, settings)
        operand = context.operands.get("inner", update)
        if not axes.kept:
            total = accumulate(state.covariances, update * update, settings.beta, settings.decay)
            return operand / (total.sqrt() + settings.adagrad_eps), ShampooState(total, state.roots)
        covariances = axes.accumulate(state.covariances, update.reshape(axes.shape), settings.beta, settings.decay)
        exponent = inverse_exponent(settings, len(axes.kept))
        roots = when(
            is_due(context.count, settings.update_freq),
            lambda: axes.pack([power(matrix, exponent) for matrix in axes.unpack(covariances)]),
            lambda: state.roots,
        )
        new = axes.multiply(operand.reshape(axes.shape), axes.unpack(roots))
        return new.reshape(update.shape), ShampooState(covariances, roots)
