"""Schedules of the learning rate, relative to its largest value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from graphopt.errors import OptionError

ScheduleType = Literal["constant", "rsqrt", "cosine", "linear_warmdown"]


def build_lr_scheduler(
    type: ScheduleType = "constant",
    *,
    warmup_steps: int = 0,
    warmup_start_value: float = 0.0,
    total_steps: int = 0,
    lr_terminal_value: float = 0.0,
) -> Callable[[Any], Any]:
    """A function of the number of steps that returns what the largest learning rate is multiplied by.

    With W warm-up steps, first value w, T steps in all and last value f: ``w + (1 - w) t / W`` for t < W, and then

        constant         1
        rsqrt            √(W / t), 1 without warm-up at t = 0 and ``√(1 / t)`` after
        cosine           f + (1 - f) (1 + cos πp) / 2,   p = (t - W) / (T - W), at most 1
        linear_warmdown  1 + (f - 1) p

    Args:
        type: which.
        warmup_steps: W.
        warmup_start_value: w, from 0 to 1.
        total_steps: T; those that end need it, at least W.
        lr_terminal_value: f.

    Returns:
        The function: of a number, as ``torch.optim.lr_scheduler.LambdaLR`` takes it, or of a tensor of shape ().

    Raises:
        OptionError: an unknown type, or numbers that contradict each other.
    """
    if type not in get_args(ScheduleType):
        raise OptionError(f"build_lr_scheduler: type={type!r}; it is one of {list(get_args(ScheduleType))}")
    if warmup_steps < 0 or not 0 <= warmup_start_value <= 1 or lr_terminal_value < 0:
        raise OptionError(
            f"build_lr_scheduler: warmup_steps={warmup_steps}, warmup_start_value={warmup_start_value}, "
            f"lr_terminal_value={lr_terminal_value}; expected at least 0, from 0 to 1, at least 0"
        )
    if type in ("cosine", "linear_warmdown") and (total_steps < warmup_steps or total_steps == 0):
        raise OptionError(
            f"build_lr_scheduler: {type} ends after total_steps={total_steps}; expected at least 1, and at least "
            f"warmup_steps={warmup_steps}"
        )
    length = max(total_steps - warmup_steps, 0)

    def after(step: Any) -> Any:
        if type == "constant":
            return step * 0 + 1.0
        if type == "rsqrt":
            return (max(warmup_steps, 1) / _at_least(step, max(warmup_steps, 1))) ** 0.5
        # With nothing between warm-up and end, the first step after it is the last.
        progress = _at_most((step - warmup_steps) / length, 1.0) if length else _is_above(step, warmup_steps)
        if type == "cosine":
            return lr_terminal_value + (1 - lr_terminal_value) * (1 + _cos(math.pi * progress)) / 2
        return 1 + (lr_terminal_value - 1) * progress

    def schedule(step: Any) -> Any:
        if isinstance(step, Tensor):
            rising = warmup_start_value + (1 - warmup_start_value) * step / max(warmup_steps, 1)
            return torch.where(step < warmup_steps, rising, after(step))
        if step < warmup_steps:
            return warmup_start_value + (1 - warmup_start_value) * step / warmup_steps
        return after(step)

    return schedule


def _at_least(step: Any, low: float) -> Any:
    return step.clamp(min=low) if isinstance(step, Tensor) else max(step, low)


def _at_most(value: Any, high: float) -> Any:
    return value.clamp(max=high) if isinstance(value, Tensor) else min(value, high)


def _is_above(step: Any, limit: float) -> Any:
    return (step > limit).to(step.dtype) if isinstance(step, Tensor) else float(step > limit)


def _cos(angle: Any) -> Any:
    return angle.cos() if isinstance(angle, Tensor) else math.cos(angle)
