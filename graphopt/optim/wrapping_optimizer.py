"""What the optimizers that wrap others share: ask an inner optimizer for its step, undo it, and take another."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt.errors import OptionError, UnsupportedError
from graphopt.optim.base_optimizer import BaseOptimizer, new_count, state_dtype
from graphopt.optim.foreach import foreach
from graphopt.optim.weight_decay import WeightDecay, WeightDecayChain


class Entry(NamedTuple):
    """A parameter that has a gradient."""

    group: dict[str, Any]
    param: Tensor
    before: Tensor  # a copy of it, before the step


class WrappingOptimizer(BaseOptimizer):
    """An optimizer that turns the steps of inner optimizers of the same parameters into a step of its own.

    Inner optimizers see the parameters as they were before the step, one after the other. Their states and options are
    part of ``state_dict()``; their schedulers, hooks and learning rates work as if they stood alone.
    """

    _attributes: ClassVar[tuple[str, ...]] = ("weight_decay_cls", "inner")
    _why_not_complex = "norms and signs of a step are taken of real ones"

    def __init__(
        self,
        params: ParamsT,
        inner: dict[str, torch.optim.Optimizer],
        defaults: dict[str, Any],
        weight_decay_cls: WeightDecayChain | WeightDecay | None,
    ) -> None:
        for role, optimizer in inner.items():
            _check_inner(type(self).__name__, role, optimizer)
        self.inner = inner
        super().__init__(params, defaults, weight_decay_cls)
        self._check_same_params()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, after it was added to the inner optimizers; options take the defaults.

        Raises:
            OptionError: an option of the group is not valid, or an inner optimizer does not have the parameters.
            UnsupportedError: a parameter is complex.
        """
        super().add_param_group(param_group)
        for role, optimizer in self.inner.items():
            known = set(map(id, _params(optimizer)))
            unknown = [param for param in self.param_groups[-1]["params"] if id(param) not in known]
            if unknown:
                name = self._name(unknown[0])
                self.param_groups.pop()
                raise OptionError(
                    f"{type(self).__name__}: {len(unknown)} parameters are not in {role}={type(optimizer).__name__}, for "
                    f"instance {name}. Give all optimizers the same parameters: {role}.add_param_group(...) comes first"
                )

    def state_dict(self) -> dict[str, Any]:
        """What torch's ``state_dict`` holds, and the states of the inner optimizers in the same form.

        What ``magnitude`` remembers of a parameter stands beside its own state, as ``"magnitude.exp_avg"``; so
        `torch.distributed.checkpoint` sees it, and shards it like the parameter. The options of the groups of
        ``magnitude`` are an entry of the first group, ``"magnitude.param_groups"``.
        """
        state_dict: dict[str, Any] = super().state_dict()
        state_dict["state"] = {identifier: dict(state) for identifier, state in state_dict["state"].items()}
        own = dict(zip(map(id, _params(self)), _identifiers(state_dict), strict=True))
        for role, optimizer in self.inner.items():
            inner = optimizer.state_dict()
            identifiers = dict(zip(_identifiers(inner), [own[id(param)] for param in _params(optimizer)], strict=True))
            for identifier, state in inner["state"].items():
                entries = {f"{role}.{name}": value for name, value in state.items()}
                state_dict["state"].setdefault(identifiers[identifier], {}).update(entries)
            state_dict["param_groups"][0][_options(role)] = inner["param_groups"]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, into the inner optimizers as well.

        Raises:
            OptionError: the states of the inner optimizers are missing, or have other names.
        """
        first, *groups = state_dict["param_groups"]
        missing = [_options(role) for role in self.inner if _options(role) not in first]
        if missing:
            raise OptionError(
                f"{type(self).__name__}.load_state_dict: the first group lacks {', '.join(map(repr, missing))}, the options "
                f"of inner optimizers. Pass what {type(self).__name__}.state_dict() returned, of one with inner optimizers "
                f"that were passed as {', '.join(self.inner)}"
            )
        saved = dict(zip(map(id, _params(self)), _identifiers(state_dict), strict=False))
        for role, optimizer in self.inner.items():
            inner = {"state": {}, "param_groups": first[_options(role)]}
            for param, identifier in zip(_params(optimizer), _identifiers(inner), strict=False):
                state = state_dict["state"].get(saved.get(id(param)), {})
                entries = {name.removeprefix(f"{role}."): v for name, v in state.items() if name.startswith(f"{role}.")}
                if entries:
                    inner["state"][identifier] = entries
            optimizer.load_state_dict(inner)
        prefixes = tuple(f"{role}." for role in self.inner)
        own = {
            identifier: {name: value for name, value in state.items() if not name.startswith(prefixes)}
            for identifier, state in state_dict["state"].items()
        }
        first = {name: value for name, value in first.items() if not name.startswith(prefixes)}
        super().load_state_dict({**state_dict, "state": own, "param_groups": [first, *groups]})

    def check(self) -> None:
        """Raise what ``step`` would raise before it changes anything; without an error this does nothing."""
        self._check_same_params()
        for optimizer in self.inner.values():
            if isinstance(optimizer, BaseOptimizer):
                optimizer.check()

    @abstractmethod
    def _steps(self, entries: Sequence[Entry]) -> tuple[list[Tensor], list[Any]]:
        """Ask the inner optimizers, and choose the steps.

        Returns:
            For each parameter the step, a new tensor in `state_dtype` that will be written to, and the learning rate of
            its weight decay, a number or a tensor of shape ().
        """

    def _update_all(self) -> None:
        if len(self.inner) > 1:  # one alone raises before anything is changed
            self.check()
        self._check_same_params()
        entries = [
            Entry(group, param, param.detach().clone())
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        if not entries:
            return
        steps, rates = self._steps(entries)
        # Without any state torch.distributed.checkpoint takes an optimizer for a new one, and steps in order to fill it.
        states = [self.state[entry.param] for entry in entries]
        for state in states:
            state.setdefault("step", new_count())
        foreach("add_", [state["step"] for state in states], 1)
        pulls = self._pulls(entries)
        if pulls is not None:
            decays = [float(entry.group["weight_decay"]) for entry in entries]
            factors = [rate * decay for rate, decay in zip(rates, decays, strict=True)]
            foreach("sub_", steps, foreach("mul_", pulls, factors))
        foreach("add_", steps, [_widen(entry.before) for entry in entries])
        foreach("copy_", [entry.param.detach() for entry in entries], steps)

    def _ask(self, role: str, entries: Sequence[Entry]) -> list[Tensor]:
        """The step that an inner optimizer would make, in `state_dtype`. The parameters stay as they are."""
        try:
            self.inner[role].step()
            after = [_widen(entry.param) for entry in entries]
            return foreach("sub", after, [_widen(entry.before) for entry in entries])
        finally:
            params = [entry.param.detach() for entry in entries]  # again: a step may have given it other memory
            foreach("copy_", params, [entry.before for entry in entries])

    def _pulls(self, entries: Sequence[Entry]) -> list[Tensor] | None:
        """What the weight decay subtracts, times its learning rate and ``weight_decay``, in new tensors."""
        params = [entry.param for entry in entries]
        decay = self.weight_decay_cls
        if decay is None or decay.is_plain:
            if not any(float(group["weight_decay"]) for group in self.param_groups):
                return None
            return [param.detach().to(state_dtype(param), copy=True) for param in params]
        states = [self.state[param] for param in params]
        for param, state in zip(params, states, strict=True):
            decay.init(param, state)
        return [pull.clone() for pull in decay(params, states)]

    def _check_same_params(self) -> None:
        own = len(_params(self))
        for role, optimizer in self.inner.items():
            theirs = len(_params(optimizer))
            if own != theirs:  # add_param_group has seen to it that ours are among theirs
                raise OptionError(
                    f"{type(self).__name__}: {role}={type(optimizer).__name__} has {theirs} parameters, of which "
                    f"{type(self).__name__} has {own}; a step would move the others as well. Give all optimizers the same "
                    "parameters"
                )

    def __repr__(self) -> str:
        inner = ", ".join(f"{role}={type(optimizer).__name__}" for role, optimizer in self.inner.items())
        return f"{type(self).__name__}({inner}, {len(_params(self))} parameters)"


def rates(entries: Sequence[Entry]) -> list[float]:
    """The learning rate of each parameter's group."""
    return [float(entry.group["lr"]) for entry in entries]


def _params(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _identifiers(state_dict: dict[str, Any]) -> list[Any]:
    """What stands for the parameters in a ``state_dict``, in the order of the parameters; numbers or names."""
    return [identifier for group in state_dict["param_groups"] for identifier in group["params"]]


def _options(role: str) -> str:
    return f"{role}.param_groups"


def _widen(param: Tensor) -> Tensor:
    return param.detach().to(state_dtype(param))


def _check_inner(name: str, role: str, optimizer: object) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"{name}: {role}={optimizer!r}; expected an optimizer of the same parameters, for instance "
            f"{role}=torch.optim.SGD(model.parameters(), lr=1.0)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            f"{name}: {role} is a torch.optim.LBFGS, which evaluates the loss several times within a step; {name} asks for "
            "the step that follows from the gradients at hand. Use an optimizer whose step() needs no closure"
        )
