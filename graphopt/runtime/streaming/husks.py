"""Move a model's values into a store, and put husks in their place; take a store that exists for the values of a model."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from graphopt.errors import StoreError
from graphopt.runtime.streaming.random_states import random_state
from graphopt.runtime.streaming.slots import Slot

if TYPE_CHECKING:
    from graphopt.runtime.streaming.stream import Stream

# Attributes of a tensor that belong to what it was, and not to the parameter that it is: those of a stored tensor, and the mark
# with which transformers' functions skip tensors that have their values already.
_NOT_CARRIED = frozenset({"store", "key", "on_change", "_views", "_is_param", "_is_hf_initialized"})


def fill_store(stream: Stream) -> None:
    """Write all parameters to a new store; each is emptied as soon as it is written, and gets its value back after an error."""
    on_meta = [slot.name for slot in stream.slots if slot.param.device.type == "meta"]
    if on_meta:
        raise StoreError(_no_values(stream, on_meta))
    emptied: list[Slot] = []
    try:
        for slot in stream.slots:
            stream.store.create(slot.key, slot.param.shape, slot.param.dtype)
            stream.store.write({slot.key: slot.param.detach()})
            slot.empty()
            emptied.append(slot)
        stream.store.commit(0, {}, stream.small_state())
    except BaseException:
        for slot in emptied:
            slot.param.data = stream.store.read(slot.key).to(stream.device)
        raise


def match_store(stream: Stream, model: nn.Module | None = None) -> None:
    """Take a store that exists for the values of the model.

    Raises:
        StoreError: it has not all of them. The model is unchanged then.
    """
    store, buffers = stream.store, {name: buffer for name, buffer in stream._buffers.items() if buffer is not None}
    missing = [slot.name for slot in stream.slots if slot.key not in store or not store.is_written(slot.key)]
    missing += [
        name for name, buffer in buffers.items() if buffer.device.type == "meta" and f"buffer/{name}" not in store.small
    ]
    if missing:
        raise StoreError(
            f"{store!r} has no values for {', '.join(missing[:5])}: it was not filled to the end; fill it anew"
        )
    for name, buffer in buffers.items():
        kept = store.small.get(f"buffer/{name}")
        if kept is not None and kept.shape != buffer.shape:
            raise StoreError(
                f"{store!r} belongs to another model: the buffer {name} is {list(kept.shape)} in it and {list(buffer.shape)} in "
                "the model. Build that model, or give another folder"
            )
    with swappable(model):
        for name, buffer in buffers.items():
            if buffer.device.type == "meta":
                become(buffer, torch.empty_like(store.small[f"buffer/{name}"], device=stream.device))
        for slot in stream.slots:
            if slot.param.device.type == "meta":
                become(slot.param, slot.husk)
            slot.empty()
    stream.load_small_state(buffers=True)


def small_state(device: torch.device, buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a commit keeps beside parameters: buffers and random states, as they are now."""
    states = {f"random/{index}": state for index, state in enumerate(random_state(device))}
    return {**states, **{f"buffer/{name}": buffer for name, buffer in buffers.items()}}


def become(tensor: Tensor, value: Tensor) -> None:
    """Give a parameter or buffer another value, on any device and of any dtype.

    The object stays, and with it its ties, its place in optimizers, and its attributes. ``.data = value`` cannot leave the meta
    device.
    """
    fresh = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    fresh.__dict__.update({name: kept for name, kept in tensor.__dict__.items() if name not in _NOT_CARRIED})
    torch.utils.swap_tensors(tensor, fresh)


def tie_again(model: nn.Module) -> None:
    """Make ties that ``accelerate.init_empty_weights`` breaks, as it makes a parameter of its own wherever one is registered."""
    for module in model.modules():
        if is_pretrained(module):
            cast(Any, module).tie_weights()


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is a model of transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")  # not imported: no such model can exist
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


@contextmanager
def swappable(model: nn.Module | None) -> Iterator[None]:
    """Within it, `become` works for the parameters of RNNs, which have weak references to them that torch objects to."""
    rnns = [module for module in model.modules() if isinstance(module, nn.RNNBase)] if model is not None else []
    for rnn in rnns:
        rnn._flat_weight_refs = []
    try:
        yield
    finally:
        for rnn in rnns:
            rnn._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in rnn._flat_weights]


def _no_values(stream: Stream, names: list[str]) -> str:
    what = f"{len(names)} parameters are on the meta device ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    if stream.store.path is None:
        return (
            f"{what}, and store='cpu' takes the values that are in memory. Initialise the model there, or stream it from a disk "
            "store: graphopt.fill_store(model, path), LayerToLayer(store='disk', store_path=path)"
        )
    path = str(stream.store.path)
    return (
        f"{what}, and the store in {path} is empty: it is new, or was not filled to the end. Fill it layer by layer: "
        f"graphopt.fill_store(model, {path!r}) initialises the values, and with checkpoint='model.safetensors' it loads them"
    )
