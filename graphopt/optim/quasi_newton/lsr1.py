"""The limited-memory version of SR1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.store import StateView
from graphopt.optim.core.vector_module import VectorModule, shorten_first
from graphopt.optim.quasi_newton import pairs
from graphopt.optim.quasi_newton.lbfgs import check_counts


class LSR1(VectorModule):
    """Multiply the update by the inverse Hessian of `SR1`, made of the last pairs of changes without any matrix.

    ``H = I + Σ w_k w_kᵀ / ⟨w_k, y_k⟩`` with ``w_k = s_k - H_k y_k``, ``H_k`` the sum up to k, ``s = θ - θ_prev`` and
    ``y = g - g_prev``, g the incoming update. H may be indefinite, and then the result need not descend. After a step that went
    nowhere everything is forgotten.

    Args:
        history_size: how many pairs are kept; the memory is three times that many times the parameters.
        tol: pairs with ``|⟨w, y⟩| <= tol ‖w‖ ‖y‖`` are not used.
        update_freq: use only the pair of each so many steps.
        scale_first: divide the first update by the sum of its absolute values, if that is above 1.
        scale_second: the same with the second.
        concat_params: one history for all parameters, or else one for each.
        inner: modules that make of the update what is multiplied.

    Raises:
        OptionError: an option is not valid.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, equations 6.25 and 6.26; Byrd, Nocedal, Schnabel,
    "Representations of quasi-Newton matrices and their use in limited memory methods", Math. Programming 63, 1994, section 5.

    Cost: ``2 history_size²`` multiplications an element once there are more pairs than are kept, as all ``w_k`` change when the
    oldest pair goes; ``4 history_size`` before. The state is ``3 history_size + 2`` numbers an element.
    """

    bounds = numbers(tol=NON_NEGATIVE)

    def __init__(
        self,
        history_size: int = 10,
        tol: Number = 1e-8,
        *,
        update_freq: int = 1,
        scale_first: bool = True,
        scale_second: bool = True,
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(
            {
                "history_size": history_size,
                "tol": tol,
                "update_freq": update_freq,
                "scale_first": scale_first,
                "scale_second": scale_second,
                "concat_params": concat_params,
            },
            inner=inner,
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Counts must be positive."""
        check_counts(self.place, settings)

    def direct(self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings) -> Tensor:
        """Learn from the last step, and multiply."""
        if "prev_flat_grad" in state:
            s, y = param - state["prev_flat_param"], update - state["prev_flat_grad"]
            if bool(s.any()):
                state["num_since_reset"] += 1
                if (state["num_since_reset"] - 1) % settings.update_freq == 0:
                    self._learn(s, y, state, settings)
            else:
                state.clear()
        direction = _times(inner, state)
        if not bool(torch.isfinite(direction).all()):
            state.clear()
            direction = inner
        if not state:
            state["num_elements"] = update.numel()
        count = state.setdefault("num_since_reset", 0)
        state["prev_flat_param"], state["prev_flat_grad"] = param, update
        is_short = (count == 0 and settings.scale_first) or (count == 1 and settings.scale_second)
        return shorten_first(direction) if is_short else direction

    def _learn(self, s: Tensor, y: Tensor, state: StateView, settings: Settings) -> None:
        tol = float(settings.tol)
        factor = _factor(s, y, state, tol)
        if factor is None:
            return
        is_full = pairs.count(state) == settings.history_size
        pairs.put(s, y, settings.history_size, state, in_place=not self._bound.replaces)
        if not is_full:
            _append(factor, state)
            return
        for name in ("factors", "denominators"):
            del state[name]
        for slot in pairs.ages(state):  # each depends on those before it
            factor = _factor(state["pairs"][slot, 0], state["pairs"][slot, 1], state, tol)
            if factor is not None:
                _append(factor, state)


def _times(vector: Tensor, state: StateView) -> Tensor:
    """The inverse Hessian times a vector."""
    factors: Tensor | None = state.get("factors")
    if factors is None:
        return vector
    return torch.addmv(vector, factors.T, (factors @ vector) / state["denominators"])


def _factor(s: Tensor, y: Tensor, state: StateView, tol: float) -> tuple[Tensor, Tensor] | None:
    """``w`` and ``⟨w, y⟩`` of one more pair; ``None`` if it is not to be used."""
    w = s - _times(y, state)
    denominator = w.dot(y)
    is_used = bool(denominator.abs() > tol * w.norm() * y.norm()) and bool(torch.isfinite(denominator))
    return (w, denominator) if is_used else None


def _append(factor: tuple[Tensor, Tensor], state: StateView) -> None:
    for name, new in zip(("factors", "denominators"), factor, strict=True):
        state[name] = torch.cat([state[name], new[None]]) if name in state else new[None].clone()
