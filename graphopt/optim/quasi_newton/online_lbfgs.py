"""L-BFGS for losses that differ from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.errors import ModuleError, OptionError
from graphopt.optim.core.closures import common, restored
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.quasi_newton import pairs
from graphopt.optim.quasi_newton.lbfgs import LBFGS


class OnlineLBFGS(LBFGS):
    """`LBFGS` with ``y = g(θ) - g(θ_prev)`` of two gradients of the same minibatch, so that noise does not pass for curvature.

    Both are those of the closure, whatever modules before this one make of them. Where the closure computes the same
    function in every step this is `LBFGS`.

    Args:
        history_size: how many pairs are kept; the memory is twice that many times the parameters.
        tol: pairs are not used if ``⟨s, y⟩`` is not above.
        sample_grads: ``"before"``: a step evaluates the new minibatch also at the parameters before the last step; ``"after"``:
            when it is made it evaluates its own minibatch at the new parameters, which is for a module of the optimizer
            itself, as opposed to a pure function or a module within `Multistep`.
        damping: whether y is damped.
        init_damping: the largest τ; below 1 y is always damped a little.
        eigval_bounds: an interval around 1 for the curvature along s.
        tol_reset: whether pairs are forgotten when no element of ``y`` is above ``tol``.
        params_beta: s is the change of an average of the parameters with this decay.
        grads_beta: y is the change of an average of the gradients with this decay.
        z_beta: the result is averaged with this decay.
        update_freq: use only the pair of each so many steps.
        scale_first: divide the first update by the sum of its absolute values, if that is above 1.
        concat_params: one history for all parameters, or else one for each.
        inner: modules that make of the update what is multiplied.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if nobody has called what ``"after"`` does when a step has been made.

    Reference: Schraudolph, Yu, Günter, "A stochastic quasi-Newton method for online convex optimization", AISTATS 2007, section
    3.

    Cost: as `LBFGS`, and one more gradient a step; with ``"before"``, which keeps no gradient, ``2 history_size``
    multiplications an element more.
    """

    needs_closure = True

    def __init__(
        self,
        history_size: int = 10,
        tol: Number = 1e-10,
        *,
        sample_grads: Literal["before", "after"] = "before",
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
            history_size,
            tol,
            damping=damping,
            init_damping=init_damping,
            eigval_bounds=eigval_bounds,
            tol_reset=tol_reset,
            params_beta=params_beta,
            grads_beta=grads_beta,
            z_beta=z_beta,
            update_freq=update_freq,
            scale_first=scale_first,
            concat_params=concat_params,
            inner=inner,
        )
        self.defaults["sample_grads"] = sample_grads
        self.check_settings(self.defaults)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """And the word."""
        super().check_settings(settings)
        word = settings.get("sample_grads", "before")
        if word not in ("before", "after"):
            raise OptionError(f"{self.place}: sample_grads={word!r}; expected 'before' or 'after'")

    def learns_before_the_product(self, settings: Settings) -> bool:
        """Not where the pair is learned when the step has been made."""
        return bool(settings.sample_grads == "before")

    def step(self, var: Var) -> Var:
        """Evaluate the second gradient, and make the step."""
        if not var.params:
            return var
        is_known = var.update is not None
        grads, updates = var.get_grad(), var.get_update()
        is_raw = not is_known or all(torch.equal(u, g.to(u.dtype)) for u, g in zip(updates, grads, strict=True))
        is_after = common(self, var.params, "sample_grads") == "after"
        groups = self._groups(var)
        if is_after:
            if any(self.state[var.params[group[0]]].get("awaits_gradient") for group in groups):
                raise ModuleError(
                    f"{self.place}: sample_grads='after' evaluates gradients when the step has been made, which is not called "
                    "here (in a pure function, or within Multistep); write sample_grads='before'"
                )
        else:
            known = [group for group in groups if self._knows_the_last_step(var, group)]
            if known:
                old = self._gradients_before(var, known)
                for group in known:
                    state = self.state[var.params[group[0]]]
                    before = flatten([old[index] for index in group])
                    if not is_raw:
                        before = before + flatten([updates[i] for i in group]) - flatten([grads[i] for i in group])
                    state["prev_flat_grad"] = before
                    if "prev_products" in state:
                        state["prev_products"] = pairs.products(before, state).to(before.dtype)
        params = list(var.params)
        var = super().step(var)
        if is_after:
            for group in groups:
                state = self.state[params[group[0]]]
                if "prev_flat_grad" in state:
                    state["prev_flat_grad"] = flatten([grads[index] for index in group])
                    state.pop("prev_products", None)
                    state["awaits_gradient"] = True
            var.post_step_hooks.append(lambda _: self._learn_after(var, params, groups))
        return var

    def _groups(self, var: Var) -> list[list[int]]:
        """Which parameters are one vector."""
        num = len(var.params)
        if common(self, var.params, "concat_params"):
            return [list(range(num))]
        return [[index] for index in range(num)]

    def _knows_the_last_step(self, var: Var, group: list[int]) -> bool:
        state = self.state[var.params[group[0]]]
        num = sum(var.params[index].numel() for index in group)
        return "prev_flat_param" in state and len(state["prev_flat_param"]) == num

    def _gradients_before(self, var: Var, groups: list[list[int]]) -> dict[int, Tensor]:
        """The gradients at the parameters before the last step, by number."""
        with restored(var.params), torch.no_grad():
            for group in groups:
                params = [var.params[index] for index in group]
                for param, value in zip(
                    params, unflatten(self.state[params[0]]["prev_flat_param"], params), strict=True
                ):
                    param.copy_(value)
            var.evaluate(backward=True)
            return dict(enumerate(var.read_grads()))

    def _learn_after(self, var: Var, params: list[Tensor], groups: list[list[int]]) -> None:
        """Keep the pairs of the step that has just been made."""
        var.evaluate(backward=True)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        for group in groups:
            own = [params[index] for index in group]
            state, settings = self.state[own[0]], self.get_settings(own[0])
            if "prev_flat_grad" in state:
                grad, param = flatten([grads[index] for index in group]), flatten(own)
                self.learn(grad, grad, param, state, settings)
                state["prev_flat_param"], state["prev_flat_grad"] = param, grad
                state["awaits_gradient"] = False
