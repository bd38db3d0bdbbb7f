"""The base classes of optimizer modules: `Module` for any step, `Rule` for what is a pure function of one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, cast

from torch import Tensor, is_grad_enabled

from graphopt import _compat
from graphopt.annotations import Key
from graphopt.errors import ModuleError, OptionError
from graphopt.optim.core.arithmetic import state_dtype, zeros
from graphopt.optim.core.batches import MIN_TENSORS, Batches
from graphopt.optim.core.bounds import Bounds, is_number
from graphopt.optim.core.context import Context, Everything, Settings
from graphopt.optim.core.store import StateView, Store
from graphopt.optim.core.var import Var


class Module:
    """A step of an optimizer: takes a `Var`, changes its update (or anything else), and returns it.

    A subclass overrides `step`. What it remembers of a parameter ``p`` is ``self.state[p]``, a dictionary; its
    hyper-parameters for ``p`` are ``self.settings[p]``.

    Args:
        defaults: hyper-parameters and their values. One that has an entry in `bounds` is a number, and may also be given
            as a function of the number of steps made before (a schedule).
        **children: modules, or lists of them, that this one runs.

    Attributes:
        bounds: for each numeric hyper-parameter the values that it may take.
        reads: the annotations that it needs.
        needs_closure: whether it evaluates the closure.
        has_own_tensors: whether its children see other tensors than the parameters, so that their state is of other shapes.
        takes_sharded: whether parameters may be DTensors; not so where it keeps tensors of other shapes than theirs.
        must_be_last: whether it reckons with the parameters moving by what it returns, so that nothing may follow it.
        selects_params: whether its children may see some of the parameters only.
        treats_each_alone: whether what it does to a parameter depends on that parameter alone, apart from what its children do.
            Rules say so by themselves.
        replaces_update: whether it ignores what the modules before it made of the gradient, so that these would be in vain.
    """

    bounds: ClassVar[Mapping[str, Bounds]] = MappingProxyType({})
    reads: ClassVar[tuple[Key[Any], ...]] = ()
    needs_closure: ClassVar[bool] = False
    has_own_tensors: ClassVar[bool] = False
    replaces_update: ClassVar[bool] = False
    treats_each_alone: ClassVar[bool] = False
    takes_sharded: ClassVar[bool] = True
    selects_params: ClassVar[bool] = False
    must_be_last: ClassVar[bool] = False
    is_learning_rate: ClassVar[bool] = False  # the last such module of a chain owns the option ``lr`` of a group

    def __init__(self, defaults: Mapping[str, Any] | None = None, **children: Any) -> None:
        self._binding: Binding | None = None
        self.defaults: dict[str, Any] = {}
        self.schedules: dict[str, Callable[[Any], Any]] = {}
        for name, value in (defaults or {}).items():
            if name in self.bounds and callable(value):
                self.schedules[name] = value
                value = value(0)
            self.check_setting(name, value)
            self.defaults[name] = float(value) if name in self.bounds and isinstance(value, int) else value
        self.children = {
            name: as_chain(child, f"{type(self).__name__}({name}=...)") for name, child in children.items()
        }
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        self.check_settings(self.defaults)

    # ------------------------------------------------------------------------------------------------- to be overridden

    def step(self, var: Var) -> Var:
        """Make the step.

        Args:
            var: the parameters and what is known about them.

        Returns:
            ``var``, or another one to go on with.
        """
        raise NotImplementedError(f"{type(self).__name__} has no step(self, var)")

    def params_for(self, child: str, var: Var) -> Sequence[int]:
        """Which parameters of a step a child sees, by their numbers in ``var.params``; all, if not overridden."""
        return range(len(var.params))

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Raise `OptionError` if hyper-parameters contradict each other; called with all of them."""

    def check_annotations(self, param: Tensor, notes: Mapping[str, Any], name_of: Callable[[Tensor], str]) -> None:
        """Raise if what `reads` names cannot be used; called in an optimizer before a step has changed anything.

        Args:
            param: a parameter.
            notes: by name its annotations.
            name_of: names a parameter for an error.
        """

    def reset(self) -> None:
        """Forget what was learned from earlier steps."""
        for view in self._views():
            view.clear()
        for module in self.descendants():
            module.reset()

    def forget(self) -> None:
        """Drop what was planned for tensors of the state: they may have been replaced. Nothing that was learned is lost."""

    # ------------------------------------------------------------------------------------------------- for subclasses

    @property
    def state(self) -> Mapping[Tensor, StateView]:
        """For each parameter a dictionary of what this module remembers of it."""
        return _States(self._bound)

    @property
    def global_state(self) -> StateView:
        """A dictionary of what this module remembers once for all parameters."""
        binding = self._bound
        return binding.store.of(binding.first_param(), f"{binding.path}/global")

    @property
    def settings(self) -> Mapping[Tensor, Settings]:
        """For each parameter the hyper-parameters of this module."""
        return _SettingsOf(self)

    def get_settings(self, param: Tensor) -> Settings:
        """The hyper-parameters for a parameter: `set_param_groups` before the options of its group, before the defaults."""
        settings = Settings(self.defaults)
        if self._binding is not None:
            settings.update(self._binding.group_settings(param))
            param = self._binding.store.owner(param)
        override = self._overrides.get(param)
        if override is not None:
            settings.update(override)
        return settings

    def set_param_groups(self, groups: Iterable[Mapping[str, Any]]) -> Module:
        """Choose hyper-parameters of this module for some parameters; they win over the optimizer's groups.

        Args:
            groups: dictionaries with ``params`` (a tensor or several) and hyper-parameters.

        Returns:
            The module itself.

        Raises:
            OptionError: the module has no such hyper-parameter, or its value is out of range.
        """
        checked: list[tuple[list[Tensor], dict[str, Any]]] = []
        for group in groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for name, value in settings.items():
                if name not in self.defaults:
                    raise OptionError(f"{self.place}: no hyper-parameter {name!r}; there are {sorted(self.defaults)}")
                self.check_setting(name, value)
            self.check_settings({**self.defaults, **settings})
            params = group["params"]
            checked.append(([params] if isinstance(params, Tensor) else list(params), settings))
        for params, settings in checked:
            for param in params:
                self._overrides.setdefault(param, {}).update(settings)
        if self._binding is not None:
            self._binding.on_change()
        return self

    @property
    def has_one_choice(self) -> bool:
        """Whether the hyper-parameters are those of one group, the same for all parameters."""
        return not self._overrides and (self._binding is None or self._binding.has_one_group())

    @property
    def overridden(self) -> Mapping[Tensor, Mapping[str, Any]]:
        """What `set_param_groups` has chosen, by parameter."""
        return self._overrides

    def descendants(self) -> Iterator[Module]:
        """The modules of the children, in order; not their own children."""
        for chain in self.children.values():
            yield from chain

    @property
    def place(self) -> str:
        """The module for an error: its name and its place in the chain."""
        return type(self).__name__ if self._binding is None else self._binding.place

    # ------------------------------------------------------------------------------------------------------ internals

    def check_setting(self, name: str, value: Any) -> None:
        """Raise `OptionError` if a hyper-parameter is out of range."""
        bounds = self.bounds.get(name)
        if bounds is None or value is None or callable(value):
            return
        if not is_number(value) or value not in bounds:
            raise OptionError(f"{self.place}: {name}={value!r}; expected a number in {bounds}")

    def bind(self, binding: Binding | None) -> None:
        """Give the module its place in an optimizer."""
        self._binding = binding

    @property
    def binding(self) -> Binding | None:
        """The module's place in an optimizer, if it has one."""
        return self._binding

    @property
    def _bound(self) -> Binding:
        if self._binding is None:
            raise ModuleError(
                f"{type(self).__name__} belongs to no optimizer yet; state and settings exist once it is "
                "in a Modular(params, ...)"
            )
        return self._binding

    def _views(self) -> list[StateView]:
        binding = self._bound
        views = [binding.store.of(param, binding.path) for param in list(binding.store.entries)]
        return [*views, binding.store.of(binding.first_param(), f"{binding.path}/global")] if views else views

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_batches"} | {"_binding": None}

    def __repr__(self) -> str:
        parts = [f"{name}={value!r}" for name, value in self.defaults.items()]
        parts += [f"{name}={chain!r}" for name, chain in self.children.items()]
        return f"{type(self).__name__}({', '.join(parts)})"


class Rule(Module):
    """A module whose mathematics is a pure function of one tensor at a time.

    A subclass gives `update`, and if it remembers anything, `State` (a NamedTuple of tensors) and `init`.

    Attributes:
        State: what is remembered of a parameter, or ``None``.
        elementwise: whether `update` is made of element-wise operations and of the reductions in
            `graphopt.optim.core.arithmetic` alone, so that it may be run on one-dimensional views. If not, tensors have their
            shapes.
        batches: of a rule that is not element-wise, whether many small tensors of equal shape are stepped by one call under
            ``torch.func.vmap``.
    """

    State: ClassVar[type[tuple[Any, ...]] | None] = None
    elementwise: ClassVar[bool] = True
    batches: ClassVar[bool] = False
    _batches: Batches | None = None

    def state_type(self, settings: Settings) -> type[tuple[Any, ...]] | None:
        """`State`, where it does not depend on the settings."""
        return self.State

    def init(self, param: Tensor, settings: Settings) -> tuple[Tensor, ...]:
        """What is remembered of a parameter before its first step, as a `State`."""
        raise NotImplementedError(f"{type(self).__name__} has a State but no init(self, param, settings)")

    def update(self, update: Tensor, state: Any, settings: Settings, context: Context) -> tuple[Tensor, Any]:
        """The new update of one tensor; a pure function.

        Args:
            update: what arrives from the module before, at least float32.
            state: a `State`, or ``()``.
            settings: numbers may be tensors of shape ().
            context: what else is known.

        Returns:
            The new update and the new state.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update(self, update, state, settings, context)")

    def measure(self, updates: Sequence[Tensor], settings: Settings) -> Mapping[str, Tensor]:
        """What the rule must know of all tensors together, as tensors of shape (); it arrives as ``context.measured``.

        Called with the settings of the first parameter. Overriding it splits compiled kernels in front of the rule.
        """
        return {}

    def measure_all(self, everything: Everything, settings: Settings) -> Mapping[str, Tensor]:
        """Like `measure`, for rules that need more than the updates."""
        return self.measure(everything.updates, settings)

    @property
    def measures(self) -> bool:
        """Whether the rule needs all tensors together."""
        return type(self).measure is not Rule.measure or type(self).measure_all is not Rule.measure_all

    @property
    def is_elementwise(self) -> bool:
        """Whether the rule and its children can be run on one-dimensional views."""
        return self.elementwise and all(
            isinstance(module, Rule) and module.is_elementwise and not module.measures for module in self.descendants()
        )

    def step(self, var: Var) -> Var:
        """Run the rule for each tensor; children see a copy of the incoming update."""
        updates = var.read_update()
        is_borrowed = var.update is None
        operands = self.run_children(var) if self.children else {}
        measured = self._measure(var, updates, operands) if self.measures and updates else {}
        news = list(updates)
        alone: Sequence[int] = range(len(updates))
        if self.batches and self._bound.batches and len(updates) >= MIN_TENSORS:
            self._batches = self._batches or Batches(self)
            alone = self._batches.run(var, updates, operands, measured, news)
        for index in alone:
            param, update = var.params[index], updates[index]
            settings = self.plain_settings(param)
            old = self.get_state(param, settings)
            if update.numel() == 0:
                continue  # it has no norm, no mean and no largest element
            context = make_context(self, var, index)  # not before: it may hold a copy of the gradient
            context.operands = {name: tensors[index] for name, tensors in operands.items()}
            context.measured = measured
            new, state = self.update(update, old, settings, context)
            self.set_state(param, state)
            new = new.to(update.dtype)  # numbers in float64 widen what has shape (), and only that
            news[index] = new.clone() if is_borrowed and _share_memory(new, update) else new
        var.update = news
        return var

    def _measure(
        self, var: Var, updates: Sequence[Tensor], operands: Mapping[str, Sequence[Tensor]]
    ) -> Mapping[str, Tensor]:
        contexts, states = [], []
        for index, param in enumerate(var.params):
            context = make_context(self, var, index)
            context.operands = {name: tensors[index] for name, tensors in operands.items()}
            contexts.append(context)
            states.append(self.get_state(param, self.plain_settings(param)))
        return self.measure_all(Everything(contexts, updates, operands, states), self.plain_settings(var.params[0]))

    def forget(self) -> None:
        """Drop the buffers that hold the state of many tensors; what stands in the store are views of them."""
        if self._batches is not None:
            self._batches = None

    def plain_settings(self, param: Tensor) -> Settings:
        """The hyper-parameters for a parameter, numbers without axes."""
        settings = self.get_settings(param)
        for name in self.bounds:
            if isinstance(value := settings.get(name), Tensor) and value.dim():
                settings[name] = value.reshape(())  # one of shape (1,) would give a shape to what has none
        return settings

    def run_children(self, var: Var) -> dict[str, list[Tensor]]:
        """What each child makes of a copy of the incoming update."""
        operands: dict[str, list[Tensor]] = {}
        for name, chain in self.children.items():
            branch = run_modules(chain, var.clone())
            operands[name] = updates_for(var.params, branch)
            var.update_attrs_from_clone_(branch)
        return operands

    def get_state(self, param: Tensor, settings: Settings) -> Any:
        """The `State` of a parameter; made at first."""
        kind = cast(Any, self.state_type(settings))
        if kind is None:
            return ()
        view = self.state[param]
        if any(name not in view for name in kind._fields):
            self.set_state(param, self.init(param, settings))
        return kind(*[view[name] for name in kind._fields])

    def set_state(self, param: Tensor, state: Any) -> None:
        """Remember a `State`: in place where the store keeps its tensors."""
        if not state:
            return
        binding = self._bound
        view = binding.store.of(param, binding.path)
        for name, new in zip(state._fields, state, strict=True):
            old = view.get(name)
            if old is None:
                view[name] = new
            elif binding.replaces:
                view[name] = new.to(old.dtype)
            elif old is not new:
                # A number that is remembered of a DTensor is the same in all processes, and an ordinary tensor.
                old.copy_(_compat.whole(new) if type(old) is Tensor else _compat.placed_like(new, old))


class Binding:
    """A module's place: in which chain, and where its state and its settings are.

    Args:
        path: unique among the modules of the chain; its state stands behind this name.
        place: the module for an error.
        store: where its state is.
        keys: for each hyper-parameter the option of a group that holds it.
        groups: for each parameter its group, ``None`` where there are no groups.
        replaces: whether new state takes the place of the old instead of being copied into it.
        batches: whether rules that may do so step tensors of equal shape together.
        on_change: called when hyper-parameters of single parameters have been chosen anew.
        has_one_group: whether all parameters are in one group, or there are no groups.
    """

    def __init__(
        self,
        path: str,
        place: str,
        store: Store,
        keys: Mapping[str, str],
        groups: Callable[[Tensor], Mapping[str, Any]] | None,
        first_param: Callable[[], Tensor],
        replaces: bool = False,
        batches: bool = False,
        on_change: Callable[[], None] = lambda: None,
        has_one_group: Callable[[], bool] = lambda: True,
    ) -> None:
        self.path = path
        self.place = place
        self.store = store
        self.keys = dict(keys)
        self.groups = groups
        self.first_param = first_param
        self.replaces = replaces
        self.batches = batches
        self.on_change = on_change
        self.has_one_group = has_one_group

    def group_settings(self, param: Tensor) -> dict[str, Any]:
        """The hyper-parameters that the parameter's group names."""
        if self.groups is None:
            return {}
        group = self.groups(param)
        return {name: group[key] for name, key in self.keys.items() if key in group}


class _States(Mapping[Tensor, StateView]):
    def __init__(self, binding: Binding) -> None:
        self._binding = binding

    def __getitem__(self, param: Tensor) -> StateView:
        return self._binding.store.of(param, self._binding.path)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._binding.store.entries)

    def __len__(self) -> int:
        return len(self._binding.store.entries)


class _SettingsOf(Mapping[Tensor, Settings]):
    def __init__(self, module: Module) -> None:
        self._module = module

    def __getitem__(self, param: Tensor) -> Settings:
        return self._module.get_settings(param)

    def __iter__(self) -> Iterator[Tensor]:
        binding = self._module.binding
        return iter(()) if binding is None else iter(binding.store.entries)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _share_memory(left: Tensor, right: Tensor) -> bool:
    return left is right or left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def make_context(module: Module, var: Var, index: int) -> Context:
    """What a rule may know of the parameter number ``index``."""
    param = var.params[index]
    if is_grad_enabled() and param.requires_grad:
        param = param.clone()  # what autograd saves of it must not be what the step writes to
    grad = var.grads[index]
    assert var.counts is not None
    return Context(
        param=param,
        grad=grad.to(state_dtype(grad)),
        count=var.counts[index],
        numel=param.numel(),
        annotations=var.notes_of(index, module.reads) if module.reads else {},
        loss=var.loss if isinstance(var.loss, Tensor) else None,
    )


def as_chain(modules: Any, where: str) -> list[Module]:
    """A module, or (nested) lists of modules, as one flat list.

    Raises:
        OptionError: something is not a module.
    """
    if isinstance(modules, Module):
        return [modules]
    if isinstance(modules, type) and issubclass(modules, Module):
        raise OptionError(f"{where}: {modules.__name__} is a class; write {modules.__name__}()")
    if isinstance(modules, (list, tuple)):
        return [module for entry in modules for module in as_chain(entry, where)]
    raise OptionError(f"{where}: {modules!r} is not a module of graphopt.optim.m, nor a list of modules")


def run_modules(modules: Sequence[Module], var: Var) -> Var:
    """Run modules one after another."""
    for module in modules:
        var = module.step(var)
        if var.stop:
            break
    return var


def updates_for(params: Sequence[Tensor], var: Var) -> list[Tensor]:
    """The update of each of these parameters; zeros for those that a chain left out or has moved itself."""
    if len(var.params) == len(params) and not var.skip_update:
        return var.get_update()
    found = {} if var.skip_update else dict(zip(var.params, var.get_update(), strict=True))
    return [found[param] if param in found else zeros(param) for param in params]


def walk(modules: Sequence[Module]) -> Iterator[Module]:
    """All modules of a chain and their children, parents first."""
    for module in modules:
        yield module
        yield from walk(list(module.descendants()))
