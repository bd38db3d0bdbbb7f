"""Any optimizer of torch's interface as a module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphopt.errors import OptionError, UnsupportedError
from graphopt.optim.core.arithmetic import state_dtype
from graphopt.optim.core.module import Module
from graphopt.optim.core.store import StateView
from graphopt.optim.core.var import Var

# Options of a `Modular`'s groups with meanings of their own; the inner optimizer's are given to `Wrap` alone.
_NOT_OURS = {"maximize", "frozen", "foreach", "capturable", "differentiable", "fused", "num_steps", "modules"}
_MISSING = object()


class Wrap(Module):
    """Run any optimizer of torch's interface as a module: the move that it makes is the update.

    ``u ← θ - step(θ, grad=u)``: the inner optimizer gets the incoming update as its gradient. Whatever it does to the
    parameters (momentum, decoupled weight decay, projections) is in its move.

    Given a class, or a function of parameters, it steps on copies of the parameters (float32 for parameters of less precision).
    Its options that `Modular` does not use itself are hyper-parameters of this module: groups may choose them
    (``{"params": ..., "wrap.lr": 0.1}``), and so may `set_param_groups` and schedulers. Given an instance, it steps on the
    parameters, which are then put back; its groups and its schedulers are the user's own.

    What it keeps in its ``state`` and in its groups is saved, loaded and reset with the state of the chain; it must be of
    tensors, numbers, and dictionaries or lists of these. What it keeps elsewhere is not saved, nor would it be by torch.

    Args:
        opt_fn_or_instance: a subclass of `torch.optim.Optimizer`, a function that makes one of parameters, or one that was made
            of the parameters of the chain.
        *args: for the class or function, after the parameters.
        **kwargs: the same, such as ``lr``.

    Raises:
        OptionError: it is no optimizer, or cannot be made; an instance does not have the parameters of the chain.
        UnsupportedError: it evaluates the loss within a step.

    Cost: the step of the inner optimizer, and a copy of the parameters.

    Example:
        >>> from graphopt.optim import Modular
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Modular([weight], Wrap(torch.optim.Adagrad, lr=1.0), Wrap(torch.optim.SGD, lr=0.5))
        >>> weight.grad = torch.tensor([3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.5000])
    """

    def __init__(self, opt_fn_or_instance: Callable[..., Optimizer] | Optimizer, *args: Any, **kwargs: Any) -> None:
        self._make: Callable[..., Optimizer] | None = None
        self._optimizer: Optimizer | None = None  # the instance, or what was made for the copies
        self._copies: dict[Tensor, Tensor] = {}
        self._written: list[dict[str, Any]] = []  # for each group of what was made, the options last written
        self._group_of: dict[Any, int] = {}  # by sources of settings
        self._kept: dict[int, Any] = {}  # for each group what was last saved of its options
        self._initial: list[dict[str, Any]] = []  # the options of the groups of an instance
        self._is_adopted = False  # whether the state that an instance came with was taken over
        self._arguments = (args, kwargs)
        if isinstance(opt_fn_or_instance, Optimizer):
            if args or kwargs:
                raise OptionError("Wrap(optimizer, ...) with arguments for an optimizer that is made already")
            optimizer = self._optimizer = opt_fn_or_instance
            self._initial = [_options(group) for group in optimizer.param_groups]
            super().__init__({})
        else:
            if not callable(opt_fn_or_instance):
                raise OptionError(
                    f"Wrap({opt_fn_or_instance!r}); expected an optimizer, its class, or a function of parameters, as in "
                    "Wrap(torch.optim.Adam, lr=1e-3)"
                )
            self._make = opt_fn_or_instance
            optimizer = self._try()
            known = {name: value for name, value in optimizer.defaults.items() if name not in _NOT_OURS}
            super().__init__(known)
        _check_needs_no_closure(optimizer)

    @property
    def optimizer(self) -> Optimizer | None:
        """The inner optimizer; of a class it exists once there was a step."""
        return self._optimizer

    def step(self, var: Var) -> Var:
        """Let the inner optimizer step, and take its move."""
        updates = var.get_update()
        if not updates:
            return var
        with torch.no_grad():
            if self._make is None:
                var.update = self._step_in_place(var, updates)
            else:
                var.update = self._step_on_copies(var, updates)
        return var

    # ---------------------------------------------------------------------------------------------------- of an instance

    def _step_in_place(self, var: Var, updates: Sequence[Tensor]) -> list[Tensor]:
        optimizer = self._optimizer
        assert optimizer is not None
        everything = [param for group in optimizer.param_groups for param in group["params"]]
        known = set(map(id, everything))
        for param in var.params:
            if id(param) not in known:
                raise OptionError(
                    f"{self.place}: a parameter of shape {tuple(param.shape)} is not in {type(optimizer).__name__}. Make that of "
                    f"the same parameters; or, inside projections and in pure functions, give its class: "
                    f"Wrap({type(optimizer).__name__}, ...)"
                )
        before = [param.detach().clone() for param in everything]
        grads = [param.grad for param in everything]
        places = {param: self.state[param] for param in everything}
        is_empty = "group_0" not in self.global_state and not any(map(len, places.values()))
        if is_empty and not self._is_adopted:
            self._save(optimizer, places)  # it may have stepped before
        else:
            self._restore(optimizer, places)
        self._is_adopted = True
        try:
            for param in everything:
                param.grad = None
            for param, update in zip(var.params, updates, strict=True):
                param.grad = update.detach().to(param.dtype)
            optimizer.step()
            old = dict(zip(everything, before, strict=True))
            moves = [
                old[param].to(update.dtype) - param.detach().to(update.dtype)
                for param, update in zip(var.params, updates, strict=True)
            ]
        finally:
            for param, value, grad in zip(everything, before, grads, strict=True):
                param.detach().copy_(value)
                param.grad = grad
        self._save(optimizer, places)
        return moves

    # -------------------------------------------------------------------------------------------------------- of a class

    def _step_on_copies(self, var: Var, updates: Sequence[Tensor]) -> list[Tensor]:
        for param, own in self._copies.items():
            own.grad = None
            if own.shape != param.shape or own.device != param.device or own.dtype != state_dtype(param):
                self._copies = {}  # the model was moved
                break
        lasting = self._bound.store.entries
        if not all(param in self._copies for param in var.params) and not all(p in lasting for p in self._copies):
            self._copies = {}  # of tensors that projections and pure functions make anew in each step
        optimizer = self._for_params(var)
        copies = [self._copies[param] for param in var.params]
        for own, param, update in zip(copies, var.params, updates, strict=True):
            own.detach().copy_(param.detach())
            own.grad = update.detach().to(own.dtype)
        places = {self._copies[param]: self.state[param] for param in var.params}
        self._restore(optimizer, places)
        before = [own.detach().clone() for own in copies]
        optimizer.step()
        moves = [old - own.detach() for old, own in zip(before, copies, strict=True)]
        self._save(optimizer, places)
        for own in copies:
            own.grad = None
        return moves

    def _for_params(self, var: Var) -> Optimizer:
        """The inner optimizer of the copies, with the present hyper-parameters."""
        if not self._copies:
            self._optimizer, self._written, self._group_of, self._kept = None, [], {}, {}
        for param in var.params:
            source = 0 if var.settings is None else var.source_of(param)
            settings = {name: value for name, value in self.get_settings(param).items() if name in self.defaults}
            if param not in self._copies:
                own = torch.empty_like(param, dtype=state_dtype(param), requires_grad=True)
                self._copies[param] = own
                if self._optimizer is None:
                    self._optimizer = self._build([{"params": [own], **settings}])
                elif source in self._group_of:
                    self._optimizer.param_groups[self._group_of[source]]["params"].append(own)
                else:
                    self._optimizer.add_param_group({"params": [own], **settings})
                if source not in self._group_of:
                    self._group_of[source] = len(self._written)
                    self._written.append(dict(settings))
            assert self._optimizer is not None
            if source not in self._group_of:  # it was given settings of its own since
                self._copies = {}
                return self._for_params(var)
            group = self._optimizer.param_groups[self._group_of[source]]
            written = self._written[self._group_of[source]]
            for name, value in settings.items():
                # Only where they were changed: some optimizers adapt options of their groups themselves.
                if not _equal(value, written.get(name, _MISSING)):
                    group[name] = written[name] = value
        assert self._optimizer is not None
        return self._optimizer

    def _build(self, params: Any) -> Optimizer:
        args, kwargs = self._arguments
        assert self._make is not None
        with torch.enable_grad():
            return self._make(params, *args, **kwargs)

    def _try(self) -> Optimizer:
        """One of a parameter that nobody needs: its options are known then, and whether they are right."""
        with torch.no_grad():
            param = torch.zeros(2, 2).requires_grad_()  # some take matrices alone
        try:
            optimizer: Any = self._build([param])
        except Exception as error:
            raise OptionError(f"Wrap: {_name(self._make)} cannot be made: {error}") from error
        if not isinstance(optimizer, Optimizer):
            raise OptionError(
                f"Wrap: {_name(self._make)} made {optimizer!r}; expected a torch.optim.Optimizer of the parameters given to it"
            )
        return optimizer

    # ------------------------------------------------------------------------------------------------------------- state

    def _save(self, optimizer: Optimizer, places: Mapping[Tensor, StateView]) -> None:
        """Remember what the inner optimizer does; the same tensors, without copies."""
        for own, view in places.items():
            state = optimizer.state.get(own, {})
            if not _is_same(state, view):
                _replace(view, state)
        shared = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
        if shared:
            self.global_state["shared"] = shared
        for index, group in enumerate(optimizer.param_groups):
            written = {} if self._make is None else self._written[index]
            options = {
                name: value
                for name, value in _options(group).items()
                if not _equal(value, written.get(name, _MISSING))
                and _is_plain(value)
                and self._is_news(group, name, value)
            }
            if options:
                self.global_state[f"group_{index}"] = self._kept[index] = options

    def _is_news(self, group: Mapping[str, Any], name: str, value: Any) -> bool:
        """Whether an option is not just one that the optimizer was made with."""
        return (
            self._make is None
            or name in self.defaults
            or self._optimizer is None
            or (not _equal(value, self._optimizer.defaults.get(name, _MISSING)))
        )

    def _restore(self, optimizer: Optimizer, places: Mapping[Tensor, StateView]) -> None:
        """Give the inner optimizer what was loaded, or take away what was reset."""
        for own, view in places.items():
            state = optimizer.state.get(own, {})
            if not _is_same(state, view):
                if len(view):
                    _replace(optimizer.state[own], view)
                else:
                    optimizer.state.pop(own, None)
        known = self.global_state
        shared = known.get("shared", {})
        for key in [key for key in optimizer.state if not isinstance(key, Tensor) and key not in shared]:
            del optimizer.state[key]
        for key, value in shared.items():
            optimizer.state[key] = value
        for index, group in enumerate(optimizer.param_groups):
            options = known.get(f"group_{index}")
            kept = self._kept.get(index)
            if options is None and kept is not None:  # after a reset
                for name in kept:
                    group.pop(name)
                group.update(self._initial[index])
                self._kept.pop(index)
            elif options is not None and options is not kept:
                group.update(options)
                self._kept[index] = options

    def reset(self) -> None:
        """Forget what was learned, of an instance as well."""
        super().reset()
        self.forget()

    def forget(self) -> None:
        """Make the inner optimizer of a class anew, of what is in the state."""
        if self._make is not None:
            self._copies = {}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self._make is not None:
            state |= {"_optimizer": None, "_copies": {}, "_written": [], "_group_of": {}, "_kept": {}}
        return state

    def __repr__(self) -> str:
        if self._make is None:
            return f"Wrap({type(self._optimizer).__name__}(...))"
        args, kwargs = self._arguments
        parts = [_name(self._make), *map(repr, args), *[f"{name}={value!r}" for name, value in kwargs.items()]]
        return f"Wrap({', '.join(parts)})"


def _check_needs_no_closure(optimizer: Optimizer) -> None:
    if step_needs_closure(optimizer):
        raise UnsupportedError(
            f"Wrap: {type(optimizer).__name__} evaluates the loss within a step; a module gets the update that is at hand. Use a "
            "module that does the same (m.LBFGS, a line search), or graphopt.optim.wrappers.SplitOptimizers"
        )


def step_needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step()`` of an optimizer cannot do without a closure."""
    from graphopt.optim.core.modular import Modular
    from graphopt.optim.core.module import walk

    if isinstance(optimizer, Modular):
        return any(module.needs_closure for module in walk(optimizer.modules))
    if getattr(optimizer, "needs_closure", False):  # those of graphopt.optim.wrappers
        return True
    try:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
    except ValueError:  # no signature
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _replace(target: Any, source: Mapping[str, Any]) -> None:
    for name in list(target):
        if name not in source:
            del target[name]
    for name, value in source.items():
        target[name] = value


def _is_same(state: Mapping[str, Any], view: Mapping[str, Any]) -> bool:
    """Whether both hold the same objects."""
    return len(state) == len(view) and all(name in view and view[name] is value for name, value in state.items())


def _equal(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and torch.equal(left, right)
    return type(left) is type(right) and bool(left == right)


def _is_plain(value: Any) -> bool:
    """Whether `torch.load` reads it with ``weights_only=True``, and torch's ``load_state_dict`` leaves it as it is."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, Tensor))


def _name(function: Any) -> str:
    return getattr(function, "__name__", None) or repr(function)
