"""Small tensors that share memory, so that one call updates all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from graphopt.optim.core.flat.ragged import ROW_WIDTH, Rows


class Bucket:
    """Buffers for many small tensors: each fills whole rows, the rest of the last is padding.

    Args:
        params: the tensors, none distributed, all of one dtype and device.
        states: by name what is remembered of each; it is copied into `buffers`, and `views` are to take its places.
        scalars: the names of what has shape () whatever the shape of the parameter.
        min_rows: at least so many rows.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Mapping[str, Sequence[Tensor]],
        scalars: Collection[str] = (),
        min_rows: int = 0,
    ) -> None:
        device = params[0].device
        lengths = [param.numel() for param in params]
        num_rows = [-(-length // ROW_WIDTH) for length in lengths]
        spare = max(0, min_rows - sum(num_rows))
        starts = [0]
        for number in num_rows:
            starts.append(starts[-1] + number * ROW_WIDTH)
        self.num_rows = sum(num_rows) + spare
        self._device = device
        self._shapes = [
            (start, length, param.shape) for start, length, param in zip(starts, lengths, params, strict=False)
        ]
        paddings = torch.tensor([number * ROW_WIDTH - length for number, length in zip(num_rows, lengths, strict=True)])
        counts = torch.tensor(num_rows)
        owner = torch.repeat_interleave(torch.arange(len(params)), counts)
        num_valid = torch.full((int(counts.sum()),), ROW_WIDTH)
        last = counts.cumsum(0) - 1
        num_valid[last[counts > 0]] = ROW_WIDTH - paddings[counts > 0]
        self.rows = Rows(
            torch.nn.functional.pad(owner, (0, spare)).to(device),
            torch.nn.functional.pad(num_valid, (0, spare)).to(device),
            torch.tensor(lengths, dtype=torch.float64, device=device),
        )
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[str, list[Tensor]] = {}
        self._gathered: dict[str, tuple[Tensor, list[Tensor]]] = {}
        for name, tensors in states.items():
            if name in scalars:
                self.buffers[name] = torch.stack([tensor.reshape(()) for tensor in tensors])
                self.views[name] = list(self.buffers[name].unbind())
            else:
                self.buffers[name] = self.new(tensors[0].dtype)
                self.views[name] = self.split(self.buffers[name])
                torch._foreach_copy_(self.views[name], list(tensors))

    def new(self, dtype: torch.dtype) -> Tensor:
        """A buffer of zeros, (num_rows, ROW_WIDTH)."""
        return torch.zeros(self.num_rows, ROW_WIDTH, dtype=dtype, device=self._device)

    def gather(self, name: str, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Copy one tensor of each parameter into the buffer that is kept for ``name``, (num_rows, ROW_WIDTH)."""
        if name not in self._gathered:
            buffer = self.new(dtype)
            self._gathered[name] = buffer, self.split(buffer)
        buffer, views = self._gathered[name]
        torch._foreach_copy_(views, list(tensors))
        return buffer

    def scatter(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Copy a gathered buffer back."""
        torch._foreach_copy_(list(tensors), self._gathered[name][1])

    def split(self, buffer: Tensor) -> list[Tensor]:
        """A buffer's part of each parameter, in the parameter's shape."""
        flat = buffer.view(-1)
        return [flat[start : start + length].view(shape) for start, length, shape in self._shapes]
