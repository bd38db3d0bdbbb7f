"""Finite differences along random directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from graphopt.optim.core.bounds import FRACTION, POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.along_directions import AlongDirections
from graphopt.optim.grad_approximation.differences import check_formula
from graphopt.optim.grad_approximation.grad_approximator import Loss, Target


class RandomizedFDM(AlongDirections):
    """The mean over random directions z of ``z D_z f``, D by a difference quotient.

    With the step h of each parameter, ``δ = Σ_j w_j f(θ + o_j h z) ≈ ⟨∇f, h z⟩`` and ``g = mean of z δ / h``. The directions
    have a covariance of one, so that the mean is the gradient of a linear function whatever the distribution is.

    With k samples the update is in the span of k directions: with ``beta`` near 1 a slowly turning subspace.

    Cost: for k samples k (``forward2``, ``backward2``; and once the loss itself), 2k (``central2``; ``forward3`` and
    ``backward3``, and once the loss itself) or 4k (``central4``) evaluations of the loss.

    Args:
        h: the step, in units of the parameter.
        n_samples: the number of directions.
        formula: which values are weighed how, see `graphopt.optim.grad_approximation.differences`.
        distribution: ``"gaussian"``, ``"uniform"``, ``"sphere"`` or ``"rademacher"`` (signs).
        beta: directions are ``beta`` times those of the step before plus ``1 - beta`` times new ones, divided by the standard
            deviation of that.
        pre_generate: draw the directions once in a step, so that modules that evaluate the gradient at several points, such
            as line searches, work on one function; otherwise for each evaluation.
        seed: of the directions; ``None`` takes torch's global generator.
        target: what the estimate replaces, see `GradApproximator`.

    Raises:
        OptionError: an option is not valid.

    Reference: Spall, "Multivariate Stochastic Approximation Using a Simultaneous Perturbation Gradient Approximation", IEEE
    Transactions on Automatic Control 37, 1992; Nesterov, Spokoiny, "Random Gradient-Free Minimization of Convex
    Functions", 2017, section 3.
    """

    bounds = numbers(h=POSITIVE, beta=FRACTION)

    def __init__(
        self,
        h: Number = 1e-3,
        n_samples: int = 1,
        formula: str = "central2",
        distribution: str = "rademacher",
        beta: Number = 0.0,
        pre_generate: bool = True,
        seed: int | None = None,
        target: Target = "closure",
    ) -> None:
        super().__init__(
            {"h": h, "formula": formula},
            n_samples=n_samples,
            distribution=distribution,
            beta=beta,
            pre_generate=pre_generate,
            seed=seed,
            target=target,
        )

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_formula(self.place, settings["formula"])
        super().check_settings(settings)

    def approximate(
        self, closure: Callable[[bool], Any], params: Sequence[Tensor], loss: Loss, var: Var
    ) -> tuple[list[Tensor], Loss, Loss]:
        """Move all elements at once, along one direction after another."""
        return self.by_differences(closure, params, loss, var, common(self, params, "formula"))


class SPSA(RandomizedFDM):
    """`RandomizedFDM` along random signs: simultaneous perturbation.

    Args:
        h: the step, in units of the parameter.
        n_samples: the number of directions.
        formula: which values are weighed how.
        beta: how much of the directions of the step before is kept.
        pre_generate: draw the directions once in a step.
        seed: of the directions; ``None`` takes torch's global generator.
        target: what the estimate replaces.

    Reference: Spall, 1992, see `RandomizedFDM`.
    """

    def __init__(
        self,
        h: Number = 1e-3,
        n_samples: int = 1,
        formula: str = "central2",
        beta: Number = 0.0,
        pre_generate: bool = True,
        seed: int | None = None,
        target: Target = "closure",
    ) -> None:
        super().__init__(h, n_samples, formula, "rademacher", beta, pre_generate, seed, target)


class RDSA(RandomizedFDM):
    """`RandomizedFDM` along normal directions: random directions stochastic approximation.

    Args:
        h: the step, in units of the parameter.
        n_samples: the number of directions.
        formula: which values are weighed how.
        beta: how much of the directions of the step before is kept.
        pre_generate: draw the directions once in a step.
        seed: of the directions; ``None`` takes torch's global generator.
        target: what the estimate replaces.

    Reference: Kushner, Clark, "Stochastic Approximation Methods for Constrained and Unconstrained Systems", Springer, 1978.
    """

    def __init__(
        self,
        h: Number = 1e-3,
        n_samples: int = 1,
        formula: str = "central2",
        beta: Number = 0.0,
        pre_generate: bool = True,
        seed: int | None = None,
        target: Target = "closure",
    ) -> None:
        super().__init__(h, n_samples, formula, "gaussian", beta, pre_generate, seed, target)


class GaussianSmoothing(RandomizedFDM):
    """`RandomizedFDM` along many normal directions: the gradient of the loss convolved with a Gaussian of width ``h``.

    Args:
        h: the step, in units of the parameter.
        n_samples: the number of directions.
        formula: which values are weighed how.
        beta: how much of the directions of the step before is kept.
        pre_generate: draw the directions once in a step.
        seed: of the directions; ``None`` takes torch's global generator.
        target: what the estimate replaces.

    Reference: Nesterov, Spokoiny, 2017, section 3, see `RandomizedFDM`.
    """

    def __init__(
        self,
        h: Number = 1e-2,
        n_samples: int = 100,
        formula: str = "central2",
        beta: Number = 0.0,
        pre_generate: bool = True,
        seed: int | None = None,
        target: Target = "closure",
    ) -> None:
        super().__init__(h, n_samples, formula, "gaussian", beta, pre_generate, seed, target)
