"""Other modules in the space of Fourier coefficients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import state_dtype
from graphopt.optim.core.closures import common
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import flatten, unflatten
from graphopt.optim.projections.projection import Projection, What

_NORMS = (None, "backward", "ortho", "forward")


class FFTProjection(Projection):
    """Run modules on the discrete Fourier transform over all axes of each parameter.

    ``z_k = c Σ_n θ_n exp(-2πi ⟨k, n / N⟩)``; of the last axis only the first half of the coefficients, which the others mirror.
    The modules inside see each as a pair of real numbers: a parameter of shape (a, b) as (a, b // 2 + 1, 2). Those of at most
    one element pass as they are.

    Inside, gradients of the closure are derivatives by these numbers: twice the transform of the gradient for those that
    stand for their mirror images too, times a constant that ``norm`` decides. Updates are transformed as parameters are. So a
    line search inside sees the slopes that it would see outside, for every ``norm``; methods that compare updates with moves
    (quasi-Newton) are right with ``project_update=False``, where they start from the derivatives.

    Args:
        modules: what runs inside.
        one_d: one transform of all parameters, one after another as one vector.
        norm: ``c`` is 1 (``None`` or ``"backward"``), 1/√N (``"ortho"``) or 1/N (``"forward"``), for N elements.
        project_update: pass the incoming update; otherwise the modules start from the gradient.
        project_params: let the modules inside evaluate the closure.
        project_grad: pass the gradient, if the update is another.

    Raises:
        OptionError: there is no such ``norm``.

    Cost: two or three transforms of order N log N per step.
    """

    def __init__(
        self,
        modules: Any,
        one_d: bool = False,
        norm: str | None = None,
        project_update: bool = True,
        project_params: bool = False,
        project_grad: bool = False,
    ) -> None:
        super().__init__(modules, project_update, project_params, project_grad, {"one_d": one_d, "norm": norm})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse unknown names."""
        if settings["norm"] not in _NORMS:
            raise OptionError(
                f"{self.place}: norm={settings['norm']!r}; expected one of {', '.join(map(repr, _NORMS))}"
            )

    def project(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Transform."""
        is_dual = current == "grads" and self.project_params
        if common(self, var.params, "one_d"):
            return [_transform(flatten(tensors), common(self, var.params, "norm"), is_dual)]
        return [
            _transform(tensor.detach().to(state_dtype(tensor)), self.get_settings(param).norm, is_dual)
            for tensor, param in zip(tensors, var.params, strict=True)
        ]

    def unproject(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Transform back."""
        if common(self, var.params, "one_d"):
            size = sum(param.numel() for param in var.params)
            return unflatten(_inverse(tensors[0], torch.Size([size]), common(self, var.params, "norm")), var.params)
        return [
            _inverse(tensor, param.shape, self.get_settings(param).norm)
            for tensor, param in zip(tensors, var.params, strict=True)
        ]


def _transform(tensor: Tensor, norm: str | None, is_dual: bool) -> Tensor:
    if tensor.numel() <= 1:
        return tensor.clone()
    pairs = torch.view_as_real(torch.fft.rfftn(tensor, norm=norm)).contiguous()
    if not is_dual:
        return pairs
    # The inverse is x = c' Re Σ_k w_k z_k exp(...), with w_k = 2 where k stands for -k too; this is its transpose.
    length = tensor.shape[-1]
    weights = torch.full((length // 2 + 1, 1), 2.0, dtype=pairs.dtype, device=pairs.device)
    weights[0] = 1
    if length % 2 == 0:
        weights[-1] = 1
    factor = {"ortho": 1.0, "forward": float(tensor.numel())}.get(norm or "", 1 / tensor.numel())
    return pairs * (weights * factor)


def _inverse(pairs: Tensor, shape: torch.Size, norm: str | None) -> Tensor:
    if math.prod(shape) <= 1:
        return pairs.clone()
    values: Tensor = torch.fft.irfftn(torch.view_as_complex(pairs.contiguous()), s=shape, norm=norm)
    return values
