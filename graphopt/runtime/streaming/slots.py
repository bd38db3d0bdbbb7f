"""One parameter of a streamed model: its husk on the device, and its records in the store."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import StreamError
from graphopt.runtime.stores import Store, StoredTensor


class Slot:
    """What stands in a model for a parameter whose value is in a store.

    The ``Parameter`` object stays, with its shape, dtype and device, on a **husk**: one NaN, expanded. So ``model.weight`` reads
    as NaN, never as a plausible value, and torch refuses to write to it in place. ``model.state_dict()`` has the values.

    Attributes:
        name: the parameter's qualified name.
        param: the parameter.
        key: record of the value; ``grad_key`` and ``statistic_key`` are those of the gradient and of the sum of squares.
        num_samples: samples that entered the gradient since it was cleared.
        norms: of the gradients of these samples, while a backward pass adds more.
        states: names of the optimizer's tensors that are records, such as ``exp_avg``.
    """

    def __init__(self, name: str, param: nn.Parameter, device: torch.device) -> None:
        self.name, self.param = name, param
        self.key, self.grad_key, self.statistic_key = f"parameter/{name}", f"grad/{name}", f"sum_grad_squared/{name}"
        self.num_samples = 0
        self.norms: Tensor | None = None
        self.states: list[str] = []
        self.husk = make_husk(param, device)
        self._version = param._version

    def state_key(self, state: str) -> str:
        """Record of one of the optimizer's tensors."""
        return f"state/{state}/{self.name}"

    def empty(self) -> None:
        """Put the husk in the place of the value."""
        self.param.data = self.husk
        self._version = self.param._version

    def check(self) -> None:
        """Raise `StreamError` if somebody has given the parameter a value of its own."""
        husk = self.husk  # a husk of one element can be written to, which only the version tells
        if (
            self.param.data_ptr() != husk.data_ptr()
            or self.param.dtype != husk.dtype
            or self.param._version != self._version
        ):
            raise StreamError(
                f"{self.name} was given a value of its own (by .data = or in place) while its value is in the store, which that "
                f"would not reach. Write to the store: graphopt.stream(model).value({self.name!r}).copy_(...) or "
                "model.load_state_dict(...); or undo the streaming first: graphopt.restore(model)"
            )

    def create_scratch(self, store: Store, key: str, dtype: torch.dtype) -> None:
        """Reserve a record of the parameter's shape that belongs to one step."""
        if key not in store:
            store.create(key, self.param.shape, dtype, durable=False)

    def __repr__(self) -> str:
        return f"Slot({self.name}, {self.param.dtype}{list(self.param.shape)})"


def signature(slots: Iterable[Slot]) -> dict[str, Any]:
    """What a disk store keeps of the model that it belongs to: names, shapes and dtypes."""
    return {slot.name: [list(slot.param.shape), str(slot.param.dtype)] for slot in slots}


def make_husk(param: Tensor, device: torch.device) -> Tensor:
    """A tensor of a parameter's shape that takes the memory of one number."""
    value = math.nan if param.is_floating_point() or param.is_complex() else 0
    return torch.full((), value, dtype=param.dtype, device=device).expand(param.shape)


def is_husk(tensor: Tensor) -> bool:
    """Whether a tensor, real or fake, is one number that is expanded."""
    return tensor.numel() > 1 and all(
        stride == 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
    )


def stored_gradient(slot: Slot) -> StoredTensor | None:
    """The parameter's gradient, if it is in the store."""
    grad = slot.param.grad
    return grad if isinstance(grad, StoredTensor) else None
