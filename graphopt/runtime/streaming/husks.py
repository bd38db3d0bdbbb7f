"""Move a model's values into a store, and put husks in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from graphopt.errors import StoreError
from graphopt.runtime.streaming.slots import Slot

if TYPE_CHECKING:
    from graphopt.runtime.streaming.stream import Stream


def fill_store(stream: Stream) -> None:
    """Write all parameters to a new store; each is emptied as soon as it is written, and gets its value back after an error."""
    on_meta = [slot.name for slot in stream.slots if slot.param.device.type == "meta"]
    if on_meta:
        raise StoreError(
            f"{len(on_meta)} parameters are on the meta device ({', '.join(on_meta[:3])}, ...) and the store is new, so there are "
            "no values. Fill it layer by layer: graphopt.fill_store(model, path) initialises them, graphopt.fill_store(model, path, "
            "checkpoint='model.safetensors') loads them"
        )
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


def match_store(stream: Stream) -> None:
    """Take a store that exists for the values of the model."""
    missing = [slot.name for slot in stream.slots if slot.key not in stream.store]
    if missing:
        raise StoreError(f"{stream.store!r} has no values for {', '.join(missing[:5])}: it was not filled to the end; fill it anew")
    stream.load_small_state(buffers=True)
    for slot in stream.slots:
        leave_meta(slot)
        slot.empty()


def leave_meta(slot: Slot) -> None:
    """Turn a parameter on the meta device into one on the husk's device, the same object."""
    if slot.param.device.type == "meta":
        torch.utils.swap_tensors(slot.param, nn.Parameter(slot.husk, slot.param.requires_grad))
