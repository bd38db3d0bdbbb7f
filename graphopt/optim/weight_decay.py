r"""Decoupled weight decay towards other values than zero, and in other norms than the Euclidean one.

An optimizer that is given ``weight_decay_cls=WeightDecayChain(f, g)`` moves every parameter that has a gradient once per
step by ``-lr * weight_decay * g(f(θ))``, where θ is the parameter before the step. What a link remembers of a parameter
lies in ``optimizer.state``, so ``state_dict`` saves it and ``load_state_dict`` brings it back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.foreach import foreach


class WeightDecay(ABC):
    """A link of a `WeightDecayChain`: maps what it is given to what is subtracted from the parameter.

    Lists run over parameters, so that a link can use torch's ``_foreach`` functions. A link that remembers something
    lists the names in `state_names`; a name that ends in ``step`` is a count, the others are tensors of the parameter's
    shape and at least float32.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def init(self, param: Tensor) -> dict[str, Tensor]:
        """What is remembered of a parameter, before its first step.

        Args:
            param: the parameter, in at least float32.

        Returns:
            An entry for each of `state_names`.
        """
        return {}

    @abstractmethod
    def __call__(self, values: list[Tensor], params: list[Tensor], states: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Map values to values, once per step.

        Args:
            values: what the link before returned; for the first link the parameters. Not to be changed.
            params: the parameters before the step, in at least float32. Not to be changed.
            states: what `init` returned for each, to be updated in place.

        Returns:
            New values, or `values` itself.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@final
class WeightDecayChain:
    """Links in order: a parameter θ moves by ``-lr * weight_decay * f_n(...f_1(θ))``, once per step.

    Args:
        links: instances of `WeightDecay`, at least one; chains among them are unpacked.

    Raises:
        OptionError: something else was given, for instance a class.

    Example:
        >>> from graphopt.optim import Sign
        >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
        >>> towards_start = WeightDecayChain(WeightDecayToInit(), L1WeightDecay())
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = Sign([weight], sgd, lr=0.5, weight_decay=0.2, graft_to_self=False, weight_decay_cls=towards_start)
        >>> weight.grad = torch.tensor([-1.0])
        >>> optimizer.step()
        >>> optimizer.step()
        >>> weight.detach()  # 2 + 0.5 + 0.5, and 0.5 * 0.2 back to 2
        tensor([2.9000])
    """

    def __init__(self, *links: WeightDecay | WeightDecayChain) -> None:
        self.links: tuple[WeightDecay, ...] = ()
        for link in links:
            if not isinstance(link, (WeightDecay, WeightDecayChain)):
                raise OptionError(
                    f"WeightDecayChain: {link!r} is no instance of WeightDecay; type for instance "
                    "WeightDecayChain(WeightDecayToInit(), L1WeightDecay())"
                )
            self.links += link.links if isinstance(link, WeightDecayChain) else (link,)
        if not self.links:
            raise OptionError("WeightDecayChain: no links; for no decay at all pass weight_decay=0 to the optimizer")

    @property
    def is_plain(self) -> bool:
        """Whether this is plain L2 decay, which optimizers have in their kernels."""
        return all(isinstance(link, L2WeightDecay) for link in self.links)

    def __call__(self, params: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> list[Tensor]:
        """What is to be subtracted, times ``lr * weight_decay``; counts as one step for all links.

        Args:
            params: the parameters before the step, in any floating dtype.
            states: ``optimizer.state[param]`` for each, after `init`.

        Returns:
            Tensors like the parameters, in at least float32; they may be the parameters themselves.
        """
        wide = [_widen(param) for param in params]
        values = wide
        for index, link in enumerate(self.links):
            own = [{name: state[_key(index, name)] for name in link.state_names} for state in states]
            values = link(values, wide, own)
        return values

    def init(self, param: Tensor, state: dict[str, Any]) -> None:
        """Add to ``optimizer.state[param]`` what the links remember and what is not there yet."""
        for index, link in enumerate(self.links):
            if any(_key(index, name) not in state for name in link.state_names):
                for name, value in link.init(_widen(param)).items():
                    state.setdefault(_key(index, name), value)

    def __repr__(self) -> str:
        return f"WeightDecayChain({', '.join(map(repr, self.links))})"


class LpWeightDecay(WeightDecay):
    """The direction of decay of a power of the absolute value: ``|x|**power * sign(x)``.

    Args:
        power: at least 0; it is the gradient of ``|x|**(power + 1) / (power + 1)``.

    Raises:
        OptionError: the power is negative, so that the smallest weights would be moved most.
    """

    def __init__(self, power: float) -> None:
        if not float(power) >= 0.0:
            raise OptionError(f"{type(self).__name__}: power={power}; expected a number, at least 0")
        self.power = float(power)

    def __call__(self, values: list[Tensor], params: list[Tensor], states: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Map x to ``|x|**power * sign(x)``."""
        if self.power == 1.0:
            return values
        signs = foreach("sign", values)
        if self.power != 0.0:
            foreach("mul_", signs, foreach("pow_", foreach("abs", values), self.power))
        return signs

    def __repr__(self) -> str:
        return f"LpWeightDecay({self.power})"


class L1WeightDecay(LpWeightDecay):
    """`LpWeightDecay` of power 0, the sign: the same speed for all weights, so that small ones reach zero."""

    def __init__(self) -> None:
        super().__init__(0.0)

    __repr__ = WeightDecay.__repr__


class L2WeightDecay(LpWeightDecay):
    """`LpWeightDecay` of power 1, the weight itself, as in `torch.optim.AdamW`."""

    def __init__(self) -> None:
        super().__init__(1.0)

    __repr__ = WeightDecay.__repr__


class WeightDecayToInit(WeightDecay):
    """Decay towards the value that the parameter had before its first step: ``x - θ₀``.

    Reference: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
    arXiv:1802.01483, 2018, equation 3 (L2-SP), here decoupled.
    """

    state_names = ("init",)

    def init(self, param: Tensor) -> dict[str, Tensor]:
        """A copy of the parameter."""
        return {"init": param.detach().clone()}

    def __call__(self, values: list[Tensor], params: list[Tensor], states: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Map x to ``x - θ₀``."""
        return foreach("sub", values, [state["init"] for state in states])


class WeightDecayToEMA(WeightDecay):
    r"""Decay towards the debiased exponential moving average of the parameter: ``x - ema_t / (1 - β^t)``.

    With ``ema_t = β ema_{t-1} + (1 - β) θ_t``, where θ_t is the parameter before step t. What is kept is the debiased
    average, ``a_t = a_{t-1} + (1 - β) / (1 - β^t) (θ_t - a_{t-1})``: so a constant parameter is its own average to the
    last bit, and is not moved.

    Args:
        beta: β, at least 0 and below 1.

    Raises:
        OptionError: β is out of range.
    """

    state_names = ("average", "step")

    def __init__(self, beta: float = 0.999) -> None:
        if not 0.0 <= float(beta) < 1.0:
            raise OptionError(f"WeightDecayToEMA: beta={beta}; expected a number, at least 0 and below 1")
        self.beta = float(beta)

    def init(self, param: Tensor) -> dict[str, Tensor]:
        """An average of nothing."""
        return {
            "average": torch.zeros_like(param, requires_grad=False),
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        }

    def __call__(self, values: list[Tensor], params: list[Tensor], states: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Let the averages take in the parameters, and map x to ``x - average``."""
        averages = [state["average"] for state in states]
        steps = foreach("add_", [state["step"] for state in states], 1)
        weights = [(1 - self.beta) / (1 - self.beta ** step.item()) for step in steps]
        foreach("lerp_", averages, params, weights)
        return foreach("sub", values, averages)

    def __repr__(self) -> str:
        return f"WeightDecayToEMA({self.beta})"


def _key(index: int, name: str) -> str:
    return f"weight_decay_{index}_{name}"


def _widen(param: Tensor) -> Tensor:
    return param.detach().to(torch.promote_types(param.dtype, torch.float32))
