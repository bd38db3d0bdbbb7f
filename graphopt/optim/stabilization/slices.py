"""What the modules that look at whole tensors, slices of them, or all tensors together have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.module import Rule

Dim = int | Sequence[int] | Literal["global"] | None


class Sliced(Rule):
    """A rule with the options ``dim``, ``inverse_dims`` and ``min_size``, which are the same for all parameters."""

    fixed = ("dim", "inverse_dims", "min_size")

    @property
    def is_elementwise(self) -> bool:
        """Slices need the shape."""
        return self.defaults["dim"] is None or self.is_global

    @property
    def measures(self) -> bool:
        """Whether all tensors are looked at together."""
        return self.is_global

    @property
    def is_global(self) -> bool:
        """Whether all tensors are looked at together."""
        return bool(self.defaults["dim"] == "global")

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse what means nothing, or would differ between parameters."""
        dim, size = settings["dim"], settings["min_size"]
        if not (
            dim is None or dim == "global" or _is_whole(dim) or (isinstance(dim, tuple) and all(map(_is_whole, dim)))
        ):
            raise OptionError(f"{self.place}: dim={dim!r}; expected None, an axis, several axes, or 'global'")
        if settings["inverse_dims"] and not isinstance(dim, (int, tuple)):
            raise OptionError(
                f"{self.place}: inverse_dims=True with dim={dim!r}; name the axes that are to be left out"
            )
        if not _is_whole(size) or size < 0:
            raise OptionError(f"{self.place}: min_size={size!r}; expected a whole number of at least 0")
        check_fixed(self, settings, self.fixed)

    def axes(self, tensor: Tensor) -> list[int]:
        """The axes of a tensor that the options name; none if slices along them are too small."""
        dim = self.defaults["dim"]
        named = {axis % tensor.dim() for axis in as_axes(dim) if -tensor.dim() <= axis < tensor.dim()}
        if self.defaults["inverse_dims"]:
            named = set(range(tensor.dim())) - named
        size = 1
        for axis in named:
            size *= tensor.shape[axis]
        return sorted(named) if size >= self.defaults["min_size"] else []


def as_axes(dim: int | Sequence[int]) -> tuple[int, ...]:
    """One or several axes."""
    return (dim,) if isinstance(dim, int) else tuple(dim)


def as_option(dim: Dim) -> Any:
    """``dim`` as it is kept: lists as tuples, for they must be hashable."""
    return tuple(dim) if isinstance(dim, (list, tuple)) else dim


def check_ord(module: Rule, settings: Mapping[str, Any]) -> None:
    """Raise `OptionError` if there is no norm of the order."""
    if not settings["ord"] > 0:
        raise OptionError(f"{module.place}: ord={settings['ord']!r}; expected a number above 0, 2 or float('inf')")


def check_fixed(module: Rule, settings: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise `OptionError` if options that belong to the module as a whole were given to some parameters."""
    for name in names:
        if settings[name] != module.defaults[name]:
            raise OptionError(
                f"{module.place}: {name}={settings[name]!r} for some parameters, but {module.defaults[name]!r} in the module; "
                "it cannot differ between them"
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
