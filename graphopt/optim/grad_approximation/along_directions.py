"""The base class of gradient approximations from derivatives along random directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import FRACTION, numbers
from graphopt.optim.core.closures import common, number
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.differences import difference, uses_centre
from graphopt.optim.grad_approximation.grad_approximator import GradApproximator, Loss, Target
from graphopt.optim.grad_approximation.random_directions import check_distribution, draw, generators


class AlongDirections(GradApproximator):
    """The mean over random directions z of ``z D_z f``; a subclass says what ``D_z f`` is.

    The directions have a covariance of one, so that the mean is the gradient of a linear function whatever the distribution
    is, and whatever ``beta`` is. With k samples the update is in the span of k directions.

    Args:
        defaults: hyper-parameters of the subclass and their values.
        n_samples: the number of directions.
        distribution: ``"gaussian"``, ``"uniform"``, ``"sphere"`` or ``"rademacher"`` (signs).
        beta: directions are ``beta`` times those of the step before plus ``1 - beta`` times new ones, divided by the standard
            deviation of that: a subspace that turns slowly where it is near 1.
        pre_generate: draw the directions once in a step, so that modules that evaluate the gradient at several points, such
            as line searches, work on one function; otherwise for each evaluation.
        seed: of the directions; ``None`` takes torch's global generator.
        target: what the estimate replaces, see `GradApproximator`.

    Raises:
        OptionError: an option is not valid.
    """

    bounds = numbers(beta=FRACTION)

    def __init__(
        self,
        defaults: Mapping[str, Any],
        *,
        n_samples: int,
        distribution: str,
        beta: Number,
        pre_generate: bool,
        seed: int | None,
        target: Target,
    ) -> None:
        options = {
            "n_samples": n_samples,
            "distribution": distribution,
            "beta": beta,
            "pre_generate": pre_generate,
            "seed": seed,
        }
        super().__init__({**defaults, **options}, target=target)
        self._forget()

    def _forget(self, var: Var | None = None) -> None:
        self._directions: list[list[Tensor]] | None = None  # those of this step
        self._num_drawn = 0  # how often they were drawn in it

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_directions": None}

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_directions(self.place, settings)

    def pre_step(self, var: Var) -> None:
        """Draw the directions of this step."""
        self._forget()
        var.post_step_hooks.append(self._forget)  # they are as large as the parameters, times the number of samples
        if common(self, var.params, "pre_generate"):
            self._directions = self._draw(var)

    def directions(self, var: Var) -> list[list[Tensor]]:
        """For each sample one tensor for each parameter."""
        return self._draw(var) if self._directions is None else self._directions

    def _draw(self, var: Var) -> list[list[Tensor]]:
        params = var.params
        seed, step = common(self, params, "seed"), step_number(var)
        samples = []
        for index in range(common(self, params, "n_samples")):
            generator_of = generators(params, seed, step, self._num_drawn, index)
            samples.append(draw(params, common(self, params, "distribution"), generator_of))
        self._num_drawn += 1
        beta = float(common(self, params, "beta"))
        if beta:
            for index, param in enumerate(params):
                mixed = self._mix(param, torch.stack([sample[index] for sample in samples]), beta)
                for sample, direction in zip(samples, mixed, strict=True):
                    sample[index] = direction
        return samples

    def _mix(self, param: Tensor, fresh: Tensor, beta: float) -> Tensor:
        """The directions of the step before, turned a little."""
        state = self.state[param]
        old = state.get("directions")
        variance = 1.0
        if old is not None and old.shape == fresh.shape:
            fresh = beta * old + (1 - beta) * fresh
            variance = beta**2 * float(state["variance"]) + (1 - beta) ** 2
        state["directions"], state["variance"] = fresh, variance
        return fresh / math.sqrt(variance)

    def steps_of(self, params: Sequence[Tensor]) -> list[float]:
        """For each parameter ``h``."""
        return [float(self.get_settings(param).h) for param in params]

    def by_differences(
        self, closure: Callable[[bool], Any], params: Sequence[Tensor], loss: Loss, var: Var, formula: str
    ) -> tuple[list[Tensor], Loss, Loss]:
        """The estimate with ``D_z f`` by a difference quotient, moving all parameters at once."""
        steps = self.steps_of(params)
        if loss is None and uses_centre(formula):
            loss = closure(False)
        centre = None if loss is None else number(loss)
        starts = [param.detach().clone() for param in params]
        samples = self.directions(var)
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


def step_number(var: Var) -> int:
    """Which step this is, also after a run was resumed."""
    return var.current_step if var.counts is None else int(var.counts[0])


def check_directions(place: str, settings: Mapping[str, Any]) -> None:
    """Raise `OptionError` for a distribution or a number of samples that there cannot be."""
    check_distribution(place, settings["distribution"])
    num = settings["n_samples"]
    if not isinstance(num, int) or isinstance(num, bool) or num < 1:
        raise OptionError(f"{place}: n_samples={num!r}; expected an integer of at least 1")
