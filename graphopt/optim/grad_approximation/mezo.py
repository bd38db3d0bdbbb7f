"""Random differences whose directions are never stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.errors import ModuleError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim.core.arithmetic import zeros
from graphopt.optim.core.bounds import NON_NEGATIVE, POSITIVE, numbers
from graphopt.optim.core.closures import common, number, restored
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.along_directions import check_directions, step_number
from graphopt.optim.grad_approximation.differences import check_formula, difference, uses_centre
from graphopt.optim.grad_approximation.grad_approximator import GradApproximator, Loss, Target
from graphopt.optim.grad_approximation.perturbed_reads import perturbed_reads
from graphopt.optim.grad_approximation.random_directions import draw, generators

_PERTURB = ("reads", "params")


class MeZO(GradApproximator):
    """`RandomizedFDM` in the memory of inference: directions are made anew from a seed whenever they are needed.

    ``δ_i = Σ_j w_j f(θ + o_j h z_i)``,  ``g = 1/k Σ_i z_i δ_i / h``; with ``lr``, ``θ = θ - lr g`` one tensor after another, so
    that no gradient is ever stored.

    Adding ``h z`` to the parameters and subtracting it again, as published, leaves rounding errors, which add up over steps;
    what rounding loses is up to a whole parameter, so that no scheme in place can put it back without a copy. Here nothing
    is written to the parameters: the operation that reads one is given ``θ + o h z``, made for it and dropped after it.

    Cost: evaluations of the loss as `RandomizedFDM`; in each of them a random tensor for each operation that reads a parameter.
    Extra memory: one tensor of the size of the largest parameter (in float32 at least) beside the estimate; with ``lr`` there is
    no estimate either. No state.

    Args:
        h: the step, in units of the parameter.
        n_samples: the number of directions.
        formula: which values are weighed how, see `graphopt.optim.grad_approximation.differences`.
        distribution: ``"gaussian"``, ``"uniform"``, ``"sphere"`` (one pass over all random numbers more) or ``"rademacher"``.
        seed: of the directions; with ``None`` each step takes one from torch's global generator.
        lr: the learning rate, to move the parameters at once. Nothing that follows in the chain runs then. ``None`` hands an
            estimate on as every gradient approximation.
        perturb: ``"reads"`` as described. It sees the operations of torch; compiled functions run uncompiled. ``"params"``
            writes ``θ + o h z`` to the parameters and puts them back from a copy: for closures that read parameters in other
            ways (extensions that take addresses), and for compiled models where there is memory for the copy.
        target: what the estimate replaces, see `GradApproximator`.

    Raises:
        OptionError: an option is not valid.
        ModuleError: in a step, if the closure reads no parameter by an operation of torch.

    Reference: Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333, 2023, algorithm 1.
    """

    bounds = numbers(h=POSITIVE, lr=NON_NEGATIVE)
    moves_params = False

    def __init__(
        self,
        h: Number = 1e-3,
        n_samples: int = 1,
        formula: str = "central2",
        distribution: str = "rademacher",
        seed: int | None = None,
        lr: Number | Callable[[Any], Any] | None = None,
        perturb: Literal["reads", "params"] = "reads",
        target: Target = "closure",
    ) -> None:
        options = {"n_samples": n_samples, "formula": formula, "distribution": distribution, "seed": seed}
        own_lr = {} if lr is None else {"lr": lr}  # otherwise the group's ``lr`` belongs to a module that follows
        super().__init__({"h": h, **options, "perturb": perturb, **own_lr}, target=target)
        self.is_learning_rate = self.must_be_last = lr is not None  # type: ignore[misc]
        self._step_seed: int | None = None
        self._lengths: list[float] = []

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names and counts."""
        check_formula(self.place, settings["formula"])
        check_directions(self.place, settings)
        if settings["perturb"] not in _PERTURB:
            raise OptionError(f"{self.place}: perturb={settings['perturb']!r}; expected one of {', '.join(_PERTURB)}")

    def pre_step(self, var: Var) -> None:
        """Take a seed for this step."""
        seed = common(self, var.params, "seed")
        self._step_seed = int(torch.randint(2**62, ())) if seed is None else seed

    def step(self, var: Var) -> Var:
        """Replace the target, or move."""
        if "lr" not in self.defaults:
            return super().step(var)
        self.pre_step(var)
        with torch.no_grad():
            changes, loss, loss_approx = self._changes(
                lambda _: var.evaluate(backward=False), var.params, var.loss, var
            )
            start = loss_approx if loss is None else loss
            if not math.isfinite(number(start)):
                raise NonFiniteError(f"{self.place}: the loss is {number(start)} before the step; nothing was changed")
            var.loss = loss if var.loss is None else var.loss
            var.loss_approx = loss_approx
            rates = [-float(self.get_settings(param).lr) for param in var.params]
            if self._bound.replaces:  # a pure function, which moves nothing
                var.update = [
                    self._add_directions(zeros(param), index, var, changes, -rate)
                    for index, (param, rate) in enumerate(zip(var.params, rates, strict=True))
                ]
            else:
                for index, (param, rate) in enumerate(zip(var.params, rates, strict=True)):
                    self._add_directions(param, index, var, changes, rate)
                var.skip_update = True
        var.stop = True
        return var

    def approximate(
        self, closure: Callable[[bool], Any], params: Sequence[Tensor], loss: Loss, var: Var
    ) -> tuple[list[Tensor], Loss, Loss]:
        """Evaluate, then add up directions."""
        changes, loss, loss_approx = self._changes(closure, params, loss, var)
        grads = [self._add_directions(zeros(param), index, var, changes, 1.0) for index, param in enumerate(params)]
        return grads, loss, loss_approx

    # -------------------------------------------------------------------------------------------------------- internals

    def _changes(
        self, closure: Callable[[bool], Any], params: Sequence[Tensor], loss: Loss, var: Var
    ) -> tuple[list[float], Loss, Loss]:
        """For each direction z the derivative along it, times h; the loss; and an estimate of it."""
        formula = common(self, params, "formula")
        steps = [float(self.get_settings(param).h) for param in params]
        if loss is None and uses_centre(formula):
            loss = closure(False)
        centre = None if loss is None else number(loss)
        num = common(self, params, "n_samples")
        self._lengths = [self._length(sample, var) for sample in range(num)]
        changes, means = [], []
        for sample in range(num):

            def value_at(offset: int) -> float:
                if offset == 0:
                    return number(closure(False))

                def moved(index: int, start: Tensor) -> Tensor:
                    z = self._direction(index, sample, var, offset * steps[index])  # noqa: B023
                    return z.add_(start.detach()).to(start.dtype)

                with self._moved(var, moved):
                    return number(closure(False))

            change, mean = difference(formula, centre, value_at)
            changes.append(change)
            means.append(mean)
        return changes, loss, sum(means) / len(means)

    @contextmanager
    def _moved(self, var: Var, moved: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        """Let the closure see other parameters."""
        params = var.params
        if common(self, params, "perturb") == "params":
            with restored(params) as starts:
                for index, (param, start) in enumerate(zip(params, starts, strict=True)):
                    param.copy_(moved(index, start))
                yield
            return
        try:
            with perturbed_reads(params, lambda index: moved(index, params[index])) as reads:
                yield
        except UnsupportedError as error:
            error.add_note(f"{self.place}: use perturb='params', which needs memory for a copy of the parameters")
            raise
        if reads.num_reads == 0 and any(param.numel() for param in params):
            raise ModuleError(
                f"{self.place}: the closure read no parameter by an operation of torch, so that perturb='reads' has no effect on "
                "it; nothing was changed. Use perturb='params', which needs memory for a copy of the parameters"
            )

    def _direction(self, index: int, sample: int, var: Var, factor: float) -> Tensor:
        """A part of a direction, times a factor."""
        return self._noise(index, sample, var).mul_(factor * self._lengths[sample])

    def _noise(self, index: int, sample: int, var: Var) -> Tensor:
        """A random tensor, the same at each call in a step."""
        param = var.params[index]
        distribution = common(self, var.params, "distribution")
        generator_of = generators([param], self._step_seed, step_number(var), sample, index)
        (z,) = draw([param], "gaussian" if distribution == "sphere" else distribution, generator_of)
        return z

    def _length(self, sample: int, var: Var) -> float:
        """What all parts of a direction are multiplied by."""
        if common(self, var.params, "distribution") != "sphere":
            return 1.0
        square = sum(float(self._noise(index, sample, var).square_().sum()) for index in range(len(var.params)))
        return (sum(param.numel() for param in var.params) / square) ** 0.5 if square > 0 else 1.0

    def _add_directions(self, tensor: Tensor, index: int, var: Var, changes: Sequence[float], factor: float) -> Tensor:
        """Add the estimate of a gradient, times a factor, to a tensor."""
        step = float(self.get_settings(var.params[index]).h)
        for sample, change in enumerate(changes):
            tensor.add_(self._direction(index, sample, var, factor * change / (step * len(changes))))
        return tensor
