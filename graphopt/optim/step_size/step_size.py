"""Step sizes beside the learning rate: under another name, and random ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Module, Rule
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.random_directions import generators


class StepSize(Rule):
    """Multiply the update by a number that is no learning rate: schedulers, and ``lr`` of a group, leave it alone.

    Args:
        step_size: the number, a tensor of shape (), or a function of the number of steps made before.
        key: its name as an option of parameter groups.

    Raises:
        OptionError: the number is out of range, or the name is none, or that of the learning rate.
    """

    bounds = numbers(step_size=NON_NEGATIVE)

    def __init__(self, step_size: Number = 1.0, key: str = "step_size") -> None:
        if not isinstance(key, str) or not key.isidentifier() or key == "lr":
            raise OptionError(f"StepSize: key={key!r}; expected a name such as 'step_size' (for 'lr' there is LR)")
        self.key = key
        if key != "step_size":
            self.bounds = numbers(**{key: NON_NEGATIVE})  # type: ignore[misc]
        super().__init__({key: step_size})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update * settings[self.key], state


class RandomStepSize(Module):
    """Multiply the update by a random number, uniform in ``[low, high)`` and new in every step.

    Args:
        low: the least.
        high: the largest.
        parameterwise: a number for each tensor; ``False``: one for all.
        seed: of the numbers; ``None`` takes torch's global generator, which several processes that train one model must have
            seeded alike.

    Raises:
        OptionError: a number is out of range, or ``low`` is above ``high``.
    """

    bounds = numbers(low=NON_NEGATIVE, high=NON_NEGATIVE)

    def __init__(
        self, low: Number = 0.0, high: Number = 1.0, parameterwise: bool = False, seed: int | None = None
    ) -> None:
        super().__init__({"low": low, "high": high, "parameterwise": parameterwise, "seed": seed})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """The least must not be above the largest."""
        low, high = settings["low"], settings["high"]
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise OptionError(f"{self.place}: low={low!r} is above high={high!r}; give the smaller one as low")

    def step(self, var: Var) -> Var:
        """Multiply."""
        updates = var.get_update()
        if not updates:
            return var
        assert var.counts is not None
        num = len(updates) if common(self, var.params, "parameterwise") else 1
        seed = common(self, var.params, "seed")
        # Always on the CPU: numbers on a device would be others, and these are few.
        cpu = [torch.empty(())]
        (generator,) = generators(cpu, seed, 0 if seed is None else int(max(var.counts))).values()
        shares = torch.rand(num, generator=generator, dtype=torch.float64).expand(len(updates))
        news = []
        for param, update, share in zip(var.params, updates, shares.unbind(), strict=True):
            settings = self.get_settings(param)
            factor = settings.low + (settings.high - settings.low) * share
            news.append((update * factor).to(update.dtype))
        var.update = news
        return var
