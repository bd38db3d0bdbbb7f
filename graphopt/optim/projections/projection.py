"""The base class of projections."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graphopt.annotations import Key
from graphopt.errors import MissingAnnotation, OptionError
from graphopt.optim.core.closures import restored
from graphopt.optim.core.module import Module, run_modules, walk
from graphopt.optim.core.store import Store
from graphopt.optim.core.var import Var

What = Literal["params", "grads", "update"]


class _StandIns(NamedTuple):
    """Of some parameters the tensors that stand for them, and for each of these the number of the parameter that owns it."""

    params: list[Tensor]
    tensors: list[Tensor]
    owners: list[int]


class Projection(Module):
    """Run other modules in another space.

    A subclass overrides `project` and `unproject`. The modules inside see tensors of that space in place of the parameters.
    What they remember is kept with the parameters (see `owner_of`), so it is saved, loaded and copied with everything else.

    These tensors have the values of the projected parameters. With ``project_params`` the modules inside may move them and
    evaluate the closure there: line searches and gradient approximations run inside. Gradients are projected by `project`,
    too: where `unproject` is not its transpose (as it is of rotations and of reshaping), it must do with gradients what that
    transpose does, so that slopes are right.

    Args:
        modules: what runs inside.
        project_update: pass the incoming update; otherwise the modules start from the gradient.
        project_params: pass a closure, which puts the parameters to where they are inside.
        project_grad: pass the gradient; otherwise, without a closure, the incoming update is taken for it.
        defaults: hyper-parameters of the subclass and their values.

    Raises:
        OptionError: nothing is projected, or a module inside needs a closure without ``project_params``.

    Example:
        >>> from graphopt.optim import Modular, Projection, m
        >>> class Doubled(Projection):
        ...     def project(self, tensors, var, current):
        ...         return [2 * tensor for tensor in tensors]
        ...     def unproject(self, tensors, var, current):
        ...         return [tensor / 2 for tensor in tensors]
        >>> weight = torch.tensor([1.0], requires_grad=True)
        >>> weight.grad = torch.tensor([3.0])
        >>> Modular([weight], Doubled(m.ClipValue(1.0))).step()
        >>> weight.data
        tensor([0.5000])
    """

    has_own_tensors = True

    def __init__(
        self,
        modules: Any,
        project_update: bool = True,
        project_params: bool = False,
        project_grad: bool = False,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        name = type(self).__name__
        super().__init__(defaults, modules=modules)
        if not (project_update or project_params or project_grad):
            raise OptionError(
                f"{name}: project_update, project_params and project_grad are all False; nothing would run inside"
            )
        needy = next((module for module in walk(self.children["modules"]) if module.needs_closure), None)
        if needy is not None and not project_params:
            raise OptionError(
                f"{name}: {type(needy).__name__} inside evaluates the loss, which is a function of the parameters; write "
                f"{name}(..., project_params=True)"
            )
        self.project_update, self.project_params, self.project_grad = project_update, project_params, project_grad
        self._store: weakref.ref[Store] | None = None
        self._stand_ins: dict[tuple[int, ...], _StandIns] = {}

    # ------------------------------------------------------------------------------------------------- to be overridden

    def project(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Go to the other space.

        Args:
            tensors: one for each parameter.
            var: the parameters outside.
            current: what the tensors are.

        Returns:
            New tensors, not views; as many and of such shapes for everything that ``current`` may be.
        """
        raise NotImplementedError(f"{type(self).__name__} has no project(self, tensors, var, current)")

    def unproject(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Come back.

        Args:
            tensors: as many as `project` returned.
            var: the parameters outside.
            current: what the tensors are.

        Returns:
            One for each parameter, in its shape.
        """
        raise NotImplementedError(f"{type(self).__name__} has no unproject(self, tensors, var, current)")

    def owner_of(self, index: int, num_tensors: int, params: Sequence[Tensor]) -> int:
        """With which parameter the state of the tensor number ``index`` inside is kept, whose settings it has, too."""
        return index if num_tensors == len(params) else 0

    # -------------------------------------------------------------------------------------------------------- internals

    def step(self, var: Var) -> Var:
        """Run the modules in the other space."""
        if self.project_params:
            with restored(var.params):
                inner = run_modules(self.children["modules"], self._enter(var))
        else:
            inner = run_modules(self.children["modules"], self._enter(var))
        if inner.skip_update:
            for param, value in zip(var.params, self.unproject(inner.params, var, "params"), strict=True):
                param.copy_(value)
            var.skip_update = True
        var.loss = inner.loss if var.loss is None else var.loss
        var.loss_approx = inner.loss_approx if var.loss_approx is None else var.loss_approx
        var.stop = inner.stop
        var.update = self.unproject(inner.get_update(), var, "update")
        return var

    def _enter(self, var: Var) -> Var:
        """What the modules inside see."""
        update = self.project(var.get_update(), var, "update") if self.project_update else None
        with_grads = self.project_grad or update is None or (self.project_params and var.has_grads)
        grads = self.project(var.get_grad(), var, "grads") if with_grads else update
        params, owners = self._stand_ins_for(self.project(var.params, var, "params"), var)
        inner = var.clone(clone_update=False)
        inner.params, inner.update, inner._notes, inner.names = params, update, {}, {}
        assert grads is not None
        inner.grads = [grad.clone() for grad in grads] if grads is update else grads
        inner.annotations, inner.check = self._read, None
        if var.counts is not None:
            inner.counts = [var.counts[owner] for owner in owners]
        inner.closure, inner.closure_has_graph = None, False
        if self.project_params and var.closure is not None:
            inner.closure = self._closure(var, params)
        return inner

    def _closure(self, var: Var, params: Sequence[Tensor]) -> Any:
        outer = var.clone(clone_update=False)

        def closure(backward: bool = True) -> Any:
            with torch.no_grad():
                for param, value in zip(outer.params, self.unproject(params, outer, "params"), strict=True):
                    param.copy_(value)
            loss = outer.evaluate(backward)
            if backward:
                with torch.no_grad():
                    grads = self.project(outer.read_grads(), outer, "grads")
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad.to(param.dtype)
            return loss

        return closure

    def _stand_ins_for(self, values: Sequence[Tensor], var: Var) -> tuple[list[Tensor], list[int]]:
        """The tensors that stand for parameters inside, and the numbers of their owners.

        They are the same in each step, as what is remembered belongs to them.
        """
        store = self._bound.store
        if self._store is None or self._store() is not store:
            self._store, self._stand_ins = weakref.ref(store), {}
        key = tuple(map(id, var.params))
        known = self._stand_ins.get(key)
        if known is None or list(map(_form, known.tensors)) != list(map(_form, values)):
            owners = [self.owner_of(index, len(values), var.params) for index in range(len(values))]
            # (The parameters are kept so that their ids stay theirs.)
            known = _StandIns(list(var.params), [value.detach().clone() for value in values], owners)
            # Numbered for each owner, so that parameters which miss a step do not rename what belongs to the others.
            numbers: Counter[int] = Counter()
            for tensor, owner in zip(known.tensors, owners, strict=True):
                store.stand_in(tensor, var.params[owner], f"{self._bound.path}/{numbers[owner]}:")
                numbers[owner] += 1
            self._stand_ins[key] = known
        for tensor, value in zip(known.tensors, values, strict=True):
            tensor.copy_(value)
        return known.tensors, known.owners

    def _read(self, param: Tensor, key: Key[Any]) -> Any:
        raise MissingAnnotation(
            f"{self.place}: a module inside reads {key.name}, which belongs to the parameters and cannot be projected; put that "
            "module in front"
        )

    def reset(self) -> None:
        """Forget what was learned from earlier steps, also inside."""
        mark = f"{self._bound.path}/"
        for entry in self._bound.store.entries.values():
            for name in [name for name in entry if any(part.startswith(mark) for part in name.split(":"))]:
                del entry[name]
        super().reset()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_store": None, "_stand_ins": {}}


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
