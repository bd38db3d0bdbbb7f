"""`Modular`: a chain of modules as a `torch.optim.Optimizer`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from graphopt import _compat
from graphopt import annotations as noted
from graphopt.errors import ClosureError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim.base_optimizer import is_count
from graphopt.optim.core.flat.segment import FlatSegment, Mode, apply_updates
from graphopt.optim.core.gradients import check_layouts, check_sharding, find_nonfinite, is_cheap_to_check
from graphopt.optim.core.memo import Memo
from graphopt.optim.core.module import Module, Rule, as_chain, walk
from graphopt.optim.core.naming import bind, check_group, check_names, check_order, name_modules
from graphopt.optim.core.notes import check_notes, read_note
from graphopt.optim.core.param_table import ParamTable
from graphopt.optim.core.state_dicts import all_params, check_state_dict, restore_dtypes
from graphopt.optim.core.step_counts import StepCounts
from graphopt.optim.core.store import Store
from graphopt.optim.core.var import Var

if TYPE_CHECKING:
    from graphopt.optim.core.in_backward import BackwardSteps

_FLAGS = ("foreach", "capturable", "differentiable", "fused", "maximize")
_MAX_NAMES = 10


class Modular(torch.optim.Optimizer):
    """An optimizer made of modules that run one after another on the gradients; the result is subtracted.

    Every hyper-parameter of every module is an option of the parameter groups, under its name, or under ``<module>.<name>``
    where two modules share it (``adam.eps``); `option_names` lists them. ``lr`` is read by the last `LR`; a chain without one
    multiplies the update by it.

    Args:
        params: parameters, groups of them, named parameters, or a module.
        *modules: modules of ``graphopt.optim.m``, of your own (`Module`), or lists of them.
        maximize: go up instead of down.
        foreach: ``True`` runs element-wise modules by torch's ``_foreach`` functions, ``False`` one tensor at a time.
        capturable: keep all numbers on the device, so that a step can be captured in a CUDA graph.
        differentiable: let autograd run through the step.
        fused: ``True`` runs element-wise modules in compiled kernels, or in torch's own where the chain equals one of its
            optimizers; an error where that fails. ``None`` for this and ``foreach`` chooses by the number of elements.
        error_if_nonfinite: whether to look for NaN and infinities in the gradients before each step, which reads all of
            them once more. ``None``: only where that costs nothing to speak of, on a CPU with at most half a million elements.
        deterministic: every step's closure computes the same function of the parameters and of nothing else. It is then not
            evaluated again at a point where it was lately, as where the last line search ended; three copies of parameters and
            gradients are kept for it. Leave it off for minibatches and dropout.

    Raises:
        OptionError: no modules, something that is none, or an option that means nothing.

    Example:
        >>> from graphopt.optim import Modular, m
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Modular([weight], m.ClipValue(0.5), m.LR(0.1))
        >>> weight.grad = torch.tensor([3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9500])
    """

    _lane: _Lane

    def __init__(
        self,
        params: ParamsT | nn.Module,
        *modules: Any,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        error_if_nonfinite: bool | None = None,
        deterministic: bool = False,
    ) -> None:
        self.model = params if isinstance(params, nn.Module) else None
        self.modules = as_chain(modules, "Modular(params, ...)")
        if not self.modules:
            raise OptionError(
                "Modular without modules; pass at least one, such as Modular(params, m.Adam(), m.LR(1e-3))"
            )
        for module in walk(self.modules):
            if module.binding is not None:
                raise OptionError(
                    f"{module!r} belongs to another optimizer already; a module remembers things, so make a new one"
                )
        check_order(self.modules)
        self.error_if_nonfinite = error_if_nonfinite
        self.deterministic = deterministic
        self._named = name_modules(self.modules)
        self._configure()
        defaults: dict[str, Any] = {}
        for entry in self._named:
            defaults.update({key: entry.module.defaults[name] for name, key in entry.keys.items()})
        defaults.setdefault("lr", 1.0)
        defaults |= {
            "maximize": maximize,
            "frozen": False,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "num_steps": 0,
            "modules": ",".join(entry.path for entry in self._named),
        }
        _check_flags(defaults)
        given: Any = params.named_parameters() if isinstance(params, nn.Module) else params
        super().__init__(given, defaults)
        self._bind()

    # ---------------------------------------------------------------------------------------------------------- options

    @property
    def option_names(self) -> dict[str, str]:
        """For each option of a parameter group that belongs to a module, the module and its place in the chain."""
        return {key: entry.place for entry in self._named for key in entry.keys.values()}

    @property
    def updates_each_parameter_alone(self) -> bool:
        """Whether the step of a parameter depends on that parameter alone, so that layers can be streamed."""
        return not self.places_of_coupled

    @property
    def places_of_coupled(self) -> list[str]:
        """The modules whose step of one parameter may depend on others, by their places."""
        return [entry.place for entry in self._named if not _treats_each_alone(entry.module)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not name take the defaults.

        Raises:
            OptionError: an option is out of range, or its name belongs to two modules.
        """
        given = {name: value for name, value in param_group.items() if name not in ("params", "param_names")}
        check_group(self._named, {**self.defaults, **given})
        check_names(given, self.defaults)
        for flag in _FLAGS:
            if flag in given and given[flag] != self.defaults[flag]:
                raise OptionError(
                    f"{flag}={given[flag]!r} in a parameter group, but {self.defaults[flag]!r} in the optimizer; "
                    "it is an option of the whole optimizer"
                )
        super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients as torch does, and the statistics that belong to them."""
        super().zero_grad(set_to_none)
        noted.clear(all_params(self))

    def reset(self) -> None:
        """Forget what all modules have learned from earlier steps; the parameters stay."""
        self.state.clear()
        self._forget_plans()
        for group in self.param_groups:
            group["num_steps"] = 0

    # ------------------------------------------------------------------------------------------------------------- step

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss. Chains with a module that needs it call it
                as often as that asks for, some with ``closure(False)``, which must not compute gradients.

        Returns:
            The loss before the step, or ``None`` without a closure.

        Raises:
            ClosureError: a module needs a closure. Nothing was changed.
            MissingAnnotation: parameters lack a statistic that a module reads. Nothing was changed.
            NonFiniteError: a gradient is NaN or infinite (see ``error_if_nonfinite``). Nothing was changed.
            UnsupportedError: a gradient is sparse. Nothing was changed.
        """
        if self.in_backward is not None:
            return self.in_backward.end(closure)
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return self._step(closure)

    @_compat.disable_dynamo  # what is compiled here is compiled by the segments
    def _step(self, closure: Callable[..., Any] | None) -> Any:
        if closure is None and self._is_asked_for_state():
            self._make_state()
            return None
        loss = None
        needy = next((entry for entry in self._named if entry.module.needs_closure), None)
        if closure is None and needy is not None:
            raise ClosureError(
                f"{needy.place} evaluates the loss, so step() needs a closure; write optimizer.step(closure) with "
                "def closure(backward=True): ... that returns the loss, and computes gradients only if backward"
            )
        if closure is not None and needy is None:
            with torch.enable_grad():
                loss = closure()
        var = self._make_var(closure if needy is not None else None, loss, with_all=needy is not None)
        if var is not None and var.closure is not None and self.deterministic:
            var.closure = self._memo.remember(var.closure, var.params)
        if var is None:
            self._end_step()
            return loss
        if needy is not None:
            var.place, var.check = needy.place, self._check_step
        self._check_step(var)
        self._run_schedules()
        var.counts = self._lane.counts.advance(var.params)
        try:
            hooks = self._run(var)
        except BaseException:
            self._lane.counts.take_back()
            raise
        self._end_step()
        for hook in hooks.post_step_hooks:
            hook(hooks)
        if needy is None:
            return loss
        return hooks.loss_approx if hooks.loss is None else hooks.loss

    @torch.no_grad()
    @_compat.disable_dynamo
    def step_parameter(self, param: Tensor) -> None:
        """Step one parameter by its gradient; `fuse_into_backward` does so, and minds schedules and ``num_steps``."""
        var = self._var_of([param], [cast(Tensor, param.grad)], None, None, with_all=False)
        if param not in self._lanes:
            self._lanes[param] = self._new_lane()
        usual = self._lane
        self._lane = self._lanes[param]
        try:
            self._check_step(var)
            var.counts = self._lane.counts.advance(var.params)
            self._run(var)
        finally:
            self._lane = usual

    def _end_step(self) -> None:
        for group in self.param_groups:
            group["num_steps"] += 1

    def _is_asked_for_state(self) -> bool:
        """Whether this is the step with zero gradients and rates by which `torch.distributed.checkpoint` makes all state."""
        if self.state or any(bool(group["lr"] != 0) for group in self.param_groups):
            return False
        grads = [param.grad for param in all_params(self) if param.grad is not None]
        return bool(grads) and not any(grad.layout is torch.strided and bool(grad.abs().sum() != 0) for grad in grads)

    def _make_state(self) -> None:
        """Give every parameter the state that a step would leave, as before the first one."""
        var = self._make_var(None, None, with_all=False)
        if var is None:
            return
        rules = [module for module in self.modules if isinstance(module, Rule)]
        is_plain = all(isinstance(module, Rule) for module in walk(self.modules))
        if not is_plain and not any(module.needs_closure for module in walk(self.modules)):
            before = [param.detach().clone() for param in var.params]
            var.counts = self._lane.counts.advance(var.params)
            self._run(var)
            for param, value in zip(var.params, before, strict=True):
                param.copy_(value)
                for name, entry in self.state[self.param_table.owner(param)].items():
                    if is_count(name.rpartition(".")[2]) and isinstance(entry, Tensor):
                        entry.zero_()
        for rule in walk(rules) if is_plain else rules:
            for param in var.params:
                assert isinstance(rule, Rule)
                settings = rule.get_settings(param)
                kind = rule.state_type(settings)
                if kind is not None:
                    rule.set_state(param, rule.init(param, settings))
        self._lane.counts.share(var.params)

    def check(self) -> None:
        """Raise what ``step`` would raise about gradients and statistics; without an error this does nothing."""
        var = self._make_var(None, None, with_all=False)
        if var is not None:
            self._check_step(var)

    def _make_var(self, closure: Callable[..., Any] | None, loss: Any, with_all: bool) -> Var | None:
        """The parameters of this step and their gradients."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        maximize = self.param_groups[0]["maximize"]
        for group in self.param_groups:
            if group["frozen"]:
                continue
            if group["maximize"] != maximize:
                raise OptionError(
                    "maximize differs between parameter groups; make two optimizers, one of them with maximize=True"
                )
            if with_all:
                params += [param for param in group["params"] if param.requires_grad]
            else:
                found = [param.grad for param in group["params"]]
                if not any(map(operator.is_, found, repeat(None))):
                    params += group["params"]
                    grads += cast("list[Tensor]", found)
                else:
                    for param, grad in zip(group["params"], found, strict=True):
                        if grad is not None:
                            params.append(param)
                            grads.append(grad)
        return self._var_of(params, grads, closure, loss, with_all) if params else None

    def _var_of(
        self, params: list[Tensor], grads: list[Tensor], closure: Callable[..., Any] | None, loss: Any, with_all: bool
    ) -> Var:
        maximize = self.param_groups[0]["maximize"]
        if with_all and maximize:
            raise OptionError(
                "maximize=True with modules that evaluate the closure; return the negative loss from it instead"
            )
        if self.param_table.refresh():
            self._forget_plans()
        if self.param_table.has_complex:
            if with_all and any(param.is_complex() for param in params):
                raise UnsupportedError(
                    "a parameter is complex, and a module evaluates the closure; make torch.view_as_real(param) the parameter"
                )
            params = self.param_table.real(params)
            grads = [torch.view_as_real(g) if g.is_complex() and g.layout is torch.strided else g for g in grads]
        return Var(
            params,
            grads=None if with_all else grads,
            closure=closure,
            model=self.model,
            current_step=self.param_groups[0]["num_steps"],
            loss=loss,
            state=self.state,
            settings=_GroupOf(self),
            annotations=read_note,
            names=self.param_table.names,
            source_of=self.param_table.source,
            maximize=maximize,
        )

    def _check_step(self, var: Var) -> None:
        """Raise what must be raised before anything has changed."""
        if not var.has_grads:
            return
        grads = var.grads
        # What follows does not change from step to step; where modules evaluate a closure steps are counted before gradients.
        if var.check is not None or not self._lane.counts.knows(var.params):
            check_layouts(var.params, grads, self.param_table.describe)
            check_sharding(self.modules, var.params, self.param_table.describe)
            self._is_cheap_to_check = is_cheap_to_check(grads) and not self._is_differentiable
        check_notes(self.modules, var, range(len(var.params)), self.param_table.describe)
        if not (self._is_cheap_to_check if self.error_if_nonfinite is None else self.error_if_nonfinite):
            return
        bad = find_nonfinite(var.params, grads)
        if bad is not None:
            names = (
                ", ".join(map(self.param_table.describe, bad[:_MAX_NAMES]))
                or "a parameter, in the part of another process,"
            )
            raise NonFiniteError(
                f"{self.modules[0].place}: the gradient of {names} holds NaN or "
                f"infinities; {self._progress}. Skip the step, or find where they come from with "
                "torch.autograd.set_detect_anomaly(True); error_if_nonfinite=False lets them pass as in torch.optim"
            )

    @property
    def _progress(self) -> str:
        return "nothing was changed" if self.in_backward is None else self.in_backward.progress

    def _run_schedules(self) -> None:
        for module, _, _, keys in self._named:
            for name, schedule in module.schedules.items():
                for group in self.param_groups:
                    value = schedule(group["num_steps"])
                    module.check_setting(name, value)
                    group[keys[name]] = value

    def _run(self, var: Var) -> Var:
        for segment in self._lane.segments:
            var = segment.run(var) if isinstance(segment, FlatSegment) else segment.step(var)
            if var.stop:
                break
        if not var.skip_update:
            apply_updates(var.params, self._scaled(var))
        return var

    def _scaled(self, var: Var) -> list[Tensor]:
        """The update, times ``lr`` if no module has done that."""
        updates = var.get_update()
        if self._has_lr:
            return updates
        return [
            update if (lr := self.param_table.group(param)["lr"]) == 1 else update * lr
            for param, update in zip(var.params, updates, strict=True)
        ]

    # -------------------------------------------------------------------------------------------------------- internals

    def _configure(self) -> None:
        """What follows from the modules."""
        self._has_lr = any("lr" in entry.keys.values() for entry in self._named)
        self._is_cheap_to_check = False
        self._memo = Memo()
        self._lanes: dict[Tensor, _Lane] = {}  # of parameters that step alone
        self.in_backward: BackwardSteps | None = None

    def _bind(self) -> None:
        """Give the modules their places, and sort them into segments."""
        self._store = Store(self.state)
        self.param_table = ParamTable(
            self, self._store, lambda param: any(param in e.module.overridden for e in self._named)
        )
        bind(
            self._named,
            self._store,
            self.param_table.group,
            lambda: next(all_params(self)),
            replaces=self.defaults["differentiable"],
            batches=self._mode != "loop",
            on_change=self._forget_plans,
            has_one_group=lambda: len(self.param_groups) == 1,
        )
        self._lane = self._new_lane()

    def _new_lane(self) -> _Lane:
        counts = StepCounts(lambda param: self.state[self.param_table.owner(param)], self.defaults["capturable"])
        return _Lane(list(self._cut()), counts)

    def _cut(self) -> Iterator[FlatSegment | Module]:
        mode, capturable = self._mode, self.defaults["capturable"]
        run: list[Rule] = []
        for index, module in enumerate(self.modules):
            is_flat = isinstance(module, Rule) and module.is_elementwise and not module.measures
            if is_flat and mode != "loop":
                run.append(cast(Rule, module))
                if index + 1 < len(self.modules):
                    continue
            if run:
                is_last = index + 1 == len(self.modules) and is_flat and self._has_lr
                yield FlatSegment(run, mode, is_last, capturable)
                run = []
            if not (is_flat and mode != "loop"):
                yield module

    @property
    def _mode(self) -> Mode:
        flags = self.defaults
        if flags["differentiable"]:
            return "loop"
        if flags["fused"]:
            return "fused"
        if flags["foreach"]:
            return "foreach"
        if flags["foreach"] is False:
            return "loop"
        return "auto"

    @property
    def _is_differentiable(self) -> bool:
        return bool(self.defaults["differentiable"])

    def _forget_plans(self) -> None:
        self._lane.counts.forget()
        self._lanes.clear()
        for segment in self._lane.segments:
            if isinstance(segment, FlatSegment):
                segment.forget()
        for entry in self._named:
            entry.module.forget()

    # ------------------------------------------------------------------------------------------------ saving and copying

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned. Tensors are copied and keep their dtypes.

        Raises:
            ModuleError: it was saved by another chain, or for another model. Nothing was changed.
        """
        loaded: dict[str, Any] = {}

        def look(_: Any, final: dict[str, Any]) -> None:
            check_state_dict(self, self._named, self.param_table.describe, final)
            loaded.update(final)

        before = self.register_load_state_dict_pre_hook(look)  # the last one: others may change what is loaded
        after = self.register_load_state_dict_post_hook(lambda _: restore_dtypes(self, loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "modules": self.modules,
            "model": self.model,
            "error_if_nonfinite": self.error_if_nonfinite,
            "deterministic": self.deterministic,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_new = "modules" in state
        super().__setstate__(state)
        if is_new:
            self._named = name_modules(self.modules)
            self._configure()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        if is_new:
            self._bind()
        else:
            self._store.entries = self.state
            self.param_table.forget()
        self._forget_plans()

    def __repr__(self) -> str:
        return f"Modular({', '.join(map(repr, self.modules))})"


class _Lane(NamedTuple):
    """The segments and the counts of parameters that step together."""

    segments: list[FlatSegment | Module]
    counts: StepCounts


class _GroupOf(Mapping[Tensor, dict[str, Any]]):
    def __init__(self, optimizer: Modular) -> None:
        self._optimizer = optimizer

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        return self._optimizer.param_table.group(param)

    def __iter__(self) -> Iterator[Tensor]:
        return all_params(self._optimizer)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _treats_each_alone(module: Module) -> bool:
    if isinstance(module, Rule) and type(module).step is Rule.step:
        return not module.measures
    return module.treats_each_alone


def _check_flags(flags: Mapping[str, Any]) -> None:
    if flags["foreach"] and flags["fused"]:
        raise OptionError("foreach=True and fused=True; choose one")
    for name in ("foreach", "fused"):
        if flags["differentiable"] and flags[name]:
            raise OptionError(f"differentiable=True and {name}=True; only single tensors can be differentiated through")
    if flags["capturable"] and flags["fused"]:
        raise OptionError(
            "capturable=True and fused=True; compiled kernels take their numbers from the host. Use foreach=True"
        )
