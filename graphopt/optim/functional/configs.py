"""Hyper-parameters of the optimizers, and the chain of modules that each stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim import m
from graphopt.optim.core.bounds import ANY, DECAY, NON_NEGATIVE, Bounds, is_number, numbers
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module


class AdamWDMode(Enum):
    """What Adam does with weight decay."""

    ORIGINAL = 0
    """An L2 penalty: ``λθ`` is added to the gradient (`torch.optim.Adam`)."""
    ADAMW = 1
    """``θ - lr s λ θ`` before the step (`torch.optim.AdamW`)."""
    DECOUPLED = 2
    """``θ - s λ θ`` after the step: the decay follows the schedule, and not ``max_lr``."""


class Config:
    """Checks what is assigned to a hyper-parameter.

    Attributes:
        bounds: for each number the values that it may take. Numbers may be tensors of shape (), also such that
            ``torch.func.grad`` differentiates.
        buffers: for each name in an optimizer's state the entry of the chain's state.
    """

    bounds: ClassVar[Mapping[str, Bounds]] = MappingProxyType({})

    max_lr: Number
    steps: int
    lr_schedule_value: Number | Callable[[Any], Any] | None

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            known = sorted(type(self).__dataclass_fields__)  # type: ignore[attr-defined]
            raise OptionError(f"{type(self).__name__} has no hyper-parameter {name!r}; there are {known}")
        self.check(name, value)
        object.__setattr__(self, name, value)

    def check(self, name: str, value: Any) -> None:
        """Raise `OptionError` if a value is out of range."""
        if name == "lr_schedule_value":
            if value is None or callable(value):
                return
        elif name not in self.bounds:
            return
        bounds = self.bounds.get(name, NON_NEGATIVE)
        if not is_number(value) or value not in bounds:
            extra = ", None, or a function of the number of steps" if name == "lr_schedule_value" else ""
            raise OptionError(f"{type(self).__name__}({name}={value!r}); expected a number in {bounds}{extra}")

    def scale(self, count: Any) -> Number:
        """The factor of the learning rate in a step.

        Args:
            count: how many steps were made before.

        Raises:
            OptionError: the schedule returned no factor.
        """
        value = self.lr_schedule_value
        if value is None:
            return 1.0
        if not callable(value):
            return value
        found = value(count)
        if not is_number(found) or found not in NON_NEGATIVE:
            raise OptionError(
                f"{type(self).__name__}: lr_schedule_value returned {found!r} for step {count}; expected a number in "
                f"{NON_NEGATIVE}"
            )
        return found  # type: ignore[no-any-return]

    def modules(self, scale: Number = 1.0) -> list[Module]:
        """The chain of one step, from ``graphopt.optim.m``.

        Args:
            scale: the factor of the learning rate.
        """
        raise NotImplementedError

    @property
    def buffers(self) -> Mapping[str, str]:
        """For each name in an optimizer's state the entry of the chain's state, for those that the chain uses."""
        raise NotImplementedError


@dataclass(kw_only=True)
class SGDConfig(Config):
    """Stochastic gradient descent: ``u = g + λθ``, ``b = momentum b + u``, ``θ - max_lr s b``.

    Attributes:
        momentum: what is left of the sum ``b`` after a step; 0 for none.
        weight_decay: λ.
        max_lr: the learning rate where the schedule is 1.
        steps: how many steps were made before the state was initialized.
        lr_schedule_value: ``s``: a number, or a function of the number of steps made before (a tensor of shape ()). Under
            ``torch.compile`` a number that changes compiles anew; a function, or a tensor, does not.
        dampening: how much of ``u`` is left out of the sum, from the second step on.
        nesterov: look one step ahead: ``u + momentum b`` instead of ``b``.

    Raises:
        OptionError: a value is out of range; ``nesterov`` without momentum or with dampening.
    """

    bounds = numbers(momentum=DECAY, weight_decay=NON_NEGATIVE, max_lr=NON_NEGATIVE, steps=NON_NEGATIVE, dampening=ANY)

    momentum: Number = 0.9
    weight_decay: Number = 0.0
    max_lr: Number = 0.1
    steps: int = 0
    lr_schedule_value: Number | Callable[[Any], Any] | None = None
    dampening: Number = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        """Raise if hyper-parameters contradict each other."""
        self.modules()

    def modules(self, scale: Number = 1.0) -> list[Module]:
        """Weight decay, momentum, learning rate."""
        momentum: list[Module] = []
        if self.nesterov:
            if _is_zero(self.momentum) or not _is_zero(self.dampening):
                raise OptionError(
                    f"SGDConfig(nesterov=True, momentum={self.momentum!r}, dampening={self.dampening!r}); expected a momentum "
                    "above 0 and no dampening"
                )
            momentum = [m.NAG(self.momentum)]
        elif not _is_zero(self.momentum):
            momentum = [m.HeavyBall(self.momentum, self.dampening)]
        return [*_decay(self.weight_decay), *momentum, m.LR(self.max_lr * scale)]

    @property
    def buffers(self) -> Mapping[str, str]:
        """One, with momentum."""
        if self.nesterov:
            return {"momentum": "nag.momentum_buffer"}
        return {} if _is_zero(self.momentum) else {"momentum": "heavyball.momentum_buffer"}


@dataclass(kw_only=True)
class AdamConfig(Config):
    """Adam, and what it does with weight decay.

    Attributes:
        max_lr: the learning rate where the schedule is 1.
        betas: of the averages of the gradient and of its square.
        eps: added to the denominator; in units of the gradient.
        weight_decay: λ.
        mode: where λ enters.
        steps: how many steps were made before the state was initialized.
        lr_schedule_value: ``s``: a number, or a function of the number of steps made before.

    Raises:
        OptionError: a value is out of range.

    Reference: Kingma, Ba, arXiv:1412.6980, 2014, algorithm 1; Loshchilov, Hutter, arXiv:1711.05101, 2017, algorithm 2, of
    which ``DECOUPLED`` decays the new parameter.
    """

    bounds = numbers(max_lr=NON_NEGATIVE, eps=NON_NEGATIVE, weight_decay=NON_NEGATIVE, steps=NON_NEGATIVE)

    max_lr: Number = 1e-3
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    mode: AdamWDMode = AdamWDMode.ORIGINAL
    steps: int = 0
    lr_schedule_value: Number | Callable[[Any], Any] | None = None

    def check(self, name: str, value: Any) -> None:
        """Two numbers, and a mode, beside what every config has."""
        super().check(name, value)
        if name == "betas" and not (
            isinstance(value, (tuple, list)) and len(value) == 2 and all(is_number(b) and b in DECAY for b in value)
        ):
            raise OptionError(f"AdamConfig(betas={value!r}); expected two numbers in {DECAY}")
        if name == "mode" and not isinstance(value, AdamWDMode):
            raise OptionError(f"AdamConfig(mode={value!r}); expected one of {[str(mode) for mode in AdamWDMode]}")

    def modules(self, scale: Number = 1.0) -> list[Module]:
        """Weight decay stands before Adam, before the learning rate, or behind it."""
        adam, lr, decay = m.Adam(*self.betas, self.eps), m.LR(self.max_lr * scale), self.weight_decay
        if self.mode is AdamWDMode.ORIGINAL:
            return [*_decay(decay), adam, lr]
        if self.mode is AdamWDMode.ADAMW or _is_zero(decay):
            return [adam, *_decay(decay), lr]
        pull = decay * scale
        return [adam, lr, m.Mul(1 - pull), m.WeightDecay(pull)]  # u (1 - sλ) + sλθ is what moves θ to (θ - u) (1 - sλ)

    @property
    def buffers(self) -> Mapping[str, str]:
        """Two."""
        return {"exp_avg": "adam.exp_avg", "exp_avg_sq": "adam.exp_avg_sq"}


@dataclass(kw_only=True)
class LARSConfig(Config):
    """LARS: ``u = g + λθ``, ``b = momentum b + max_lr s trust_coefficient ‖θ‖ / (‖u‖ + eps) u``, ``θ - b``.

    Norms are those of each tensor; where one of them is zero, ``u`` is multiplied by ``max_lr s`` alone.

    Attributes:
        max_lr: the learning rate where the schedule is 1.
        momentum: what is left of the sum ``b`` after a step; 0 for none.
        weight_decay: λ.
        trust_coefficient: how far a tensor moves in one step, as a fraction of its norm, before ``max_lr``.
        eps: added to the denominator; in units of the gradient.
        steps: how many steps were made before the state was initialized.
        lr_schedule_value: ``s``: a number, or a function of the number of steps made before.

    Raises:
        OptionError: a value is out of range.

    Reference: You, Gitman, Ginsburg, arXiv:1708.03888, 2017, algorithm 1.
    """

    bounds = numbers(
        max_lr=NON_NEGATIVE,
        momentum=DECAY,
        weight_decay=NON_NEGATIVE,
        trust_coefficient=NON_NEGATIVE,
        eps=NON_NEGATIVE,
        steps=NON_NEGATIVE,
    )

    max_lr: Number = 0.1
    momentum: Number = 0.9
    weight_decay: Number = 0.0
    trust_coefficient: Number = 1e-3
    eps: Number = 1e-8
    steps: int = 0
    lr_schedule_value: Number | Callable[[Any], Any] | None = None

    def modules(self, scale: Number = 1.0) -> list[Module]:
        """The learning rate is inside of the momentum."""
        momentum = [] if _is_zero(self.momentum) else [m.HeavyBall(self.momentum)]
        ratio = m.LARS(self.trust_coefficient, self.eps)
        return [*_decay(self.weight_decay), ratio, m.LR(self.max_lr * scale), *momentum]

    @property
    def buffers(self) -> Mapping[str, str]:
        """One, with momentum."""
        return {} if _is_zero(self.momentum) else {"momentum": "heavyball.momentum_buffer"}


def _decay(weight_decay: Number) -> list[Module]:
    return [] if _is_zero(weight_decay) else [m.WeightDecay(weight_decay)]


def _is_zero(number: Number) -> bool:
    """Whether a term can be left out; nobody looks into a tensor."""
    return not isinstance(number, Tensor) and number == 0
