"""Gradient clipping that keeps the statistics of a gradient in step with it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from graphopt import annotations


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of all gradients together, and rescale their sums of squares with them.

    As `torch.nn.utils.clip_grad_norm_`, which multiplies every gradient by ``c = min(1, max_norm / norm)``, except
    that ``SUM_GRAD_SQUARED`` is multiplied by ``c**2`` in the same call. (After torch's own function the statistic
    follows when it is next read.)

    Args:
        parameters: one tensor or an iterable of them; those without a gradient are skipped.
        max_norm: upper limit of the norm, in units of the gradient.
        norm_type: order of the norm; ``float("inf")`` for the largest entry.
        error_if_nonfinite: raise if the norm is infinite or NaN, before any gradient is changed.
        foreach: torch's choice of implementation; ``None`` lets torch choose.

    Returns:
        The norm before clipping, shape (), dtype of the gradients.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
        StaleAnnotation: a gradient had been changed after backward in a way that is not a rescaling.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> annotations.publish(weight, weight.grad**2, num_samples=1)
        >>> float(clip_grad_norm_(weight, max_norm=1.0))
        5.0
        >>> annotations.get(weight, annotations.SUM_GRAD_SQUARED)
        tensor([0.3600, 0.6400])
    """
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite, foreach)
    annotations.reconcile(params)
    return norm
