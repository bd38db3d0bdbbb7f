"""The base class of quasi-Newton methods that keep a matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError, UnsupportedError
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, Bounds, is_number, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.store import StateView
from graphopt.optim.core.vector_module import VectorModule, check_interval, is_due, shorten_first


@renamed(restart_interval="reset_interval", ptol_restart="tol_reset")
class QuasiNewtonH(VectorModule):
    """Multiply the update by an estimate H of the inverse Hessian, learned from differences of updates.

    With ``s = θ - θ_prev`` and ``y = g - g_prev``, g the incoming update, a subclass overrides `update_H`, which returns the
    next H; or `update_B`, which returns the next estimate B of the Hessian itself, and then the update is ``B⁻¹ g``. Others
    may override `multiply`.

    The matrix has as many rows as there are elements, n: for some thousands at most.

    Cost: O(n²) for each step, with ``update_B`` O(n³), and what the subclass does; keeps n² + 2 n numbers.

    Args:
        defaults: hyper-parameters of the subclass and their values.
        init_scale: H is this times the identity at first (B: divided by it); ``"auto"`` for ``⟨s, y⟩ / ⟨y, y⟩``, with the
            first pair (Nocedal, Wright, equation 6.20).
        tol: pairs are not used if no element of ``y`` is above, or if ``s`` is 0; and what a subclass compares with it.
        tol_reset: whether H is forgotten when that happens, as when a line search has found nothing along the direction.
        reset_interval: forget H after so many steps; ``"auto"`` for one more than there are elements.
        beta: H is ``beta`` times the old one plus ``1 - beta`` times the next.
        update_freq: use only the pair of each so many steps.
        scale_first: divide the first update by the sum of its absolute values, if that is above 1.
        scale_second: the same with the second.
        concat_params: one matrix for all parameters, or else one for each.
        inner: modules that make of the update what H is multiplied with.

    Raises:
        OptionError: an option is not valid.

    Example:
        >>> import torch
        >>> from graphopt.optim import Modular, QuasiNewtonH
        >>> class RankOne(QuasiNewtonH):
        ...     def update_H(self, H, s, y, p, g, p_prev, g_prev, state, settings):
        ...         z = s - H @ y
        ...         return H + torch.outer(z, z) / z.dot(y) if z.dot(y).abs() > 1e-9 else H
        >>> weight = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> optimizer = Modular([weight], RankOne(init_scale=1.0))
        >>> for _ in range(4):
        ...     weight.grad = torch.tensor([1.0, 4.0]) * weight.detach()  # of (x² + 4 y²) / 2
        ...     optimizer.step()
        >>> bool(weight.abs().max() < 1e-5)
        True
    """

    takes_sharded = False
    bounds = numbers(tol=NON_NEGATIVE, beta=DECAY)

    def __init__(
        self,
        defaults: Mapping[str, Any] | None = None,
        *,
        init_scale: Number | str = "auto",
        tol: Number = 1e-10,
        tol_reset: bool = True,
        reset_interval: int | str | None = None,
        beta: Number | None = None,
        update_freq: int = 1,
        scale_first: bool = True,
        scale_second: bool = False,
        concat_params: bool = True,
        inner: Any = None,
    ) -> None:
        own = {
            "init_scale": init_scale,
            "tol": tol,
            "tol_reset": tol_reset,
            "reset_interval": reset_interval,
            "beta": beta,
            "update_freq": update_freq,
            "scale_first": scale_first,
            "scale_second": scale_second,
            "concat_params": concat_params,
        }
        super().__init__({**own, **(defaults or {})}, inner=inner)

    # ------------------------------------------------------------------------------------------------- to be overridden

    def update_H(
        self,
        H: Tensor,
        s: Tensor,
        y: Tensor,
        p: Tensor,
        g: Tensor,
        p_prev: Tensor,
        g_prev: Tensor,
        state: StateView,
        settings: Settings,
    ) -> Tensor:
        """The next estimate of the inverse Hessian; ``H`` may not be written to.

        Args:
            H: the present one, shape (n, n).
            s: the change of the parameters, shape (n,), as all that follow.
            y: the change of the update.
            p: the parameters.
            g: the update.
            p_prev: the parameters before.
            g_prev: the update before.
            state: for what the method remembers beside H, under names of its own; forgotten when H is.
            settings: hyper-parameters.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither update_H nor update_B")

    def update_B(
        self,
        B: Tensor,
        s: Tensor,
        y: Tensor,
        p: Tensor,
        g: Tensor,
        p_prev: Tensor,
        g_prev: Tensor,
        state: StateView,
        settings: Settings,
    ) -> Tensor:
        """The next estimate of the Hessian; as `update_H`."""
        raise NotImplementedError(f"{type(self).__name__} has neither update_H nor update_B")

    def multiply(self, matrix: Tensor, g: Tensor, settings: Settings) -> Tensor:
        """The direction: ``H g``, or ``B⁻¹ g``."""
        if not self._keeps_b:
            return matrix @ g
        solution, failed = torch.linalg.solve_ex(matrix, g)
        return g if bool(failed) else solution

    def starts_anew(self, count: int, num_elements: int, settings: Settings) -> bool:
        """Whether H is forgotten before a step, ``count`` steps after it was last; by ``reset_interval``."""
        return is_due(settings.reset_interval, count, num_elements)

    # -------------------------------------------------------------------------------------------------------- internals

    @property
    def _keeps_b(self) -> bool:
        return type(self).update_B is not QuasiNewtonH.update_B

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """What is no number in an interval."""
        scale = settings["init_scale"]
        if scale != "auto" and not (is_number(scale) and scale in Bounds(0.0, includes_low=False, includes_high=False)):
            raise OptionError(f"{self.place}: init_scale={scale!r}; expected a positive number, or 'auto'")
        check_interval(self.place, "reset_interval", settings["reset_interval"])
        frequency = settings["update_freq"]
        if not isinstance(frequency, int) or frequency < 1:
            raise OptionError(f"{self.place}: update_freq={frequency!r}; expected an integer of at least 1")

    def direct(self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings) -> Tensor:
        """Learn from the last step, and multiply."""
        name = "B" if self._keeps_b else "H"
        if self.starts_anew(state.get("num_since_reset", -1) + 1, update.numel(), settings):
            state.clear()
        if name not in state:
            return self._start(name, update, inner, param, state, settings)
        s, y = param - state["prev_param"], update - state["prev_grad"]
        state["num_since_reset"] += 1
        if (state["num_since_reset"] - 1) % settings.update_freq == 0:
            if bool((y.abs().amax() <= settings.tol) | ~s.any()):
                if settings.tol_reset:
                    state.clear()
                    return self._start(name, update, inner, param, state, settings)
            else:
                self._learn(name, s, y, update, param, state, settings)
        state["prev_param"], state["prev_grad"] = param, update
        direction = self.multiply(state[name], inner, settings)
        if not bool(torch.isfinite(direction).all()):
            state.clear()
            return self._start(name, update, inner, param, state, settings)
        if settings.scale_second and state["num_since_reset"] == 1:
            direction = shorten_first(direction)
        return direction

    def _identity(self, update: Tensor) -> Tensor:
        num = update.numel()
        try:
            return torch.eye(num, dtype=update.dtype, device=update.device)
        except RuntimeError as error:  # both of the CPU and of a GPU
            raise UnsupportedError(
                f"{self.place}: a matrix of {num:,} x {num:,} elements ({num * num * update.element_size() / 1e9:,.0f} GB) does "
                "not fit in memory. Use m.LBFGS, which keeps some vectors, or concat_params=False or m.BlockPartition for "
                "smaller matrices"
            ) from error

    def _start(
        self, name: str, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings
    ) -> Tensor:
        scale = 1.0 if settings.init_scale == "auto" else float(settings.init_scale)
        identity = self._identity(update)
        state["num_elements"] = update.numel()
        state[name] = identity / scale if self._keeps_b else identity * scale
        state["prev_param"], state["prev_grad"], state["num_since_reset"] = param, update, 0
        direction = self.multiply(state[name], inner, settings)
        return shorten_first(direction) if settings.scale_first else direction

    def _learn(
        self, name: str, s: Tensor, y: Tensor, g: Tensor, p: Tensor, state: StateView, settings: Settings
    ) -> None:
        old = state[name]
        if settings.init_scale == "auto" and "is_scaled" not in state:
            sy, yy = s.dot(y), y.dot(y)
            if bool(sy > 0):
                old = old * (yy / sy if self._keeps_b else sy / yy)
            state["is_scaled"] = True
        change = self.update_B if self._keeps_b else self.update_H
        new = change(old, s, y, p, g, state["prev_param"], state["prev_grad"], state, settings)
        state[name] = new if settings.beta is None else torch.lerp(new, old, float(settings.beta))
