"""Newton's method with the whole Hessian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from graphopt.errors import NonFiniteError, OptionError
from graphopt.optim.core.bounds import NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module, run_modules
from graphopt.optim.core.renamed import renamed
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.second_order.derivatives import check_curvature
from graphopt.optim.second_order.hessian_products import HVPMethod, check_method, hessian_matrix

HessianTransform = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, bool]]


@renamed(damping="reg")
class Newton(Module):
    """Solve ``(H + reg I) x = u``, H the Hessian of the closure and u the update; x is the new update.

    By Cholesky's factors where the matrix is positive definite, else by LU factors; the x of least norm where it is singular.
    Where H is indefinite x may ascend and end in a saddle point, as Newton's method does: ``eig_reg``, ``search_negative``,
    ``eigval_tfm=torch.abs``, or a line search behind the module are against that.

    Args:
        reg: added to the diagonal of H.
        eig_reg: add to the diagonal what makes the lowest eigenvalue ``reg``, if it is negative.
        search_negative: where H has negative eigenvalues go along the eigenvector of the lowest one, of length 1 and in the
            direction that descends, instead of solving.
        hessian_method: how H is computed: ``"autograd"`` and ``"forward_over_reverse"`` exactly; ``"forward"`` or
            ``"central"`` by differences of gradients, which also works behind gradient approximations.
        vectorize: with ``"autograd"`` compute many rows at once; operators that do not allow it are computed row by row.
        h: of differences the length of the step, in units of the parameters.
        inner: modules that make of the incoming update what takes the place of u.
        H_tfm: a function of ``H + reg I`` and u that returns x, as a vector of shape (n,); or a matrix of shape (n, n) and
            whether that is an inverse already.
        eigval_tfm: a function of the vector of eigenvalues of ``H + reg I`` that returns others, such as ``torch.abs``. Along
            the eigenvectors of those that are 0 then x is 0.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if autograd cannot be used, or all second derivatives are zero.
        NonFiniteError: in a step, if the solution is not finite.
        UnsupportedError: in a step, if an operator in the loss cannot be differentiated twice.

    Cost: n elements: ``"autograd"`` one gradient, and n backwards through it; others n Hessian products; O(n³) to solve, O(n²)
    memory. No state.

    Reference: Nocedal, Wright, "Numerical Optimization", 2nd edition, 2006, section 3.3 and 3.4.
    """

    needs_closure = True
    bounds = numbers(reg=NON_NEGATIVE, h=POSITIVE)

    def __init__(
        self,
        reg: Number = 1e-6,
        eig_reg: bool = False,
        search_negative: bool = False,
        hessian_method: HVPMethod = "autograd",
        vectorize: bool = True,
        h: Number = 1e-3,
        inner: Any = None,
        H_tfm: HessianTransform | None = None,
        eigval_tfm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.H_tfm = H_tfm
        self.eigval_tfm = eigval_tfm
        super().__init__(
            {
                "reg": reg,
                "eig_reg": eig_reg,
                "search_negative": search_negative,
                "hessian_method": hessian_method,
                "vectorize": vectorize,
                "h": h,
            },
            **({} if inner is None else {"inner": inner}),
        )
        for name, function in (("H_tfm", H_tfm), ("eigval_tfm", eigval_tfm)):
            if function is not None and not callable(function):
                raise OptionError(f"{self.place}: {name}={function!r}; expected a function, or None")
        if H_tfm is not None and (eigval_tfm is not None or search_negative):
            raise OptionError(
                f"{self.place}: H_tfm with eigval_tfm or search_negative; do all of it in H_tfm, or leave it out"
            )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names."""
        check_method(self.place, settings["hessian_method"], "hessian_method")

    def step(self, var: Var) -> Var:
        """Solve."""
        names = ("reg", "eig_reg", "search_negative", "hessian_method", "vectorize", "h")
        settings = {name: common(self, var.params, name) for name in names}
        hessian = hessian_matrix(self, var, settings["hessian_method"], float(settings["h"]), settings["vectorize"])
        updates = var.get_update()
        right = flatten(updates)
        if right.numel() == 0:
            return var
        check_curvature(self, hessian, right)
        if self.children:
            branch = run_modules(self.children["inner"], var.clone())
            right = flatten(branch.get_update())
            var.update_attrs_from_clone_(branch)
        hessian = hessian.to(right.dtype)
        shift = float(settings["reg"])
        if settings["eig_reg"]:
            shift += max(0.0, -float(torch.linalg.eigvalsh(hessian)[0]))
        hessian.diagonal().add_(shift)
        solution = self._solve(hessian, right, settings["search_negative"])
        if not bool(torch.isfinite(solution).all()):
            raise NonFiniteError(
                f"{self.place}: the solution of (H + reg I) x = u is not finite; nothing was changed. Use a larger reg"
            )
        var.update = unflatten(solution, updates)
        return var

    def _solve(self, matrix: Tensor, right: Tensor, search_negative: bool) -> Tensor:
        if self.H_tfm is not None:
            result = self.H_tfm(matrix, right)
            if isinstance(result, tuple):
                matrix, is_inverse = result
                return torch.mv(matrix, right) if is_inverse else solve_symmetric(matrix, right)
            if isinstance(result, Tensor) and result.shape == right.shape:
                return result
            got = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise OptionError(
                f"{self.place}: H_tfm returned {got}; expected the update, shape {tuple(right.shape)}, or (matrix, is_inverse)"
            )
        if not search_negative and self.eigval_tfm is None:
            return solve_symmetric(matrix, right)
        eigenvalues, eigenvectors = torch.linalg.eigh(matrix)
        if search_negative and bool(eigenvalues[0] < 0):
            lowest = eigenvectors[:, 0]
            return cast(Tensor, -lowest if bool(lowest.dot(right) < 0) else lowest)
        if self.eigval_tfm is not None:
            eigenvalues = self.eigval_tfm(eigenvalues)
        inside = torch.mv(eigenvectors.T, right)
        return torch.mv(eigenvectors, torch.where(eigenvalues == 0, 0.0, inside / eigenvalues))


def solve_symmetric(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve a symmetric system, by the first that works of Cholesky's factors, LU factors, and least squares."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if not bool(failed):
        return torch.cholesky_solve(right[:, None], factor)[:, 0]
    solution, failed = torch.linalg.solve_ex(matrix, right)
    if not bool(failed) and bool(torch.isfinite(solution).all()):
        return cast(Tensor, solution)
    return torch.mv(torch.linalg.pinv(matrix, hermitian=True), right)
