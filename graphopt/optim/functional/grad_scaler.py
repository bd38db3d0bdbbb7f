"""A gradient scaler as pure functions of a dictionary, for gradients in half precision.

The loss is multiplied by a scale so that small gradients do not become zero, and the gradients are divided by it. If one of
them is not finite the step is left out (``found_inf`` of `adam_step` and the others) and the scale shrinks; after many good
steps in a row it grows.

Reference: Micikevicius et al., "Mixed Precision Training", arXiv:1710.03740, 2017, section 3.2; the scale is that of
`torch.amp.GradScaler`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import OptionError


def init_grad_scaler(
    init_scale: float = 2.0**16,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 2000,
    precision: torch.dtype | str = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """The scaler at the beginning.

    Args:
        init_scale: the scale of the first step.
        growth_factor: multiplies the scale after enough steps without overflow.
        backoff_factor: multiplies it after a step with overflow.
        growth_interval: how many steps without overflow in a row are enough.
        precision: the dtype of the passes, or its name (``"torch.bfloat16"``); kept for the caller.
        device: where the scale is.

    Returns:
        A dictionary: ``scale`` and ``growth_tracker`` (good steps in a row) of shape (), and the arguments.

    Raises:
        OptionError: a number is out of range, or the precision is no dtype.
    """
    for name, value, holds, expected in (
        ("init_scale", init_scale, init_scale > 0, "a number above 0"),
        ("growth_factor", growth_factor, growth_factor > 1, "a number above 1"),
        ("backoff_factor", backoff_factor, 0 < backoff_factor < 1, "a number in (0, 1)"),
        ("growth_interval", growth_interval, growth_interval >= 1, "at least 1"),
    ):
        if not holds:
            raise OptionError(f"init_grad_scaler({name}={value!r}); expected {expected}")
    return {
        "scale": torch.full((), init_scale, dtype=torch.float32, device=device),
        "growth_factor": growth_factor,
        "backoff_factor": backoff_factor,
        "growth_interval": growth_interval,
        "growth_tracker": torch.zeros((), dtype=torch.int32, device=device),
        "precision": _dtype(precision),
    }


def scale_loss(loss: Tensor, scaler_state: dict[str, Any]) -> Tensor:
    """The loss times the scale, in the dtype of the loss."""
    scale: Tensor = scaler_state["scale"]
    return loss * scale.to(loss.device)


def unscale_grads(
    grads: Any,
    scaler_state: dict[str, Any],
    device: torch.device | str | None = None,
    allow_fp16: bool = False,
) -> tuple[Any, Tensor]:
    """Divide gradients by the scale.

    Args:
        grads: a pytree of tensors, and ``None`` where there is no gradient.
        scaler_state: of `init_grad_scaler` or `update_scale`.
        device: where ``found_inf`` is wanted, by default with the scale.
        allow_fp16: accept float16; what is not small anymore may be infinite once it is divided.

    Returns:
        The gradients in their own dtypes, and ``found_inf`` of shape (), float32: 1 if an element of them is infinite or NaN.

    Raises:
        OptionError: a gradient is float16.
    """
    leaves, spec = pytree.tree_flatten(grads)
    if not allow_fp16 and any(isinstance(grad, Tensor) and grad.dtype == torch.float16 for grad in leaves):
        raise OptionError(
            "unscale_grads: a gradient is float16, whose range is too small for what is unscaled. Keep the parameters in "
            "float32 and compute under torch.autocast, or pass allow_fp16=True"
        )
    scale: Tensor = scaler_state["scale"]
    found_inf = torch.zeros((), dtype=torch.float32, device=scale.device if device is None else device)
    inverse = scale.double().reciprocal().float()
    unscaled = []
    for grad in leaves:
        if grad is not None:
            wide = torch.promote_types(grad.dtype, torch.float32)
            grad = (grad.to(wide) * inverse.to(grad.device)).to(grad.dtype)
            found_inf = found_inf.maximum((~grad.isfinite()).any().to(found_inf))
        unscaled.append(grad)
    return pytree.tree_unflatten(unscaled, spec), found_inf


def update_scale(scaler_state: dict[str, Any], found_inf: Tensor, *, inplace: bool = False) -> dict[str, Any]:
    """The scaler for the next step.

    Args:
        scaler_state: the scaler of this step.
        found_inf: of `unscale_grads`.
        inplace: write to the tensors of ``scaler_state`` instead of making new ones.

    Returns:
        The scaler; what was passed in is unchanged unless ``inplace``.
    """
    scale, tracker = scaler_state["scale"], scaler_state["growth_tracker"]
    is_bad = found_inf.to(scale.device) > 0
    good = tracker + 1
    is_due = good == scaler_state["growth_interval"]
    grown = scale * scaler_state["growth_factor"]
    grown = torch.where(is_due & grown.isfinite(), grown, scale)
    news = {
        "scale": torch.where(is_bad, scale * scaler_state["backoff_factor"], grown),
        "growth_tracker": torch.where(is_bad | is_due, torch.zeros_like(tracker), good),
    }
    if not inplace:
        return {**scaler_state, **news}
    for name, new in news.items():
        scaler_state[name].copy_(new)
    return scaler_state


def _dtype(precision: torch.dtype | str) -> torch.dtype:
    found = precision
    if isinstance(precision, str):
        found = getattr(torch, precision.removeprefix("torch."), precision)
    if not isinstance(found, torch.dtype):
        raise OptionError(f"init_grad_scaler(precision={precision!r}): no dtype; expected one such as torch.bfloat16")
    return found
