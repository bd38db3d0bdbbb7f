"""Updates as long as their direction agrees with another one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graphopt.optim.core.arithmetic import dot_of_all, larger, norm_of_all
from graphopt.optim.core.bounds import POSITIVE, numbers
from graphopt.optim.core.context import Context, Everything, Number, Settings
from graphopt.optim.core.module import Rule


class _Similarity(Rule):
    bounds = numbers(eps=POSITIVE)

    def pair(self, everything: Everything) -> tuple[list[Tensor], list[Tensor]]:
        """What is compared."""
        raise NotImplementedError

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """The cosine of the angle between both, all tensors together."""
        left, right = self.pair(everything)
        lengths = norm_of_all(left) * norm_of_all(right)
        return {"cosine": dot_of_all(left, right) / larger(lengths, settings.eps)}


class ScaleByGradCosineSimilarity(_Similarity):
    """Multiply the update by the cosine of its angle to the gradient: ``u ⟨u, g⟩ / max(‖u‖ ‖g‖, eps)``, over all tensors.

    Args:
        eps: the least product of norms that is divided by.
    """

    def __init__(self, eps: Number = 1e-6) -> None:
        super().__init__({"eps": eps})

    def pair(self, everything: Everything) -> tuple[list[Tensor], list[Tensor]]:
        """The update and the gradient."""
        return list(everything.updates), [context.grad for context in everything.contexts]

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return update * context.measured["cosine"].to(update.device, update.dtype), state


class ScaleModulesByCosineSimilarity(_Similarity):
    """What some modules make of the update, times the cosine of its angle to what others make of it, over all tensors.

    Args:
        main: the module, or list of modules, whose result is scaled.
        compare: those that it is compared with.
        eps: the least product of norms that is divided by.
    """

    def __init__(self, main: Any, compare: Any, eps: Number = 1e-6) -> None:
        super().__init__({"eps": eps}, main=main, compare=compare)

    def pair(self, everything: Everything) -> tuple[list[Tensor], list[Tensor]]:
        """The results of both."""
        return list(everything.operands["main"]), list(everything.operands["compare"])

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return context.operands["main"] * context.measured["cosine"].to(update.device, update.dtype), state
