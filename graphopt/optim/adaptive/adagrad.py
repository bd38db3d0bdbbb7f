"""Adagrad."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import full
from graphopt.optim.core.bounds import ANY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class AdagradState(NamedTuple):
    """The sum of powers of the updates, like the parameter, at least float32."""

    sum: Tensor


class Adagrad(Rule):
    """The update, divided by the root of the sum of all its squares so far.

    ``s = s + |u|^pow``, update ``alpha / (1 + (t - 1) lr_decay) · inner(u) / (s^(1/pow) + eps)``.

    Args:
        lr_decay: how fast the update shrinks beside that, per step.
        initial_accumulator_value: of the sum.
        eps: added to the denominator; in units of the gradient.
        alpha: multiplies the update.
        pow: the power that is summed.
        use_sqrt: whether the root is taken; if not, the update is divided by ``s + eps``.
        inner: modules that make of the update what is divided.

    Raises:
        OptionError: a number is out of range.

    Reference: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic optimization", JMLR 12,
    2011, figure 1 (diagonal).
    """

    bounds = numbers(lr_decay=NON_NEGATIVE, initial_accumulator_value=NON_NEGATIVE, eps=NON_NEGATIVE, alpha=ANY)
    State = AdagradState

    def __init__(
        self,
        lr_decay: Number = 0.0,
        initial_accumulator_value: Number = 0.0,
        eps: Number = 1e-10,
        *,
        alpha: Number = 1.0,
        pow: float = 2.0,
        use_sqrt: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(
            {
                "lr_decay": lr_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "eps": eps,
                "alpha": alpha,
                "pow": pow,
                "use_sqrt": use_sqrt,
            },
            **({} if inner is None else {"inner": inner}),
        )

    def check_settings(self, settings: Any) -> None:
        """The power must be positive."""
        if not settings["pow"] > 0:
            raise OptionError(f"{self.place}: pow={settings['pow']!r}; expected a positive number")

    def init(self, param: Tensor, settings: Settings) -> AdagradState:
        """The initial value."""
        return AdagradState(full(param, settings.initial_accumulator_value))

    def update(
        self, update: Tensor, state: AdagradState, settings: Settings, context: Context
    ) -> tuple[Tensor, AdagradState]:
        """One step."""
        power = settings.pow
        total = state.sum + (update * update if power == 2 else update.abs() ** power)
        scale = total
        if settings.use_sqrt:
            scale = total.sqrt() if power == 2 else total ** (1 / power)
        step_size = settings.alpha / (1 + (context.count - 1) * settings.lr_decay)
        return context.operands.get("inner", update) * step_size / (scale + settings.eps), AdagradState(total)
