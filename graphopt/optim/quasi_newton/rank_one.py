"""Quasi-Newton methods whose H changes by a matrix of rank one: ``H⁺ = H + (s - H y) cᵀ / ⟨c, y⟩``, with any ``c``.

H is not symmetric. For systems of n linear equations all of them end after 2 n steps of length 1 at most (Gay, "Some
convergence properties of Broyden's method", SIAM J. Numer. Anal. 16(4), 1979).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from graphopt.optim.core.context import Settings
from graphopt.optim.core.store import StateView
from graphopt.optim.quasi_newton.quasi_newton_h import QuasiNewtonH


class _RankOne(QuasiNewtonH):
    """What they have in common; H stays if ``|⟨c, y⟩| <= tol ‖c‖ ‖y‖``."""

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
        Hy = H @ y
        c = self.choose_c(H, Hy, s, y, g_prev, state)
        cy = c.dot(y)
        if bool(cy.abs() <= settings.tol * c.norm() * y.norm()):
            return H
        return H + torch.outer(s - Hy, c / cy)

    @abstractmethod
    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:
        """The vector by which the methods differ; of any length."""


class BroydenGood(_RankOne):
    """``H⁺ = H + (s - H y) cᵀ / ⟨c, y⟩``, ``c = Hᵀ s``; the inverse of ``H⁺`` is that nearest to the old.

    H stays if ``|⟨c, y⟩| <= tol ‖c‖ ‖y‖``. Arguments as `QuasiNewtonH`.

    Reference: Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19, 1965; Spedicato,
    Huang, "Numerical experience with Newton-like methods for nonlinear algebraic systems", Computing 58, 1997.
    """

    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:  # noqa: D102
        return H.T @ s


class BroydenBad(_RankOne):
    """``H⁺ = H + (s - H y) yᵀ / ⟨y, y⟩``: the nearest to H of all that map ``y`` to ``s``.

    Arguments as `QuasiNewtonH`.

    Reference: Broyden, "A class of methods for solving nonlinear simultaneous equations", Math. Comp. 19, 1965; Spedicato,
    Huang, "Numerical experience with Newton-like methods for nonlinear algebraic systems", Computing 58, 1997.
    """

    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:  # noqa: D102
        return y


class Greenstadt1(_RankOne):
    """``H⁺ = H + (s - H y) cᵀ / ⟨c, y⟩``, ``c = g_prev``, the update in front of the last step.

    H stays if ``|⟨c, y⟩| <= tol ‖c‖ ‖y‖``. Arguments as `QuasiNewtonH`.

    Reference: Spedicato, Huang, "Numerical experience with Newton-like methods for nonlinear algebraic systems", Computing 58,
    1997.
    """

    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:  # noqa: D102
        return g_prev


class Greenstadt2(_RankOne):
    """``H⁺ = H + (s - H y) cᵀ / ⟨c, y⟩``, ``c = H H y``.

    H stays if ``|⟨c, y⟩| <= tol ‖c‖ ‖y‖``. Arguments as `QuasiNewtonH`.

    Reference: Spedicato, Huang, "Numerical experience with Newton-like methods for nonlinear algebraic systems", Computing 58,
    1997.
    """

    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:  # noqa: D102
        return H @ Hy


class ColumnUpdatingMethod(_RankOne):
    """``H⁺ = H + (s - H y) e_jᵀ / y_j``, j the element of y that is largest in magnitude: one column of H changes.

    Arguments as `QuasiNewtonH`.

    Reference: Lopes, Martinez, "Convergence properties of the inverse column-updating method", Optimization Methods and
    Software 6(2), 1995.
    """

    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:  # noqa: D102
        c = torch.zeros_like(y)
        c[y.abs().argmax()] = 1
        return c


class ThomasOptimalMethod(_RankOne):
    """``H⁺ = H + (s - H y) cᵀ / ⟨c, y⟩``, ``c = Hᵀ d``, ``d = (R + ½ ‖s‖ I) s``; R is another matrix, at first the identity.

    ``R⁺ = (1 + ‖s‖) (‖s‖ I + R - d dᵀ / ⟨d, s⟩)``: as in a filter of Kalman, R tells in which directions the Hessian is not yet
    known, or may have changed meanwhile.

    H stays if ``|⟨c, y⟩| <= tol ‖c‖ ‖y‖``. Arguments as `QuasiNewtonH`.

    Cost: O(n²) for n elements; keeps 2 n² + 2 n numbers.

    Reference: Thomas, "Sequential estimation techniques for quasi-Newton algorithms", Cornell University, 1975; Spedicato,
    Huang, "Numerical experience with Newton-like methods for nonlinear algebraic systems", Computing 58, 1997.
    """

    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:  # noqa: D102
        identity = torch.eye(len(s), dtype=s.dtype, device=s.device)
        R: Tensor = state.get("R", identity)
        length = s.norm()
        d = R @ s + s * (length / 2)
        state["R"] = (1 + length) * (identity * length + R - torch.outer(d, d / d.dot(s)))
        return torch.mv(H.T, d)


class _Transposed(_RankOne):
    """Those of Huang's family: the update is ``Hᵀ g``, which makes directions conjugate."""

    def multiply(self, matrix: Tensor, g: Tensor, settings: Settings) -> Tensor:
        return matrix.T @ g


class McCormick(_Transposed):
    """``H⁺ = H + (s - H y) sᵀ / ⟨s, y⟩``; the update is ``Hᵀ g``.

    With exact line searches it ends on quadratics in as many steps as there are elements (which the product ``H g`` does not).
    H stays if ``|⟨s, y⟩| <= tol ‖s‖ ‖y‖``. Arguments as `QuasiNewtonH`.

    Reference: Pearson, "Variable metric methods of minimisation", The Computer Journal 12(2), 1969; Huang, "Unified approach to
    quadratically convergent algorithms for function minimization", J. Optim. Theory Appl. 5, 1970.
    """

    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:  # noqa: D102
        return s


class Pearson(_Transposed):
    """``H⁺ = H + (s - H y) cᵀ / ⟨c, y⟩``, ``c = Hᵀ y``; the update is ``Hᵀ g``.

    With exact line searches it ends on quadratics in as many steps as there are elements (which the product ``H g`` does not).
    H stays if ``|⟨c, y⟩| <= tol ‖c‖ ‖y‖``. Arguments as `QuasiNewtonH`.

    Reference: Pearson, "Variable metric methods of minimisation", The Computer Journal 12(2), 1969; Huang, "Unified approach to
    quadratically convergent algorithms for function minimization", J. Optim. Theory Appl. 5, 1970.
    """

    def choose_c(self, H: Tensor, Hy: Tensor, s: Tensor, y: Tensor, g_prev: Tensor, state: StateView) -> Tensor:  # noqa: D102
        return H.T @ y
