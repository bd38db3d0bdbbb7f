"""L-BFGS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.store import StateView
from graphopt.optim.core.vector_module import VectorModule, shorten_first


class LBFGS(VectorModule):
    """Multiply the update by the inverse Hessian of `BFGS`, made of the last pairs of changes without any matrix.

    With ``s = θ - θ_prev`` and ``y = g - g_prev``, g the incoming update, the pairs with ``⟨s, y⟩ > tol`` are kept; before all
    of them the inverse Hessian is ``⟨s, y⟩ / ⟨y, y⟩`` of the last pair. With ``m.LR`` behind it, it is
    ``torch.optim.LBFGS(max_iter=1)``.

    Args:
        history_size: how many pairs are kept; the memory is twice that many times the parameters.
        tol: pairs are not used if ``⟨s, y⟩`` is not above.
        tol_reset: whether pairs are forgotten when no element of ``y`` is above ``tol``.
        params_beta: s is the change of an average of the parameters with this decay.
        grads_beta: y is the change of an average of the updates with this decay.
        z_beta: the result is averaged with this decay.
        update_freq: use only the pair of each so many steps.
        scale_first: divide the first update by the sum of its absolute values, if that is above 1.
        concat_params: one history for all parameters, or else one for each.
        inner: modules that make of the update what is multiplied.

    Raises:
        OptionError: an option is not valid.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, algorithm 7.4, equation 7.20.
    """

    bounds = numbers(tol=NON_NEGATIVE, params_beta=DECAY, grads_beta=DECAY, z_beta=DECAY)

    def __init__(
        self,
        history_size: int = 10,
        tol: Number = 1e-10,
        *,
        tol_reset: bool = False,
        params_beta: Number | None = None,
        grads_beta: Number | None = None,
        z_beta: Number | None = None,
        update_freq: int = 1,
        scale_first: bool = True,
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        super().__init__(
            {
                "history_size": history_size,
                "tol": tol,
                "tol_reset": tol_reset,
                "params_beta": params_beta,
                "grads_beta": grads_beta,
                "z_beta": z_beta,
                "update_freq": update_freq,
                "scale_first": scale_first,
                "concat_params": concat_params,
            },
            inner=inner,
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Counts must be positive."""
        for name in ("history_size", "update_freq"):
            if not isinstance(settings[name], int) or settings[name] < 1:
                raise OptionError(f"{self.place}: {name}={settings[name]!r}; expected an integer of at least 1")

    def direct(self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings) -> Tensor:
        """Learn from the last step, and multiply."""
        param = _follow(param, settings.params_beta, "param_avg", state)
        grad = _follow(update, settings.grads_beta, "grad_avg", state)
        is_first = "prev_flat_grad" not in state
        if is_first:
            nothing = update.new_empty(0, update.numel())
            state["old_stps"], state["old_dirs"], state["num_pairs_seen"] = nothing, nothing, 0
        else:
            self._learn(param - state["prev_flat_param"], grad - state["prev_flat_grad"], state, settings)
        state["prev_flat_param"], state["prev_flat_grad"] = param, grad
        direction = _two_loops(inner, state["old_stps"], state["old_dirs"])
        if not bool(torch.isfinite(direction).all()):
            state["old_stps"], state["old_dirs"] = state["old_stps"][:0], state["old_dirs"][:0]
            direction = inner
        direction = _follow(direction, settings.z_beta, "direction_avg", state)
        return shorten_first(direction) if is_first and settings.scale_first else direction

    def _learn(self, s: Tensor, y: Tensor, state: StateView, settings: Settings) -> None:
        state["num_pairs_seen"] += 1
        if (state["num_pairs_seen"] - 1) % settings.update_freq:
            return
        if settings.tol_reset and bool(y.abs().amax() <= settings.tol):
            state["old_stps"], state["old_dirs"] = state["old_stps"][:0], state["old_dirs"][:0]
        elif bool(s.dot(y) > settings.tol):
            for name, new in (("old_stps", s), ("old_dirs", y)):
                state[name] = torch.cat([state[name], new[None]])[-settings.history_size :]


def _follow(value: Tensor, decay: Number | None, name: str, state: StateView) -> Tensor:
    """An average that starts with the first value; the value itself without a decay."""
    if decay is None:
        return value
    state[name] = torch.lerp(value, state[name], float(decay)) if name in state else value
    average: Tensor = state[name]
    return average


def _two_loops(vector: Tensor, steps: Tensor, changes: Tensor) -> Tensor:
    """The inverse Hessian of the pairs, oldest first, times a vector."""
    if not len(steps):
        return vector
    inverses = 1 / (steps * changes).sum(1)
    coefficients = []
    for s, y, inverse in zip(reversed(steps), reversed(changes), reversed(inverses), strict=True):
        coefficients.append(s.dot(vector) * inverse)
        vector = vector - y * coefficients[-1]
    vector = vector / (changes[-1].dot(changes[-1]) * inverses[-1])
    for s, y, inverse, coefficient in zip(steps, changes, inverses, reversed(coefficients), strict=True):
        vector = vector + s * (coefficient - y.dot(vector) * inverse)
    return vector
