"""Nevergrad's optimizers as an optimizer of torch's interface."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from graphopt.errors import OptionError
from graphopt.optim.core.libraries import library
from graphopt.optim.wrappers.ask_tell import AskTell, AskTellOptimizer
from graphopt.optim.wrappers.external import Bound, Problem, Vector


class NevergradOptimizer(AskTellOptimizer):
    """Minimise by an optimizer of Nevergrad. One step asks for one candidate, evaluates it, and tells its loss.

    After each step the parameters are the best that were evaluated so far. No gradients are needed. ``state_dict()`` holds the
    best parameters and all that is needed to continue exactly from there (see `AskTellOptimizer`).

    Args:
        params: parameters, or groups of them; groups may have ``lb`` and ``ub``.
        opt_cls: a class of ``nevergrad.optimizers`` or another function of ``parametrization`` and ``budget``, or its name in
            Nevergrad's registry, such as ``"OnePlusOne"``.
        budget: the number of steps that are planned; many of Nevergrad's optimizers need it.
        mutable_sigma: whether Nevergrad adapts the size of mutations as a parameter of its own.
        lb: lower bound of every element: a number, a tensor that can be expanded to the parameter's shape, or ``None``.
        ub: upper bound.
        use_init: whether it starts at the present parameters; otherwise at the middle of the bounds, at 0 without.
        seed: of Nevergrad's random numbers; ``None`` draws one from torch's generator.

    Attributes:
        best_loss: the lowest loss so far.
        inner: Nevergrad's optimizer, once it was made.

    Raises:
        OptionError: there is no such optimizer, or a parameter is outside its bounds.
        UnsupportedError: Nevergrad is not installed.

    Cost: one loss; Nevergrad's own work, for most of its optimizers in the order of n a step.

    Reference: Rapin, Teytaud, "Nevergrad - A gradient-free optimization platform",
    https://github.com/FacebookResearch/Nevergrad, 2018.
    """

    def __init__(
        self,
        params: ParamsT | nn.Module,
        opt_cls: Callable[..., Any] | str,
        budget: int | None = None,
        mutable_sigma: bool = False,
        lb: Bound = None,
        ub: Bound = None,
        use_init: bool = True,
        seed: int | None = None,
    ) -> None:
        place = type(self).__name__
        if not (callable(opt_cls) or isinstance(opt_cls, str)):
            raise OptionError(
                f"{place}: opt_cls={opt_cls!r}; expected a class of nevergrad.optimizers, or a name such as 'OnePlusOne'"
            )
        if budget is not None and not (isinstance(budget, int) and budget >= 1):
            raise OptionError(f"{place}: budget={budget!r}; expected a whole number of at least 1, or None")
        self.opt_cls, self.budget, self.mutable_sigma, self.use_init = opt_cls, budget, mutable_sigma, use_init
        super().__init__(params, _never, lb, ub, None, seed)

    def make(self, problem: Problem, start: Vector, seed: int) -> AskTell:
        """An optimizer of one array for each parameter, which Nevergrad may scale and bound apart."""
        import numpy as np

        nevergrad = library("nevergrad", self.place)
        arrays, first = [], 0
        for param in problem.params:
            part = slice(first, first := first + param.numel())
            init, low, high = start[part], problem.low[part], problem.high[part]
            if not self.use_init:
                is_open = np.isinf(low) | np.isinf(high)
                middle = (np.where(is_open, 0.0, low) + np.where(is_open, 0.0, high)) / 2
                init = np.clip(middle, low, high)
            array = nevergrad.p.Array(init=init, mutable_sigma=self.mutable_sigma)
            lower, upper = (None if np.isinf(end).all() else end for end in (low, high))
            if lower is not None and upper is not None:
                # Mutations in units of the box: of size 1 they would leave a small one in most cases.
                array.set_mutation(sigma=float(min(1.0, (high - low).min() / 6)) or 1.0)
            if lower is not None or upper is not None:
                array.set_bounds(lower, upper)
            arrays.append(array)
        parametrization = nevergrad.p.Tuple(*arrays)
        parametrization.random_state = np.random.RandomState(seed % 2**32)
        make: Any = self.opt_cls
        if isinstance(make, str):
            if make not in nevergrad.optimizers.registry:
                raise OptionError(
                    f"{self.place}: opt_cls={make!r} is none of Nevergrad's {len(nevergrad.optimizers.registry)} optimizers, "
                    "such as 'OnePlusOne', 'NGOpt' or 'CMA'; sorted(nevergrad.optimizers.registry) lists all"
                )
            make = nevergrad.optimizers.registry[make]
        inner: AskTell = make(parametrization=parametrization, budget=self.budget)
        return inner

    def read(self, candidate: Any) -> Any:
        """The arrays of all parameters in one vector."""
        import numpy as np

        return np.concatenate([np.reshape(value, -1) for value in candidate.value])

    def __repr__(self) -> str:
        name = self.opt_cls if isinstance(self.opt_cls, str) else getattr(self.opt_cls, "__name__", self.opt_cls)
        return f"{super().__repr__()[:-1]}, {name})"


def _never(*_: Any) -> AskTell:
    raise AssertionError(math.nan)  # `make` is overridden
