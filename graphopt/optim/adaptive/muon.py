"""Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from graphopt.errors import UnsupportedError
from graphopt.optim.adaptive.orthogonalize import (
    NS_COEFFICIENTS,
    AdjustLR,
    Method,
    check_adjust_lr_fn,
    check_method,
    orthogonalize,
    ratio,
)
from graphopt.optim.core.arithmetic import average, dot, mix, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class MuonState(NamedTuple):
    """The average of updates, like the parameter, at least float32."""

    momentum_buffer: Tensor


class Muon(Rule):
    """Momentum whose matrices are made orthogonal, as `torch.optim.Muon`.

    ``b = momentum b + (1 - momentum) u``, ``d = momentum b + (1 - momentum) u`` with the new b (``nesterov``, else ``d = b``),
    update ``ratio(shape) orthogonal(d)``: `NAG` with ``lerp=True``, `Orthogonalize`, `MuonAdjustLR`. It takes parameters with at
    least two axes; behind it, `WeightDecay` and `LR`.

    Args:
        momentum: of the average.
        nesterov: whether to look one step ahead.
        ns_steps: iterations of Newton-Schulz.
        adjust_lr_fn: how the shape scales the update (see `MuonAdjustLR`); ``None`` is ``"original"``.
        dual_norm_correction: whether to multiply the update by its inner product with ``d``.
        method: ``"newton-schulz"`` in bfloat16, or ``"svd"``.
        eps: the least norm that is divided by.
        ns_coefficients: of the polynomial that is iterated.

    Raises:
        OptionError: an option is not valid.
        UnsupportedError: in a step, of a parameter with less than two axes. Nothing was changed.

    Cost: ``ns_steps`` times three products of order r² c for r rows, the shorter side, in bfloat16; with ``"svd"`` one
    decomposition.

    Reference: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    bounds = numbers(momentum=DECAY, eps=NON_NEGATIVE)
    State = MuonState
    elementwise = False
    batches = True

    def __init__(
        self,
        momentum: Number = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLR | None = None,
        dual_norm_correction: bool = False,
        method: Method = "newton-schulz",
        eps: Number = 1e-7,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    ) -> None:
        super().__init__(
            {
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
                "dual_norm_correction": dual_norm_correction,
                "method": method,
                "eps": eps,
                "ns_coefficients": ns_coefficients,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse unknown methods."""
        check_method(self, settings)
        check_adjust_lr_fn(self, settings)

    def init(self, param: Tensor, settings: Settings) -> MuonState:
        """Zeros."""
        return MuonState(zeros(param))

    def update(
        self, update: Tensor, state: MuonState, settings: Settings, context: Context
    ) -> tuple[Tensor, MuonState]:
        """One step."""
        if update.dim() < 2:
            raise UnsupportedError(
                f"{self.place}: a parameter of shape {tuple(update.shape)} is no matrix. Give such parameters to another "
                "module: m.Split(lambda p: p.ndim >= 2, m.Muon(), m.Adam())"
            )
        buffer = average(state.momentum_buffer, update, settings.momentum)
        direction = mix(update, buffer, settings.momentum) if settings.nesterov else buffer
        new = orthogonalize(direction, settings)
        factor = ratio(update, settings.adjust_lr_fn)
        if factor != 1:
            new = new.mul_(factor)  # nobody else has it yet
        if settings.dual_norm_correction:
            new = new * dot(direction, new)
        return new, MuonState(buffer)
