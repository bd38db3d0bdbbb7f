"""What the modules of a chain hand to each other in one step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from graphopt._compat import is_transformed
from graphopt.annotations import Key
from graphopt.errors import ClosureError, MissingAnnotation, NonFiniteError
from graphopt.optim.core.closures import RIGHT_CLOSURE, check_loss, number
from graphopt.optim.core.vectors import copies

Closure = Callable[..., Any]
"""Computes the loss; called with ``backward=True`` (or nothing) it also computes gradients, with ``False`` it does not."""


class Var:
    """The parameters of a step and what is known about them; modules change it and pass it on.

    Attributes:
        params: the parameters, as real tensors that may be written to.
        closure: computes the loss at the present parameters, or ``None``.
        model: the module whose parameters these are, if the optimizer was given one.
        current_step: how many steps were made before this one.
        update: what will be subtracted from the parameters, one tensor for each; ``None`` until a module asks for it.
        loss: the loss at the parameters before the step, once somebody has evaluated it.
        loss_approx: an estimate of it, where gradients are approximated without evaluating the loss itself.
        closure_has_graph: whether the result of ``closure(False)`` can be differentiated; not so if modules have replaced the
            closure by one whose gradients are others.
        place: the first module that evaluates the closure, for errors.
        check: called with this object once gradients are known.
        state: for each parameter the dictionary of everything that is remembered of it.
        settings: for each parameter the options of its group.
        annotations: reads an annotation of a parameter.
        names: of those parameters that have one.
        counts: for each parameter how many steps it has made with this one, shape ().
        source_of: parameters with equal results have the same settings.
        maximize: whether `grads` are still to be negated (compiled kernels do it themselves).
        post_step_hooks: functions of this object that are called after the parameters have moved.
        skip_update: set it if the parameters have been moved already.
        stop: set it to leave out the modules that follow.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        grads: Sequence[Tensor] | None = None,
        closure: Closure | None = None,
        model: nn.Module | None = None,
        current_step: int = 0,
        loss: Tensor | float | None = None,
        state: Mapping[Tensor, dict[str, Any]] | None = None,
        settings: Mapping[Tensor, dict[str, Any]] | None = None,
        counts: Sequence[Tensor] | None = None,
        annotations: Callable[[Tensor, Any], Any] | None = None,
        names: Mapping[Tensor, str] | None = None,
        source_of: Callable[[Tensor], Any] = id,
        maximize: bool = False,
    ) -> None:
        self.params = list(params)
        self.closure = closure
        self.model = model
        self.current_step = current_step
        self.update: list[Tensor] | None = None
        self.loss = loss
        self.loss_approx: Tensor | float | None = None
        self.state = state
        self.settings = settings
        self.counts = counts
        self.annotations = annotations
        self.names = names or {}
        self.source_of = source_of
        self.maximize = maximize
        self.closure_has_graph = True
        self.place = "step"
        self.check: Callable[[Var], None] | None = None
        self._notes: dict[int, dict[str, Any]] = {}
        self.post_step_hooks: list[Callable[[Var], None]] = []
        self.skip_update = False
        self.stop = False
        self._grads = None if grads is None else list(grads)

    @property
    def grads(self) -> list[Tensor]:
        """The gradients at the parameters before the step, one for each; not to be written to."""
        return self.get_grad()

    @grads.setter
    def grads(self, grads: Sequence[Tensor]) -> None:
        self._grads = list(grads)

    @property
    def has_grads(self) -> bool:
        """Whether gradients are known without evaluating the closure."""
        return self._grads is not None

    def forget_grads(self) -> None:
        """Let the next module that asks for gradients evaluate the closure."""
        self._grads = None

    def get_grad(self) -> list[Tensor]:
        """`grads`; evaluates the closure if nobody has yet."""
        if self._grads is None:
            self._evaluate(backward=True)
        return cast("list[Tensor]", self._grads)

    def get_loss(self, backward: bool = True) -> Tensor | float:
        """`loss`; evaluates the closure if nobody has yet.

        Args:
            backward: whether to compute the gradients as well if the closure must be evaluated.
        """
        if self.loss is None or (backward and self._grads is None):
            self._evaluate(backward)
        return cast("Tensor | float", self.loss)

    def get_update(self) -> list[Tensor]:
        """`update`, which is a copy of the gradients at first; it may be written to."""
        if self.update is None:
            self.update = [
                grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True) for grad in self.get_grad()
            ]
            if self.maximize:
                self._grads, self.maximize = [-grad for grad in self.get_grad()], False
                self.update = [-update for update in self.update]
        return self.update

    def read_update(self) -> list[Tensor]:
        """What `get_update` returns, not to be written to: where nobody has made an update yet, the gradients themselves."""
        if self.update is None and not self.maximize and all(type(grad) is Tensor for grad in self.get_grad()):
            wide = (torch.float32, torch.float64)
            return [
                grad if grad.dtype in wide else grad.to(torch.promote_types(grad.dtype, torch.float32))
                for grad in self.get_grad()
            ]
        return self.get_update()

    # Other names: of the seed's torchzero, and of 0.4, where this class is called Objective.

    @property
    def grad(self) -> list[Tensor]:
        """`grads`."""
        return self.get_grad()

    @property
    def updates(self) -> list[Tensor] | None:
        """`update`."""
        return self.update

    @updates.setter
    def updates(self, updates: list[Tensor] | None) -> None:
        self.update = updates

    def get_grads(self) -> list[Tensor]:
        """`get_grad`."""
        return self.get_grad()

    def get_updates(self) -> list[Tensor]:
        """`get_update`."""
        return self.get_update()

    def part(self, indices: Sequence[int]) -> Var:
        """A second object for some of the parameters."""
        other = self.clone(clone_update=False)
        other.params = [self.params[index] for index in indices]
        if self.update is not None:
            other.update = [self.update[index] for index in indices]
        if self._grads is not None:
            other._grads = [self._grads[index] for index in indices]
        if self.counts is not None:
            other.counts = [self.counts[index] for index in indices]
        other._notes = {}
        return other

    def notes_of(self, index: int, keys: Sequence[Key[Any]]) -> dict[str, Any]:
        """Annotations of the parameter number ``index``, by name; read once a step."""
        notes = self._notes.setdefault(index, {})
        for key in keys:
            if key.name not in notes:
                if self.annotations is None:
                    raise MissingAnnotation(f"nothing provides {key.name} in this step")
                notes[key.name] = self.annotations(self.params[index], key)
        return notes

    def clone(self, clone_update: bool = True) -> Var:
        """A second object that shares everything but the list of updates.

        Args:
            clone_update: whether the tensors of the update are copied too.
        """
        other = Var.__new__(Var)
        other.__dict__.update(self.__dict__)
        if self.update is not None:
            other.update = [tensor.clone() if clone_update else tensor for tensor in self.update]
        return other

    def update_attrs_from_clone_(self, other: Var) -> None:
        """Take over what a clone has found out meanwhile: loss, gradients, hooks."""
        if self.loss is None:
            self.loss = other.loss
        if self.loss_approx is None:
            self.loss_approx = other.loss_approx
        if self._grads is None:
            self._grads = other._grads

    def replace_closure(self, closure: Closure) -> None:
        """Let all modules that follow work on another function; gradient and update of the old one are forgotten.

        The loss is kept: it is that of the user's closure.
        """
        self.closure = closure
        self.closure_has_graph = False
        self.update = self._grads = None

    def evaluate(self, backward: bool = True, with_graph: bool = False, is_loss: bool = True) -> Any:
        """Call the closure at the present parameters.

        Args:
            backward: whether it computes gradients, into ``p.grad``.
            with_graph: whether the loss can be differentiated although ``backward`` is false. Otherwise the closure runs under
                ``torch.no_grad()`` then, without keeping activations.
            is_loss: whether the result must be one number; otherwise the caller looks at what it is.

        Returns:
            The loss.

        Raises:
            ClosureError: there is no closure, it takes no argument, or it returns no number.
        """
        if self.closure is None:
            raise ClosureError("this step needs a closure; call optimizer.step(closure)")
        with torch.set_grad_enabled(backward or with_graph):
            # Without an argument, so that closures of every other optimizer work, too.
            loss = self.closure() if backward else self._evaluate_loss(self.closure)
        if is_loss:
            check_loss(loss, self.place)
        return loss

    def _evaluate_loss(self, closure: Closure) -> Any:
        try:
            return closure(False)
        except TypeError as error:
            if _takes_argument(closure):
                raise
            raise ClosureError(
                f"{self.place} calls closure(False) for the loss alone, but the closure takes no argument. Write\n"
                f"{RIGHT_CLOSURE}"
            ) from error
        except RuntimeError as error:
            if "does not require grad" in str(error):
                error.add_note(
                    f"{self.place} called closure(False), which runs under torch.no_grad(). Call backward() only if "
                    "backward, and put what must be differentiated for the loss itself under torch.enable_grad()"
                )
            raise

    def see_grads(self) -> list[Tensor]:
        """The gradients in ``p.grad``, not to be written to, and only until the next evaluation; zeros where there is none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.params]

    def read_grads(self) -> list[Tensor]:
        """The gradients in ``p.grad``, copied; zeros where there is none."""
        grads = [param.grad for param in self.params]
        if all(type(grad) is Tensor for grad in grads):
            return copies(cast("list[Tensor]", grads))
        return [torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for p in self.params]

    def _evaluate(self, backward: bool) -> None:
        if self.closure is None and backward:
            self._grads = self.read_grads()
            return
        loss = self.evaluate(backward)
        self.learn_start(loss, self.read_grads() if backward else None)

    def learn_start(self, loss: Any, grads: Sequence[Tensor] | None) -> None:
        """Take over the loss, and the gradients, at the parameters before the step.

        Raises:
            NonFiniteError: the loss is NaN or infinite.
        """
        if not (isinstance(loss, Tensor) and is_transformed(loss)) and not math.isfinite(number(loss)):
            raise NonFiniteError(
                f"{self.place}: the loss is {number(loss)} at the parameters before the step; nothing was changed. Start from "
                "parameters where it is finite, or find where it comes from with torch.autograd.set_detect_anomaly(True)"
            )
        if self.loss is None:
            self.loss = loss
        if grads is not None:
            self._grads = list(grads)
            if self.check is not None:
                self.check(self)


def _takes_argument(closure: Closure) -> bool:
    try:
        inspect.signature(closure).bind(False)
    except TypeError:
        return False
    except ValueError:  # no signature
        return True
    return True
