"""Newton's method with Taylor polynomials of higher order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.errors import NonFiniteError, OptionError
from graphopt.optim.core.bounds import AT_LEAST_ONE, POSITIVE, Bounds, numbers
from graphopt.optim.core.closures import common, number
from graphopt.optim.core.context import Number
from graphopt.optim.core.libraries import library
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.second_order.cubic_regularization import loss_behind
from graphopt.optim.second_order.derivatives import (
    check_curvature,
    check_twice_differentiable,
    gradients_with_graph,
    graph_of_loss,
    jacobian,
    second_derivatives,
)
from graphopt.optim.second_order.nystrom import check_count

TrustMethod = Literal["bounds", "proximal", "none"]
_INSTEAD = "Use a lower order, or a module that needs gradients only, such as m.BFGS()"
_METHODS = ("bounds", "proximal", "none", None)
_MAX_ITERATIONS = 200  # of SciPy's methods for one polynomial
_WIDE = 10.0  # how far differential evolution looks in each direction where no bounds are given


class HigherOrderNewton(Module):
    """Minimise the Taylor polynomial ``T(s) = Σ_k f⁽ᵏ⁾[s, …, s] / k!`` up to ``order``, with SciPy; the update is -s.

    With ``trust_method="bounds"`` among the steps with ``|s_i| ≤ r``; with ``"proximal"`` the polynomial with ``‖s‖² / 2 r``
    added. A step that does not lower the loss is not made: r is multiplied by ``decrease``, and it is tried again with the
    same derivatives. If the polynomial falls by at most ``trust_tol`` times as much as the loss, r is multiplied by
    ``increase``. So the loss never rises; where ``maxiter`` trials fail the parameters stay.

    Args:
        order: the highest derivatives. Without a trust region it must be even, since polynomials of odd order have no minimum.
        trust_method: ``"bounds"``, ``"proximal"``, or ``"none"`` (or ``None``): go to the minimum of the polynomial.
        increase: the factor of r after good steps.
        decrease: the factor of r after bad ones.
        trust_init: r at first, in units of the parameters (``"proximal"``: of their squares by the loss); ``None`` for 1, and
            0.1 with ``"proximal"``.
        trust_tol: how much the polynomial may promise, relative to what is kept, for r to grow.
        de_iters: how many iterations differential evolution looks for other minima of the polynomial first, -1 for as many as
            SciPy takes; ``None``: none. Its random numbers are from torch's generator.
        vectorize: compute many derivatives at once; operators that do not allow it are computed one by one.
        maxiter: most trials in one step.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used, or all derivatives from the second on are zero.
        NonFiniteError: in a step, if the polynomial has no minimum, without a trust region.
        UnsupportedError: SciPy is not installed; in a step, if an operator in the loss cannot be differentiated ``order``
            times.

    Cost: n elements: O(n^(order - 1)) backwards through graphs that grow with each order, O(n^order) memory; one evaluation
    of the loss for each trial. State: r.

    Reference: Nesterov, "Implementable tensor methods in unconstrained convex optimization", Math. Program. 186, 2021,
    equations 1.5 and 2.1, for the polynomial and its regularisation; the trust region is Conn, Gould, Toint, "Trust-Region
    Methods", 2000, algorithm 6.1.1.
    """

    needs_closure = True
    replaces_update = True
    bounds = numbers(
        increase=AT_LEAST_ONE, decrease=Bounds(0.0, 1.0, False, False), trust_init=POSITIVE, trust_tol=AT_LEAST_ONE
    )

    def __init__(
        self,
        order: int = 4,
        trust_method: TrustMethod | None = "bounds",
        increase: Number = 1.5,
        decrease: Number = 0.75,
        trust_init: Number | None = None,
        trust_tol: Number = 2.0,
        de_iters: int | None = None,
        vectorize: bool = True,
        maxiter: int = 20,
    ) -> None:
        super().__init__(
            {
                "order": order,
                "trust_method": trust_method,
                "increase": increase,
                "decrease": decrease,
                "trust_init": trust_init,
                "trust_tol": trust_tol,
                "de_iters": de_iters,
                "vectorize": vectorize,
                "maxiter": maxiter,
            }
        )
        library("scipy.optimize", self.place)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        order, method, de_iters = settings["order"], settings["trust_method"], settings["de_iters"]
        if method not in _METHODS:
            raise OptionError(f"{self.place}: trust_method={method!r}; expected 'bounds', 'proximal', 'none' or None")
        check_count(self.place, "order", order)
        if method in ("none", None) and order % 2:
            raise OptionError(
                f"{self.place}: order={order} with trust_method={method!r}; polynomials of odd order have no minimum. Use an "
                "even order, or trust_method='bounds'"
            )
        check_count(self.place, "maxiter", settings["maxiter"])
        if de_iters is not None and de_iters != -1:
            check_count(self.place, "de_iters", de_iters, ", -1 or None")

    def step(self, var: Var) -> Var:
        """Differentiate, and minimise the polynomial until the loss falls."""
        names = ("order", "trust_method", "increase", "decrease", "trust_init", "trust_tol", "de_iters", "vectorize")
        order, method, increase, decrease, init, trust_tol, de_iters, vectorize = (
            common(self, var.params, name) for name in names
        )
        polynomial = Polynomial(self._derivatives(var, order, vectorize))
        params, loss = var.params, number(var.get_loss())
        var.update = unflatten(torch.zeros_like(flatten(params)), params)
        if polynomial.size == 0 or not polynomial.derivatives[0].any():
            return var
        if method in ("none", None):
            update = self._minimize(polynomial, None, 0.0, de_iters, params)
            if not math.isfinite(loss_behind(var, update)):
                raise NonFiniteError(
                    f"{self.place}: the polynomial of order {order} has no minimum that could be found, or the loss is not "
                    "finite there; nothing was changed. Use trust_method='bounds'"
                )
            var.update = update
            return var
        state = self.global_state
        region = state.get("trust_region") or float((1.0 if method == "bounds" else 0.1) if init is None else init)
        noise = 10 * torch.finfo(flatten(params).dtype).eps * abs(loss)
        for _ in range(common(self, params, "maxiter")):
            is_box = method == "bounds"
            update = self._minimize(
                polynomial, region if is_box else None, 0.0 if is_box else 1 / region, de_iters, params
            )
            step = -flatten(update).double().cpu().numpy()
            promised, fall = -polynomial.value(step), loss - loss_behind(var, update)
            if not promised > 0:
                break
            if fall <= 0 and promised <= noise:
                break  # the loss cannot tell any more
            if fall > 0:
                if promised <= float(trust_tol) * fall:
                    region *= float(increase)
                var.update = update
                break
            region *= float(decrease)
        state["trust_region"] = region
        return var

    def _derivatives(self, var: Var, order: int, vectorize: bool) -> list[Any]:
        """Arrays of shape (n,), (n, n), ... in float64."""
        loss = graph_of_loss(self, var, "derivatives by autograd", "m.NewtonCG(hvp_method='forward') instead")
        grads = gradients_with_graph(loss, var.params)
        var.learn_start(loss.detach(), [grad.detach() for grad in grads])
        if order > 1:
            check_twice_differentiable(self, grads, _INSTEAD)
        dtype = flatten(var.params).dtype
        with torch.enable_grad():
            last = torch.cat([grad.reshape(-1).to(dtype) for grad in grads])
        size, found = last.numel(), [last.detach()]
        for number_of in range(2, order + 1):
            with (
                torch.enable_grad(),
                second_derivatives(self, "Use a lower order, or a module that needs gradients only, such as m.BFGS()"),
            ):
                last = jacobian(last, var.params, vectorize, create_graph=number_of < order).reshape(-1)
            found.append(last.detach().reshape([size] * number_of))
        if order > 1 and size:
            check_curvature(self, torch.cat([tensor.reshape(-1) for tensor in found[1:]]), found[0])
        return [tensor.double().cpu().numpy() for tensor in found]

    def _minimize(
        self, polynomial: Polynomial, box: float | None, prox: float, de_iters: int | None, params: Sequence[Tensor]
    ) -> list[Tensor]:
        optimize, size = library("scipy.optimize", self.place), polynomial.size
        start = torch.zeros(size, dtype=torch.float64).numpy()

        def value(step: Any) -> Any:
            return polynomial.value(step) + prox / 2 * (step * step).sum(0)

        def gradient(step: Any) -> Any:
            return polynomial.gradient(step) + prox * step

        def hessian(step: Any) -> Any:
            matrix = polynomial.hessian(step)
            matrix[range(size), range(size)] += prox
            return matrix

        bounds = None if box is None else [(-box, box)] * size
        if de_iters is not None:
            evolved = optimize.differential_evolution(
                value,
                bounds or [(-_WIDE, _WIDE)] * size,
                **({} if de_iters == -1 else {"maxiter": de_iters}),
                vectorized=True,
                updating="deferred",
                polish=False,
                rng=int(torch.randint(2**31, ()).item()),
            )
            if math.isfinite(evolved.fun) and evolved.fun < 0:
                start = evolved.x
        if box is None and polynomial.order > 1:
            options = {"gtol": 1e-12, "maxiter": _MAX_ITERATIONS, "max_trust_radius": 1e6}
            try:
                found = optimize.minimize(
                    value, start, jac=gradient, hess=hessian, method="trust-exact", options=options
                )
                is_lost = found.status == 1 and prox == 0  # all iterations were not enough
                point = start * math.nan if is_lost else found.x
            except (ValueError, OverflowError):  # of numbers that are not finite any more
                point = start * math.nan
        else:
            options = {"gtol": 1e-12, "ftol": 0.0, "maxiter": 5 * _MAX_ITERATIONS, "maxcor": max(10, size)}
            found = optimize.minimize(value, start, jac=gradient, bounds=bounds, method="L-BFGS-B", options=options)
            point = found.x
        vector = torch.from_numpy(-point).to(flatten(params))
        return unflatten(vector, params)


class Polynomial:
    """A Taylor polynomial without its constant, as SciPy asks for it.

    Args:
        derivatives: symmetric arrays of shape (n,), (n, n), ...
    """

    def __init__(self, derivatives: Sequence[Any]) -> None:
        self.derivatives = list(derivatives)
        self.order = len(self.derivatives)
        self.size: int = self.derivatives[0].shape[0]

    def _partly(self, step: Any, num_axes: int) -> Any:
        """``Σ_k f⁽ᵏ⁾[s, …, s] / (k - num_axes)!``, each of ``num_axes`` axes left, for all k that have as many."""
        total: Any = 0.0
        for order, tensor in enumerate(self.derivatives, 1):
            if order < num_axes:
                continue
            for _ in range(order - num_axes):
                tensor = tensor @ step
            total = total + tensor / math.factorial(order - num_axes)
        return total

    def value(self, step: Any) -> Any:
        """Of one step, shape (n,), or of several, shape (n, number)."""
        if step.ndim == 1:
            return float(self._partly(step, 0))
        return torch.tensor([self.value(column) for column in step.T], dtype=torch.float64).numpy()

    def gradient(self, step: Any) -> Any:
        """Shape (n,)."""
        return self._partly(step, 1)

    def hessian(self, step: Any) -> Any:
        """Shape (n, n)."""
        return self._partly(step, 2) if self.order > 1 else 0.0 * self.derivatives[0][:, None] * step
