"""The parts of resilient propagation, as modules of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import choose, larger, smaller, zeros
from graphopt.optim.core.bounds import AT_LEAST_ONE, NON_NEGATIVE, POSITIVE, Bounds, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class StepSizeState(NamedTuple):
    """The signs before, and the step sizes, each like the parameter, at least float32."""

    prev_sign: Tensor
    step_size: Tensor


class BacktrackState(NamedTuple):
    """The signs before, zero where they had flipped, and the result before, each like the parameter, at least float32."""

    prev_sign: Tensor
    prev_update: Tensor


class SignState(NamedTuple):
    """The signs before, like the parameter, at least float32."""

    prev_sign: Tensor


class _StepSizes(Rule):
    """Keeps a step size for each element."""

    bounds = numbers(
        nplus=AT_LEAST_ONE,
        nminus=Bounds(0.0, 1.0, includes_low=False),
        lb=NON_NEGATIVE,
        ub=POSITIVE,
        alpha=POSITIVE,
    )
    State = StepSizeState

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """The least step size must not be above the largest."""
        low, high = settings["lb"], settings["ub"]
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise OptionError(f"{self.place}: lb={low!r} is above ub={high!r}; give the smaller one as lb")

    def init(self, param: Tensor, settings: Settings) -> StepSizeState:
        """Zeros; the first step fills in ``alpha``."""
        return StepSizeState(zeros(param), zeros(param))

    def advance(self, sign: Tensor, state: StepSizeState, settings: Settings, context: Context) -> StepSizeState:
        """The step sizes of this step, for its signs."""
        ones = torch.ones_like(sign)
        before = choose(context.count == 1, ones * settings.alpha, state.step_size)
        agreement = sign * state.prev_sign
        factor = choose(agreement < 0, ones * settings.nminus, choose(agreement > 0, ones * settings.nplus, ones))
        return StepSizeState(sign, smaller(larger(before * factor, settings.lb), settings.ub))


class ScaleLRBySignChange(_StepSizes):
    """Multiply each element of the update by a step size of its own, which grows while its sign stays.

    ``s`` is multiplied by ``nplus`` where the sign is that of the step before, by ``nminus`` where it is the opposite, and
    clamped to ``[lb, ub]``; update ``u s``. Unlike in `Rprop`, it also grows in the step after a flip.

    Args:
        nplus: growth.
        nminus: shrinkage.
        lb: the least step size.
        ub: the largest step size.
        alpha: the first step size.
        use_grad: look at signs of the gradient instead of the update.

    Raises:
        OptionError: a number is out of range.

    Reference: Riedmiller, Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", 1993,
    equation 4.
    """

    def __init__(
        self,
        nplus: Number = 1.2,
        nminus: Number = 0.5,
        lb: Number = 1e-6,
        ub: Number = 50.0,
        alpha: Number = 1.0,
        use_grad: bool = False,
    ) -> None:
        super().__init__({"nplus": nplus, "nminus": nminus, "lb": lb, "ub": ub, "alpha": alpha, "use_grad": use_grad})

    def update(
        self, update: Tensor, state: StepSizeState, settings: Settings, context: Context
    ) -> tuple[Tensor, StepSizeState]:
        """One step."""
        sign = (context.grad.to(update.dtype) if settings.use_grad else update).sign()
        state = self.advance(sign, state, settings, context)
        return update * state.step_size, state


class SignConsistencyLRs(_StepSizes):
    """The step sizes that `ScaleLRBySignChange` multiplies by; ``Mul(SignConsistencyLRs())`` is that module.

    Args:
        nplus: growth where the update has the sign of the one before.
        nminus: shrinkage where it has the opposite sign.
        lb: the least step size.
        ub: the largest step size.
        alpha: the first step size.

    Raises:
        OptionError: a number is out of range.
    """

    def __init__(
        self,
        nplus: Number = 1.2,
        nminus: Number = 0.5,
        lb: Number = 1e-6,
        ub: Number = 50.0,
        alpha: Number = 1.0,
    ) -> None:
        super().__init__({"nplus": nplus, "nminus": nminus, "lb": lb, "ub": ub, "alpha": alpha})

    def update(
        self, update: Tensor, state: StepSizeState, settings: Settings, context: Context
    ) -> tuple[Tensor, StepSizeState]:
        """One step."""
        state = self.advance(update.sign(), state, settings, context)
        return state.step_size, state


class BacktrackOnSignChange(Rule):
    """Where a sign flips, take back the step before instead of making one.

    There the update is minus what this module returned before (or 0, without ``backtrack``), and the sign counts as none in
    the next step, which is a step forwards whatever its sign is; as in `Rprop`.

    Args:
        use_grad: look at signs of the gradient instead of the update.
        backtrack: whether to take the step back, rather than make none.

    Reference: Riedmiller, Braun, "A direct adaptive method for faster backpropagation learning: the RPROP algorithm", 1993,
    equation 6.
    """

    State = BacktrackState

    def __init__(self, use_grad: bool = False, backtrack: bool = True) -> None:
        super().__init__({"use_grad": use_grad, "backtrack": backtrack})

    def init(self, param: Tensor, settings: Settings) -> BacktrackState:
        """Zeros."""
        return BacktrackState(zeros(param), zeros(param))

    def update(
        self, update: Tensor, state: BacktrackState, settings: Settings, context: Context
    ) -> tuple[Tensor, BacktrackState]:
        """One step."""
        sign = (context.grad.to(update.dtype) if settings.use_grad else update).sign()
        is_flip = sign * state.prev_sign < 0
        nothing = torch.zeros_like(update)
        new = choose(is_flip, -state.prev_update if settings.backtrack else nothing, update)
        return new, BacktrackState(choose(is_flip, nothing, sign), new)


class SignConsistencyMask(Rule):
    """0 where the update has the opposite sign of the one before, else 1; ``Mul(SignConsistencyMask())`` skips flips.

    In the first step, and where the update or the one before is zero, there is no flip.
    """

    State = SignState

    def init(self, param: Tensor, settings: Settings) -> SignState:
        """Zeros."""
        return SignState(zeros(param))

    def update(
        self, update: Tensor, state: SignState, settings: Settings, context: Context
    ) -> tuple[Tensor, SignState]:
        """One step."""
        sign = update.sign()
        return (sign * state.prev_sign >= 0).to(update.dtype), SignState(sign)
