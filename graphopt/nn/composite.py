"""Modules made of modules: what they build of ``torch.nn`` becomes graphopt's."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

from graphopt.nn.mirror import Mirror

Class = TypeVar("Class", bound=type[nn.Module])

_mirror_of: dict[type[nn.Module], type[nn.Module]] = {}  # a class of torch.nn -> graphopt's


def register(*classes: type[nn.Module]) -> None:
    """Let composites turn children of the class of ``torch.nn`` behind each of these into it."""
    for mirror in classes:
        original = next(base for base in mirror.__mro__ if base.__module__.startswith("torch.nn."))
        if original.__name__ == mirror.__name__:
            _mirror_of[original] = mirror


def adopts_children(cls: Class) -> Class:
    """Class decorator: once built, an instance's children are graphopt's."""
    build = cls.__init__

    @functools.wraps(build)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for child in self.children():
            adopt(child)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


def adopt(module: nn.Module) -> None:
    """Change the class of a module, and of everything in it, from ``torch.nn``'s to graphopt's; in place."""
    mirror = _mirror_of.get(type(module))
    if mirror is not None:
        module.__class__ = mirror
        if isinstance(module, Mirror):
            module.enlist()
    for child in module.children():
        adopt(child)
