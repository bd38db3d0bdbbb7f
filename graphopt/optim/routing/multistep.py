"""Several steps of other modules in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import OptionError
from graphopt.optim.core.closures import restored
from graphopt.optim.core.flat.segment import apply_updates
from graphopt.optim.core.memo import Memo
from graphopt.optim.core.var import Var
from graphopt.optim.core.vectors import copies
from graphopt.optim.routing.router import Router


class _InnerSteps(Router):
    """Steps that move the parameters; the update is how far they got, and the parameters are put back."""

    needs_closure = True
    counts_apart = True

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse numbers that mean nothing."""
        steps = settings["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise OptionError(f"{self.place}: steps={steps!r}; expected a whole number of at least 1")

    def step(self, var: Var) -> Var:
        """Make the steps."""
        params = var.params
        assert var.closure is not None
        closure = Memo().remember(var.closure, params)
        first: Var | None = None
        with restored(params) as starts:
            for chain in self._chains(var):
                inner = var.clone()
                inner.closure = closure
                if first is None:
                    first = inner
                else:  # another point
                    inner.loss = inner.loss_approx = inner.update = inner.check = None
                    inner.forget_grads()
                result = self.run_chain(chain, inner)
                with torch.no_grad():
                    apply_updates(params, result)
            ends = copies(params)
        assert first is not None
        var.update_attrs_from_clone_(first)
        var.update = [_difference(start, end) for start, end in zip(starts, ends, strict=True)]
        return var

    def _chains(self, var: Var) -> Iterator[str]:
        """For each inner step the name of the chain that makes it."""
        steps = self.get_settings(var.params[0])["steps"]
        for _ in range(steps):
            yield from self.children


class Multistep(_InnerSteps):
    """Make several steps of a chain in one, on the same closure.

    The update is the difference between the parameters before and after, so that an `LR` behind it scales the whole way (1
    goes all of it; a smaller one is a kind of Lookahead). A full-batch method is so run to its end by one call of ``step``,
    as with ``max_iter`` of `torch.optim.LBFGS`: the closure is not evaluated again where a line search has ended.

    Args:
        modules: a module, or a list of modules. They count the steps that they make.
        steps: how many. The closure must compute the same function all the while.

    Raises:
        OptionError: ``steps`` is no whole number of at least 1.

    Cost: ``steps`` times that of the chain; three copies of the parameters and gradients.

    Example:
        >>> from graphopt.optim import Modular, m
        >>> weight = torch.nn.Parameter(torch.tensor([4.0]))
        >>> def closure(backward=True):
        ...     loss = (weight**2).sum()
        ...     if backward:
        ...         weight.grad = None
        ...         loss.backward()
        ...     return loss
        >>> _ = Modular([weight], m.Multistep(m.LR(0.25), 3)).step(closure)
        >>> weight.data
        tensor([0.5000])
    """

    def __init__(self, modules: Any, steps: int) -> None:
        super().__init__({"steps": steps}, modules=modules)


class Sequential(_InnerSteps):
    """Let chains make a full step each, one after another, every one with gradients of where the one before has got.

    The update is the difference between the parameters before and after.

    Args:
        *modules: chains, each a module or a list of modules, and in it what scales its step. They count their own steps.
        steps: how often the whole sequence is gone through.

    Raises:
        OptionError: there are no chains, or ``steps`` is no whole number of at least 1.

    Cost: ``steps`` times that of all chains; three copies of the parameters and gradients.
    """

    def __init__(self, *modules: Any, steps: int = 1) -> None:
        if not modules:
            raise OptionError("Sequential: no chains; write Sequential(first, second, ...), each may be a list")
        super().__init__({"steps": steps}, **{f"module_{index}": chain for index, chain in enumerate(modules)})


def _difference(start: Tensor, end: Tensor) -> Tensor:
    dtype = torch.promote_types(start.dtype, torch.float32)
    return start.to(dtype) - end.to(dtype)
