"""The limited-memory version of BFGS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import DECAY, FRACTION, NON_NEGATIVE, is_number, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.store import StateView
from graphopt.optim.core.vector_module import VectorModule, shorten_first
from graphopt.optim.quasi_newton import pairs
from graphopt.optim.quasi_newton.pairs import SMALL


class LBFGS(VectorModule):
    """Multiply the update by the inverse Hessian of `BFGS`, made of the last pairs of changes without any matrix.

    With ``s = θ - θ_prev`` and ``y = g - g_prev``, g the incoming update, the pairs with ``⟨s, y⟩ > tol`` are kept; before all
    of them the inverse Hessian is ``⟨s, y⟩ / ⟨y, y⟩`` of the last pair. With ``m.LR`` behind it, it is
    ``torch.optim.LBFGS(max_iter=1)``.

    With ``damping`` y is replaced by ``τ y + (1 - τ) s``, so that ``⟨s, y⟩ / ⟨s, s⟩`` lies in ``eigval_bounds``, and pairs along
    which the loss is not convex can be used, too.

    Args:
        history_size: how many pairs are kept; the memory is twice that many times the parameters.
        tol: pairs are not used if ``⟨s, y⟩`` is not above.
        damping: whether y is damped.
        init_damping: the largest τ; below 1 y is always damped a little.
        eigval_bounds: an interval around 1 for the curvature along s.
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

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, algorithm 7.4, equation 7.20. Damping: Al-Baali,
    "Damped techniques for enforcing convergence of quasi-Newton methods", Optim. Methods Softw. 29(5), 2014, section 3, with
    the identity for the Hessian.

    Cost: ``4 history_size`` multiplications an element, in two matrix-vector products; the state is ``2 history_size + 2``
    numbers an element. ``2 history_size`` more with averages, damping, or ``inner``.
    """

    bounds = numbers(tol=NON_NEGATIVE, init_damping=FRACTION, params_beta=DECAY, grads_beta=DECAY, z_beta=DECAY)

    def __init__(
        self,
        history_size: int = 10,
        tol: Number = 1e-10,
        *,
        damping: bool = False,
        init_damping: Number = 0.9,
        eigval_bounds: tuple[float, float] = (0.5, 50.0),
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
                "damping": damping,
                "init_damping": init_damping,
                "eigval_bounds": eigval_bounds,
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
        """Counts must be positive, and 1 inside of the interval."""
        check_counts(self.place, settings)
        bounds = settings["eigval_bounds"]
        is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(map(is_number, bounds))
        if not is_pair or not 0 < bounds[0] < 1 < bounds[1]:
            raise OptionError(f"{self.place}: eigval_bounds={bounds!r}; expected (low, high) with 0 < low < 1 < high")

    def direct(self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings) -> Tensor:
        """Learn from the last step, and multiply."""
        is_first = "prev_flat_grad" not in state
        products = None
        if is_first:
            state["num_pairs_seen"] = 0
        elif self.learns_before_the_product(settings):
            products = self.learn(update, inner, param, state, settings)
        direction = inner
        if pairs.count(state):
            if products is None:
                products = pairs.products(inner, state)
            direction = self._multiply(inner, products, state)
        state["prev_flat_param"], state["prev_flat_grad"] = param, update
        if inner is update and pairs.count(state):
            assert products is not None
            state["prev_products"] = products.to(update.dtype)
        elif "prev_products" in state:
            del state["prev_products"]
        direction = _follow(direction, settings.z_beta, "direction_avg", state)
        return shorten_first(direction) if is_first and settings.scale_first else direction

    def learns_before_the_product(self, settings: Settings) -> bool:
        """Whether a step uses the pair of the last one; if not, somebody else calls `learn`."""
        return True

    def learn(
        self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings
    ) -> Tensor | None:
        """Keep the pair of the last step.

        Returns:
            The products of all pairs with ``inner``, if they are known now.
        """
        state["num_pairs_seen"] += 1
        if (state["num_pairs_seen"] - 1) % settings.update_freq:
            return None
        s, y, before = state["prev_flat_param"], state["prev_flat_grad"], state.get("prev_products")
        if self._bound.replaces:
            s, y = param - s, update - y
        else:  # where the old ones were: new memory takes longer than a subtraction
            torch.sub(param, s, out=s)
            torch.sub(update, y, out=y)
        for vector, beta, name in ((s, settings.params_beta, "s_avg"), (y, settings.grads_beta, "y_avg")):
            if beta is not None:  # the change of an average is the average of changes
                old = state[name] if name in state else torch.zeros_like(vector)
                state[name] = torch.lerp(vector, old, float(beta))
                vector.copy_(state[name])
        if settings.damping:
            _damp(s, y, settings)
        if settings.tol_reset and bool(y.abs().amax() <= settings.tol):
            pairs.forget(state)
            return None
        num, is_plain = pairs.count(state), settings.grads_beta is None and not settings.damping
        parts = [torch.stack([s.dot(y), y.dot(y), s.dot(inner), y.dot(inner)])]
        if num:
            old_rows = pairs.rows(state)
            parts.append(old_rows @ inner)
            if before is None or inner is not update or not is_plain:
                before = None
                parts.append(old_rows @ y)
        found: list[Tensor] = list(pairs.small(torch.cat(parts)).split([2, 2] + [2 * num] * (len(parts) - 1)))
        own, new, *old_parts = found
        if not bool(own[0] > settings.tol) or not bool(own[1].isfinite()):
            return old_parts[0] if num else None
        s_dot_y, y_dot_y = own[:1], own[1:]
        slots = pairs.ages(state) if num else []
        if num:
            changes = (old_parts[1] if before is None else old_parts[0] - before.to(**SMALL)).view(num, 2)[slots]
            s_dot_y, y_dot_y = torch.cat([changes[:, 0], s_dot_y]), torch.cat([changes[:, 1], y_dot_y])
        pairs.put_products(s_dot_y, y_dot_y, settings.history_size, y.dtype, state)
        is_full = num == settings.history_size
        pairs.put(s, y, settings.history_size, state, in_place=not self._bound.replaces)
        if not num:
            return new
        if not is_full:
            return torch.cat([old_parts[0], new])
        products = old_parts[0].clone()
        products.view(num, 2)[slots[0]] = new
        return products

    def _multiply(self, vector: Tensor, products: Tensor, state: StateView) -> Tensor:
        slots = pairs.ages(state)
        in_order = products.view(-1, 2)[slots]
        of_s, of_y, scale = pairs.coefficients(in_order[:, 0], in_order[:, 1], state)
        factors = torch.empty(len(slots), 2, **SMALL)
        factors[slots] = torch.stack([of_s, of_y], 1)
        # Not an element of the vector was NaN or infinite if no product is.
        if not bool(torch.isfinite(factors).all()) or not bool(torch.isfinite(products).all()):
            pairs.forget(state)
            return vector
        return torch.addmv(vector, pairs.rows(state).T, pairs.for_product(factors.flatten(), vector), beta=scale)


def check_counts(place: str, settings: Mapping[str, Any]) -> None:
    """Raise `OptionError` unless the history holds a pair, and pairs are used."""
    for name in ("history_size", "update_freq"):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{place}: {name}={value!r}; expected an integer of at least 1")


def _damp(s: Tensor, y: Tensor, settings: Settings) -> None:
    """Replace y by ``τ y + (1 - τ) s``, whose curvature along s is inside of the bounds."""
    low, high = map(float, settings.eigval_bounds)
    s_dot_s = float(s.dot(s))
    if s_dot_s == 0:
        return
    curvature, part = float(s.dot(y)) / s_dot_s, float(settings.init_damping)
    if curvature < low:
        part = min(part, (1 - low) / (1 - curvature))
    elif curvature > high:
        part = min(part, (high - 1) / (curvature - 1))
    y.mul_(part).add_(s, alpha=1 - part)


def _follow(value: Tensor, decay: Number | None, name: str, state: StateView) -> Tensor:
    """An average that starts with the first value; the value itself without a decay."""
    if decay is None:
        return value
    state[name] = torch.lerp(value, state[name], float(decay)) if name in state else value.clone()
    average: Tensor = state[name]
    return average
