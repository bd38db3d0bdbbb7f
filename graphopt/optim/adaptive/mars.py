"""Gradients with less variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from graphopt.optim.core.arithmetic import choose, norm, norm_of_all, smaller, zeros
from graphopt.optim.core.bounds import ANY, DECAY, POSITIVE, numbers
from graphopt.optim.core.context import Context, Everything, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.stabilization.slices import check_fixed


class MARSState(NamedTuple):
    """The update before, like the parameter, at least float32."""

    prev_update: Tensor


class MARSCorrection(Rule):
    """Add to the gradient a part of its change: ``c = u + scaling beta / (1 - beta) (u - u_before)``, then clip its norm.

    It stands in front of an optimizer whose average of gradients has the same ``beta``: ``[MARSCorrection(0.95),
    Adam(0.95, 0.99)]`` is MARS-AdamW with `WeightDecay`, ``[MARSCorrection(0.95), Lion(...)]`` MARS-Lion. The gradient before
    is that of the batch before, which the paper calls the approximate version; it needs no second evaluation.

    Args:
        beta: of the average that follows.
        scaling: how much of the correction is made; 0 for none, 1 for that of STORM.
        max_norm: the largest norm of ``c``, in units of the gradient; ``None`` for no limit.
        tensorwise: norms of each tensor, as in the authors' program; ``False``: of all tensors together.

    Raises:
        OptionError: a number is out of range, or ``tensorwise`` differs between parameters.

    Reference: Yuan, Liu, Wu, Zhou, Gu, "MARS: Unleashing the Power of Variance Reduction for Training Large Models",
    arXiv:2411.10438, 2024, algorithm 1 with the approximation of section 3.
    """

    bounds = numbers(beta=DECAY, scaling=ANY, max_norm=POSITIVE)
    State = MARSState

    def __init__(
        self,
        beta: Number = 0.9,
        scaling: Number = 0.025,
        max_norm: Number | None = 1.0,
        *,
        tensorwise: bool = True,
    ) -> None:
        super().__init__({"beta": beta, "scaling": scaling, "max_norm": max_norm, "tensorwise": tensorwise})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what must be the same for all tensors."""
        check_fixed(self, settings, ("tensorwise",))

    @property
    def measures(self) -> bool:
        """Whether there is one norm for all tensors."""
        return not self.defaults["tensorwise"]

    def init(self, param: Tensor, settings: Settings) -> MARSState:
        """Zeros; the first step makes no correction."""
        return MARSState(zeros(param))

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """The norm of all corrected gradients."""
        entries = zip(everything.updates, everything.states, everything.contexts, strict=True)
        return {"norm": norm_of_all([_corrected(u, state, settings, context) for u, state, context in entries])}

    def update(
        self, update: Tensor, state: MARSState, settings: Settings, context: Context
    ) -> tuple[Tensor, MARSState]:
        """One step."""
        new = _corrected(update, state, settings, context)
        if settings.max_norm is not None:
            length = context.measured["norm"].to(new.device, new.dtype) if self.measures else norm(new)
            new = new * smaller(length.reciprocal() * settings.max_norm, 1.0)  # of zeros it is min(1, infinity)
        return new, MARSState(update)


def _corrected(update: Tensor, state: MARSState, settings: Settings, context: Context) -> Tensor:
    difference = update - choose(context.count == 1, update, state.prev_update)
    weight: Number = settings.scaling * settings.beta / (1 - settings.beta)
    return update + difference * weight
