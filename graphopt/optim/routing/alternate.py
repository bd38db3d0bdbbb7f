"""Different chains for different steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from graphopt.errors import OptionError
from graphopt.optim.core.var import Var
from graphopt.optim.routing.router import Router, values_of


class _InTurn(Router):
    """Chains of which one runs at a time; each counts the steps that it makes itself."""

    counts_apart = True
    treats_each_alone = True

    def __init__(self, modules: Sequence[Any], steps: int | Sequence[int], num_steps: int) -> None:
        name = type(self).__name__
        if len(modules) < 2:
            raise OptionError(f"{name}: {len(modules)} chains; write {name}(first, second, ...), each may be a list")
        self.steps = [steps] * num_steps if isinstance(steps, int) else list(steps)
        if len(self.steps) != num_steps or not all(isinstance(step, int) and step >= 1 for step in self.steps):
            raise OptionError(
                f"{name}: steps={steps!r}; expected a whole number of at least 1, or {num_steps} of them for "
                f"{len(modules)} chains"
            )
        super().__init__({}, **{f"module_{index}": chain for index, chain in enumerate(modules)})

    def route(self, var: Var) -> list[str | None]:
        """By the number of steps that each parameter has made."""
        names = list(self.children)
        ends = list(accumulate(self.steps))
        counts = values_of(self.count(var, "own_step"))
        return [names[sum(self.position(count - 1, ends) >= end for end in ends)] for count in counts]

    def position(self, count: int, ends: Sequence[int]) -> int:
        """Where in the sequence of chains the step number ``count``, from 0, stands."""
        raise NotImplementedError

    def __repr__(self) -> str:
        chains = ", ".join(map(repr, self.children.values()))
        return f"{type(self).__name__}({chains}, steps={self.steps!r})"


class Alternate(_InTurn):
    """Run chains in turn, over and over: ``Alternate(a, b)`` runs a, b, a, b, ...

    Args:
        *modules: chains, each a module or a list of modules. Each has its own state, and counts the steps that it makes.
        steps: how many steps each makes in its turn, or one number for each.

    Raises:
        OptionError: there are fewer than two chains, or the numbers mean nothing.
    """

    def __init__(self, *modules: Any, steps: int | Sequence[int] = 1) -> None:
        super().__init__(modules, steps, len(modules))

    def position(self, count: int, ends: Sequence[int]) -> int:
        """It starts again at the end."""
        return count % ends[-1]


class Switch(_InTurn):
    """Run chains one after another, the last for good.

    Args:
        *modules: chains, each a module or a list of modules. Each has its own state, and counts the steps that it makes.
        steps: how many steps each but the last makes, or one number for each but the last.

    Raises:
        OptionError: there are fewer than two chains, or the numbers mean nothing.
    """

    def __init__(self, *modules: Any, steps: int | Sequence[int]) -> None:
        super().__init__(modules, steps, len(modules) - 1)

    def position(self, count: int, ends: Sequence[int]) -> int:
        """It goes on beyond the last end."""
        return count
