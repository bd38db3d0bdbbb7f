"""A line search that tries a fixed set of step sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import ANY, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.line_search.line_search import LineSearch


class GridLineSearch(LineSearch):
    """Take the best of ``num`` step sizes at equal distances, ``a_i = start + (end - start) i / (num - 1)``, i from 0.

    It is taken even if no step would have been better; let the grid begin with 0 if the loss is not to rise. The step is 0 where
    the loss is finite nowhere on the grid.

    Args:
        start: the first step size, in units of the update.
        end: the last one.
        num: how many there are.

    Raises:
        OptionError: an option is not valid.

    Cost: ``num`` evaluations of the loss, without gradients.
    """

    bounds = numbers(start=ANY, end=ANY)

    def __init__(self, start: Number, end: Number, num: int) -> None:
        super().__init__({"start": start, "end": end, "num": num})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """A grid has points."""
        num = settings["num"]
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            raise OptionError(f"{self.place}: num={num!r}; expected an integer of at least 1")

    def search(self, update: Sequence[Tensor], var: Var) -> float:
        """Try all."""
        start, end, num = (common(self, var.params, name) for name in ("start", "end", "num"))
        grid = torch.linspace(float(start), float(end), num, dtype=torch.float64).tolist()
        losses = [self.evaluate(step_size, var) for step_size in grid]
        best = min(
            range(num), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf
        )  # the first of equals
        return float(grid[best]) if math.isfinite(losses[best]) else 0.0
