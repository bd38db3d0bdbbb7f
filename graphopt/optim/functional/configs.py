"""Hyper-parameters of the optimizers that are chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import DECAY, FRACTION, NON_NEGATIVE, Bounds, is_number
from graphopt.optim.core.context import Number

Schedule = Number | Callable[[Tensor], Number]
AdamMode = Literal["original", "adamw", "decoupled"]


class _Config:
    """Checks the fields of a config."""

    _bounds: ClassVar[dict[str, Bounds]]

    def __post_init__(self) -> None:
        for name, bounds in self._bounds.items():
            self._check(name, getattr(self, name), bounds)
        schedule = getattr(self, "lr_schedule_value")  # noqa: B009
        if schedule is not None and not callable(schedule):
            self._check("lr_schedule_value", schedule, NON_NEGATIVE)

    def _check(self, name: str, value: Any, bounds: Bounds) -> None:
        if not is_number(value) or value not in bounds:
            raise OptionError(f"{type(self).__name__}: {name}={value!r}; expected a number in {bounds}")

    @property
    def names(self) -> list[str]:
        """The fields."""
        return [field.name for field in fields(self)]  # type: ignore[arg-type]


@dataclass(frozen=True)
class SGDConfig(_Config):
    """Stochastic gradient descent: ``u = g + weight_decay θ``, ``b = momentum b + (1 - dampening) u``, ``θ -= lr b``.

    Numbers may be tensors of shape (), also such that ``torch.func`` differentiates or maps.

    Attributes:
        max_lr: the learning rate is ``max_lr`` times the schedule's value.
        momentum: 0 for none.
        weight_decay: an L2 penalty.
        dampening: how much less of a new gradient enters, from the second step on.
        nesterov: step by ``u + momentum b``.
        lr_schedule_value: a number, or a function of the number of steps made before (a tensor of shape ()); ``None`` is 1.
    """

    max_lr: Number = 0.1
    momentum: Number = 0.9
    weight_decay: Number = 0.0
    dampening: Number = 0.0
    nesterov: bool = False
    lr_schedule_value: Schedule | None = None

    _bounds = {"max_lr": NON_NEGATIVE, "momentum": FRACTION, "weight_decay": NON_NEGATIVE, "dampening": FRACTION}  # noqa: RUF012


@dataclass(frozen=True)
class AdamConfig(_Config):
    """Adam, and two ways to decay weights apart from the gradient.

    Attributes:
        max_lr: the learning rate is ``max_lr`` times the schedule's value.
        betas: of the averages of gradient and square.
        eps: added to the denominator, in units of the gradient.
        weight_decay: as ``mode`` says.
        mode: ``"original"`` adds ``weight_decay θ`` to the gradient (Kingma, Ba, arXiv:1412.6980); ``"adamw"`` decays by
            ``lr weight_decay``; ``"decoupled"`` by ``weight_decay`` times the schedule's value, whatever ``max_lr``
            (Loshchilov, Hutter, arXiv:1711.05101, algorithm 2).
        lr_schedule_value: a number, or a function of the number of steps made before (a tensor of shape ()); ``None`` is 1.
    """

    max_lr: Number = 1e-3
    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    weight_decay: Number = 0.0
    mode: AdamMode = "original"
    lr_schedule_value: Schedule | None = None

    _bounds = {"max_lr": NON_NEGATIVE, "eps": NON_NEGATIVE, "weight_decay": NON_NEGATIVE}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, beta in enumerate(self.betas):
            self._check(f"betas[{index}]", beta, DECAY)
        if self.mode not in get_args(AdamMode):
            raise OptionError(f"AdamConfig: mode={self.mode!r}; it is one of {list(get_args(AdamMode))}")


@dataclass(frozen=True)
class LARSConfig(_Config):
    """Layer-wise adaptive rates: a step of each tensor in proportion to its norm.

    ``u = g + weight_decay θ``, ``b = momentum b + lr trust ‖θ‖ / (‖u‖ + eps) u``, ``θ -= b``.

    Attributes:
        max_lr: the learning rate is ``max_lr`` times the schedule's value.
        momentum: 0 for none.
        weight_decay: an L2 penalty.
        trust: the ratio of the norms of step and parameter, at ``lr = 1``.
        eps: added to the norm of the gradient.
        lr_schedule_value: a number, or a function of the number of steps made before (a tensor of shape ()); ``None`` is 1.

    Reference: You, Gitman, Ginsburg, arXiv:1708.03888, 2017, algorithm 1.
    """

    max_lr: Number = 0.1
    momentum: Number = 0.9
    weight_decay: Number = 0.0
    trust: Number = 1e-3
    eps: Number = 1e-8
    lr_schedule_value: Schedule | None = None

    _bounds = {  # noqa: RUF012
        "max_lr": NON_NEGATIVE,
        "momentum": FRACTION,
        "weight_decay": NON_NEGATIVE,
        "trust": NON_NEGATIVE,
        "eps": NON_NEGATIVE,
    }
