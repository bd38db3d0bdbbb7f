"""Adagrad with the whole matrix of products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.adaptive.kronecker import accumulate, power
from graphopt.optim.core.bounds import DECAY, FRACTION, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.store import StateView
from graphopt.optim.core.vector_module import VectorModule


class FullMatrixAdagrad(VectorModule):
    """The update as a vector, multiplied by the inverse root of the sum of its outer products with itself.

    ``C = C + u uᵀ``, starting as the identity, update ``C^(-1/2) inner(u)``. With an average in place of the sum and ``inner``
    a momentum, ``m.FullMatrixAdagrad(beta=0.999, inner=m.EMA(0.9))``, this is Adam with a full matrix. Where C is singular,
    as an average may become, directions in which no update ever went are left out.

    Args:
        beta: average the products instead, ``C = beta C + (1 - beta) u uᵀ``.
        decay: C is multiplied by it in each step before something is added.
        sqrt: whether the root is taken; if not, the update is ``C⁻¹ inner(u)``.
        concat_params: one matrix for all parameters, or else one for each.
        update_freq: the root is computed in the first step and in each so many steps.
        inner: modules that make of the update what is multiplied.

    Raises:
        OptionError: an option is not valid.

    Cost: for n elements two products of order n² per step, and in each ``update_freq``-th step an eigendecomposition of order
    n³. The state is 2 n² numbers: for some thousands of elements at most.

    Reference: Duchi, Hazan, Singer, "Adaptive subgradient methods for online learning and stochastic optimization", JMLR 12,
    2011, figure 1 (full matrix).
    """

    takes_sharded = False
    bounds = numbers(beta=DECAY, decay=FRACTION)

    def __init__(
        self,
        beta: Number | None = None,
        decay: Number | None = None,
        sqrt: bool = True,
        concat_params: bool = False,
        update_freq: int = 1,
        *,
        inner: Any = None,
    ) -> None:
        super().__init__(
            {"beta": beta, "decay": decay, "sqrt": sqrt, "concat_params": concat_params, "update_freq": update_freq},
            inner=inner,
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what is no number of steps."""
        value = settings["update_freq"]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise OptionError(f"{self.place}: update_freq={value!r}; expected a positive whole number")

    def direct(self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings) -> Tensor:
        """One step."""
        old = state.get("covariance")
        if old is None:
            old = torch.eye(len(update), dtype=update.dtype, device=update.device)
        covariance = accumulate(old, torch.outer(update, update), settings.beta, settings.decay)
        count = state.get("num_updates", 0)
        if count % settings.update_freq == 0:
            state["root"] = power(covariance, -0.5 if settings.sqrt else -1.0)
        state["covariance"] = covariance
        state["num_updates"] = count + 1
        direction: Tensor = state["root"] @ inner
        return direction
