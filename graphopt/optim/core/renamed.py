"""Keywords that other libraries, or other versions of them, call by other names."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from graphopt.errors import OptionError

_Kind = TypeVar("_Kind", bound=type)


def renamed(**names: str) -> Callable[[_Kind], _Kind]:
    """A decorator of classes: let a keyword of the constructor be written in another way, too.

    Args:
        **names: by the other name the keyword's own.

    Example:
        >>> @renamed(debias="debiased")
        ... class Average:
        ...     def __init__(self, debiased=False):
        ...         self.debiased = debiased
        >>> Average(debias=True).debiased
        True
    """

    def decorate(kind: _Kind) -> _Kind:
        construct: Callable[..., None] = vars(kind).get("__init__") or kind.__init__  # type: ignore[misc]

        @functools.wraps(construct)
        def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
            for other, name in names.items():
                if other in kwargs:
                    if name in kwargs:
                        raise OptionError(f"{kind.__name__}: {other}= and {name}= are the same; give one of them")
                    kwargs[name] = kwargs.pop(other)
            construct(self, *args, **kwargs)

        kind.__init__ = constructor  # type: ignore[misc]
        return kind

    return decorate
