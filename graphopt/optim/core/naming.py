"""Names of the modules of a chain, of their state, and of their hyper-parameters in parameter groups."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.bounds import is_number
from graphopt.optim.core.module import Binding, Module, Rule, walk
from graphopt.optim.core.store import Store


class Named(NamedTuple):
    """A module of a chain and what it is called.

    Attributes:
        module: the module.
        path: unique in the chain; its state stands behind it (``adam.exp_avg``).
        place: where it stands, for an error.
        keys: for each hyper-parameter the option of a parameter group: its name, with the path in front where two modules
            share it.
    """

    module: Module
    path: str
    place: str
    keys: dict[str, str]


def name_modules(modules: Sequence[Module]) -> list[Named]:
    """Name all modules of a chain, children included.

    Raises:
        OptionError: one object stands in the chain twice.
    """
    everything = list(walk(modules))
    repeated = [module for module, count in Counter(map(id, everything)).items() if count > 1]
    if repeated:
        module = next(module for module in everything if id(module) == repeated[0])
        raise OptionError(
            f"{module!r} stands in the chain twice; a module remembers things, so make one object for each place"
        )
    places = dict(_places(modules))
    owner = next((module for module in reversed(modules) if module.is_learning_rate), None)
    users: defaultdict[str, list[Module]] = defaultdict(list)
    for module in everything:
        for name in module.defaults:
            users[name].append(module)
    counts: Counter[str] = Counter()
    named = []
    for module in everything:
        path = type(module).__name__.lower()
        counts[path] += 1
        path = path if counts[path] == 1 else f"{path}_{counts[path]}"
        keys = {
            name: name if _is_alone(name, module, users[name], owner) else f"{path}.{name}" for name in module.defaults
        }
        named.append(Named(module, path, places[id(module)], keys))
    return named


def _is_alone(name: str, module: Module, users: Sequence[Module], owner: Module | None) -> bool:
    """Whether the option of a group has just the hyper-parameter's name."""
    return module is owner if name == "lr" else len(users) == 1


def bind(
    named: Sequence[Named],
    store: Store,
    groups: Callable[[Tensor], Mapping[str, Any]] | None,
    first_param: Callable[[], Tensor],
    replaces: bool,
    batches: bool = False,
    on_change: Callable[[], None] = lambda: None,
    has_one_group: Callable[[], bool] = lambda: True,
) -> None:
    """Give the modules of a chain their places."""
    for module, path, place, keys in named:
        module.bind(Binding(path, place, store, keys, groups, first_param, replaces, batches, on_change, has_one_group))


def check_order(modules: Sequence[Module]) -> None:
    """Raise `OptionError` if a module undoes what those before it have done, or stands behind one that must be last."""
    places = dict(_places(modules))
    for index, module in enumerate(modules):
        if module.must_be_last and index + 1 < len(modules):
            raise OptionError(
                f"{places[id(module)]} must be the last one: it makes the whole step, with its own lr, and "
                f"{type(modules[index + 1]).__name__} behind it would make another one. Put other modules in front of it"
            )
        in_vain = next((earlier for earlier in modules[:index] if isinstance(earlier, Rule)), None)
        if module.replaces_update and in_vain is not None:
            raise OptionError(
                f"{places[id(module)]} makes an update of its own, so that {places[id(in_vain)]} would be in vain; put "
                f"{type(module).__name__} first, and {type(in_vain).__name__} behind it"
            )


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """Raise `OptionError` for an option of a group that nobody reads, but whose name is almost that of one."""
    known = sorted(known)
    for option in options:
        if option in known:
            continue
        near = [name for name in difflib.get_close_matches(option, known, cutoff=0.8) if not option.endswith(name)]
        if option == "betas" and "beta1" in known:
            near = ["beta1", "beta2"]
        if near:  # (others may be notes of a scheduler, such as max_momentum)
            raise OptionError(
                f"no module has the option {option!r} of the parameter group; write {' and '.join(map(repr, near[:2]))}. "
                "Modular.option_names lists all"
            )


def check_group(named: Sequence[Named], group: Mapping[str, Any]) -> None:
    """Check the options of a parameter group against the modules that read them.

    Raises:
        OptionError: a value is out of range, or a name belongs to several modules.
    """
    users: defaultdict[str, list[Named]] = defaultdict(list)
    for entry in named:
        for name in entry.module.defaults:
            users[name].append(entry)
    for option in group:
        entries = users.get(option, [])
        # (``lr`` is the group's own where no module at the end of the chain reads it: `Modular` multiplies by it)
        if option != "lr" and len(entries) > 1 and all(entry.keys[option] != option for entry in entries):
            raise OptionError(
                f"the group's option {option!r} belongs to {len(entries)} modules; write "
                f"{' or '.join(repr(entry.keys[option]) for entry in entries)}"
            )
    for module, _, place, keys in named:
        settings = dict(module.defaults)
        for name, key in keys.items():
            if key in group:
                settings[name] = group[key]
                bounds = module.bounds.get(name)
                value = group[key]
                if bounds is not None and value is not None and not (is_number(value) and value in bounds):
                    raise OptionError(f"{place}: {key}={value!r} in a parameter group; expected a number in {bounds}")
        module.check_settings(settings)


def _places(modules: Sequence[Module], inside: str = "") -> list[tuple[int, str]]:
    places = []
    for index, module in enumerate(modules, 1):
        place = f"module {index} of {len(modules)}{inside}, {type(module).__name__}"
        places.append((id(module), place))
        for name, chain in module.children.items():
            places += _places(chain, f" in {name}= of {type(module).__name__}")
    return places
