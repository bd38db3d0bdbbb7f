"""Other modules on the lengths of tensors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.optim.core.arithmetic import state_dtype
from graphopt.optim.core.var import Var
from graphopt.optim.projections.projection import Projection, What


class TensorNormsProjection(Projection):
    """Run modules on one vector that holds the norm of each tensor; they rescale tensors, whose directions stay.

    With the directions ``d_i = u_i / ‖u_i‖`` of the update, the modules see ``z_i = ⟨u_i, d_i⟩ = ‖u_i‖`` as the update and
    ``‖θ_i‖`` as the parameter; what they make of ``z_i`` is multiplied by ``d_i``. Tensors of zeros stay zeros.

    With ``project_params`` moving ``z`` by ``δ`` moves each parameter by ``δ_i d_i``, and gradients are ``⟨g_i, d_i⟩``, so that a
    line search inside goes where it would go outside. With ``project_update=False`` the directions are those of the
    parameters, of which the modules then find the lengths, or else those of the gradient.

    Args:
        modules: what runs inside, with the settings of the first parameter.
        project_update: pass the incoming update; otherwise the modules start from the gradient.
        project_params: let the modules inside evaluate the closure.
        project_grad: pass the gradient, if the update is another.
    """

    _starts: Sequence[Tensor] | None = None
    _directions: Sequence[Tensor] | None = None

    def step(self, var: Var) -> Var:
        """Run the modules along the present directions."""
        if self.project_update:
            along = var.get_update()
        else:
            along = var.params if self.project_params else var.get_grad()
        self._directions = [_direction(tensor) for tensor in along]
        self._starts = [param.detach().clone() for param in var.params] if self.project_params else None
        try:
            return super().step(var)
        finally:
            self._directions = self._starts = None

    def project(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Measure."""
        if current == "params":
            return [_gather([_norm(tensor) for tensor in tensors])]
        assert self._directions is not None
        return [_gather([(tensor.detach() * d).sum() for tensor, d in zip(tensors, self._directions, strict=True)])]

    def unproject(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Rescale."""
        assert self._directions is not None
        lengths = list(tensors[0])
        starts: Sequence[Tensor | None] = [None] * len(lengths)
        if current == "params":
            starts = var.params if self._starts is None else self._starts
        news = []
        for length, direction, start in zip(lengths, self._directions, starts, strict=True):
            length = length.to(direction.device, direction.dtype)
            if start is None:
                news.append(direction * length)
            else:
                news.append(start.detach().to(direction.dtype) + direction * (length - _norm(start)))
        return news


def _norm(tensor: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(tensor.detach().to(state_dtype(tensor)))
    return length


def _direction(tensor: Tensor) -> Tensor:
    length = _norm(tensor)
    return tensor.detach() / torch.where(length > 0, length, 1)


def _gather(numbers: Sequence[Tensor]) -> Tensor:
    dtype = numbers[0].dtype
    for number in numbers[1:]:
        dtype = torch.promote_types(dtype, number.dtype)
    return torch.stack([number.to(numbers[0].device, dtype) for number in numbers])
