"""Barzilai's and Borwein's step sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import choose, dot, larger, norm, scalar, smaller, zeros
from graphopt.optim.core.bounds import POSITIVE, numbers
from graphopt.optim.core.context import Context, Everything, Number, Settings
from graphopt.optim.core.module import Rule
from graphopt.optim.stabilization.slices import check_fixed

_TYPES = ("long", "short", "geom")


class BarzilaiBorweinState(NamedTuple):
    """The parameter and the gradient before, each like the parameter, and the step size, shape (); at least float32."""

    prev_param: Tensor
    prev_grad: Tensor
    step_size: Tensor


class BarzilaiBorwein(Rule):
    """Multiply the update by a step size with which ``1 / step size`` is a curvature of the loss along the last step.

    With the changes ``s`` of the parameters and ``y`` of the gradient, ``⟨s, s⟩ / ⟨s, y⟩`` (``"long"``), ``⟨s, y⟩ / ⟨y, y⟩``
    (``"short"``), or ``‖s‖ / ‖y‖``, their geometric mean. Where ``⟨s, y⟩`` is not positive, the last step size is kept. In the
    first step it is ``1 / max(1, ‖u‖₁)``.

    Args:
        type: ``"long"``, ``"short"`` or ``"geom"``.
        parameterwise: a step size for each tensor; ``False``: one for all of them.
        max: the largest step size, or ``None``.

    Raises:
        OptionError: an option is out of range, or ``parameterwise`` differs between parameters.

    Reference: Barzilai, Borwein, "Two-Point Step Size Gradient Methods", IMA Journal of Numerical Analysis 8, 1988, equations
    5 and 6.
    """

    bounds = numbers(max=POSITIVE)
    State = BarzilaiBorweinState

    def __init__(
        self,
        type: Literal["long", "short", "geom"] = "long",
        parameterwise: bool = False,
        *,
        max: Number | None = None,
    ) -> None:
        super().__init__({"type": type, "parameterwise": parameterwise, "max": max})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Names, and what must be the same for all tensors."""
        if settings["type"] not in _TYPES:
            raise OptionError(f"{self.place}: type={settings['type']!r}; expected one of {', '.join(_TYPES)}")
        check_fixed(self, settings, ("parameterwise",))

    @property
    def measures(self) -> bool:
        """Whether there is one step size for all tensors."""
        return not self.defaults["parameterwise"]

    def init(self, param: Tensor, settings: Settings) -> BarzilaiBorweinState:
        """Zeros; a step size of zero is none yet."""
        return BarzilaiBorweinState(zeros(param), zeros(param), scalar(param))

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """The step size of all tensors."""
        before = torch.stack([state.step_size.to(everything.updates[0].device) for state in everything.states]).max()
        each = [
            _products(*entry) for entry in zip(everything.updates, everything.contexts, everything.states, strict=True)
        ]
        ss, sy, yy, length = (
            torch.stack([value.to(before.device, before.dtype) for value in values]).sum()
            for values in zip(*each, strict=True)
        )
        return {"step_size": _step_size(ss, sy, yy, length, before, settings)}

    def update(
        self, update: Tensor, state: BarzilaiBorweinState, settings: Settings, context: Context
    ) -> tuple[Tensor, BarzilaiBorweinState]:
        """One step."""
        if self.measures:
            step_size = context.measured["step_size"].to(update.device)
        else:
            step_size = _step_size(*_products(update, context, state), state.step_size, settings)
        step_size = step_size.to(state.step_size.dtype)
        param, grad = (tensor.to(state.prev_param.dtype) for tensor in (context.param, context.grad))
        return update * step_size, BarzilaiBorweinState(param, grad, step_size)


def _products(update: Tensor, context: Context, state: BarzilaiBorweinState) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``⟨s, s⟩, ⟨s, y⟩, ⟨y, y⟩, ‖u‖₁`` of one tensor."""
    nothing = torch.zeros_like(state.prev_param)
    s, y = (
        choose(context.count == 1, nothing, new.to(old.dtype) - old)
        for new, old in ((context.param, state.prev_param), (context.grad, state.prev_grad))
    )
    return dot(s, s), dot(s, y), dot(y, y), norm(update, 1)


def _step_size(ss: Tensor, sy: Tensor, yy: Tensor, length: Tensor, before: Tensor, settings: Settings) -> Tensor:
    is_curved = sy > 0
    one = torch.ones_like(sy)
    ss, sy, yy = (choose(is_curved, value, one) for value in (ss, sy, yy))
    if settings.type == "long":
        new = ss / sy
    elif settings.type == "short":
        new = sy / yy
    else:
        new = ss.sqrt() / yy.sqrt()
    first = larger(length, 1.0).reciprocal()
    new = choose(is_curved, new, choose(before > 0, before.to(first.dtype), first))
    return new if settings.max is None else smaller(new, settings.max)
