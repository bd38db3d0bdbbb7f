"""Chains as pure functions: `Transform`, and `chain`, which makes one of modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.annotations import Key
from graphopt.errors import ClosureError, MissingAnnotation, OptionError, UnsupportedError
from graphopt.optim.core.module import Rule, as_chain, run_modules, updates_for, walk
from graphopt.optim.core.naming import Named, bind, name_modules
from graphopt.optim.core.store import Store
from graphopt.optim.core.var import Var


@dataclass(frozen=True)
class Step:
    """What a step knows beside the gradients.

    Attributes:
        grads: the gradients, if the updates that are passed in are not.
        loss: the loss at the parameters.
        loss_fn: computes the loss of parameters, for modules that need a closure.
        annotations: for each key values like the parameters (a pytree of the same form).
    """

    grads: Any = None
    loss: Tensor | None = None
    loss_fn: Callable[[Any], Tensor] | None = None
    annotations: Mapping[Key[Any], Any] = field(default_factory=dict)


class ChainState(NamedTuple):
    """What a chain remembers.

    Attributes:
        step: how many steps were made, shape (), float64.
        states: for each parameter, in the order of the pytree's leaves, a dictionary of ``<module>.<name>`` and tensors.
    """

    step: Tensor
    states: list[dict[str, Any]]


class Transform(NamedTuple):
    """An optimizer as two pure functions.

    Attributes:
        init: ``init(params) -> state``. ``params`` is a pytree of tensors.
        update: ``update(updates, state, params, *, step=None) -> (updates, state)``. ``updates`` are gradients like
            ``params``; those returned are to be **subtracted** (`apply_updates`). ``step`` is a `Step`. Nothing that is
            passed in is changed; usable under ``torch.func.vmap``, ``grad`` and ``torch.compile``.

    Both can be differentiated, so that the results of parameters which require gradients hold the graph of all steps before.
    Call them under ``torch.no_grad()`` where nobody asks for that; ``torch.func.grad`` inside of it works all the same.
    """

    init: Callable[[Any], ChainState]
    update: Callable[..., tuple[Any, ChainState]]


def chain(*modules: Any) -> Transform:
    """The pure functions of a chain of modules.

    Args:
        *modules: modules of ``graphopt.optim.m``, user's own, or lists of them. Hyper-parameters may be tensors of shape (),
            also such that ``torch.func.grad`` differentiates.

    Returns:
        A `Transform`. Modules that are no rules (line searches, a user's own `Module`) run on copies of the state.

    Raises:
        OptionError: no modules, or something that is no module.

    Example:
        >>> from graphopt.optim import m
        >>> sgd = chain(m.HeavyBall(0.5), m.LR(0.1))
        >>> params = [torch.tensor([1.0])]
        >>> state = sgd.init(params)
        >>> for _ in range(2):
        ...     updates, state = sgd.update([2 * params[0]], state, params)
        ...     params = apply_updates(params, updates)
        >>> params
        [tensor([0.5400])]
    """
    flat = as_chain(modules, "chain(...)")
    if not flat:
        raise OptionError("chain() without modules; pass at least one, such as m.LR(0.1)")
    named = name_modules(flat)

    def init(params: Any) -> ChainState:
        leaves = _real(pytree.tree_leaves(params))
        device = leaves[0].device if leaves else None
        states: list[dict[str, Any]] = [{} for _ in leaves]
        with _bound(named, leaves, states):
            inside = [id(child) for module in walk(flat) if module.has_own_tensors for child in walk([module])]
            for module in walk(flat):
                if isinstance(module, Rule) and id(module) not in inside:
                    for leaf in leaves:
                        module.get_state(leaf, module.get_settings(leaf))
        return ChainState(torch.zeros((), dtype=torch.float64, device=device), states)

    def update(updates: Any, state: ChainState, params: Any, *, step: Step | None = None) -> tuple[Any, ChainState]:
        step = step or Step()
        leaves, spec = pytree.tree_flatten(params)
        given = leaves_like(params, updates, "chain.update: updates")
        if len(state.states) != len(leaves):
            raise OptionError(
                f"chain.update: the state of {len(state.states)} parameters for {len(leaves)} parameters; pass what "
                "init(params) or the update before has returned"
            )
        grads = given if step.grads is None else leaves_like(params, step.grads, "chain.update: Step(grads=...)")
        count = state.step + 1
        states = [dict(entry) for entry in state.states]
        annotations = _reader(step, params)
        closure, leaves = _closure(step, leaves, spec, named)
        originals, leaves, given, grads = leaves, _real(leaves), _real(given), _real(grads)
        with _bound(named, leaves, states), _schedules(named, state.step):
            _copy_what_is_written(named, states)
            var = Var(
                leaves,
                grads=grads,
                closure=closure,
                loss=step.loss,
                counts=[count] * len(leaves),
                annotations=lambda param, key: annotations(_index(leaves, param), key),
                state=dict(zip(leaves, states, strict=True)),
            )
            var.place = next((entry.place for entry in named if entry.module.needs_closure), var.place)
            var.update = [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in given]
            if any(not isinstance(module, Rule) for module in walk(flat)):
                var.update = [leaf.clone() for leaf in var.update]
            with torch.no_grad() if closure is not None else nullcontext():
                var = run_modules(flat, var)
            news = [
                torch.view_as_complex(new) if leaf.is_complex() else new
                for leaf, new in zip(originals, updates_for(leaves, var), strict=True)
            ]
        return pytree.tree_unflatten(news, spec), ChainState(count, states)

    return Transform(init, update)


def apply_updates(params: Any, updates: Any) -> Any:
    """``params - updates``, leaf by leaf, in the dtype of the parameters."""
    return pytree.tree_map(lambda param, update: (param - update).to(param.dtype), params, updates)


def leaves_like(params: Any, tree: Any, what: str, has_shapes: bool = True) -> list[Any]:
    """The leaves of a pytree in the order of the leaves of ``params``; dictionaries may be in another order.

    Args:
        params: a pytree of tensors.
        tree: another of the same structure.
        what: names it for an error.
        has_shapes: whether its leaves must be tensors of the shapes of the parameters.

    Raises:
        OptionError: the structure, or a shape, is another one.
    """
    leaves, spec = pytree.tree_flatten(params)
    if type(tree) in (list, tuple) and spec.type in (list, tuple):
        tree = spec.type(tree)  # torch.autograd.grad returns tuples
    try:
        found: list[Any] = spec.flatten_up_to(tree)
    except ValueError as error:
        raise OptionError(
            f"{what}: not of the structure of the parameters: {error} Pass one tensor for each parameter, in the same "
            "(nested) dictionaries and lists"
        ) from error
    for leaf, value in zip(leaves, found, strict=True):
        if has_shapes and not (isinstance(value, Tensor) and value.shape == leaf.shape):
            name = next(path for path, other in pytree.tree_leaves_with_path(params) if other is leaf)
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise OptionError(
                f"{what}: {got} for the parameter {pytree.keystr(name) or 'itself'} of shape {tuple(leaf.shape)}; pass a "
                "tensor of that shape (zeros if it got no gradient), or leave the parameter out everywhere"
            )
    return found


@contextmanager
def _bound(named: Sequence[Named], leaves: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> Iterator[None]:
    before = [entry.module.binding for entry in named]
    store = Store(dict(zip(leaves, states, strict=True)))
    bind(named, store, None, lambda: leaves[0], replaces=True)
    try:
        yield
    finally:
        for entry, binding in zip(named, before, strict=True):
            entry.module.bind(binding)


@contextmanager
def _schedules(named: Sequence[Named], step: Tensor) -> Iterator[None]:
    """Hyper-parameters that are functions of the number of steps, evaluated."""
    changed = [(entry.module, dict(entry.module.defaults)) for entry in named if entry.module.schedules]
    try:
        for module, _ in changed:
            module.defaults.update({name: schedule(step) for name, schedule in module.schedules.items()})
        yield
    finally:
        for module, defaults in changed:
            module.defaults.update(defaults)


def _copy_what_is_written(named: Sequence[Named], states: Sequence[dict[str, Any]]) -> None:
    """Modules that are no rules may write to their state."""
    prefixes = tuple(f"{entry.path}{mark}" for entry in named if not isinstance(entry.module, Rule) for mark in "./")
    for entry in states:
        for name, value in entry.items():
            if prefixes and name.startswith(prefixes):
                entry[name] = value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _closure(
    step: Step, leaves: list[Tensor], spec: Any, named: Sequence[Named]
) -> tuple[Callable[..., Tensor] | None, list[Tensor]]:
    needy = [entry for entry in named if entry.module.needs_closure]
    if not needy:
        return None, leaves
    if step.loss_fn is None:
        raise ClosureError(
            f"{needy[0].place} needs the loss as a function of the parameters; pass step=Step(loss_fn=...) to update()"
        )
    if any(leaf.is_complex() for leaf in leaves):
        raise UnsupportedError(
            f"a parameter is complex, and {needy[0].place} evaluates the loss; make torch.view_as_real(param) the parameter"
        )
    loss_fn = step.loss_fn
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]

    def closure(backward: bool = True) -> Tensor:
        loss = loss_fn(pytree.tree_unflatten(own, spec))
        if backward:
            for leaf, grad in zip(own, torch.autograd.grad(loss, own), strict=True):
                leaf.grad = grad
        return loss

    return closure, own


def _reader(step: Step, params: Any) -> Callable[[int, Key[Any]], Any]:
    def read(index: int, key: Key[Any]) -> Any:
        for known, tree in step.annotations.items():
            if known.name == key.name:
                if pytree.tree_structure(tree).is_leaf():
                    return tree  # one value for all parameters
                return leaves_like(params, tree, f"chain.update: Step(annotations={{{key.name.upper()}: ...}})", False)[
                    index
                ]
        raise MissingAnnotation(
            f"no {key.name}: pass step=Step(annotations={{{key.name.upper()}: ...}}); it is provided by {key.provider}"
        )

    return read


def _index(leaves: Sequence[Tensor], param: Tensor) -> int:
    return next(index for index, leaf in enumerate(leaves) if leaf is param)


def _real(tensors: list[Tensor]) -> list[Tensor]:
    """Complex tensors as pairs of real ones, as in every optimizer of torch."""
    return [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
