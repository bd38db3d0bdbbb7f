"""Where modules keep what they remember of each parameter.

All of it stands in one dictionary for each parameter (`torch.optim.Optimizer.state`), under ``<module>.<name>``, so that it
is saved, loaded, copied and moved as torch does it.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor


class Store:
    """The dictionaries of all parameters, and of tensors that stand for parameters inside projections.

    Args:
        entries: for each parameter its dictionary; missing ones are made.
    """

    def __init__(self, entries: MutableMapping[Tensor, dict[str, Any]]) -> None:
        self.entries = entries
        self._stand_ins: dict[Tensor, tuple[Tensor, str]] = {}

    def stand_in(self, tensor: Tensor, owner: Tensor, prefix: str) -> None:
        """Keep what belongs to ``tensor`` in the dictionary of ``owner``, every name behind a prefix."""
        self._stand_ins[tensor] = (owner, prefix)

    def owner(self, tensor: Tensor) -> Tensor:
        """The parameter that a tensor stands for; itself if it stands for none."""
        while tensor in self._stand_ins:
            tensor = self._stand_ins[tensor][0]
        return tensor

    def entry(self, param: Tensor) -> tuple[dict[str, Any], str]:
        """The dictionary that holds a parameter's state, and the prefix of its names there."""
        prefix = ""
        while param in self._stand_ins:
            param, outer = self._stand_ins[param]
            prefix = outer + prefix
        return self.entries.setdefault(param, {}), prefix

    def of(self, param: Tensor, path: str) -> StateView:
        """What the module at ``path`` remembers of a parameter."""
        entry, prefix = self.entry(param)
        return StateView(entry, f"{prefix}{path}.")


class StateView(MutableMapping[str, Any]):
    """The entries of a parameter's dictionary that belong to one module, under the module's own names."""

    def __init__(self, entry: dict[str, Any], prefix: str) -> None:
        self._entry = entry
        self._prefix = prefix

    def __getitem__(self, name: str) -> Any:
        return self._entry[self._prefix + name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._entry[self._prefix + name] = value

    def __delitem__(self, name: str) -> None:
        del self._entry[self._prefix + name]

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._entry

    def __iter__(self) -> Iterator[str]:
        length = len(self._prefix)
        return (name[length:] for name in list(self._entry) if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))
