"""Preconditioned SGD with triangular Kronecker factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.adaptive.kronecker import gram, multiply_axis
from graphopt.optim.core.arithmetic import average, debias, norm, smaller, state_dtype, when, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, POSITIVE, is_number, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule

MemorySaveMode = Literal["one_diag", "all_diag"]
_LEAST_PROBABILITY, _DECAY, _FLAT_START = 0.03, 1e-3, 500


class PSGDKronState(NamedTuple):
    """The average of updates, like the parameter; the factors, one after another in a vector; a norm for each of them."""

    exp_avg: Tensor
    factors: Tensor
    norms: Tensor


class PSGDKron(Rule):
    """The average of updates, whitened by a matrix that is a Kronecker product and is learned by steps of its own.

    Each axis i has a factor ``Q_i``, upper triangular or diagonal, and with Q their Kronecker product the update is ``QᵀQ m̂``,
    m̂ the average of updates corrected for starting at zero. Q is to minimise ``E[mᵀ QᵀQ m + vᵀ (QᵀQ)⁻¹ v]`` over updates m
    and standard normal v, which makes ``QᵀQ`` the inverse root of ``E[m mᵀ]``, as near as a Kronecker product comes. Its
    step for one axis is, with ``A = Q m``, ``B = Q⁻ᵀ v``, and ``A_i`` as a matrix whose rows are the slices of that axis,

        ``Q_i = Q_i - precond_lr · triu(A_i A_iᵀ - B_i B_iᵀ) Q_i / l_i``,

        ``l_i = max(n_i, beta_norm l_i + (1 - beta_norm) n_i)``,

    with ``n_i = ‖A_i A_iᵀ + B_i B_iᵀ‖``. Divided by ``n_i`` alone (``beta_norm=0``) large updates would count less than they
    should, and what is learned would not be the inverse root.

    The normal v is not drawn: ``B_i B_iᵀ`` is its mean ``Q_i⁻ᵀ Q_i⁻¹ · Π_(j≠i) ‖Q_j⁻¹‖²_F``, which is exact, and needs no
    random numbers. Steps of Q are made in the first step and then once in ``ceil(1 / p)`` steps, p the ``update_probability``,
    instead of at random; before each, factors are scaled so that their largest elements are equal.

    Updates have a root mean square of about 1: learning rates are those of Adam, or smaller.

    Args:
        momentum: of the average of updates.
        precond_lr: the length of a step of Q, relative to Q.
        beta_norm: how slowly the norms in the denominator fall.
        update_probability: how many steps of Q there are per step; ``None`` for 1 in the first 500 steps, then falling by a
            factor of e in 1000 steps, down to 0.03.
        max_size_triangular: the factors of longer axes are diagonal.
        min_ndim_triangular: all factors of tensors with fewer axes are diagonal. Axes of length 1 do not count.
        memory_save_mode: ``"one_diag"`` for a diagonal factor of the longest axis, ``"all_diag"`` for diagonal ones of all.
        momentum_into_precond_update: learn Q from the average, or else from the updates.
        init_scale: of Q at first; ``None`` to take it from the first update, whose root mean square it brings to 1.
        max_rms: shorten the update to this root mean square if that is larger; ``None`` not to.
        damping: noise of this size is thought to be part of every update, without its correlations in ``Q m``, so that Q
            stays finite where updates are 0; in units of the gradient.

    Raises:
        OptionError: an option is not valid.

    Cost: for a triangular axis of length d of a tensor with n elements two products of order n d per step, and for a step of Q
    two more, with an inverse and a product of order d³. The state is d² numbers, or d for a diagonal axis, and n.

    Reference: Li, "Preconditioned stochastic gradient descent", IEEE TNNLS, 2018, arXiv:1512.04202; Pooladzandi, Li,
    "Curvature-informed SGD via general purpose Lie-group preconditioners", arXiv:2402.11858, 2024, for the step of triangular
    factors in their group.
    """

    takes_sharded = False
    bounds = numbers(
        momentum=DECAY,
        precond_lr=NON_NEGATIVE,
        beta_norm=DECAY,
        init_scale=POSITIVE,
        max_rms=POSITIVE,
        damping=NON_NEGATIVE,
    )
    State = PSGDKronState
    elementwise = False
    batches = True

    def __init__(
        self,
        momentum: Number = 0.9,
        precond_lr: Number = 0.1,
        beta_norm: Number = 0.9,
        *,
        update_probability: float | None = None,
        max_size_triangular: int = 8192,
        min_ndim_triangular: int = 2,
        memory_save_mode: MemorySaveMode | None = None,
        momentum_into_precond_update: bool = True,
        init_scale: Number | None = 1.0,
        max_rms: Number | None = 1.1,
        damping: Number = 1e-9,
    ) -> None:
        super().__init__(
            {
                "momentum": momentum,
                "precond_lr": precond_lr,
                "beta_norm": beta_norm,
                "update_probability": update_probability,
                "max_size_triangular": max_size_triangular,
                "min_ndim_triangular": min_ndim_triangular,
                "memory_save_mode": memory_save_mode,
                "momentum_into_precond_update": momentum_into_precond_update,
                "init_scale": init_scale,
                "max_rms": max_rms,
                "damping": damping,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what means nothing."""
        mode, probability = settings["memory_save_mode"], settings["update_probability"]
        if mode not in (None, "one_diag", "all_diag"):
            raise OptionError(f"{self.place}: memory_save_mode={mode!r}; expected None, 'one_diag' or 'all_diag'")
        if probability is not None and not (is_number(probability) and 0 < probability <= 1):
            raise OptionError(
                f"{self.place}: update_probability={probability!r}; expected a number in (0, 1], or None for a schedule"
            )
        for name in ("max_size_triangular", "min_ndim_triangular"):
            value = settings[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise OptionError(f"{self.place}: {name}={value!r}; expected a whole number of at least 0")

    def init(self, param: Tensor, settings: Settings) -> PSGDKronState:
        """Zeros, and multiples of the identity."""
        shape, are_diagonal = _plan(param, settings)
        scale = (1.0 if settings.init_scale is None else settings.init_scale) ** (1 / len(shape))
        options: dict[str, Any] = {"dtype": state_dtype(param), "device": param.device}
        factors = [
            (torch.ones(length, **options) if is_diagonal else torch.eye(length, **options)) * scale
            for length, is_diagonal in zip(shape, are_diagonal, strict=True)
        ]
        return PSGDKronState(zeros(param), _pack(factors), torch.zeros(len(shape), **options))

    def update(
        self, update: Tensor, state: PSGDKronState, settings: Settings, context: Context
    ) -> tuple[Tensor, PSGDKronState]:
        """One step."""
        shape, are_diagonal = _plan(update, settings)
        exp_avg = average(state.exp_avg, update, settings.momentum)
        debiased = (exp_avg / debias(settings.momentum, context.count)).to(exp_avg.dtype).reshape(shape)
        sample = debiased if settings.momentum_into_precond_update else update.reshape(shape)
        old = state.factors
        if settings.init_scale is None:
            scale = _scale(sample) ** (1 / len(shape))
            old = torch.where(context.count == 1, old * scale, old)
        packed, norms = when(
            _is_due(context.count, settings.update_probability),
            lambda: _learn(sample, old, state.norms, shape, are_diagonal, settings),
            lambda: (old, state.norms),
        )
        factors = _unpack(packed, shape, are_diagonal)
        new = debiased
        for axis, factor in enumerate(factors):
            new = _apply(new, factor * factor, axis) if are_diagonal[axis] else _apply(new, factor, axis)
        for axis, factor in enumerate(factors):
            new = new if are_diagonal[axis] else multiply_axis(new, factor.mT, axis)
        if settings.max_rms is not None:
            rms = norm(new) / math.sqrt(max(1, new.numel()))
            new = new * smaller(settings.max_rms / (rms + 1e-6), 1.0)
        return new.reshape(update.shape), PSGDKronState(exp_avg, packed, norms)


def _plan(tensor: Tensor, settings: Mapping[str, Any]) -> tuple[tuple[int, ...], list[bool]]:
    """The shape without axes of length 1, and for each of its axes whether its factor is diagonal."""
    shape = tuple(length for length in tensor.shape if length != 1) or (1,)
    mode = settings["memory_save_mode"]
    if mode == "all_diag" or len(shape) < settings["min_ndim_triangular"]:
        return shape, [True] * len(shape)
    are_diagonal = [length > settings["max_size_triangular"] for length in shape]
    if mode == "one_diag":
        are_diagonal[shape.index(max(shape))] = True
    return shape, are_diagonal


def _pack(factors: Sequence[Tensor]) -> Tensor:
    return torch.cat([factor.reshape(-1) for factor in factors]) if len(factors) > 1 else factors[0].reshape(-1)


def _unpack(vector: Tensor, shape: Sequence[int], are_diagonal: Sequence[bool]) -> list[Tensor]:
    forms = [(n,) if is_diagonal else (n, n) for n, is_diagonal in zip(shape, are_diagonal, strict=True)]
    parts = vector.split([math.prod(form) for form in forms])
    return [part.view(form) for part, form in zip(parts, forms, strict=True)]


def _apply(tensor: Tensor, factor: Tensor, axis: int) -> Tensor:
    if factor.dim() == 1:
        return tensor * factor.reshape([-1] + [1] * (tensor.dim() - 1 - axis))
    return multiply_axis(tensor, factor, axis)


def _scale(sample: Tensor) -> Tensor:
    """By what Q must be multiplied so that the whitened update has a root mean square of 1."""
    rms = norm(sample) / math.sqrt(max(1, sample.numel()))
    return torch.where(rms > 0, torch.where(rms > 0, rms, 1.0) ** -0.5, 1.0)


def _is_due(count: Tensor, probability: float | None) -> bool | Tensor:
    """Whether Q makes a step: one in ``ceil(1 / p)``, p that of the step."""
    if probability == 1:
        return True
    if probability is not None:
        return (count - 1) % math.ceil(1 / probability) == 0
    falling = ((count - 1 - _FLAT_START) * -_DECAY).exp().clamp(_LEAST_PROBABILITY, 1.0)
    return (count - 1) % (1 / falling).ceil() == 0


def _learn(
    sample: Tensor,
    old: Tensor,
    old_norms: Tensor,
    shape: Sequence[int],
    are_diagonal: Sequence[bool],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """The factors and the norms after a step of all of them."""
    factors = _balance(_unpack(old, shape, are_diagonal))
    whitened = sample
    for axis, factor in enumerate(factors):
        whitened = _apply(whitened, factor, axis)
    inverses = [_gram_of_inverse(factor) for factor in factors]
    squares = [factor * factor if factor.dim() == 1 else (factor * factor).sum(1) for factor in factors]
    damping = settings.damping * settings.damping
    slopes, sizes = [], []
    for axis, factor in enumerate(factors):
        noise = squares[axis] * (damping * _traces(squares, axis))
        plus = _products(whitened, axis, factor.dim()) + (noise if factor.dim() == 1 else noise.diag_embed())
        minus = inverses[axis] * _traces(inverses, axis)
        slopes.append(plus - minus)
        sizes.append((plus + minus).amax() if factor.dim() == 1 else _spectral_norm(plus + minus))
    size = torch.stack(sizes)
    norms = torch.maximum(size, average(old_norms, size, settings.beta_norm))
    news = []
    for factor, slope, scale in zip(factors, slopes, settings.precond_lr / _positive(norms), strict=True):
        step = slope * factor if factor.dim() == 1 else slope.triu() @ factor
        news.append(factor - step * scale)
    new = _pack(news)
    # What is not finite, and a factor without an inverse, would stay for ever.
    is_sound = new.isfinite().all()
    for factor in news:
        is_sound = is_sound & ((factor if factor.dim() == 1 else factor.diagonal()) != 0).all()
    return torch.where(is_sound, new, old), torch.where(is_sound, norms, old_norms)


def _balance(factors: list[Tensor]) -> list[Tensor]:
    """Factors with equal largest elements and the same product."""
    if len(factors) == 1:
        return factors
    logs = torch.stack([factor.abs().amax().log() for factor in factors])
    scales = (logs.mean() - logs).exp()
    return [factor * scale for factor, scale in zip(factors, scales, strict=True)]


def _gram_of_inverse(factor: Tensor) -> Tensor:
    """``Q⁻ᵀ Q⁻¹``; of a diagonal factor its diagonal."""
    if factor.dim() == 1:
        return 1 / (factor * factor)
    # (QQᵀ)⁻¹ from a triangular factor of QQᵀ, but of rows in reverse order: those of torch are lower ones.
    return torch.cholesky_inverse(factor.flip(0, 1)).flip(0, 1)


def _traces(matrices: Sequence[Tensor], axis: int) -> Tensor:
    """The product of the traces of all matrices but one; some are given by their diagonals."""
    result = matrices[0].new_ones(())
    for other, matrix in enumerate(matrices):
        if other != axis:
            result = result * (matrix if matrix.dim() == 1 else matrix.diagonal()).sum()
    return result


def _products(tensor: Tensor, axis: int, num_axes: int) -> Tensor:
    """Of the slices of an axis: of all pairs, or of each with itself."""
    if num_axes == 2:
        return gram(tensor, axis)
    others = [other for other in range(tensor.dim()) if other != axis]
    return (tensor * tensor).sum(others) if others else tensor * tensor


def _spectral_norm(matrix: Tensor) -> Tensor:
    """Nearly that of a positive semidefinite matrix, from below: ``‖M x‖ / ‖x‖`` with x the longest row of M."""
    largest = _positive(matrix.abs().amax())
    scaled = matrix / largest
    row = scaled.index_select(0, (scaled * scaled).sum(1).argmax().reshape(1)).reshape(-1)
    return largest * norm(scaled @ row) / _positive(norm(row))


def _positive(number: Tensor) -> Tensor:
    return number.clamp(min=torch.finfo(number.dtype).tiny)
