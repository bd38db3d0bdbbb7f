"""The base class of nonlinear conjugate gradient methods."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.store import StateView
from graphopt.optim.core.vector_module import VectorModule, check_interval, is_due


@renamed(restart_interval="reset_interval")
class ConjugateGradientBase(VectorModule):
    """``d_t = u_t + β_t d_{t-1}``, where a subclass says in `get_beta` what β is.

    All are meant for a line search behind them, such as ``StrongWolfe(c2=0.1)``.

    Args:
        defaults: hyper-parameters of the subclass and their values.
        clip_beta: take 0 for a negative β.
        reset_interval: β is 0 after so many steps; ``"auto"`` for one more than there are elements.
        concat_params: one direction for all parameters, or else one for each.
        inner: modules that make u of the incoming update, such as a preconditioner.

    Raises:
        OptionError: an option is not valid.

    Example:
        >>> from graphopt.optim import ConjugateGradientBase
        >>> class HalfOfTheOld(ConjugateGradientBase):
        ...     def get_beta(self, p, g, prev_g, prev_d):
        ...         return 0.5
        >>> HalfOfTheOld()
        HalfOfTheOld(clip_beta=False, reset_interval=None, concat_params=True)
    """

    def __init__(
        self,
        defaults: Mapping[str, Any] | None = None,
        *,
        clip_beta: bool = False,
        reset_interval: int | str | None = None,
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        own = {"clip_beta": clip_beta, "reset_interval": reset_interval, "concat_params": concat_params}
        super().__init__({**own, **(defaults or {})}, inner=inner)

    def get_beta(self, p: Tensor, g: Tensor, prev_g: Tensor, prev_d: Tensor) -> Number:
        """How much of the old direction is kept.

        Args:
            p: the parameters, shape (n,), as all that follow.
            g: the incoming update.
            prev_g: that of the step before.
            prev_d: the direction of the step before, in the sign of the update: it was subtracted.
        """
        raise NotImplementedError(f"{type(self).__name__} has no get_beta(self, p, g, prev_g, prev_d)")

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """The interval."""
        check_interval(self.place, "reset_interval", settings["reset_interval"])

    def direct(self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings) -> Tensor:
        """Add some of the old direction."""
        direction = inner
        count = state.get("num_since_reset", 0)
        if "prev_direction" in state and is_due(settings.reset_interval, count, update.numel()):
            count = 0
        elif "prev_direction" in state:
            old = state["prev_direction"]
            beta = torch.as_tensor(
                self.get_beta(param, update, state["prev_flat_grad"], old), dtype=update.dtype, device=update.device
            )
            if bool(torch.isfinite(beta)):  # not where the gradient was 0 before
                beta = beta.clamp(min=0) if settings.clip_beta else beta
                direction = inner + beta * old
        state["prev_flat_grad"], state["prev_direction"], state["num_since_reset"] = update, direction, count + 1
        return direction
