"""Several optimizers as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphopt.errors import ClosureError, OptionError
from graphopt.optim.core.closures import RIGHT_CLOSURE
from graphopt.optim.routing.wrap import step_needs_closure


class SplitOptimizers(Optimizer):
    """Several optimizers, each of parameters of its own, as one.

    Those that step by gradients come first: the closure is evaluated once, and all of them see the gradients at the same
    parameters. Those that evaluate the loss themselves (`torch.optim.LBFGS`, line searches, the wrappers of this folder) follow,
    one after another, in the order given; each sees the moves of those before.

    Its ``param_groups`` are those of the optimizers, so that schedulers work on all of them. To add parameters, add them to one
    of the optimizers.

    Args:
        *optimizers: at least one; no parameter may be in two.

    Raises:
        OptionError: there is none, or a parameter is in two of them.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = SplitOptimizers(torch.optim.Adam([model.weight]), torch.optim.SGD([model.bias], lr=0.1))
        >>> len(optimizer.param_groups)
        2
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise OptionError(
                    f"SplitOptimizers: {optimizer!r}; expected optimizers, as in SplitOptimizers(first, second)"
                )
        if not optimizers:
            raise OptionError("SplitOptimizers() without optimizers; pass at least one")
        self.optimizers = list(optimizers)
        self._check_apart()
        super().__init__([{"params": []}], {})

    def _check_apart(self) -> None:
        owner: dict[int, Optimizer] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    other = owner.setdefault(id(param), optimizer)
                    if other is not optimizer:
                        raise OptionError(
                            f"SplitOptimizers: a parameter of shape {tuple(param.shape)} is in {type(other).__name__} and in "
                            f"{type(optimizer).__name__}; give each parameter to one of them"
                        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, in order."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """They are the optimizers' own."""

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """What all optimizers remember, by parameter; to be read."""
        found: defaultdict[Tensor, Any] = defaultdict(dict)
        for optimizer in self.optimizers:
            found.update(optimizer.state)
        return found

    @state.setter
    def state(self, state: Any) -> None:
        """It is the optimizers' own."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise: add parameters to one of the optimizers."""
        if param_group["params"]:
            raise OptionError(
                "SplitOptimizers.add_param_group: which of the optimizers is meant? Write "
                "optimizer.optimizers[0].add_param_group(...)"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all optimizers."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Step all optimizers.

        Args:
            closure: computes the loss and gradients; optional if no optimizer needs it.

        Returns:
            The loss before the step, ``None`` without a closure; if all optimizers evaluate the loss themselves, what the first
            returns.

        Raises:
            ClosureError: an optimizer needs a closure. Nothing was changed.
        """
        needy = [optimizer for optimizer in self.optimizers if step_needs_closure(optimizer)]
        if closure is None and needy:
            raise ClosureError(
                f"SplitOptimizers: {type(needy[0]).__name__} evaluates the loss; write optimizer.step(closure) with\n"
                f"{RIGHT_CLOSURE}"
            )
        others = [optimizer for optimizer in self.optimizers if optimizer not in needy]
        loss = None
        if closure is not None and others:
            with torch.enable_grad():
                loss = closure()
        for optimizer in others:
            optimizer.step()
        for optimizer in needy:
            found = optimizer.step(closure)
            loss = found if loss is None else loss
        return loss

    def state_dict(self) -> dict[str, Any]:
        """In the form of torch: parameters are numbered through all optimizers.

        What optimizers add to that form is in ``more``, a list with an entry for each optimizer.
        """
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        more: list[dict[str, Any]] = []
        for optimizer in self.optimizers:
            found = optimizer.state_dict()
            first = sum(len(group["params"]) for group in groups)
            state.update({_shift(key, first): value for key, value in found["state"].items()})
            groups += [
                {**group, "params": [_shift(key, first) for key in group["params"]]} for group in found["param_groups"]
            ]
            more.append({name: value for name, value in found.items() if name not in ("state", "param_groups")})
        return {"state": state, "param_groups": groups, "more": more}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned into all optimizers.

        Raises:
            OptionError: it was saved with other optimizers, or for other groups. Nothing was changed.
        """
        counts = [len(optimizer.param_groups) for optimizer in self.optimizers]
        groups, more = state_dict["param_groups"], state_dict.get("more", [])
        sizes = [len(group["params"]) for group in groups]
        if len(more) != len(counts) or sizes != [len(group["params"]) for group in self.param_groups]:
            raise OptionError(
                f"SplitOptimizers.load_state_dict: it is of {len(more)} optimizers with groups of {sizes} parameters; this one "
                f"has {len(counts)} with {[len(group['params']) for group in self.param_groups]}. Nothing was changed"
            )
        done = first = 0
        for optimizer, count, extra in zip(self.optimizers, counts, more, strict=True):
            own = groups[done : done + count]
            size = sum(len(group["params"]) for group in own)
            keys = {key for group in own for key in group["params"]}
            optimizer.load_state_dict(
                {
                    "state": {_shift(key, -first): value for key, value in state_dict["state"].items() if key in keys},
                    "param_groups": [
                        {**group, "params": [_shift(key, -first) for key in group["params"]]} for group in own
                    ],
                    **extra,
                }
            )
            done, first = done + count, first + size

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizers = state["optimizers"]
        super().__setstate__({"defaults": state["defaults"]})

    def __repr__(self) -> str:
        return f"SplitOptimizers({', '.join(type(optimizer).__name__ for optimizer in self.optimizers)})"


def _shift(key: Any, by: int) -> Any:
    """The number of a parameter in another count; names stay."""
    return key + by if isinstance(key, int) else key
