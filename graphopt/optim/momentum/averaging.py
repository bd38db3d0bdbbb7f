"""Averages of the last few updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import zeros
from graphopt.optim.core.context import Context, Settings
from graphopt.optim.core.module import Rule


class HistoryState(NamedTuple):
    """The last updates, oldest overwritten first, with one axis of ``history_size`` in front of the parameter's."""

    history: Tensor


class _History(Rule):
    """Keeps the last updates. All are summed up anew in every step: a running sum would drift."""

    takes_sharded = False
    State = HistoryState
    elementwise = False  # the history has one axis more

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse a history of nothing."""
        size = settings["history_size"]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise OptionError(f"{self.place}: history_size={size!r}; expected a whole number of at least 1")

    def size_of(self, settings: Settings) -> int:
        """How many updates are kept."""
        return int(settings.history_size)

    def init(self, param: Tensor, settings: Settings) -> HistoryState:
        """Zeros."""
        return HistoryState(torch.stack([zeros(param)] * self.size_of(settings)))

    def update(
        self, update: Tensor, state: HistoryState, settings: Settings, context: Context
    ) -> tuple[Tensor, HistoryState]:
        """One step."""
        size = self.size_of(settings)
        slots = torch.arange(size, device=update.device)
        count = context.count.to(update.device)
        age = (count - 1 - slots).remainder(size)  # in steps, of what stands in each slot after this one
        column = (size, *[1] * update.dim())
        history = torch.where((age == 0).view(column), update, state.history)
        is_filled = age < count
        return self.reduce(history, age.view(column), is_filled.view(column), settings), HistoryState(history)

    def reduce(self, history: Tensor, age: Tensor, is_filled: Tensor, settings: Settings) -> Tensor:
        """The new update.

        Args:
            history: the last updates in any order, zeros where there are fewer, (history_size, ...).
            age: how many steps ago each arrived, (history_size, 1, ...).
            is_filled: whether there is one, (history_size, 1, ...).
            settings: of the parameter.
        """
        raise NotImplementedError


class Averaging(_History):
    """Replace the update by the mean of the last ones.

    Args:
        history_size: how many; fewer in the first steps.

    Raises:
        OptionError: the size is no whole number of at least 1.

    Cost: O(n); keeps ``history_size`` updates.
    """

    def __init__(self, history_size: int) -> None:
        super().__init__({"history_size": history_size})

    def reduce(self, history: Tensor, age: Tensor, is_filled: Tensor, settings: Settings) -> Tensor:
        """The mean."""
        return history.sum(0) / is_filled.sum()


class MedianAveraging(_History):
    """Replace each element of the update by the median of the last ones; of an even number, the mean of the middle two.

    Args:
        history_size: how many; fewer in the first steps.

    Raises:
        OptionError: the size is no whole number of at least 1.

    Cost: a median of ``history_size`` numbers for each element; keeps as many updates.
    """

    def __init__(self, history_size: int) -> None:
        super().__init__({"history_size": history_size})

    def reduce(self, history: Tensor, age: Tensor, is_filled: Tensor, settings: Settings) -> Tensor:
        """The median."""
        ordered = torch.where(is_filled, history, torch.inf).sort(0).values
        number = is_filled.sum()
        slots = torch.arange(len(history), device=history.device).view(age.shape)
        is_middle = (slots == (number - 1) // 2) | (slots == number // 2)
        return torch.where(is_middle, ordered, 0.0).sum(0) / is_middle.sum()


class WeightedAveraging(_History):
    """Replace the update by a weighted mean of the last ones: ``Σ w_i u_i / n`` over the ``n`` updates that there are.

    Args:
        weights: from the oldest update to the newest.
        normalize: divide by the sum of weights instead of by ``n``.

    Raises:
        OptionError: there are no weights, or they cannot be normalized.

    Cost: O(n h) for h weights; keeps h updates.
    """

    def __init__(self, weights: Sequence[float], *, normalize: bool = False) -> None:
        super().__init__({"weights": tuple(float(weight) for weight in weights), "normalize": normalize})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse weights that mean nothing."""
        weights = settings["weights"]
        if not weights:
            raise OptionError(f"{self.place}: weights={weights!r}; expected at least one number")
        newest_sums = [sum(weights[index:]) for index in range(len(weights))]
        if settings["normalize"] and 0.0 in newest_sums:
            raise OptionError(
                f"{self.place}: the newest of weights={weights!r} sum up to 0, by which normalize=True would divide"
            )

    def size_of(self, settings: Settings) -> int:
        """One update for each weight."""
        return len(settings.weights)

    def reduce(self, history: Tensor, age: Tensor, is_filled: Tensor, settings: Settings) -> Tensor:
        """The weighted mean."""
        newest_first = torch.tensor(settings.weights[::-1], dtype=history.dtype, device=history.device)
        weights = newest_first[age.long()] * is_filled
        return (history * weights).sum(0) / (weights.sum() if settings.normalize else is_filled.sum())
