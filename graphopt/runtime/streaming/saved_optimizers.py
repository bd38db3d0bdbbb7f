"""What a commit keeps of optimizers beside their stored tensors, and how one goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.optim import Optimizer

from graphopt.errors import StoreError
from graphopt.runtime.stores import Store, StoredTensor
from graphopt.runtime.streaming.slots import Slot

if TYPE_CHECKING:
    from graphopt.runtime.streaming.stream import Stream


def describe(stream: Stream, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options of the groups and counts, as JSON can hold them, and small tensors by parameter and name."""
    names = {id(slot.param): slot.name for slot in stream.slots}
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        options = {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({"options": options, "params": [names.get(id(param), "") for param in group["params"]]})
    numbers: dict[str, dict[str, Any]] = {}
    for param, state in optimizer.state.items():
        name = names.get(id(param))
        for key, value in state.items() if name is not None else ():
            if isinstance(value, StoredTensor):
                continue
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value
            else:
                numbers.setdefault(cast(str, name), {})[key] = _plain(value)
    return {"class": class_name(optimizer), "groups": groups, "numbers": numbers}, tensors


def load(stream: Stream, optimizer: Optimizer, own: list[Slot]) -> None:
    """Give an optimizer what the last commit has kept of one like it; does nothing if no step was finished.

    Raises:
        StoreError: it has kept other optimizers.
    """
    saved = stream.store.extra.get("optimizers", {})
    kind, names = class_name(optimizer), {slot.name for slot in own}
    for number, found in saved.items():
        theirs = {name for group in found["groups"] for name in group["params"] if name}
        if found["class"] == kind and theirs == names:
            _load_groups(optimizer, found)
            load_numbers(stream, optimizer, own, found, number)
            for slot in own:
                for key in state_keys(stream.store, slot):
                    name = key.split("/")[1]
                    slot.states.append(name)
                    optimizer.state[slot.param][name] = StoredTensor(stream.store, key, "cpu")
            return
    if saved:
        described = "; ".join(
            f"{found['class']} over {sum(len(group['params']) for group in found['groups'])} parameters"
            for found in saved.values()
        )
        raise StoreError(
            f"the store holds the state of other optimizers ({described}) than this {kind} over {len(own)} parameters. Make the "
            "optimizer as it was made then"
        )


def load_numbers(stream: Stream, optimizer: Optimizer, own: list[Slot], found: Mapping[str, Any], number: str) -> None:
    """Counts, and other small parts of the state."""
    small = stream.store.small
    for slot in own:
        numbers, prefix = found["numbers"].get(slot.name, {}), f"optimizer/{number}/{slot.name}/"
        tensors = {key.removeprefix(prefix): value.clone() for key, value in small.items() if key.startswith(prefix)}
        if numbers or tensors:
            optimizer.state[slot.param].update(numbers)
            optimizer.state[slot.param].update(tensors)


def class_name(optimizer: Optimizer) -> str:
    """By which an optimizer is recognised."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def state_keys(store: Store, slot: Slot) -> list[str]:
    """The records of an optimizer's tensors for one parameter."""
    return [key for key in store.keys() if key.startswith("state/") and key.split("/", 2)[2] == slot.name]


def _load_groups(optimizer: Optimizer, found: Mapping[str, Any]) -> None:
    theirs = [len(group["params"]) for group in found["groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        raise StoreError(
            f"the store holds the state of an optimizer with groups of {theirs} parameters, and this one has groups of {ours}. "
            "Make the optimizer as it was made then"
        )
    for group, saved in zip(optimizer.param_groups, found["groups"], strict=True):
        for key, value in saved["options"].items():
            old = group.get(key)
            if isinstance(old, Tensor):
                old.fill_(value)
            elif value is not None or old is None:
                group[key] = tuple(value) if isinstance(old, tuple) else value


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; what it cannot hold is left to the optimizer that resumes."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else None
