"""Different chains for different parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.errors import OptionError
from graphopt.optim.core.var import Var
from graphopt.optim.routing.router import Filter, Router, Selection


class Split(Router):
    """Run one chain on the parameters that a filter means, and another on the rest.

    Args:
        filter: a function of the parameter (``lambda p: p.ndim >= 2``), or of its name and the parameter
            (``lambda name, p: "bias" in name``), called at each step; or parameters, a module, or a list of all these.
        true: a module, or list of modules, for the parameters that are meant; ``None``: their update passes unchanged.
        false: the same for the others.

    Raises:
        OptionError: there is no chain; the filter is none, or asks for names that the optimizer was not given.

    Example:
        >>> import torch
        >>> from graphopt.optim import Modular, m
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = Modular(model, m.Split(lambda p: p.ndim >= 2, m.Sign(), m.Fill(3.0)))
        >>> before = model.bias.item()
        >>> model(torch.ones(1, 2)).backward()
        >>> optimizer.step()
        >>> round(before - model.bias.item(), 4)
        3.0
    """

    treats_each_alone = True

    def __init__(self, filter: Filter, true: Any = None, false: Any = None) -> None:
        name = type(self).__name__
        if true is None and false is None:
            raise OptionError(f"{name} without a chain; write {name}(filter, true, false), one of which may be None")
        self.selection = Selection(filter, name)
        chains = {"true": true, "false": false}
        super().__init__({}, **{name: chain for name, chain in chains.items() if chain is not None})

    def route(self, var: Var) -> list[str | None]:
        """By the filter."""
        names = [("false", "true")[is_meant] for is_meant in self.selection.mask(self, var)]
        return [name if name in self.children else None for name in names]

    def params_for(self, child: str, var: Var) -> Sequence[int]:
        """By the filter."""
        return [index for index, name in enumerate(self.route(var)) if name == child]

    def __repr__(self) -> str:
        parts = [repr(self.selection), *[f"{name}={chain!r}" for name, chain in self.children.items()]]
        return f"{type(self).__name__}({', '.join(parts)})"


class Masked(Split):
    """Run modules on the parameters that a filter means; the update of the others passes unchanged.

    Args:
        filter: as of `Split`.
        *modules: modules, or lists of them.

    Raises:
        OptionError: there are no modules; the filter is none, or asks for names that the optimizer was not given.
    """

    def __init__(self, filter: Filter, *modules: Any) -> None:
        if not modules:
            raise OptionError("Masked(filter) without modules; write Masked(filter, module, ...)")
        super().__init__(filter, list(modules))
