"""What the wrappers of other libraries share: the loss as a function of one float64 vector, bounds, and parameters put back."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from graphopt.errors import ClosureError, GraphoptError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim.core.closures import RIGHT_CLOSURE, number
from graphopt.optim.core.libraries import library
from graphopt.optim.core.var import Closure, Var
from graphopt.optim.second_order.derivatives import gradients_with_graph, jacobian

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]
else:
    Vector = Any

Bound = float | Tensor | None
"""A limit of all elements of a parameter: a number, or a tensor that can be expanded to its shape; ``None``: none."""


class ExternalOptimizer(Optimizer):
    """An optimizer whose steps another library makes, on all parameters as one vector.

    ``step(closure)`` needs a closure, as `Modular` does for chains that evaluate the loss: ``closure(False)`` is the loss alone,
    and ``closure()`` computes gradients as well. Parameters that do not require gradients stay as they are. Devices and dtypes
    are kept; the library sees float64. If it raises, or the closure does, or the loss ends as NaN, all parameters are put back
    bit for bit.

    A subclass overrides `run`.

    Args:
        params: parameters, groups of them, named parameters, or a module. Groups may have ``lb`` and ``ub``.
        lb: lower bound of every element, or ``None``.
        ub: upper bound, or ``None``.
        **options: other options of the groups.

    Attributes:
        result: what the library returned at the last step.
    """

    needs_closure = True
    is_global = False  # whether it does without a finite loss at the start

    def __init__(self, params: ParamsT | nn.Module, lb: Bound = None, ub: Bound = None, **options: Any) -> None:
        self.result: Any = None
        given: Any = params.named_parameters() if isinstance(params, nn.Module) else params
        super().__init__(given, {"lb": lb, "ub": ub, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            OptionError: its lower bound is above its upper one, or has another shape.
            UnsupportedError: a parameter is complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for param in group["params"]:
                if param.is_complex():
                    raise UnsupportedError(
                        f"{self.place}: a parameter is complex; make torch.view_as_real(param) the parameter"
                    )
                low, high = bounds_of(self.place, param, group)
                if low is not None and high is not None and not bool((low <= high).all()):
                    raise OptionError(f"{self.place}: lb={group['lb']!r} is above ub={group['ub']!r}")
        except GraphoptError:
            self.param_groups.pop()
            raise

    @property
    def place(self) -> str:
        """The optimizer for an error."""
        return type(self).__name__

    def step(self, closure: Closure | None = None) -> float:  # type: ignore[override]
        """Let the library work.

        Args:
            closure: computes the loss, and with ``backward=True``, the default, gradients.

        Returns:
            The loss at the parameters after the step.

        Raises:
            ClosureError: there is no closure, or it returns no number.
            NonFiniteError: the loss is NaN or infinite, at the start or at the end. Nothing was changed.
            OptionError: a parameter is outside its bounds. Nothing was changed.
        """
        if closure is None:
            raise ClosureError(f"{self.place} evaluates the loss; write optimizer.step(closure) with\n{RIGHT_CLOSURE}")
        problem = self._problem(closure)
        try:
            if not self.is_global and not math.isfinite(problem.loss(problem.start)):
                raise NonFiniteError(
                    f"{self.place}: the loss is NaN or infinite at the parameters before the step; nothing was changed. Start "
                    "from parameters where it is finite"
                )
            final = self.run(problem)
            # What the library thinks of as the end may not be the last point that it has looked at.
            loss = problem.loss(final)
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"{self.place}: it ended where the loss is NaN or infinite, after {problem.num_evaluations} evaluations; the "
                    "parameters are those from before the step. Bounds (lb=, ub=) keep it where the loss is finite"
                )
        except BaseException as error:
            problem.put_back()
            if isinstance(error, Exception) and not isinstance(error, GraphoptError):
                error.add_note(f"raised during {self.place}.step(); the parameters are those from before the step")
            raise
        return loss

    @abstractmethod
    def run(self, problem: Problem) -> Vector:
        """Let the library work.

        Args:
            problem: the loss, its derivatives, where to start, and bounds.

        Returns:
            Where it ended.
        """

    def _problem(self, closure: Closure) -> Problem:
        params: list[Tensor] = []
        bounds: list[tuple[Tensor | None, Tensor | None]] = []
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                if not param.requires_grad or param.numel() == 0:
                    continue
                low, high = bounds_of(self.place, param, group)
                _check_inside(self.place, param, low, high, group, index)
                params.append(param)
                bounds.append((low, high))
        if not params:
            raise OptionError(
                f"{self.place}: no parameter requires gradients, so there is nothing to optimize; param.requires_grad_() says "
                "that one may change"
            )
        return Problem(self.place, params, bounds, closure)

    def __repr__(self) -> str:
        return f"{self.place}({sum(len(group['params']) for group in self.param_groups)} parameters)"


class Problem:
    """The loss as a function of one float64 vector of all parameters, which `loss` and the others leave at that vector.

    Attributes:
        params: the parameters.
        place: the optimizer for an error.
        start: the vector at the beginning, inside the bounds.
        low: lower bounds, ``-inf`` where there is none.
        high: upper bounds.
        num_evaluations: how often the closure was called.
        best: the vector of the lowest loss that was evaluated, and that loss.
    """

    def __init__(
        self,
        place: str,
        params: Sequence[Tensor],
        bounds: Sequence[tuple[Tensor | None, Tensor | None]],
        closure: Closure,
    ) -> None:
        np = library("numpy", place)
        self.params, self.place, self.num_evaluations = list(params), place, 0
        self._var = Var(params, closure=closure)
        self._var.place = place
        self._before = [param.detach().clone() for param in params]
        low, high = zip(*bounds, strict=True)
        self.low, self.high = _concatenate(params, low, -math.inf), _concatenate(params, high, math.inf)
        self.start: Vector = np.clip(np.concatenate([_as_vector(param) for param in params]), self.low, self.high)
        self._present: Vector | None = None
        self._loss: float | None = None
        self._grad: Vector | None = None
        self._graph: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self.best: tuple[Vector, float] = (self.start, math.inf)

    @property
    def has_bounds(self) -> bool:
        """Whether any element has a finite bound."""
        return bool((self.low > -math.inf).any() or (self.high < math.inf).any())

    def parts(self, vector: Vector) -> list[Tensor]:
        """A vector in the shapes, dtypes and devices of the parameters."""
        whole = torch.from_numpy(vector.copy())
        cut = whole.split([param.numel() for param in self.params])
        return [part.reshape(p.shape).to(p.device, p.dtype) for part, p in zip(cut, self.params, strict=True)]

    def move(self, vector: Vector) -> None:
        """Give the parameters the values of a vector."""
        import numpy as np

        vector = np.asarray(vector, dtype=np.float64).reshape(-1)
        if self._present is not None and np.array_equal(vector, self._present):
            return
        self._present = vector.copy()
        self._loss = self._grad = self._graph = None
        with torch.no_grad():
            for param, part in zip(self.params, self.parts(vector), strict=True):
                param.copy_(part)

    def loss(self, vector: Vector) -> float:
        """The loss; infinite where it is NaN, so that no search takes it for small."""
        self.move(vector)
        if self._loss is None:
            self._learn(self._var.evaluate(backward=False))
        return cast(float, self._loss)

    def gradient(self, vector: Vector) -> Vector:
        """The gradient, from the closure."""
        import numpy as np

        self.move(vector)
        if self._grad is None:
            for param in self.params:
                param.grad = None  # so that one of which the loss does not depend has none of an earlier evaluation
            self._learn(self._var.evaluate(backward=True))
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
            self._grad = np.concatenate([_as_vector(g if g.layout is torch.strided else g.to_dense()) for g in grads])
        return self._grad.copy()

    def loss_and_gradient(self, vector: Vector) -> tuple[float, Vector]:
        """Both, from one call of the closure."""
        grad = self.gradient(vector)
        return self.loss(vector), grad

    def hessian(self, vector: Vector) -> Vector:
        """The matrix of second derivatives, by automatic differentiation of ``closure(False)``: one backward a row, batched."""
        grad, _ = self._differentiable(vector)
        return cast(Vector, jacobian(grad, self.params).detach().cpu().double().numpy())

    def hessian_product(self, vector: Vector, direction: Vector) -> Vector:
        """The Hessian times a direction, by one backward; those at one vector share an evaluation."""
        import numpy as np

        grad, _ = self._differentiable(vector)
        if not grad.requires_grad:
            return np.zeros_like(self.start)
        weights = torch.from_numpy(np.asarray(direction, dtype=np.float64).reshape(-1)).to(grad.device, grad.dtype)
        parts = torch.autograd.grad(grad, self.params, weights, retain_graph=True, materialize_grads=True)
        return cast(Vector, np.concatenate([_as_vector(part) for part in parts]))

    def put_back(self) -> None:
        """Give the parameters their values from before, bit for bit."""
        self._present = None
        with torch.no_grad():
            for param, value in zip(self.params, self._before, strict=True):
                param.copy_(value)

    def _differentiable(self, vector: Vector) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradient as one vector with its graph."""
        self.move(vector)
        if self._graph is None:
            loss = self._var.evaluate(backward=False, with_graph=True)
            if not (isinstance(loss, Tensor) and loss.requires_grad):
                raise ClosureError(
                    f"{self.place} needs second derivatives, but the loss of closure(False) does not require gradients. Take "
                    "torch.no_grad() and loss.item() out of the closure, or choose a method without second derivatives"
                )
            self._learn(loss)
            grads = gradients_with_graph(loss, self.params)
            device = grads[0].device
            flat = torch.cat([grad.reshape(-1).to(device) for grad in grads])
            self._graph = flat, grads
        return self._graph

    def _learn(self, loss: Any) -> None:
        self.num_evaluations += 1
        value = number(loss)
        self._loss = math.inf if math.isnan(value) else value
        if self._loss < self.best[1] and self._present is not None:
            self.best = self._present, self._loss


def numpy_seed(seed: int | None) -> int:
    """A seed for another library: the user's, or one from torch's generator, so that ``torch.manual_seed`` decides."""
    return int(torch.randint(2**31 - 1, ()).item()) if seed is None else seed


def check_choice(place: str, name: str, value: Any, choices: Sequence[str], otherwise: Callable[[Any], bool]) -> None:
    """Raise `OptionError` unless a value is one of the names, or something else that is right."""
    if not (isinstance(value, str) and value in choices) and not otherwise(value):
        raise OptionError(f"{place}: {name}={value!r}; expected one of {', '.join(map(repr, choices))}")


def bounds_of(place: str, param: Tensor, group: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """The bounds of each element of a parameter, float64."""
    found: list[Tensor | None] = []
    for name in ("lb", "ub"):
        value = group[name]
        if value is None:
            found.append(None)
            continue
        try:
            bound = torch.as_tensor(value, dtype=torch.float64, device=param.device).expand(param.shape)
        except (RuntimeError, TypeError, ValueError) as error:
            raise OptionError(
                f"{place}: {name}={value!r} for a parameter of shape {tuple(param.shape)}; expected a number, a tensor that can "
                "be expanded to that shape, or None"
            ) from error
        if bool(bound.isnan().any()):
            raise OptionError(f"{place}: {name}={value!r}; expected a number, or None for no bound")
        found.append(bound)
    return found[0], found[1]


def _check_inside(
    place: str, param: Tensor, low: Tensor | None, high: Tensor | None, group: dict[str, Any], index: int
) -> None:
    value = param.detach()
    # Bounds are rounded as the parameter is: one of float32 may stand a little outside of 0.1 and be as near as it can.
    below = low is not None and bool((value < low.to(param.dtype)).any())
    above = high is not None and bool((value > high.to(param.dtype)).any())
    if below or above:
        names = group.get("param_names")
        name = repr(names[index]) if names else f"number {index} of its group"
        raise OptionError(
            f"{place}: parameter {name} of shape {tuple(param.shape)} has values from {float(value.min())} to "
            f"{float(value.max())}, outside of lb={group['lb']!r}, ub={group['ub']!r}; nothing was changed. Start inside: "
            "with torch.no_grad(): param.clamp_(lb, ub)"
        )


def _concatenate(params: Sequence[Tensor], bounds: Sequence[Tensor | None], otherwise: float) -> Vector:
    import numpy as np

    parts = [
        np.full(param.numel(), otherwise) if bound is None else _as_vector(bound)
        for param, bound in zip(params, bounds, strict=True)
    ]
    return cast(Vector, np.concatenate(parts))


def _as_vector(tensor: Tensor) -> Vector:
    return cast(Vector, tensor.detach().reshape(-1).to("cpu", torch.float64).numpy())
