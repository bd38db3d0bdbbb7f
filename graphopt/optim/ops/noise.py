"""Random updates, and random parts of updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import norm_of_all, state_dtype
from graphopt.optim.core.bounds import ANY, FRACTION, POSITIVE, numbers
from graphopt.optim.core.closures import common
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.grad_approximation.along_directions import step_number
from graphopt.optim.grad_approximation.random_directions import check_distribution, draw, generators

_NAMES = {"normal": "gaussian"}


class _Random(Module):
    """Draws from torch's global generator, or from one of its own in each step, which a run that is resumed draws from again."""

    takes_sharded = False

    def generators(self, var: Var) -> dict[torch.device, torch.Generator | None]:
        """One for each device."""
        seed = common(self, var.params, "seed")
        return generators(var.params, seed, *([] if seed is None else [step_number(var)]))

    def uniform(self, var: Var) -> list[Tensor]:
        """Numbers in [0, 1), like the parameters."""
        generator_of = self.generators(var)
        return [
            torch.rand(p.shape, dtype=state_dtype(p), device=p.device, generator=generator_of[p.device])
            for p in var.params
        ]


class _Sampled(_Random):
    """Draws from a distribution with variance 1."""

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse unknown names."""
        check_distribution(self.place, _NAMES.get(settings["distribution"], settings["distribution"]))

    def sample(self, var: Var) -> list[Tensor]:
        """Like the parameters."""
        distribution = common(self, var.params, "distribution")
        return draw(var.params, _NAMES.get(distribution, distribution), self.generators(var))


class RandomSample(_Sampled):
    """A random update, ``eps z``, whatever came before.

    Args:
        eps: the standard deviation of each element.
        distribution: ``"normal"`` (or ``"gaussian"``), ``"uniform"``, ``"sphere"`` (all tensors together are of length
            ``eps √n`` for their n elements) or ``"rademacher"`` (±``eps``); the mean is 0.
        seed: ``None`` draws from torch's global generator.

    Raises:
        OptionError: an option is not valid.
    """

    bounds = numbers(eps=ANY)

    def __init__(self, eps: Number = 1.0, distribution: str = "normal", seed: int | None = None) -> None:
        super().__init__({"eps": eps, "distribution": distribution, "seed": seed})

    def step(self, var: Var) -> Var:
        """Draw."""
        var.update = [_times(z, self.get_settings(p).eps) for z, p in zip(self.sample(var), var.params, strict=True)]
        return var


class Randn(_Random):
    """A random update from the standard normal distribution, whatever came before.

    Args:
        seed: ``None`` draws from torch's global generator.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__({"seed": seed})

    def step(self, var: Var) -> Var:
        """Draw."""
        var.update = draw(var.params, "gaussian", self.generators(var))
        return var


class Uniform(_Random):
    """A random update from the uniform distribution in [low, high), whatever came before.

    Args:
        low: the lower end.
        high: the upper end.
        seed: ``None`` draws from torch's global generator.

    Raises:
        OptionError: ``low`` is above ``high``, or something is no number.
    """

    bounds = numbers(low=ANY, high=ANY)

    def __init__(self, low: Number, high: Number, seed: int | None = None) -> None:
        super().__init__({"low": low, "high": high, "seed": seed})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse an empty interval."""
        low, high = settings["low"], settings["high"]
        if isinstance(low, float) and isinstance(high, float) and low > high:
            raise OptionError(f"{self.place}: low={low!r} is above high={high!r}; exchange them")

    def step(self, var: Var) -> Var:
        """Draw."""
        news = []
        for unit, param in zip(self.uniform(var), var.params, strict=True):
            settings = self.get_settings(param)
            news.append(_times(unit, settings.high - settings.low) + _number(settings.low, unit))
        var.update = news
        return var


class NoiseSign(_Sampled):
    """A random magnitude with the sign of the update, ``alpha |z| sign(u)``; zeros stay zeros.

    Args:
        distribution: of z, as of `RandomSample`.
        alpha: the standard deviation of z.
        seed: ``None`` draws from torch's global generator.

    Raises:
        OptionError: an option is not valid.
    """

    bounds = numbers(alpha=POSITIVE)

    def __init__(self, distribution: str = "normal", alpha: Number = 1.0, seed: int | None = None) -> None:
        super().__init__({"distribution": distribution, "alpha": alpha, "seed": seed})

    def step(self, var: Var) -> Var:
        """Draw."""
        updates = var.get_update()
        var.update = [
            _times(z.abs(), self.get_settings(p).alpha).to(u.dtype) * u.sign()
            for z, u, p in zip(self.sample(var), updates, var.params, strict=True)
        ]
        return var


class Dropout(_Random):
    """Set each element of the update to 0 with probability ``p``; the others stay as they are.

    Args:
        p: the probability.
        graft: scale the result so that the norm over all tensors is what it was.
        seed: ``None`` draws from torch's global generator.

    Raises:
        OptionError: ``p`` is not between 0 and 1.
    """

    bounds = numbers(p=FRACTION)

    def __init__(self, p: Number = 0.5, graft: bool = False, seed: int | None = None) -> None:
        super().__init__({"p": p, "graft": graft, "seed": seed})

    def step(self, var: Var) -> Var:
        """Drop."""
        updates = var.get_update()
        news = [
            torch.where(unit >= _number(self.get_settings(p).p, unit), update, 0.0)
            for unit, update, p in zip(self.uniform(var), updates, var.params, strict=True)
        ]
        if common(self, var.params, "graft"):
            before, after = norm_of_all(updates), norm_of_all(news)
            factor = before / torch.where(after > 0, after, 1)
            news = [_times(new, factor) for new in news]
        var.update = news
        return var


class WeightDropout(_Random):
    """Let the modules behind it work on the loss with random weights set to 0: ``f(m ⊙ θ)``, with a mask ``m`` for each step.

    Gradients are those of this function, so that a weight that was left out gets none. The parameters themselves stay as they
    are. The loss that the step returns is that with the weights left out.

    Args:
        p: the probability of a weight to be set to 0; a group with ``p=0`` keeps all of its.
        seed: ``None`` draws from torch's global generator.

    Raises:
        OptionError: ``p`` is not between 0 and 1.

    Cost: a mask and a copy of the parameters.

    Reference: Wan et al., "Regularization of Neural Networks using DropConnect", ICML 2013, section 3.
    """

    bounds = numbers(p=FRACTION)
    needs_closure = True

    def __init__(self, p: Number = 0.5, seed: int | None = None) -> None:
        super().__init__({"p": p, "seed": seed})

    def step(self, var: Var) -> Var:
        """Replace the closure."""
        params = var.params
        masks = [
            unit >= _number(self.get_settings(param).p, unit)
            for unit, param in zip(self.uniform(var), params, strict=True)
        ]
        var.replace_closure(_masked(var, params, masks))
        var.loss = None  # of another function
        return var


def _masked(var: Var, params: Sequence[Tensor], masks: Sequence[Tensor]) -> Callable[..., Any]:
    original = var.clone(clone_update=False)

    def closure(backward: bool = True) -> Any:
        with torch.no_grad():
            before = [param.detach().clone() for param in params]
            for param, mask in zip(params, masks, strict=True):
                param.copy_(torch.where(mask, param, 0.0))
        try:
            loss = original.evaluate(backward)
        finally:
            with torch.no_grad():
                for param, value in zip(params, before, strict=True):
                    param.copy_(value)
        if backward:
            for param, mask in zip(params, masks, strict=True):
                if param.grad is not None:
                    param.grad = torch.where(mask, param.grad, 0.0)
        return loss

    return closure


def _times(tensor: Tensor, factor: Number) -> Tensor:
    return tensor * _number(factor, tensor)


def _number(value: Number, like: Tensor) -> Number:
    """So that a tensor of shape () and another dtype does not widen one that has none either."""
    return value.reshape(()).to(like.device, like.dtype) if isinstance(value, Tensor) else value
