"""Grafting: the direction of one update with the norm of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import larger, norm, norm_of_all
from graphopt.optim.core.bounds import ANY, POSITIVE, numbers
from graphopt.optim.core.context import Context, Everything, Number, Settings
from graphopt.optim.core.module import Rule


class _Grafting(Rule):
    """``d (‖d‖ + strength (‖m‖ - ‖d‖)) / max(‖d‖, eps)``; subclasses say what direction and magnitude are."""

    bounds = numbers(eps=POSITIVE, strength=ANY)

    def __init__(self, tensorwise: bool, ord: float, eps: Number, strength: Number, **children: Any) -> None:
        super().__init__({"tensorwise": tensorwise, "ord": ord, "eps": eps, "strength": strength}, **children)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what must be the same for all tensors."""
        if settings["tensorwise"] != self.defaults["tensorwise"]:
            raise OptionError(f"{self.place}: tensorwise cannot differ between parameters; set it in the module")
        if not settings["ord"] > 0:
            raise OptionError(f"{self.place}: ord={settings['ord']!r}; expected a number above 0")

    @property
    def measures(self) -> bool:
        """Whether there is one norm for all tensors."""
        return not self.defaults["tensorwise"]

    def pair(self, update: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Direction and magnitude."""
        raise NotImplementedError

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """The norms of all directions, and of all magnitudes."""
        pairs = [self.pair(*entry) for entry in zip(everything.updates, everything.contexts, strict=True)]
        directions, magnitudes = zip(*pairs, strict=True)
        return {"direction": norm_of_all(directions, settings.ord), "magnitude": norm_of_all(magnitudes, settings.ord)}

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        direction, magnitude = self.pair(update, context)
        if settings.tensorwise:
            old, target = norm(direction, settings.ord), norm(magnitude, settings.ord)
        else:
            old = context.measured["direction"].to(update.device)
            target = context.measured["magnitude"].to(update.device)
        new = old + (target - old) * settings.strength
        return direction * (new / larger(old, settings.eps)), state


class Graft(_Grafting):
    """The update, with the norm of what modules make of it.

    ``u ‖m‖ / max(‖u‖, eps)``; a ``strength`` between 0 and 1 goes only so far from ``‖u‖`` to ``‖m‖``.

    Args:
        magnitude: a module, or list of modules, that makes ``m`` of a copy of the update; starts it with `Grad` to leave out
            what came before.
        tensorwise: one norm for each tensor; ``False``: one for all.
        ord: order of the norms, above 0.
        eps: the least norm that is divided by.
        strength: 1 for all of it.

    Raises:
        OptionError: a number is out of range.

    Reference: Agarwal et al., "Disentangling Adaptive Gradient Methods from Learning Rates", arXiv:2002.11803, 2020.
    """

    def __init__(
        self, magnitude: Any, tensorwise: bool = True, ord: float = 2.0, eps: Number = 1e-6, strength: Number = 1.0
    ) -> None:
        super().__init__(tensorwise, ord, eps, strength, magnitude=magnitude)

    def pair(self, update: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The update, and the module's."""
        return update, context.operands["magnitude"]


GraftInputToOutput = Graft


class GraftToUpdate(_Grafting):
    """What modules make of the update, with the norm of the update; otherwise as `Graft`.

    Args:
        direction: a module, or list of modules, that makes it of a copy of the update.
        tensorwise: one norm for each tensor; ``False``: one for all.
        ord: order of the norms, above 0.
        eps: the least norm that is divided by.
        strength: 1 for all of it.
    """

    def __init__(
        self, direction: Any, tensorwise: bool = True, ord: float = 2.0, eps: Number = 1e-6, strength: Number = 1.0
    ) -> None:
        super().__init__(tensorwise, ord, eps, strength, direction=direction)

    def pair(self, update: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The module's, and the update."""
        return context.operands["direction"], update


RGraft = GraftToUpdate
GraftOutputToInput = GraftToUpdate


class GraftModules(_Grafting):
    """What some modules make of the update, with the norm of what others make of it; otherwise as `Graft`.

    Args:
        direction: a module, or list of modules, whose direction is taken.
        magnitude: those whose norm is taken.
        tensorwise: one norm for each tensor; ``False``: one for all.
        ord: order of the norms, above 0.
        eps: the least norm that is divided by.
        strength: 1 for all of it.
    """

    def __init__(
        self,
        direction: Any,
        magnitude: Any,
        tensorwise: bool = True,
        ord: float = 2.0,
        eps: Number = 1e-6,
        strength: Number = 1.0,
    ) -> None:
        super().__init__(tensorwise, ord, eps, strength, direction=direction, magnitude=magnitude)

    def pair(self, update: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """One module's, and the other's."""
        return context.operands["direction"], context.operands["magnitude"]


class GraftToGrad(_Grafting):
    """The update, with the norm of the gradient; arguments as of `Graft`."""

    def __init__(self, tensorwise: bool = False, ord: float = 2.0, eps: Number = 1e-6, strength: Number = 1.0) -> None:
        super().__init__(tensorwise, ord, eps, strength)

    def pair(self, update: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The update and the gradient."""
        return update, context.grad.to(update.dtype)


class GraftGradToUpdate(_Grafting):
    """The gradient, with the norm of the update; arguments as of `Graft`."""

    def __init__(self, tensorwise: bool = False, ord: float = 2.0, eps: Number = 1e-6, strength: Number = 1.0) -> None:
        super().__init__(tensorwise, ord, eps, strength)

    def pair(self, update: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The gradient and the update."""
        return context.grad.to(update.dtype), update


class GraftToParams(_Grafting):
    """The update, with the norm of the parameter, at least ``eps``; arguments as of `Graft`."""

    def __init__(self, tensorwise: bool = False, ord: float = 2.0, eps: Number = 1e-4, strength: Number = 1.0) -> None:
        super().__init__(tensorwise, ord, eps, strength)

    def pair(self, update: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """The update and the parameter."""
        return update, context.param.to(update.dtype)
