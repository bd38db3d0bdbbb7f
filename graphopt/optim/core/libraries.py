"""Libraries that only some modules and wrappers need, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from graphopt.errors import UnsupportedError


def library(name: str, place: str) -> ModuleType:
    """Import a library of the extra ``[wrappers]``.

    Args:
        name: of the module to import.
        place: who needs it, for the error.

    Raises:
        UnsupportedError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UnsupportedError(
            f"{place} needs {package}, which is not installed ({error}). Type: pip install graphopt[wrappers]"
        ) from error
