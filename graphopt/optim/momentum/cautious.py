"""Updates that move only where they agree with something else about the sign."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import larger, total
from graphopt.optim.core.bounds import POSITIVE, numbers
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule

Mode = Literal["zero", "grad", "backtrack"]
_MODES = ("zero", "grad", "backtrack")


class Cautious(Rule):
    """Keep the update where it has the sign of the gradient, ``u g > 0``.

    Args:
        normalize: with mode ``"zero"``, divide what is left by the share of elements that are left.
        eps: the least share that is divided by.
        mode: what the other elements become: ``"zero"``, the gradient (``"grad"``), or ``-u`` (``"backtrack"``).

    Raises:
        OptionError: the mode is unknown, or ``normalize`` with another mode than ``"zero"``.

    Reference: Liang et al., "Cautious Optimizers", arXiv:2411.16085, 2024, algorithm 1.
    """

    bounds = numbers(eps=POSITIVE)

    def __init__(self, normalize: bool = False, eps: Number = 1e-6, mode: Mode = "zero") -> None:
        super().__init__({"normalize": normalize, "eps": eps, "mode": mode})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse modes that mean nothing."""
        _check_mode(self, settings)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return _mask(update, context.grad, settings, context), state


class IntermoduleCautious(Rule):
    """Keep what one module makes of the update where another's result has the same sign; see `Cautious`.

    Args:
        main: the module, or list of modules, whose result is kept.
        compare: the module, or list of modules, that it is compared with.
        normalize: with mode ``"zero"``, divide what is left by the share of elements that are left.
        eps: the least share that is divided by.
        mode: what the other elements become: ``"zero"``, the result of ``compare`` (``"grad"``), or that of ``main``
            with the other sign (``"backtrack"``).

    Raises:
        OptionError: the mode is unknown, or ``normalize`` with another mode than ``"zero"``.
    """

    bounds = numbers(eps=POSITIVE)

    def __init__(
        self, main: Any, compare: Any, normalize: bool = False, eps: Number = 1e-6, mode: Mode = "zero"
    ) -> None:
        super().__init__({"normalize": normalize, "eps": eps, "mode": mode}, main=main, compare=compare)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse modes that mean nothing."""
        _check_mode(self, settings)

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        return _mask(context.operands["main"], context.operands["compare"], settings, context), state


class UpdateGradientSignConsistency(Rule):
    """1 where the update has the sign of the gradient, else 0; what `Cautious` multiplies by.

    Args:
        normalize: divide by the share of ones.
        eps: the least share that is divided by.
    """

    bounds = numbers(eps=POSITIVE)

    def __init__(self, normalize: bool = False, eps: Number = 1e-6) -> None:
        super().__init__({"normalize": normalize, "eps": eps})

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """One step."""
        agrees = (update * context.grad > 0).to(update.dtype)
        return _divide_by_share(agrees, agrees, settings, context) if settings.normalize else agrees, state


def _check_mode(module: Rule, settings: Mapping[str, Any]) -> None:
    mode = settings["mode"]
    if mode not in _MODES:
        raise OptionError(f"{module.place}: mode={mode!r}; expected one of {', '.join(map(repr, _MODES))}")
    if settings["normalize"] and mode != "zero":
        raise OptionError(
            f"{module.place}: normalize=True makes up for elements that become zero, but mode={mode!r} leaves none; "
            "write mode='zero' or normalize=False"
        )


def _mask(main: Tensor, compare: Tensor, settings: Settings, context: Context) -> Tensor:
    agrees = main * compare > 0
    if settings.mode == "grad":
        return main.where(agrees, compare)
    if settings.mode == "backtrack":
        return main.where(agrees, -main)
    kept = agrees.to(main.dtype)
    return _divide_by_share(main * kept, kept, settings, context) if settings.normalize else main * kept


def _divide_by_share(tensor: Tensor, kept: Tensor, settings: Settings, context: Context) -> Tensor:
    return tensor / larger(total(kept) / context.numel, settings.eps)
