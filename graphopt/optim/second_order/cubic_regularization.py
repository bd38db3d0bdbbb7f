"""Newton's method with a cubic term that keeps steps where the model is right."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.optim.core.bounds import FRACTION, POSITIVE, Bounds, numbers
from graphopt.optim.core.closures import common, number, restored
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.second_order.derivatives import check_curvature
from graphopt.optim.second_order.hessian_products import HVPMethod, check_method, hessian_matrix
from graphopt.optim.second_order.nystrom import check_count

_MAX_ITERATIONS = 200
_MAX_GROWTH = 1e3  # of σ after one trial


class CubicRegularization(Module):
    """Minimise ``f + gᵀs + ½ sᵀHs + ⅓ σ ‖s‖³`` exactly, with a σ that is adapted (ARC); the update is -s.

    The step is made if the loss falls by at least ``eta1`` times what the model promises; if not, σ grows to the one with which
    the model would have been right there, and it is tried again with the same derivatives. So the loss never rises, and saddle
    points are left. σ is divided by 10 after steps with at least ``eta2`` times what was promised. Where ``maxiter`` trials
    fail the parameters stay.

    Args:
        sigma: σ at first, in units of the third derivative.
        eta1: the least ratio of the fall of the loss to that of the model for a step to be made.
        eta2: the ratio from which on σ shrinks.
        gamma: by what σ is multiplied at least after a step that fails; at most by 1000.
        maxiter: most trials in one step.
        hessian_method: how H is computed: ``"autograd"`` and ``"forward_over_reverse"`` exactly; ``"forward"`` or
            ``"central"`` by differences of gradients, which also works behind gradient approximations.
        vectorize: with ``"autograd"`` compute many rows at once; operators that do not allow it are computed row by row.
        h: of differences the length of the step, in units of the parameters.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used, or all second derivatives are zero.
        UnsupportedError: in a step, if an operator in the loss cannot be differentiated twice.

    Cost: n elements: ``"autograd"`` one gradient, n backwards through it, others n Hessian products; at least one evaluation
    of the loss, O(n³) for eigenvalues, O(n²) memory. State: σ.

    Reference: Cartis, Gould, Toint, "Adaptive cubic regularisation methods for unconstrained optimization. Part I",
    Math. Program. 127, 2011, algorithm 2.1, and section 6.1 for the subproblem. For σ: Gould, Porcelli, Toint, "Updating the
    regularization parameter in the adaptive cubic regularization algorithm", Comput. Optim. Appl. 53, 2012, of whose
    interpolation this is the simplest case.
    """

    needs_closure = True
    replaces_update = True
    bounds = numbers(
        sigma=POSITIVE,
        eta1=Bounds(0.0, 1.0, False, False),
        eta2=FRACTION,
        gamma=Bounds(1.0, math.inf, False, False),
        h=POSITIVE,
    )

    def __init__(
        self,
        sigma: Number = 1.0,
        eta1: Number = 0.1,
        eta2: Number = 0.9,
        gamma: Number = 2.0,
        maxiter: int = 50,
        hessian_method: HVPMethod = "autograd",
        vectorize: bool = True,
        h: Number = 1e-3,
    ) -> None:
        super().__init__(
            {
                "sigma": sigma,
                "eta1": eta1,
                "eta2": eta2,
                "gamma": gamma,
                "maxiter": maxiter,
                "hessian_method": hessian_method,
                "vectorize": vectorize,
                "h": h,
            }
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_method(self.place, settings["hessian_method"], "hessian_method")
        check_count(self.place, "maxiter", settings["maxiter"])

    def step(self, var: Var) -> Var:
        """Minimise the model until the loss falls, too."""
        names = ("sigma", "eta1", "eta2", "gamma", "maxiter", "hessian_method", "vectorize", "h")
        first, eta1, eta2, gamma, maxiter, method, vectorize, h = (common(self, var.params, name) for name in names)
        hessian = hessian_matrix(self, var, method, float(h), vectorize)
        grads = var.get_grad()
        grad = flatten(grads).to(hessian.dtype)
        var.update = unflatten(torch.zeros_like(grad), grads)
        if grad.numel() == 0:
            return var
        check_curvature(self, hessian, grad)
        eigenvalues, eigenvectors = torch.linalg.eigh(hessian)
        inside = eigenvectors.T @ grad
        loss, state = number(var.get_loss()), self.global_state
        sigma = state.get("sigma", float(first))
        eps = torch.finfo(grad.dtype).eps
        for _ in range(maxiter):
            coefficients = minimize_cubic(eigenvalues, inside, sigma)
            length = float(coefficients.norm())
            promised = -float(
                inside @ coefficients + 0.5 * (eigenvalues * coefficients) @ coefficients + sigma / 3 * length**3
            )
            if promised <= 0:
                break  # at a minimum
            update = unflatten(-(eigenvectors @ coefficients), grads)
            fall = loss - loss_behind(var, update)
            is_noise = promised <= 10 * eps * abs(loss) and abs(fall) <= 10 * eps * abs(loss)
            ratio = 1.0 if is_noise and fall >= 0 else fall / promised
            if ratio >= float(eta2):
                sigma = max(sigma / 10, eps)
            elif not ratio >= float(eta1):
                # That with which the model would have been right here, unless it is none or far off.
                right = sigma + 3 * (promised - fall) / length**3
                sigma *= max(float(gamma), min(right / sigma, _MAX_GROWTH))
                if is_noise:
                    break  # the loss cannot tell any more
                continue
            var.update = update
            break
        state["sigma"] = sigma
        return var


def loss_behind(var: Var, update: list[Tensor]) -> float:
    """The loss if this is subtracted from the parameters; infinite if it is not finite."""
    with restored(var.params) as starts, torch.no_grad():
        for param, start, part in zip(var.params, starts, update, strict=True):
            param.copy_(start.to(torch.promote_types(start.dtype, part.dtype)) - part)
        loss = number(var.evaluate(backward=False))
    return loss if math.isfinite(loss) else math.inf


def minimize_cubic(eigenvalues: Tensor, linear: Tensor, sigma: float) -> Tensor:
    """The global minimum of ``Σ (b_i s_i + ½ λ_i s_i²) + ⅓ σ ‖s‖³``.

    It is ``s = -b / (λ + μ)`` with ``μ = σ ‖s‖`` and all ``λ + μ ≥ 0``. Where b has nothing along the lowest eigenvalue and
    that is negative, ``μ = -λ_1`` may make s too short; what is missing of its length is then added along that eigenvector.

    Args:
        eigenvalues: λ, in ascending order, shape (n,).
        linear: b, shape (n,).
        sigma: positive.

    Returns:
        s, shape (n,).
    """
    values, linear64 = eigenvalues.double(), linear.double()
    low = max(0.0, -float(values[0]))
    # μ = low + t: of the distance t to where the lowest λ + μ is 0 no digit may be lost.
    above_pole = values - values[0] if low > 0 else values
    largest, b_norm = float(above_pole.abs().max()), float(linear64.norm())
    is_lowest = above_pole <= largest * 1e-15
    b_lowest = float(linear64[is_lowest].norm())

    def solution(distance: float) -> Tensor:
        denominator = above_pole + distance
        return torch.where(linear64 == 0, 0.0, -linear64 / torch.where(denominator == 0, 1.0, denominator))

    if b_lowest <= b_norm * 1e-15:
        step = torch.where(is_lowest, 0.0, solution(0.0))
        missing = (low / sigma) ** 2 - float(step @ step)
        if missing >= 0:
            if low > 0:
                step[0] = math.sqrt(missing)
            return step.to(eigenvalues.dtype)
    # 1/‖s(t)‖ - σ/(low + t) is concave and grows with t, so Newton's method stays left of its root if it starts there:
    # ‖s‖ is at least what the lowest eigenvalue alone makes of it, and what the largest alone makes of b.
    distance = max(_root(low, sigma * b_lowest), _root(low + largest, sigma * b_norm - low * largest))
    for _ in range(_MAX_ITERATIONS):
        step = solution(distance)
        length, mu = float(step.norm()), low + distance
        residual = 1 / length - sigma / mu if mu > 0 else -math.inf
        if not residual * length < -1e-14:
            break
        denominator = torch.where(linear64 == 0, 1.0, above_pole + distance)
        slope = float((step * step / denominator).sum()) / length**3 + sigma / mu**2
        new = distance - residual / slope
        if new == distance:
            break
        distance = new
    return solution(distance).to(eigenvalues.dtype)


def _root(linear: float, constant: float) -> float:
    """The positive t with ``t² + linear t = constant``; 0 if there is none."""
    return 2 * constant / (linear + math.sqrt(linear**2 + 4 * constant)) if constant > 0 else 0.0
