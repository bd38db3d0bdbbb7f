"""Parameters of a streamed model that code reads outside of captured graphs, where they are husks: NaN instead of values."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import StreamError, UncapturedParameter
from graphopt.runtime.streaming.slots import Slot
from graphopt.runtime.uncaptured import leaves_of

_WHERE = (
    "functions under torch.compiler.disable, data-dependent code behind a graph break and terms of the loss run there "
    "(TORCH_LOGS=graph_breaks shows breaks)"
)


def check_outputs(outputs: Any, slots: Sequence[Slot], used: set[str]) -> None:
    """Look for husks behind what a call has returned.

    Args:
        outputs: of the call.
        slots: the model's parameters.
        used: names of those that a graph has loaded during the call.

    Raises:
        StreamError: gradients would flow to a husk.
    """
    reached = leaves_of(outputs)
    if outside := [slot.name for slot in slots if id(slot.param) in reached]:
        raise StreamError(
            f"{_some(outside)} would be read as NaN: the model uses {_them(outside)} outside any captured graph, where nobody "
            f"loads {_them(outside)} from the store; {_WHERE}. Remove the break, keep such modules out of the model that is "
            "streamed, or use LayerToLayer(store='device')"
        )
    unused = [slot.name for slot in slots if slot.name not in used]
    if unused and any(map(_has_nan, pytree.tree_leaves(outputs))):
        warnings.warn(
            f"the streamed model returned NaN, and no captured graph has read {_some(unused)} in this call. If the model does "
            f"use {_them(unused)}, it read NaN instead of values: {_WHERE}",
            UncapturedParameter,
            stacklevel=3,
        )


def watch(slots: Iterable[Slot]) -> list[Any]:
    """Refuse gradients that autograd gives to a husk: streamed layers send theirs to the store. Returns the hooks' handles."""

    def refuse_for(slot: Slot) -> Any:
        name = slot.name

        def refuse(grad: Tensor) -> None:
            raise StreamError(
                f"the loss depends on {name} outside the streamed model (a penalty on weights, a second use), where it is NaN: "
                "its value is in the store. Leave the term out, or compute it from "
                f"graphopt.stream(model).value({name!r}).load() and add its gradient to param.grad; for a penalty on the norm "
                "there is the optimizer's weight_decay"
            )

        return refuse

    return [slot.param.register_hook(refuse_for(slot)) for slot in slots if slot.param.requires_grad]


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(torch.isnan(value.detach()).any())


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"


def _them(names: Sequence[str]) -> str:
    return "them" if len(names) > 1 else "it"
