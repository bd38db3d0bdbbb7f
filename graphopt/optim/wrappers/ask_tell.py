"""Optimizers that are asked for parameters to try, and told the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.optim.optimizer import ParamsT

from graphopt.errors import ClosureError, OptionError
from graphopt.optim.core.closures import RIGHT_CLOSURE
from graphopt.optim.core.var import Closure
from graphopt.optim.wrappers.external import Bound, ExternalOptimizer, Problem, Vector, numpy_seed


class AskTell(Protocol):
    """An optimizer of another library, or an adapter of one."""

    def ask(self) -> Any:
        """A candidate, or a list of candidates (a population)."""

    def tell(self, candidates: Any, losses: Any) -> Any:
        """Learn the loss of the candidate, or the list of losses of the list of candidates, that `ask` has returned."""


class AskTellOptimizer(ExternalOptimizer):
    """Minimise by any optimizer with ``ask`` and ``tell``. One step asks once, evaluates all candidates, and tells the losses.

    After each step the parameters are the best that were evaluated so far. No gradients are needed.

    ``make(start, low, high, seed)`` returns the other optimizer: an object with

    - ``ask()``: a candidate, or a list (or a matrix) of candidates. A candidate is a vector of n numbers, or an object that
      ``read`` makes one of.
    - ``tell(candidate, loss)``, or ``tell(candidates, losses)`` if it has returned several: exactly the objects that ``ask`` has
      returned, and floats. A loss that is NaN is told as infinity.

    `cma <https://github.com/CMA-ES/pycma>`_ and scikit-optimize are of this form::

        AskTellOptimizer(params, lambda start, low, high, seed:
            cma.CMAEvolutionStrategy(start, 0.5, {"seed": seed, "bounds": [low, high], "verbose": -9}))

    Others need a small adapter, here for Optuna::

        class Adapter:
            def __init__(self, start, low, high, seed):
                self.study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
                self.box = list(zip(low, high))
            def ask(self):
                self.trial = self.study.ask()
                return [self.trial.suggest_float(str(i), low, high) for i, (low, high) in enumerate(self.box)]
            def tell(self, candidate, loss):
                self.study.tell(self.trial, loss)

        AskTellOptimizer(params, Adapter, lb=-5.0, ub=5.0)

    ``state_dict()`` holds the best parameters, the seed, and the losses that were told. `load_state_dict` makes the other
    optimizer anew and tells it those losses again, without evaluations; it then continues exactly where it was, if all that it
    asks follows from the seed and what it is told. If it asks for something else on the way, it starts anew at the best.

    Args:
        params: parameters, or groups of them; groups may have ``lb`` and ``ub``.
        make: makes the other optimizer of the start and of lower and upper bounds (float64 vectors, infinite where there is no
            bound), and a seed (a number); called at the first step.
        lb: lower bound of every element: a number, a tensor that can be expanded to the parameter's shape, or ``None``.
        ub: upper bound.
        read: makes a vector of a candidate, if it is none.
        seed: for ``make``; ``None`` draws one from torch's generator.

    Attributes:
        best_loss: the lowest loss so far.
        inner: the other optimizer, once it was made.

    Raises:
        OptionError: a candidate has another number of elements, or a parameter is outside its bounds.

    Cost: one loss for each candidate; 8 bytes for each loss told, and twice the parameters (the start and the best).
    """

    is_global = True

    def __init__(
        self,
        params: ParamsT | nn.Module,
        make: Callable[[Vector, Vector, Vector, int], AskTell],
        lb: Bound = None,
        ub: Bound = None,
        read: Callable[[Any], Any] | None = None,
        seed: int | None = None,
    ) -> None:
        if not callable(make):
            raise OptionError(
                f"{type(self).__name__}: make={make!r}; expected a function of start, low, high and seed that returns an object "
                "with ask() and tell()"
            )
        self._make, self._read, self._given_seed = make, read, seed
        self._clear()
        super().__init__(params, lb, ub)

    def _clear(self) -> None:
        self.inner: AskTell | None = None
        self.best_loss = math.inf
        self._seed = -1  # none was chosen yet
        self._losses: list[float] = []

    def reset(self) -> None:
        """Forget all that was learned; the parameters stay."""
        self._clear()
        self.state.clear()

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Ask, evaluate, tell.

        Args:
            closure: computes the loss; called as ``closure(False)``.

        Returns:
            The lowest loss of this step.

        Raises:
            ClosureError: there is no closure, or it returns no number.
        """
        if closure is None:
            raise ClosureError(f"{self.place} evaluates the loss; write optimizer.step(closure) with\n{RIGHT_CLOSURE}")
        problem = self._problem(closure)
        try:
            inner = self._prepare(problem)
            asked, candidates = self._ask(inner, problem)
            losses = [problem.loss(candidate) for candidate in candidates]
            self._tell(inner, asked, losses)
        except BaseException:
            problem.put_back()
            raise
        self._losses += losses
        lowest = min(losses)
        if lowest < self.best_loss:
            self.best_loss = lowest
            best = problem.parts(candidates[losses.index(lowest)])
            for param, part in zip(problem.params, best, strict=True):
                self.state[param]["best"] = part
        if self.best_loss < math.inf:
            self.restore_best()
        else:
            problem.put_back()
        return lowest

    def run(self, problem: Problem) -> Vector:
        """Not used: a step is no whole run."""
        raise NotImplementedError

    def restore_best(self) -> None:
        """Give the parameters the best values that were evaluated so far."""
        with torch.no_grad():
            for param, state in self.state.items():
                if "best" in state:
                    param.copy_(state["best"])

    # ------------------------------------------------------------------------------------------------------- for subclasses

    def make(self, problem: Problem, start: Vector, seed: int) -> AskTell:
        """The other optimizer."""
        return self._make(start, problem.low.copy(), problem.high.copy(), seed)

    def read(self, candidate: Any) -> Any:
        """The numbers of a candidate."""
        return candidate if self._read is None else self._read(candidate)

    # ------------------------------------------------------------------------------------------------------------ internals

    def _prepare(self, problem: Problem) -> AskTell:
        if self.inner is not None:
            return self.inner
        if self._losses:
            inner = self._replay(problem)
            if inner is not None:
                self.inner = inner
                return inner
        if self._seed < 0:
            self._seed = numpy_seed(self._given_seed)
        self._losses = []
        for param in problem.params:
            self.state[param]["start"] = self.state[param].get("best", param.detach()).clone()
        self.inner = self._checked(self.make(problem, self._start(problem), self._seed))
        return self.inner

    def _replay(self, problem: Problem) -> AskTell | None:
        """Bring a new one to where a saved one was; ``None`` if it takes another way."""
        import numpy as np

        inner = self._checked(self.make(problem, self._start(problem), self._seed))
        told, best = 0, (math.inf, problem.start)
        while told < len(self._losses):
            asked, candidates = self._ask(inner, problem)
            losses = self._losses[told : told + len(candidates)]
            if len(losses) < len(candidates):
                return None
            self._tell(inner, asked, losses)
            told += len(candidates)
            if min(losses) < best[0]:
                best = min(losses), np.array(candidates[losses.index(min(losses))])
        if math.isinf(best[0]):
            return inner
        parts = problem.parts(best[1])
        is_same = all(torch.equal(part, self.state[p]["best"]) for part, p in zip(parts, problem.params, strict=True))
        return inner if is_same else None

    def _start(self, problem: Problem) -> Vector:
        import numpy as np

        parts = [self.state[param]["start"].reshape(-1).to("cpu", torch.float64).numpy() for param in problem.params]
        return cast(Vector, np.clip(np.concatenate(parts), problem.low, problem.high))

    def _checked(self, inner: Any) -> AskTell:
        if not (callable(getattr(inner, "ask", None)) and callable(getattr(inner, "tell", None))):
            raise OptionError(
                f"{self.place}: make(...) returned {inner!r}, which has no ask() and tell(); return the optimizer, or an adapter"
            )
        return cast(AskTell, inner)

    def _ask(self, inner: AskTell, problem: Problem) -> tuple[Any, list[Vector]]:
        """What it asks for, and that as vectors."""
        import numpy as np

        asked = inner.ask()
        several = asked if _is_several(asked) else [asked]
        vectors = []
        for candidate in several:
            vector = np.array(self.read(candidate), dtype=np.float64).reshape(-1)
            if vector.shape != problem.start.shape:
                raise OptionError(
                    f"{self.place}: {type(inner).__name__}.ask() returned a candidate of {vector.size} elements for parameters "
                    f"of {problem.start.size}; read= may make a vector of it"
                )
            vectors.append(vector)
        return asked, vectors

    def _tell(self, inner: AskTell, asked: Any, losses: Sequence[float]) -> None:
        if _is_several(asked):
            inner.tell(asked, list(losses))
        else:
            inner.tell(asked, losses[0])

    # ---------------------------------------------------------------------------------------------------- saving and copying

    def state_dict(self) -> dict[str, Any]:
        """What torch's ``state_dict`` holds, and ``search``: the losses that were told, and the seed."""
        search = {
            "losses": torch.tensor(self._losses, dtype=torch.float64),
            "best_loss": self.best_loss,
            "seed": self._seed,
        }
        return {**super().state_dict(), "search": search}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned; the next step continues from there. `restore_best` sets the parameters.

        Raises:
            OptionError: it was not saved by an optimizer of this kind.
        """
        if "search" not in state_dict:
            raise OptionError(
                f"{self.place}.load_state_dict: no 'search' in it; pass what {self.place}.state_dict() returned. Nothing was "
                "changed"
            )
        search = state_dict["search"]
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "search"})
        self._clear()
        self._losses, self.best_loss = search["losses"].tolist(), float(search["best_loss"])
        self._seed = int(search["seed"])

    def __getstate__(self) -> dict[str, Any]:
        own = {
            name: value for name, value in vars(self).items() if not name.startswith("_optimizer") and name != "inner"
        }
        # A copy makes the other optimizer anew, as after loading: that of a library cannot always be copied.
        return {**own, **super().__getstate__(), "inner": None}


def _is_several(asked: Any) -> bool:
    """Whether candidates are many: a list of things that are no numbers, or a matrix."""
    if getattr(asked, "ndim", None) is not None:
        return bool(asked.ndim >= 2)
    return isinstance(asked, (list, tuple)) and len(asked) > 0 and not isinstance(asked[0], Real)
