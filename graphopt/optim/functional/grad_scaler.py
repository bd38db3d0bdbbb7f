"""Loss scaling for half precision as pure functions: the rule of ``torch.amp.GradScaler``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import AT_LEAST_ONE, POSITIVE, Bounds


class GradScalerState(NamedTuple):
    """What the scaler remembers; a pytree of tensors of shape ().

    Attributes:
        scale: what the loss is multiplied by, float32.
        growth_tracker: steps without overflow since the scale last changed, int32.
        growth_factor: what the scale is multiplied by after ``growth_interval`` of them.
        backoff_factor: what it is multiplied by after an overflow.
        growth_interval: see there.
    """

    scale: Tensor
    growth_tracker: Tensor
    growth_factor: Tensor
    backoff_factor: Tensor
    growth_interval: Tensor


def init_grad_scaler(
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    *,
    precision: torch.dtype = torch.bfloat16,
    allow_fp16: bool = False,
    device: torch.device | str = "cpu",
) -> GradScalerState:
    """The state of a new scaler.

    Args:
        init_scale: the first scale, above 0.
        growth_factor: at least 1.
        backoff_factor: above 0 and below 1.
        growth_interval: steps, at least 1.
        precision: what the forward pass runs in: ``torch.bfloat16``, or ``torch.float16`` if ``allow_fp16`` says that its
            narrow range is known about.
        allow_fp16: see there.
        device: where the tensors live.

    Raises:
        OptionError: a number is out of range, or the precision is not allowed.
    """
    checks = {
        "init_scale": (init_scale, POSITIVE),
        "growth_factor": (growth_factor, AT_LEAST_ONE),
        "backoff_factor": (backoff_factor, Bounds(0.0, 1.0, includes_low=False, includes_high=False)),
        "growth_interval": (growth_interval, AT_LEAST_ONE),
    }
    for name, (value, bounds) in checks.items():
        if value not in bounds:
            raise OptionError(f"init_grad_scaler: {name}={value!r}; expected a number in {bounds}")
    if precision not in (torch.bfloat16, torch.float16):
        raise OptionError(f"init_grad_scaler: precision={precision}; expected torch.bfloat16 or torch.float16")
    if precision == torch.float16 and not allow_fp16:
        raise OptionError(
            "init_grad_scaler: precision=torch.float16 overflows from 65504 on; pass allow_fp16=True if you mean it"
        )
    return GradScalerState(
        torch.tensor(float(init_scale), device=device),
        torch.zeros((), dtype=torch.int32, device=device),
        torch.tensor(float(growth_factor), device=device),
        torch.tensor(float(backoff_factor), device=device),
        torch.tensor(int(growth_interval), dtype=torch.int32, device=device),
    )


def scale_loss(loss: Tensor, state: GradScalerState) -> Tensor:
    """The loss times the scale, whose gradients are far enough from zero."""
    return loss * state.scale.to(loss.dtype)


def unscale_grads(grads: Any, state: GradScalerState) -> tuple[Any, Tensor]:
    """Divide gradients by the scale.

    Returns:
        The gradients, and whether any of them holds an infinity or NaN, shape (), bool.
    """
    found = torch.zeros((), dtype=torch.bool, device=state.scale.device)
    for grad in pytree.tree_leaves(grads):
        found = found | ~torch.isfinite(grad).all().to(found.device)
    inverse = 1 / state.scale.to(torch.float64)
    return pytree.tree_map(lambda grad: grad * inverse.to(grad.dtype), grads), found


def update_scale(state: GradScalerState, found_inf: Tensor) -> GradScalerState:
    """The state after a step: a lower scale if gradients were not finite, a higher one after enough steps that were."""
    tracker = torch.where(found_inf, 0, state.growth_tracker + 1).to(torch.int32)
    grows = ~found_inf & (tracker == state.growth_interval)
    grown = state.scale * state.growth_factor
    scale = torch.where(grows & torch.isfinite(grown), grown, state.scale)
    scale = torch.where(found_inf, state.scale * state.backoff_factor, scale)
    return state._replace(scale=scale, growth_tracker=torch.where(grows, 0, tracker).to(torch.int32))


def keep_if(condition: Tensor, old: Any, new: Any) -> Any:
    """``old`` if the condition holds, else ``new``, leaf by leaf: skips a step whose gradients were not finite."""
    return pytree.tree_map(lambda before, after: torch.where(condition, before, after), old, new)
