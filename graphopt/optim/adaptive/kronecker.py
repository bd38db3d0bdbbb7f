"""Matrices for the axes of a tensor: their shapes, products with the tensor, roots, and how they stand in one vector of state.

A tensor of three axes with lengths a, b and c has factors of shapes (a, a), (b, b) and (c, c), instead of one matrix for all
abc elements. An axis that is too long has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import average, state_dtype
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.module import Module


class Axes(NamedTuple):
    """How a rule looks at a tensor.

    Attributes:
        shape: what it is reshaped to.
        kept: the numbers of the axes in it that have a matrix.
    """

    shape: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def lengths(self) -> list[int]:
        """Of the axes that have a matrix."""
        return [self.shape[axis] for axis in self.kept]

    def pack(self, matrices: Sequence[Tensor]) -> Tensor:
        """The matrices one after another in a vector."""
        if len(matrices) == 1:
            return matrices[0].reshape(-1)
        return torch.cat([matrix.reshape(-1) for matrix in matrices])

    def unpack(self, vector: Tensor) -> list[Tensor]:
        """The matrices in a vector, as views."""
        lengths = self.lengths
        parts = vector.split([length * length for length in lengths])
        return [part.view(length, length) for part, length in zip(parts, lengths, strict=True)]

    def identity(self, param: Tensor) -> Tensor:
        """A vector of identity matrices, empty if no axis has a matrix."""
        options: dict[str, Any] = {"dtype": state_dtype(param), "device": param.device}
        if not self.kept:
            return torch.zeros(0, **options)
        return self.pack([torch.eye(length, **options) for length in self.lengths])

    def zeros(self, param: Tensor) -> Tensor:
        """A vector of matrices of zeros."""
        size = sum(length * length for length in self.lengths)
        return torch.zeros(size, dtype=state_dtype(param), device=param.device)

    def accumulate(self, old: Tensor, tensor: Tensor, beta: Number | None, decay: Number | None) -> Tensor:
        """For each axis add the products of its slices with each other, summed over all other axes; in a vector.

        Args:
            old: what there is.
            tensor: whose slices are multiplied.
            beta: see `accumulate`.
            decay: likewise.
        """
        olds = self.unpack(old)
        return self.pack(
            [
                _add_gram(matrix, _slices(tensor, axis), beta, decay)
                for axis, matrix in zip(self.kept, olds, strict=True)
            ]
        )

    def multiply(self, tensor: Tensor, matrices: Sequence[Tensor], transposed: bool = False) -> Tensor:
        """Multiply each axis by its matrix M, ``M t`` if the axis is the first, or by ``Mᵀ``."""
        for axis, matrix in zip(self.kept, matrices, strict=True):
            tensor = multiply_axis(tensor, matrix.mT if transposed else matrix, axis)
        return tensor


def axes_of(tensor: Tensor, settings: Mapping[str, Any]) -> Axes:
    """How a rule with the settings ``max_dim``, ``merge_small`` and ``precondition_1d`` looks at a tensor."""
    max_dim = settings["max_dim"]
    shape = tuple(tensor.shape)
    if settings["merge_small"]:
        shape = merge(shape, max_dim)
    if tensor.dim() <= 1 and not settings["precondition_1d"]:
        return Axes(shape, ())
    return Axes(shape, tuple(axis for axis, length in enumerate(shape) if 1 < length <= max_dim))


def merge(shape: Sequence[int], max_dim: int) -> tuple[int, ...]:
    """Multiply lengths of neighbouring axes as long as the product is at most ``max_dim``; lengths of 1 vanish.

    The first axis, that of outputs, stays apart. One matrix for all elements of a small matrix would have as many rows as there
    are elements, and of the few gradients that an average remembers so large a matrix learns less than two small ones.
    """
    merged: list[int] = []
    for length in shape:
        if length == 1:
            continue
        if len(merged) > 1 and merged[-1] * length <= max_dim:
            merged[-1] *= length
        else:
            merged.append(length)
    return tuple(merged)


def check_axes(module: Module, settings: Mapping[str, Any], interval: str) -> None:
    """Raise `OptionError` if ``max_dim`` or the setting named ``interval`` is no positive whole number."""
    for name in ("max_dim", interval):
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{module.place}: {name}={value!r}; expected a positive whole number")


def is_due(context_count: Tensor, interval: int) -> bool | Tensor:
    """Whether the step is one of number 1, 1 + interval, 1 + 2 interval, ..."""
    return True if interval == 1 else (context_count - 1) % interval == 0


def accumulate(old: Tensor, new: Tensor, beta: Number | None, decay: Number | None) -> Tensor:
    """An average with ``beta``, or else the sum; ``decay`` shrinks what is old before."""
    if decay is not None:
        old = old * decay
    return old + new if beta is None else average(old, new, beta)


def gram(tensor: Tensor, axis: int) -> Tensor:
    """The products of the slices of an axis with each other, summed over all other axes."""
    rows = _slices(tensor, axis)
    return rows @ rows.mT


def _slices(tensor: Tensor, axis: int) -> Tensor:
    """The slices of an axis as the rows of a matrix."""
    length = tensor.shape[axis]
    if axis == tensor.dim() - 1:
        return tensor.reshape(-1, length).mT
    return (tensor if axis == 0 else tensor.movedim(axis, 0)).reshape(length, -1)


def _add_gram(old: Tensor, rows: Tensor, beta: Number | None, decay: Number | None) -> Tensor:
    """`accumulate` with the products of rows; numbers are given to the product, which then adds in the same pass."""
    if isinstance(beta, Tensor) or isinstance(decay, Tensor):
        return accumulate(old, rows @ rows.mT, beta, decay)
    kept = (1.0 if decay is None else decay) * (1.0 if beta is None else beta)
    return torch.addmm(old, rows, rows.mT, beta=kept, alpha=1.0 if beta is None else 1 - beta)


def multiply_axis(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """``sum over j of matrix[i, j] tensor[..., j, ...]``."""
    shape = tensor.shape
    length = shape[axis]
    if axis == tensor.dim() - 1:
        return (tensor.reshape(-1, length) @ matrix.mT).reshape(shape)
    if axis == 0:
        return (matrix @ tensor.reshape(length, -1)).reshape(shape)
    return (matrix @ tensor.reshape(math.prod(shape[:axis]), length, -1)).reshape(shape)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues in ascending order and eigenvectors of a symmetric matrix.

    What is not finite counts as 0. Where the algorithm does not converge, it is tried in float64 with a little of the identity
    added, and after that the diagonal is all that is used.
    """
    matrix = matrix.nan_to_num(0.0, 0.0, 0.0)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        jitter = torch.finfo(matrix.dtype).eps * diagonal.abs().amax()
        identity = torch.eye(matrix.shape[-1], dtype=torch.float64, device=matrix.device)
        try:
            values, vectors = torch.linalg.eigh(matrix.double() + jitter * identity)
            return values.to(matrix.dtype), vectors.to(matrix.dtype)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            order = diagonal.argsort()
            return diagonal[order], identity.to(matrix.dtype)[:, order]
    return values, vectors


def power(matrix: Tensor, exponent: Number) -> Tensor:
    """A power of a symmetric positive semidefinite matrix, on the span of its eigenvectors.

    Eigenvalues that are 0 up to rounding stay 0, as in the pseudoinverse. The derivative is exact for equal eigenvalues, too.

    Cost: one eigendecomposition and a product, of order n³.
    """
    given = (
        exponent if isinstance(exponent, Tensor) else torch.full((), exponent, dtype=matrix.dtype, device=matrix.device)
    )
    root: Tensor = _Power.apply(matrix, given.to(matrix.dtype))[0]  # type: ignore[no-untyped-call]
    return root


class _Power(torch.autograd.Function):
    """The power, with the derivative of Daleckii and Krein: that of `torch.linalg.eigh` is NaN for equal eigenvalues."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = eigh(matrix)
        powers = _powers(values, exponent)
        return (vectors * powers) @ vectors.mT, values, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, values, vectors = output
        ctx.mark_non_differentiable(values, vectors)
        ctx.save_for_backward(values, vectors, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors, exponent = ctx.saved_tensors
        powers = _powers(values, exponent)
        inner = vectors.mT @ grad @ vectors
        rows, columns = values.unsqueeze(-1), values.unsqueeze(-2)
        apart = rows - columns
        are_equal = apart.abs() <= torch.finfo(values.dtype).eps ** 0.5 * (rows.abs() + columns.abs())
        quotients = (powers.unsqueeze(-1) - powers.unsqueeze(-2)) / torch.where(are_equal, 1.0, apart)
        slopes = exponent * _powers(values, exponent - 1)
        quotients = torch.where(are_equal, (slopes.unsqueeze(-1) + slopes.unsqueeze(-2)) / 2, quotients)
        logs = torch.where(powers > 0, values, 1.0).log()
        of_exponent = (inner.diagonal(dim1=-2, dim2=-1) * powers * logs).sum(-1)
        return vectors @ (inner * quotients) @ vectors.mT, of_exponent


def _powers(values: Tensor, exponent: Tensor) -> Tensor:
    """Of eigenvalues in ascending order."""
    least = values[-1:] * (torch.finfo(values.dtype).eps * len(values))
    is_zero = (values <= least) | (values <= 0)
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, values) ** exponent)


def inverse_exponent(settings: Settings, num_factors: int) -> Number:
    """Of Shampoo: ``-1 / (2 number of factors)``, or ``-1 / exp_override``."""
    override: Number | None = settings.exp_override
    return -1 / (2 * num_factors if override is None else override)
