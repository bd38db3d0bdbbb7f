"""Finite differences along random directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import FRACTION, POSITIVE, numbers
from graphopt.optim.core.closures import common, number
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.differences import check_formula, difference, uses_centre
from graphopt.optim.grad_approximation.grad_approximator import GradApproximator, Loss, Target
from graphopt.optim.grad_approximation.random_directions import check_distribution, draw, generators


class RandomizedFDM(GradApproximator):
    """The mean over random directions z of ``z D_z f``, D by a difference quotient.

    With the step h of each parameter, ``δ = Σ_j w_j f(θ + o_j h z) ≈ ⟨∇f, h z⟩`` and ``g = mean of z δ / h``. The directions
    have a covariance of one, so that the mean is the gradient of a linear function whatever the distribution is.

    With k samples the update is in the span of k directions: with ``beta`` near 1 a slowly turning subspace.

    Args:
        h: the step, in units of the parameter.
        n_samples: the number of directions.
        formula: which values are weighed how, see `graphopt.optim.grad_approximation.differences`.
        distribution: ``"gaussian"``, ``"uniform"``, ``"sphere"`` or ``"rademacher"`` (signs).
        beta: directions are ``beta`` times those of the step before plus ``1 - beta`` times new ones.
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
            {
                "h": h,
                "n_samples": n_samples,
                "formula": formula,
                "distribution": distribution,
                "beta": beta,
                "pre_generate": pre_generate,
                "seed": seed,
            },
            target=target,
        )
        self._forget()

    def _forget(self, var: Var | None = None) -> None:
        self._directions: list[list[Tensor]] | None = None  # those of this step
        self._num_drawn = 0  # how often they were drawn in it

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_directions": None}

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_formula(self.place, settings["formula"])
        check_distribution(self.place, settings["distribution"])
        if not isinstance(settings["n_samples"], int) or settings["n_samples"] < 1:
            raise OptionError(f"{self.place}: n_samples={settings['n_samples']!r}; expected an integer of at least 1")

    def pre_step(self, var: Var) -> None:
        """Draw the directions of this step."""
        self._forget()
        var.post_step_hooks.append(self._forget)  # they are as large as the parameters, times the number of samples
        if common(self, var.params, "pre_generate"):
            self._directions = self._draw(var)

    def _draw(self, var: Var) -> list[list[Tensor]]:
        """For each sample one tensor for each parameter."""
        params = var.params
        settings = self.get_settings(params[0])
        step = var.current_step if var.counts is None else int(var.counts[0])
        samples = []
        for index in range(common(self, params, "n_samples")):
            generator_of = generators(params, settings.seed, step, self._num_drawn, index)
            samples.append(draw(params, common(self, params, "distribution"), generator_of))
        self._num_drawn += 1
        beta = float(settings.beta)
        if beta:
            for index, param in enumerate(params):
                fresh, state = torch.stack([sample[index] for sample in samples]), self.state[param]
                old = state.get("directions")
                if old is not None and old.shape == fresh.shape:
                    fresh = beta * old + (1 - beta) * fresh
                state["directions"] = fresh
                for sample, mixed in zip(samples, fresh, strict=True):
                    sample[index] = mixed
        return samples

    def approximate(
        self, closure: Callable[[bool], Any], params: Sequence[Tensor], loss: Loss, var: Var
    ) -> tuple[list[Tensor], Loss, Loss]:
        """Move all elements at once, along one direction after another."""
        formula = common(self, params, "formula")
        steps = [float(self.get_settings(param).h) for param in params]
        if loss is None and uses_centre(formula):
            loss = closure(False)
        centre = None if loss is None else number(loss)
        starts = [param.detach().clone() for param in params]
        samples = self._draw(var) if self._directions is None else self._directions
        sums = [torch.zeros_like(z) for z in samples[0]]
        means = []
        for sample in samples:

            def value_at(offset: int) -> float:
                for param, start, z, step in zip(params, starts, sample, steps, strict=True):  # noqa: B023
                    param.copy_(start + z * (offset * step))
                return number(closure(False))

            change, mean = difference(formula, centre, value_at)
            means.append(mean)
            for total, z, step in zip(sums, sample, steps, strict=True):
                total.add_(z, alpha=change / (step * len(samples)))
        return sums, loss, sum(means) / len(means)


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
