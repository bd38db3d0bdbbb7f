"""Updates of matrices made orthogonal, and what scales them: the parts of `Muon`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import dot
from graphopt.optim.core.bounds import ANY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule

Method = Literal["newton-schulz", "svd"]
AdjustLR = Literal["original", "match_rms_adamw"]

# https://github.com/KellerJordan/Muon/blob/f90a42b28e00b8d9d2d05865fe90d9f39abcbcbd/muon.py#L16
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Orthogonalize(Rule):
    """Set all singular values of each matrix to 1: ``U S Vᵀ`` becomes ``U Vᵀ``; what has less than two axes stays.

    Tensors with more axes are matrices with the first axis as rows. The method ``"newton-schulz"`` runs in bfloat16 and leaves
    singular values between about 0.6 and 1.3; ``"svd"`` is exact (singular values that are zero stay zero), and slower.

    Args:
        ns_steps: iterations of Newton-Schulz.
        adjust_lr: whether to scale the result as `MuonAdjustLR` does.
        dual_norm_correction: whether to multiply the result by its inner product with what came in.
        method: how to compute it.
        eps: the least norm that is divided by.
        ns_coefficients: of ``x``, ``x³`` and ``x⁵`` in the polynomial that is iterated.

    Raises:
        OptionError: an option is not valid.

    Cost: ``ns_steps`` times three products of order r² c for r rows, the shorter side, in bfloat16; with ``"svd"`` one
    decomposition.

    Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. Bernstein, Newhouse, "Old
    optimizer, new norm", arXiv:2409.20325, 2024, for the dual norm.
    """

    bounds = numbers(eps=NON_NEGATIVE)
    elementwise = False
    batches = True

    def __init__(
        self,
        ns_steps: int = 5,
        *,
        adjust_lr: bool = False,
        dual_norm_correction: bool = False,
        method: Method = "newton-schulz",
        eps: Number = 1e-7,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    ) -> None:
        super().__init__(
            {
                "ns_steps": ns_steps,
                "adjust_lr": adjust_lr,
                "dual_norm_correction": dual_norm_correction,
                "method": method,
                "eps": eps,
                "ns_coefficients": ns_coefficients,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse unknown methods."""
        check_method(self, settings)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        if update.dim() < 2:
            return update, state
        new = orthogonalize(update, settings)
        if settings.dual_norm_correction:
            new = new * dot(update, new)
        if settings.adjust_lr:
            new = new * ratio(update, "match_rms_adamw")
        return new, state


class MuonAdjustLR(Rule):
    """Scale the update of each matrix by its shape; what has less than two axes stays.

    With A rows and B columns, ``"match_rms_adamw"`` multiplies by ``0.2 √max(A, B)``, after which an orthogonal update is as
    large as one of AdamW, and ``"original"`` by ``√max(1, A / B)``.

    Args:
        alpha: multiplies it, too.
        adjust_lr_fn: the rule.

    Raises:
        OptionError: an option is not valid.

    Reference: Liu et al., "Muon is scalable for LLM training", arXiv:2502.16982, 2025, equation 4.
    """

    bounds = numbers(alpha=ANY)
    elementwise = False
    batches = True

    def __init__(self, alpha: Number = 1.0, *, adjust_lr_fn: AdjustLR = "match_rms_adamw") -> None:
        super().__init__({"alpha": alpha, "adjust_lr_fn": adjust_lr_fn})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse unknown rules."""
        check_adjust_lr_fn(self, settings)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        if update.dim() < 2:
            return update, state
        return update * (ratio(update, settings.adjust_lr_fn) * settings.alpha), state


class DualNormCorrection(Rule):
    """Multiply the update of each matrix by its inner product with the gradient; what has less than two axes stays.

    Behind `Orthogonalize` the factor is the sum of the gradient's singular values, so that steps shrink with the gradient.

    Reference: Bernstein, Newhouse, "Old optimizer, new norm", arXiv:2409.20325, 2024.
    """

    elementwise = False
    batches = True

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        if update.dim() < 2:
            return update, state
        return update * dot(context.grad.to(update.dtype), update), state


def orthogonalize(tensor: Tensor, settings: Settings) -> Tensor:
    """The tensor, as a matrix of its first axis and all others, with singular values of 1."""
    matrix, new = tensor.flatten(1), tensor
    if settings.method == "svd":
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        least = values[:1] * (torch.finfo(matrix.dtype).eps * max(matrix.shape))
        new = (left * (values > least).to(left.dtype)) @ right
    else:
        new = _newton_schulz(matrix, settings).to(tensor.dtype)
    return new.reshape(tensor.shape)


def ratio(tensor: Tensor, adjust_lr_fn: AdjustLR | None) -> float:
    """By what the update of a matrix is multiplied."""
    num_rows = tensor.shape[0]
    num_columns = math.prod(tensor.shape[1:])
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(num_rows, num_columns))
    return math.sqrt(max(1.0, num_rows / max(1, num_columns)))


def check_method(module: Rule, settings: Mapping[str, Any]) -> None:
    """Raise `OptionError` for what `orthogonalize` does not know."""
    if settings["method"] not in ("newton-schulz", "svd"):
        raise OptionError(f"{module.place}: method={settings['method']!r}; expected 'newton-schulz' or 'svd'")
    steps, coefficients = settings["ns_steps"], settings["ns_coefficients"]
    if not isinstance(steps, int) or steps < 1:
        raise OptionError(f"{module.place}: ns_steps={steps!r}; expected a positive whole number")
    if len(coefficients) != 3:
        raise OptionError(f"{module.place}: ns_coefficients={coefficients!r}; expected three numbers")


def check_adjust_lr_fn(module: Rule, settings: Mapping[str, Any]) -> None:
    """Raise `OptionError` for what `ratio` does not know."""
    if settings["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        raise OptionError(
            f"{module.place}: adjust_lr_fn={settings['adjust_lr_fn']!r}; expected 'original' or 'match_rms_adamw'"
        )


def _newton_schulz(matrix: Tensor, settings: Settings) -> Tensor:
    """The iteration ``X (a + b XᵀX + c (XᵀX)²)`` in bfloat16, with the products on the short side."""
    linear, cubic, quintic = settings.ns_coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=settings.eps)
    for _ in range(settings.ns_steps):
        gram = x @ x.T
        # addmm rounds to bfloat16 once, and in the order of torch.optim.Muon.
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x.T if is_tall else x
