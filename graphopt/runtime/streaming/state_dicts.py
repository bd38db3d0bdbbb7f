"""What modules of a streamed model do beside computing: state dicts come from the store and go there; copies are refused."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

from torch import Tensor, nn

from graphopt.errors import StreamError
from graphopt.runtime.stores import StoredTensor
from graphopt.runtime.streaming.husks import small_state
from graphopt.runtime.streaming.slots import Slot

if TYPE_CHECKING:
    from graphopt.runtime.streaming.stream import Stream

_COPY = (
    "{kind} has parameters whose values are in a store, so it cannot be {done}: {what}. Use model.state_dict(), which has the "
    "values; or graphopt.restore(model) first"
)


class StateTensor(StoredTensor):
    """A stored tensor in a state dict: libraries that save it compare addresses, to find out which names are of one tensor.

    Nothing can be read at its address. It says that it is not contiguous, so that they read what ``.contiguous()`` returns, or
    ask for that.
    """

    def data_ptr(self) -> int:
        """An address that only other names of the same parameter have."""
        return self.store.storage_id(self.key) + int(self.storage_offset()) * self.element_size()

    def is_contiguous(self, *args: Any, **kwargs: Any) -> bool:
        """False."""
        return False


class StateDictHooks:
    """Hooks on all modules of a model that have parameters, or contain such.

    ``state_dict()`` returns tensors that load their values when they are read. ``load_state_dict()`` brings the parameters of one
    module at a time into memory, lets torch copy into them, and writes them to the store; at the end they are committed, so that
    neither a crash nor a step that fails takes them away. Copying, pickling and converting modules would take the memory of the
    whole model, for nothing but NaN, and is refused before it begins.
    """

    def __init__(self, model: nn.Module, stream: Stream) -> None:
        self._model, self._stream = weakref.ref(model), stream
        self._slots = {id(slot.param): slot for slot in stream.slots}
        self._handles: list[Any] = []
        self._guarded: list[nn.Module] = []
        self._outermost: tuple[nn.Module, list[str]] | None = None  # what load_state_dict was called on, and its errors
        self._brought: dict[int, tuple[nn.Module, Slot]] = {}
        for module in model.modules():
            self._attach(module)

    def remove(self) -> None:
        """Take everything off."""
        for handle in self._handles:
            handle.remove()
        for module in self._guarded:
            for name in ("__deepcopy__", "__reduce_ex__", "_apply"):
                module.__dict__.pop(name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """That of the model."""
        model = self._model()
        assert model is not None, "the stream outlives its model"
        return model.state_dict()

    def _attach(self, module: nn.Module) -> None:
        inside = [self._slots[id(param)] for param in module.parameters() if id(param) in self._slots]
        if not inside:
            return
        self._handles += [
            module.register_state_dict_post_hook(functools.partial(self._fill)),  # torch sets an attribute on it
            module.register_load_state_dict_pre_hook(self._bring),
            module.register_load_state_dict_post_hook(self._send),
        ]
        self._guarded.append(module)
        _guard(module, inside)

    def _own(self, module: nn.Module) -> dict[str, Slot]:
        return {name: self._slots[id(param)] for name, param in module._parameters.items() if id(param) in self._slots}

    # ------------------------------------------------------------------------------------------------------ state_dict

    def _fill(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, slot in self._own(module).items():
            if prefix + name in state:
                state[prefix + name] = StateTensor(self._stream.store, slot.key, self._stream.device)

    # ------------------------------------------------------------------------------------------------- load_state_dict

    def _bring(
        self,
        module: nn.Module,
        state: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        if metadata.get("assign_to_params_buffers", False):
            raise StreamError(
                f"load_state_dict(assign=True) would put other parameters in the place of those of {type(module).__name__}, "
                "whose values are in a store. Without assign=True the values are written to the store"
            )
        if not prefix:
            self._outermost = (module, errors)
            for _, slot in self._brought.values():  # of a load that was interrupted
                slot.empty()
            self._brought.clear()
        for name, slot in self._own(module).items():
            if prefix + name in state and id(slot) not in self._brought:  # tied: a parent may have brought it
                slot.param.data = self._stream.store.read(slot.key).to(self._stream.device)
                self._brought[id(slot)] = (module, slot)

    def _send(self, module: nn.Module, incompatible: Any) -> None:
        own = [slot for owner, slot in self._brought.values() if owner is module]
        if own:
            try:
                self._stream.store.write({slot.key: slot.param.detach() for slot in own})
            finally:
                for slot in own:
                    slot.empty()
                    del self._brought[id(slot)]
            self._stream.store.flush()
        if self._outermost is not None and self._outermost[0] is module:
            errors, self._outermost = self._outermost[1], None
            if not errors:
                store, stream = self._stream.store, self._stream
                small = {**store.small, **small_state(stream.device, stream._buffers)}
                store.commit(store.step, store.extra, small)


def _guard(module: nn.Module, inside: Sequence[Slot]) -> None:
    """Refuse what would take memory for all parameters; ``copy``, ``pickle`` and torch look for these names on the object."""
    kind = type(module).__name__

    def deepcopy(memo: Any) -> NoReturn:
        raise StreamError(_COPY.format(kind=kind, done="copied", what="the copy would need a store of its own"))

    def reduce(protocol: Any) -> NoReturn:
        raise StreamError(_COPY.format(kind=kind, done="pickled", what="the values would not be in it"))

    def apply(function: Any, recurse: bool = True) -> nn.Module:
        for slot in inside if recurse else ():
            part = slot.husk[(slice(0, 0),) * slot.husk.dim()] if slot.husk.dim() else slot.husk
            if function(part) is not part:
                raise StreamError(
                    f".to(), .half() or another conversion of {kind} would replace {slot.name}, whose value is in a store. Where "
                    "layers compute is said by LayerToLayer(device=...); to convert the model, graphopt.restore(model) first"
                )
        return cast(nn.Module, type(module)._apply(module, function, recurse))

    module.__dict__.update(__deepcopy__=deepcopy, __reduce_ex__=reduce, _apply=apply)
