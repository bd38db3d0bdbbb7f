"""``state_dict`` and ``load_state_dict`` of a streamed model: values come from the store, and go there, module by module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.runtime.stores import StoredTensor
from graphopt.runtime.streaming.slots import Slot

if TYPE_CHECKING:
    from graphopt.runtime.streaming.stream import Stream


class StateDictHooks:
    """Hooks on every module that has parameters of its own.

    ``state_dict()`` returns tensors that load their values when they are read. ``load_state_dict()`` brings the parameters of one
    module at a time into memory, lets torch copy into them, and writes them to the store.
    """

    def __init__(self, model: nn.Module, stream: Stream) -> None:
        self._handles: list[Any] = []
        by_id = {id(slot.param): slot for slot in stream.slots}
        for module in model.modules():
            own = {
                name: by_id[id(param)] for name, param in module._parameters.items() if param is not None and id(param) in by_id
            }
            if own:
                self._handles += _attach(module, own, stream)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()


def _attach(module: nn.Module, own: dict[str, Slot], stream: Stream) -> list[Any]:
    def fill(_: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, slot in own.items():
            if prefix + name in state:
                state[prefix + name] = StoredTensor(stream.store, slot.key, stream.device)

    def bring(*_: Any) -> None:
        for slot in own.values():
            slot.param.data = stream.store.read(slot.key).to(stream.device)

    def send(*_: Any) -> None:
        stream.store.write({slot.key: slot.param.detach() for slot in own.values()})
        for slot in own.values():
            slot.empty()
        stream.store.flush()

    return [
        module.register_state_dict_post_hook(fill),
        module.register_load_state_dict_pre_hook(bring),
        module.register_load_state_dict_post_hook(send),
    ]
