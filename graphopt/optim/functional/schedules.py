"""Schedules of the learning rate, as factors: each rises to 1 in a warm-up of W steps, and then stays or falls.

With ``t`` the number of steps made before, ``t < W``: ``w0 + (1 - w0) t / W``. Behind it, with ``p = (t - W) / (T - W)``, which
stays at 1 after T steps:

    constant            1
    rsqrt               √(W / t)
    cosine              f + (1 - f) (1 + cos πp) / 2
    linear_warmdown     1 + (f - 1) p

``t`` is a number, and the result is one; or it is a tensor of shape (), inside a step, and so is the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.context import Number

Schedule = Callable[[Any], Any]


def constant_lr(steps: Number, warmup_steps: int = 0, warmup_start_value: float = 0.0) -> Number:
    """1 after the warm-up.

    Args:
        steps: how many were made before.
        warmup_steps: how many steps the warm-up takes.
        warmup_start_value: the factor of the first step.
    """
    return _warm_up(steps, warmup_steps, warmup_start_value, 1.0)


def rsqrt_lr(steps: Number, warmup_steps: int, warmup_start_value: float = 0.0) -> Number:
    """The inverse root of the number of steps, ``√(warmup_steps / steps)``, after the warm-up; arguments as of `constant_lr`.

    Raises:
        OptionError: there is no warm-up, so that the scale of time is unknown.
    """
    _check_times("rsqrt", warmup_steps, None)
    later = _larger(steps, warmup_steps)  # no division by zero in the warm-up
    return _warm_up(steps, warmup_steps, warmup_start_value, (warmup_steps / later) ** 0.5)


def cosine_lr(
    steps: Number,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_start_value: float = 0.0,
    lr_terminal_value: float = 0.0,
) -> Number:
    """Half a period of a cosine, from 1 after the warm-up to the terminal value.

    Args:
        steps: how many were made before.
        total_steps: when it reaches the terminal value, where it stays.
        warmup_steps: how many steps the warm-up takes.
        warmup_start_value: the factor of the first step.
        lr_terminal_value: the factor at the end.

    Raises:
        OptionError: it would end before the warm-up does.

    Reference: Loshchilov, Hutter, "SGDR", arXiv:1608.03983, 2016, equation 5, without restarts.
    """
    progress = _progress(steps, "cosine", total_steps, warmup_steps)
    cosine = (progress * math.pi).cos() if isinstance(progress, Tensor) else math.cos(progress * math.pi)
    value = lr_terminal_value + (1.0 - lr_terminal_value) * 0.5 * (1.0 + cosine)
    return _warm_up(steps, warmup_steps, warmup_start_value, value)


def linear_warmdown_lr(
    steps: Number,
    total_steps: int,
    warmup_steps: int = 0,
    warmup_start_value: float = 0.0,
    lr_terminal_value: float = 0.0,
) -> Number:
    """A straight line from 1 after the warm-up to the terminal value; arguments and errors as of `cosine_lr`."""
    progress = _progress(steps, "linear_warmdown", total_steps, warmup_steps)
    return _warm_up(steps, warmup_steps, warmup_start_value, 1.0 + (lr_terminal_value - 1.0) * progress)


SCHEDULES: dict[str, Callable[..., Number]] = {
    "constant": constant_lr,
    "rsqrt": rsqrt_lr,
    "cosine": cosine_lr,
    "linear_warmdown": linear_warmdown_lr,
}
"""By `LRSchedulerConfig.scheduler_type`."""


@dataclass(kw_only=True)
class LRSchedulerConfig:
    """Which schedule, and its times.

    Attributes:
        warmup_steps: how many steps the warm-up takes.
        warmup_start_value: the factor of the first step.
        total_steps: when ``cosine`` and ``linear_warmdown`` reach the terminal value.
        scheduler_type: a name in `SCHEDULES`.
        lr_terminal_value: the factor at the end, of ``cosine`` and ``linear_warmdown``.
    """

    warmup_steps: int = 0
    warmup_start_value: float = 0.0
    total_steps: int = 0
    scheduler_type: str = "constant"
    lr_terminal_value: float = 0.0


def build_lr_scheduler(config: LRSchedulerConfig) -> Schedule:
    """The schedule of a config as a function of the number of steps made before.

    It is the ``lr_schedule_value`` of an optimizer's config, and the function of `torch.optim.lr_scheduler.LambdaLR`.

    Raises:
        OptionError: no such schedule, or its times contradict each other.

    Example:
        >>> schedule = build_lr_scheduler(LRSchedulerConfig(scheduler_type="cosine", warmup_steps=2, total_steps=6))
        >>> [round(schedule(step), 3) for step in range(8)]
        [0.0, 0.5, 1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    kind = config.scheduler_type
    if kind not in SCHEDULES:
        raise OptionError(
            f"LRSchedulerConfig(scheduler_type={kind!r}): no such schedule; there are {sorted(SCHEDULES)}"
        )
    for name in ("warmup_start_value", "lr_terminal_value"):
        if not getattr(config, name) >= 0:
            raise OptionError(f"LRSchedulerConfig({name}={getattr(config, name)!r}); expected a factor of at least 0")
    options: dict[str, Any] = {
        "warmup_steps": config.warmup_steps,
        "warmup_start_value": config.warmup_start_value,
    }
    if kind in ("cosine", "linear_warmdown"):
        options |= {"total_steps": config.total_steps, "lr_terminal_value": config.lr_terminal_value}
    _check_times(kind, config.warmup_steps, options.get("total_steps"))
    return functools.partial(SCHEDULES[kind], **options)


def _check_times(kind: str, warmup_steps: int, total_steps: int | None) -> None:
    least = 1 if kind == "rsqrt" else 0
    if warmup_steps < least:
        raise OptionError(f"the schedule {kind} with warmup_steps={warmup_steps}; expected at least {least}")
    if total_steps is not None and total_steps < warmup_steps:
        raise OptionError(
            f"the schedule {kind} with total_steps={total_steps} and warmup_steps={warmup_steps}: it would end before the "
            "warm-up does; total_steps counts the warm-up, too"
        )


def _progress(steps: Number, kind: str, total_steps: int, warmup_steps: int) -> Number:
    _check_times(kind, warmup_steps, total_steps)
    progress = (steps - warmup_steps) / max(total_steps - warmup_steps, 1)
    return progress.clamp(0.0, 1.0) if isinstance(progress, Tensor) else min(max(progress, 0.0), 1.0)


def _warm_up(steps: Number, warmup_steps: int, start: float, after: Number) -> Number:
    if not warmup_steps:
        return after
    before = start + (1.0 - start) * steps / warmup_steps
    if isinstance(steps, Tensor):
        return torch.where(steps < warmup_steps, before, after)
    return before if steps < warmup_steps else after


def _larger(steps: Number, floor: int) -> Number:
    return steps.clamp(min=floor) if isinstance(steps, Tensor) else max(steps, floor)
