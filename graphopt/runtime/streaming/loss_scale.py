"""Gradients in half precision: multiplied where they enter the layers, divided where they leave, dropped if not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import OptionError, StreamError

HALF_PRECISION = {"cuda": torch.float16, "cpu": torch.bfloat16}

_LEAST = 2.0**-16  # gradients that are not finite at 2**-16 of their size do not owe it to half precision


class LossScale:
    """One number, and what came of the gradients that were multiplied by it."""

    def __init__(self, value: float) -> None:
        self.value = value
        self._applied = self.value  # in the last forward pass
        self._is_finite: list[tuple[str, Tensor]] = []
        self._spoilt_step: int | None = None

    @property
    def value(self) -> float:
        """The number."""
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise OptionError(
                f"Layer2Layer(loss_scale={value!r}): it is a number greater than zero; 1.0 scales nothing"
            )
        self._value = float(value)

    def enter(self, inputs: Any) -> Any:
        """What the model is called with; gradients that leave it there are divided."""
        return _with_scaled_gradients(inputs, 1 / self.value)

    def leave(self, outputs: Any) -> Any:
        """What the model returns, in float32; gradients that enter it there are multiplied while they are float32.

        Raises:
            StreamError: there may be tensors that cannot be reached.
        """
        for leaf in pytree.tree_leaves(outputs):
            if not isinstance(leaf, Tensor | int | float | str | None):
                raise StreamError(
                    f"the model returned a {type(leaf).__name__}, and with mixed_precision=True the gradients of the tensors in "
                    "it have to be scaled. Leave it out (in transformers: use_cache=False), return tensors in tuples, lists or "
                    "dicts, or tell torch.utils._pytree.register_pytree_node what the class holds"
                )
        self._applied, self._is_finite = self.value, []
        half = tuple(HALF_PRECISION.values())
        floats = pytree.tree_map_only(Tensor, lambda value: value.float() if value.dtype in half else value, outputs)
        return _with_scaled_gradients(floats, self.value)

    def divide(self, name: str, gradient: Tensor) -> Tensor:
        """A parameter's gradient as it is without scale; remembers whether it is finite, without waiting for the device."""
        unscaled = gradient / self._applied
        self._is_finite.append((name, unscaled.isfinite().all()))
        return unscaled

    def forgive(self) -> None:
        """Gradients are cleared: what was not finite is gone."""
        self._spoilt_step = None

    def accepts(self, loss: Tensor, step: int) -> bool:
        """Whether the gradients may stay. If not, the scale is halved, unless that cannot help.

        Args:
            loss: whose backward pass is over.
            step: finished steps of the optimizer; all backward passes of one step are accepted, or none after the first that is
                not.

        Raises:
            StreamError: the scale is so small that it cannot be the reason.
        """
        names = self._not_finite()
        if not names:
            return self._spoilt_step != step
        self._spoilt_step = step
        listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        if not loss.isfinite():
            advice = f"the loss is {loss.item()} itself, so loss_scale={self.value} stays as it is"
        elif self.value / 2 >= _LEAST:
            advice = f"loss_scale={self.value} is now {self.value / 2}"
            self.value /= 2
        else:
            raise StreamError(
                f"the gradients of {listed} are not finite with loss_scale={self.value} either, so half precision is not the "
                "reason. Look for log(0), sqrt(0) or a division by zero, with torch.autograd.set_detect_anomaly(True) and the "
                "model as it was written (graphopt.restore)"
            )
        warnings.warn(
            f"the gradients of {listed} are not finite: they are dropped, the next optimizer.step() does nothing, and {advice}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False

    def _not_finite(self) -> Sequence[str]:
        found, self._is_finite = self._is_finite, []
        if not found:
            return []
        flags = torch.stack([flag for _, flag in found]).tolist()
        return list(dict.fromkeys(name for (name, _), flag in zip(found, flags, strict=True) if not flag))


class _ScaleGradient(torch.autograd.Function):
    """The same values; their gradient times a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _with_scaled_gradients(values: Any, factor: float) -> Any:
    def scaled(value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value
        return cast(Tensor, _ScaleGradient.apply(value, factor))  # type: ignore[no-untyped-call]

    return pytree.tree_map_only(Tensor, scaled, values)
