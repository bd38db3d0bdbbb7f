"""Other modules in the space of coefficients of cosines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import state_dtype
from graphopt.optim.core.var import Var
from graphopt.optim.projections.projection import Projection, What

_NORMS = (None, "ortho")


class DCTProjection(Projection):
    """Run modules on the discrete cosine transform (type II) over the first axes of each parameter.

    ``z_k = 2 Σ_n θ_n cos(π k (2n + 1) / (2N))`` along each of these axes; with ``norm="ortho"`` divided by √(4N) where k is 0
    and by √(2N) elsewhere, which makes it a rotation. The shape stays.

    Inside, gradients of the closure are derivatives by ``z``, and updates are transformed as parameters are. So a line search
    inside sees the slopes that it would see outside; quasi-Newton methods, which compare updates with moves, want
    ``norm="ortho"`` or ``project_update=False``.

    Args:
        modules: what runs inside.
        dims: how many axes, 1 to 3; parameters of fewer are transformed over all that they have.
        norm: ``None`` or ``"ortho"``.
        project_update: pass the incoming update; otherwise the modules start from the gradient.
        project_params: let the modules inside evaluate the closure.
        project_grad: pass the gradient, if the update is another.

    Raises:
        OptionError: an option is not valid.

    Cost: for each axis two or three transforms of order N log N per step.

    Reference: Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP 28 (1), 1980, section II.
    """

    takes_sharded = False

    def __init__(
        self,
        modules: Any,
        dims: int = 3,
        norm: str | None = None,
        project_update: bool = True,
        project_params: bool = False,
        project_grad: bool = False,
    ) -> None:
        super().__init__(modules, project_update, project_params, project_grad, {"dims": dims, "norm": norm})

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse unknown names and numbers of axes."""
        if settings["norm"] not in _NORMS:
            raise OptionError(f"{self.place}: norm={settings['norm']!r}; expected None or 'ortho'")
        if isinstance(settings["dims"], bool) or settings["dims"] not in (1, 2, 3):
            raise OptionError(f"{self.place}: dims={settings['dims']!r}; expected 1, 2 or 3")

    def project(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Transform."""
        is_dual = current == "grads" and self.project_params
        news = []
        for tensor, param in zip(tensors, var.params, strict=True):
            settings = self.get_settings(param)
            new = tensor.detach().to(state_dtype(tensor), copy=True)
            for axis in _axes(new, settings.dims):
                new = _transform(new, axis, settings.norm, is_dual)
            news.append(new)
        return news

    def unproject(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Transform back."""
        news = []
        for tensor, param in zip(tensors, var.params, strict=True):
            settings, new = self.get_settings(param), tensor.clone()
            for axis in _axes(new, settings.dims):
                new = _inverse(new, axis, settings.norm)
            news.append(new)
        return news


def _axes(tensor: Tensor, dims: int) -> range:
    return range(min(dims, tensor.dim()) if tensor.numel() else 0)


def _transform(tensor: Tensor, axis: int, norm: str | None, is_dual: bool) -> Tensor:
    rows = tensor.movedim(axis, -1)
    folded = torch.cat([rows[..., ::2], rows[..., 1::2].flip(-1)], -1)
    turned = torch.fft.fft(folded) * _phases(rows).conj()
    new: Tensor = 2 * turned.real
    scale = _scale(rows)
    if norm == "ortho":
        new = new / scale
    elif is_dual:  # the inverse is a rotation after a division by the scale; this is its transpose
        new = new / scale**2
    return new.movedim(-1, axis).contiguous()


def _inverse(tensor: Tensor, axis: int, norm: str | None) -> Tensor:
    rows = tensor.movedim(axis, -1)
    length = rows.shape[-1]
    if norm == "ortho":
        rows = rows * _scale(rows)
    mirrored = torch.cat([torch.zeros_like(rows[..., :1]), rows[..., 1:].flip(-1)], -1)
    spectrum = torch.complex(rows, -mirrored) * _phases(rows) / 2
    folded = torch.fft.irfft(spectrum[..., : length // 2 + 1], n=length)
    new = torch.empty_like(rows)
    half = (length + 1) // 2
    new[..., ::2], new[..., 1::2] = folded[..., :half], folded[..., half:].flip(-1)
    return new.movedim(-1, axis).contiguous()


def _phases(rows: Tensor) -> Tensor:
    """``exp(iπ k / (2N))``."""
    length = rows.shape[-1]
    angles = torch.arange(length, dtype=rows.dtype, device=rows.device) * (math.pi / (2 * length))
    return torch.polar(torch.ones_like(angles), angles)


def _scale(rows: Tensor) -> Tensor:
    """The length of each cosine, twice."""
    length = rows.shape[-1]
    scale = torch.full((length,), math.sqrt(2 * length), dtype=rows.dtype, device=rows.device)
    scale[0] = math.sqrt(4 * length)
    return scale
