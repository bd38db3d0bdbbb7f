"""Operations on the update and those of earlier steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import full, larger, zeros
from graphopt.optim.core.bounds import POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule


class HistoryState(NamedTuple):
    """The last updates, oldest overwritten first, with one axis of ``n`` in front of the parameter's."""

    history: Tensor


class PreviousUpdateState(NamedTuple):
    """The update before, like the parameter, at least float32."""

    prev_update: Tensor


class PreviousGradState(NamedTuple):
    """The gradient before, like the parameter, at least float32."""

    prev_grad: Tensor


class Previous(Rule):
    """The update of ``n`` steps ago, ``u_(t-n)``; in the first ``n`` steps the very first one.

    Args:
        n: how many steps ago.

    Raises:
        OptionError: ``n`` is no whole number of at least 1.

    Cost: the state is ``n`` updates, all of which are read in each step.
    """

    takes_sharded = False
    State = HistoryState
    elementwise = False  # the history has one axis more

    def __init__(self, n: int = 1) -> None:
        super().__init__({"n": n})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a history of nothing."""
        n = settings["n"]
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise OptionError(f"{self.place}: n={n!r}; expected a whole number of at least 1")

    def init(self, param: Tensor, settings: Settings) -> HistoryState:
        """Zeros."""
        return HistoryState(torch.stack([zeros(param)] * settings.n))

    def update(
        self, update: Tensor, state: HistoryState, settings: Settings, context: Context
    ) -> tuple[Tensor, HistoryState]:
        """One step."""
        n = settings.n
        column = (n, *[1] * update.dim())
        slots = torch.arange(n, device=update.device)
        count = context.count.to(update.device)
        is_next = ((count - 1).remainder(n) == slots).view(column)  # what stands there is n steps old
        history = torch.where(is_next, update, state.history)
        is_wanted = torch.where(count > n, is_next, (slots == 0).view(column))
        source = torch.where(count > n, state.history, history)
        return torch.where(is_wanted, source, 0.0).sum(0), HistoryState(history)


class _WithPrevious(Rule):
    """Compares the update with the one before."""

    State = PreviousUpdateState
    start = 0.0

    def init(self, param: Tensor, settings: Settings) -> PreviousUpdateState:
        """What the first update is compared with."""
        return PreviousUpdateState(full(param, self.start))


class LastDifference(_WithPrevious):
    """The difference to the update before, ``u_t - u_(t-1)``; the first as it is."""

    def update(
        self, update: Tensor, state: PreviousUpdateState, settings: Settings, context: Context
    ) -> tuple[Tensor, PreviousUpdateState]:
        """One step."""
        return update - state.prev_update, PreviousUpdateState(update)


class LastGradDifference(Rule):
    """The difference to the gradient before, ``g_t - g_(t-1)``, whatever the update is; the first gradient as it is."""

    State = PreviousGradState

    def init(self, param: Tensor, settings: Settings) -> PreviousGradState:
        """Zeros."""
        return PreviousGradState(zeros(param))

    def update(
        self, update: Tensor, state: PreviousGradState, settings: Settings, context: Context
    ) -> tuple[Tensor, PreviousGradState]:
        """One step."""
        grad = context.grad.to(update.dtype)
        return grad - state.prev_grad, PreviousGradState(grad)


class LastProduct(_WithPrevious):
    """The product with the update before, ``u_t u_(t-1)``; the first as it is."""

    start = 1.0

    def update(
        self, update: Tensor, state: PreviousUpdateState, settings: Settings, context: Context
    ) -> tuple[Tensor, PreviousUpdateState]:
        """One step."""
        return update * state.prev_update, PreviousUpdateState(update)


class _Ratio(_WithPrevious):
    """Has the update or the one before on top; before the first there are ones."""

    start = 1.0

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse other names."""
        if settings["numerator"] not in ("cur", "prev"):
            raise OptionError(f"{self.place}: numerator={settings['numerator']!r}; expected 'cur' or 'prev'")


class LastRatio(_Ratio):
    """The ratio to the update before, ``u_t / u_(t-1)``, with 1 before the first. Dividing by zero gives infinities and NaN.

    Args:
        numerator: ``"cur"``, or ``"prev"`` for ``u_(t-1) / u_t``.

    Raises:
        OptionError: ``numerator`` is something else.
    """

    def __init__(self, numerator: Literal["cur", "prev"] = "cur") -> None:
        super().__init__({"numerator": numerator})

    def update(
        self, update: Tensor, state: PreviousUpdateState, settings: Settings, context: Context
    ) -> tuple[Tensor, PreviousUpdateState]:
        """One step."""
        top, bottom = update, state.prev_update
        if settings.numerator == "prev":
            top, bottom = bottom, top
        return top / bottom, PreviousUpdateState(update)


class LastAbsoluteRatio(_Ratio):
    """The ratio of magnitudes, ``|u_t| / max(|u_(t-1)|, eps)``, with 1 before the first.

    Args:
        numerator: ``"cur"``, or ``"prev"`` for ``|u_(t-1)| / max(|u_t|, eps)``.
        eps: the least that is divided by.

    Raises:
        OptionError: an option is not valid.
    """

    bounds = numbers(eps=POSITIVE)

    def __init__(self, numerator: Literal["cur", "prev"] = "cur", eps: Number = 1e-8) -> None:
        super().__init__({"numerator": numerator, "eps": eps})

    def update(
        self, update: Tensor, state: PreviousUpdateState, settings: Settings, context: Context
    ) -> tuple[Tensor, PreviousUpdateState]:
        """One step."""
        top, bottom = update.abs(), state.prev_update.abs()
        if settings.numerator == "prev":
            top, bottom = bottom, top
        return top / larger(bottom, settings.eps), PreviousUpdateState(update)
