"""Newton's method with a Hessian of low rank, sketched by products with a few random vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module, run_modules
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.grad_approximation.random_directions import generators
from graphopt.optim.second_order.derivatives import check_curvature
from graphopt.optim.second_order.hessian_products import HVPMethod, check_method, hessian_product
from graphopt.optim.second_order.newton_cg import best_of, conjugate_gradients, with_curvature


class NystromSketchAndSolve(Module):
    """Solve ``(UΛUᵀ + reg I) x = u`` for a Hessian ``H ≈ UΛUᵀ`` of low rank; x is the new update.

    ``x = U (Λ + reg)⁻¹ Uᵀu + (u - U Uᵀu) / reg``. The approximation is that of `nystrom`: of the Hessian where it is positive
    semi-definite, and of ``|H|`` where it is not, so that x descends where u is the gradient.

    Args:
        rank: how many random directions H is multiplied by; at most as many as there are elements are used.
        reg: added to the eigenvalues; what H does outside of the sketch is taken to be this.
        hvp_method: how H is multiplied: ``"autograd"`` and ``"forward_over_reverse"`` exactly; ``"forward"`` or ``"central"``
            by differences of gradients, which also works behind gradient approximations.
        h: of differences the length of the step, in units of the parameters.
        inner: modules that make of the incoming update what takes the place of u.
        seed: of the random directions, which are others in each step; ``None``: torch's generator.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used, or all second derivatives are zero.
        UnsupportedError: in a step, if an operator in the loss cannot be differentiated as ``hvp_method`` asks for.

    Cost: one gradient, ``rank`` products with the Hessian, O(n rank²) for n elements, O(n rank) memory. No state.

    Reference: Frangella, Tropp, Udell, "Randomized Nyström Preconditioning", arXiv:2110.02820, 2021, algorithm 2.1 and
    section 3 (sketch-and-solve).
    """

    needs_closure = True
    bounds = numbers(reg=POSITIVE, h=POSITIVE)

    def __init__(
        self,
        rank: int,
        reg: Number = 1e-3,
        hvp_method: HVPMethod = "autograd",
        h: Number = 1e-3,
        inner: Any = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            {"rank": rank, "reg": reg, "hvp_method": hvp_method, "h": h, "seed": seed},
            **({} if inner is None else {"inner": inner}),
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_method(self.place, settings["hvp_method"])
        check_count(self.place, "rank", settings["rank"])

    def step(self, var: Var) -> Var:
        """Sketch and solve."""
        rank, reg, method, h, seed = (
            common(self, var.params, name) for name in ("rank", "reg", "hvp_method", "h", "seed")
        )
        multiply = hessian_product(self, var, method, float(h))
        updates = var.get_update()
        right = flatten(updates)
        if right.numel() == 0 or not bool(right.any()):
            return var
        vectors, eigenvalues = nystrom(self, multiply, right, rank, seed, var)
        right = _inner_update(self, var, right)
        inside = vectors.T @ right
        solution = vectors @ (inside / (eigenvalues + float(reg))) + (right - vectors @ inside) / float(reg)
        var.update = unflatten(solution, updates)
        return var


@renamed(rank="sketch_size")
class NystromPCG(Module):
    """Solve ``(H + reg I) x = u`` by conjugate gradients as `NewtonCG`, with a preconditioner made of a sketch of H.

    ``P⁻¹ = (λ + reg) U (Λ + reg)⁻¹ Uᵀ + (I - U Uᵀ)`` with ``H ≈ UΛUᵀ`` and λ the least of the eigenvalues Λ. Large eigenvalues
    of H that the sketch finds do not slow down what remains. It ends as `NewtonCG` does where H is indefinite.

    Args:
        sketch_size: how many random directions H is multiplied by for the preconditioner; at most as many as there are elements.
        maxiter: most products with H afterwards; ``None`` for as many as there are elements.
        tol: of the residual, relative to u.
        reg: added to the diagonal of H.
        hvp_method: how H is multiplied: ``"autograd"`` and ``"forward_over_reverse"`` exactly; ``"forward"`` or ``"central"``
            by differences of gradients, which also works behind gradient approximations.
        h: of differences the length of the step, in units of the parameters.
        inner: modules that make of the incoming update what takes the place of u.
        seed: of the random directions, which are others in each step; ``None``: torch's generator.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used, or all second derivatives are zero.
        UnsupportedError: in a step, if an operator in the loss cannot be differentiated as ``hvp_method`` asks for.

    Cost: one gradient, ``sketch_size`` and at most ``maxiter`` products with the Hessian, O(n sketch_size²) for n elements,
    O(n sketch_size) memory. No state.

    Reference: Frangella, Tropp, Udell, "Randomized Nyström Preconditioning", arXiv:2110.02820, 2021, algorithms 2.1 and 5.1,
    equation 5.3.
    """

    needs_closure = True
    bounds = numbers(tol=NON_NEGATIVE, reg=NON_NEGATIVE, h=POSITIVE)

    def __init__(
        self,
        sketch_size: int,
        maxiter: int | None = None,
        tol: Number = 1e-3,
        reg: Number = 1e-6,
        hvp_method: HVPMethod = "autograd",
        h: Number = 1e-3,
        inner: Any = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            {
                "sketch_size": sketch_size,
                "maxiter": maxiter,
                "tol": tol,
                "reg": reg,
                "hvp_method": hvp_method,
                "h": h,
                "seed": seed,
            },
            **({} if inner is None else {"inner": inner}),
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_method(self.place, settings["hvp_method"])
        check_count(self.place, "sketch_size", settings["sketch_size"])
        if settings["maxiter"] is not None:
            check_count(self.place, "maxiter", settings["maxiter"], " or None")

    def step(self, var: Var) -> Var:
        """Sketch, and solve by conjugate gradients."""
        size, maxiter, tol, reg, method, h, seed = (
            common(self, var.params, name)
            for name in ("sketch_size", "maxiter", "tol", "reg", "hvp_method", "h", "seed")
        )
        reg = float(reg)
        multiply = hessian_product(self, var, method, float(h))
        updates = var.get_update()
        right = flatten(updates)
        if right.numel() == 0 or not bool(right.any()):
            return var
        vectors, eigenvalues = nystrom(self, multiply, right, size, seed, var)
        right = _inner_update(self, var, right)
        factors = (eigenvalues.min() + reg) / (eigenvalues + reg)

        def precondition(residual: Tensor) -> Tensor:
            inside = vectors.T @ residual
            return residual + vectors @ (factors * inside - inside)

        solutions = conjugate_gradients(
            with_curvature(self, multiply, reg, right),
            right,
            None,
            float(tol),
            right.numel() if maxiter is None else maxiter,
            precondition,
        )
        solution = solutions[0] if len(solutions) == 1 else best_of(solutions, var)
        var.update = unflatten(solution, updates)
        return var


def nystrom(
    module: Module, multiply: Callable[[Tensor], Tensor], like: Tensor, rank: int, seed: int | None, var: Var
) -> tuple[Tensor, Tensor]:
    """An approximation ``UΛUᵀ`` of a symmetric matrix H, from products with an orthonormal random basis Ω.

    With ``Y = HΩ`` and the eigenvalues and eigenvectors D, V of ``ΩᵀY`` it is ``Y V |D|⁺ Vᵀ Yᵀ``: Nyström's approximation
    ``Y (ΩᵀY)⁺ Yᵀ`` where H is positive semi-definite, and ``|H|`` for an Ω with as many columns as rows.

    Args:
        module: for errors.
        multiply: multiplies a vector of shape (n,) by H.
        like: a vector, for dtype and device.
        rank: the number of columns of Ω, at most n.
        seed: of Ω; ``None``: torch's generator.
        var: for the number of the step.

    Returns:
        U, with orthonormal columns, and the positive eigenvalues Λ, the largest first.

    Raises:
        ModuleError: H is zero.
    """
    size = like.numel()
    generator = generators([like], seed, var.current_step)[like.device]
    random = torch.randn(size, min(rank, size), dtype=like.dtype, device=like.device, generator=generator)
    basis = torch.linalg.qr(random)[0]
    products = torch.stack([multiply(column).to(like.dtype) for column in basis.T.contiguous()], dim=1)
    check_curvature(module, products, like)
    core = basis.T @ products
    values, vectors = torch.linalg.eigh((core + core.T) / 2)
    magnitudes = values.abs()
    is_kept = magnitudes > magnitudes.max() * (size * torch.finfo(like.dtype).eps)
    factor = (products @ vectors[:, is_kept]) / magnitudes[is_kept].sqrt()
    left, singular, _ = torch.linalg.svd(factor, full_matrices=False)
    is_positive = singular > 0
    return left[:, is_positive], singular[is_positive].square()


def check_count(place: str, name: str, value: Any, alternative: str = "") -> None:
    """Raise `OptionError` unless it is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{place}: {name}={value!r}; expected an integer of at least 1{alternative}")


def _inner_update(module: Module, var: Var, update: Tensor) -> Tensor:
    """What ``inner=`` makes of the update."""
    if not module.children:
        return update
    branch = run_modules(module.children["inner"], var.clone())
    var.update_attrs_from_clone_(branch)
    return flatten(branch.get_update())
