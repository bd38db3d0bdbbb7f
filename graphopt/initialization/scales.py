"""Scales in a module: it computes with ``scale * weight``, shows its scales as its parameters, and is as it was afterwards.

While scales are attached, each submodule has a class of its own, derived from the one it had, that reads a parameter as
``scale * weight`` (`_class_with_scales`), and holds the scale in the parameter's place. Everything that must see the weights
themselves (``state_dict``, ``load_state_dict``, ``to``, ``deepcopy``, pickling, a captured graph) gets the original classes and
parameters for as long as it takes (`Scales.as_written`). So no parameter is ever replaced, and none is written to before
`detach`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from graphopt import _compat
from graphopt.annotations import INIT_PROBE, INIT_SCALE, attach, expose, remove
from graphopt.errors import OptionError
from graphopt.second_order import differentiable_kernels, gradients, scale_weight, weight_norm

_STATE = "_graphopt_scales"  # where a module keeps its `_Own`


@dataclass
class _Scaled:
    """One parameter and its scale.

    Attributes:
        name: the first of its names.
        parameter: what training will train; never written to while scales are attached, but by the user.
        scale: (), at least float32.
        probe: zeros like the parameter, without memory, whose gradient in a captured graph is that of the scaled weight.
        made_from: what ``weight`` was computed from: versions, and where it is.
        weight: ``scale * parameter``.
    """

    name: str
    parameter: nn.Parameter
    scale: nn.Parameter
    probe: Tensor
    made_from: tuple[Any, ...] = ()
    weight: Tensor | None = None

    def effective(self) -> Tensor:
        """``scale * parameter``, made anew when one of them has changed; any number of backward passes go through it."""
        here = self.scale._version, self.parameter._version, self.parameter.data_ptr(), self.parameter.dtype
        if torch.is_inference_mode_enabled():
            return scale_weight(self.parameter, self.scale)
        if self.weight is None or self.made_from != here:
            with torch.enable_grad(), torch.autocast(self.parameter.device.type, enabled=False):
                self.weight = cast(Tensor, _Times.apply(self.scale, self.parameter.detach()))  # type: ignore[no-untyped-call]
            self.made_from = here
        return self.weight


@dataclass
class _Own:
    """What one module was, and what stands in its place."""

    scales: Scales
    kind: type[nn.Module]
    parameters: dict[str, nn.Parameter | None]
    scaled: dict[str, _Scaled]


class Scales:
    """The scales of a model, attached to it from the start.

    Args:
        model: any module; must have a trainable parameter.

    Attributes:
        entries: one for each trainable parameter, in the order of ``model.parameters()``.

    Raises:
        OptionError: the model has none, has scales already, or holds something that cannot be scaled; it is unchanged then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = list(model.modules())
        _check(model, modules)
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            names.setdefault(id(parameter), name)
        self._by_parameter: dict[int, _Scaled] = {}
        self._modules = modules
        for parameter in model.parameters():
            if parameter.requires_grad:
                wide = torch.promote_types(parameter.dtype, torch.float32)
                scale = nn.Parameter(torch.ones((), dtype=wide, device=parameter.device))
                self._by_parameter[id(parameter)] = _Scaled(names[id(parameter)], parameter, scale, _probe(parameter))
        self.entries = list(self._by_parameter.values())
        self._buffers = [
            (module, name, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        try:
            for module in modules:
                _dress(module, self._own(module))
        except BaseException:
            self._undress()
            raise
        expose()
        for entry in self.entries:
            attach(entry.parameter, INIT_SCALE, entry.scale)
            attach(entry.parameter, INIT_PROBE, entry.probe)
        self.is_attached = True
        self.saw_autocast = False

    def note_autocast(self) -> None:
        """Remember that the model is called under autocast, if it is."""
        self.saw_autocast = self.saw_autocast or _compat.is_any_autocast_enabled()

    @property
    def scales(self) -> list[nn.Parameter]:
        """The scales, (), in the order of the model's parameters."""
        return [entry.scale for entry in self.entries]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that have a scale."""
        return [entry.parameter for entry in self.entries]

    def gradients(self, loss: Tensor, *, create_graph: bool = True) -> list[Tensor | None]:
        """The gradient of a loss with respect to each scaled weight, in the order of ``entries``.

        Raises:
            OptionError: the loss depends on no scaled weight, or on a parameter that is read unscaled.
        """
        places = [(entry, entry.probe) for entry in self.entries]
        places += [(entry, entry.weight) for entry in self.entries if entry.weight is not None]
        places += [(entry, entry.parameter) for entry in self.entries]
        num_scaled = len(places) - len(self.entries)
        if not loss.requires_grad:
            raise OptionError(_NOTHING.format(kind=type(self.model).__name__))
        found = gradients(loss, [tensor for _, tensor in places], create_graph=create_graph)
        if unscaled := [
            e.name for (e, _), g in zip(places[num_scaled:], found[num_scaled:], strict=True) if g is not None
        ]:
            raise OptionError(
                f"{', '.join(unscaled[:10])} of {type(self.model).__name__} are used outside any captured graph, or through a "
                "list or closure that holds the parameters themselves, where their scales have no effect. Learn the "
                "initialisation without compiling the model: learn_init(..., compiler='eager'), or "
                "GradInitWrapper(graphopt.restore(model)); and let forward read parameters as attributes of their modules"
            )
        sums: dict[int, Tensor] = {}
        for (entry, _), grad in zip(places[:num_scaled], found[:num_scaled], strict=True):
            if grad is not None:
                sums[id(entry)] = sums[id(entry)] + grad if id(entry) in sums else grad
        if not sums:
            raise OptionError(_NOTHING.format(kind=type(self.model).__name__))
        return [sums.get(id(entry)) for entry in self.entries]

    @contextmanager
    def as_written(self, modules: Sequence[nn.Module] | None = None) -> Iterator[None]:
        """Within, the modules (all by default) have their own classes and parameters, unscaled."""
        taken = [(module, vars(module)[_STATE]) for module in modules or self._modules if _STATE in vars(module)]
        for module, own in taken:
            _undress(module, own)
        try:
            yield
        finally:
            for module, own in taken:
                _dress(module, self._own(module, own))

    def detach(self, *, fold: bool) -> None:
        """Give the model back.

        Args:
            fold: multiply the scales into the parameters, in place; else the parameters stay as they are.
        """
        if not self.is_attached:
            return
        self.is_attached = False
        self._undress()
        for module, name, value in self._buffers:  # batch normalisation does not even move a buffer's version
            current = module._buffers.get(name)
            if current is not None and current.shape == value.shape:
                with torch.no_grad():
                    current.copy_(value)
        for entry in self.entries:
            remove(entry.parameter, INIT_PROBE)
            remove(entry.parameter, INIT_SCALE)
            if fold:
                with torch.no_grad():
                    if entry.scale.item() != 1:
                        entry.parameter.copy_(scale_weight(entry.parameter, entry.scale))
                    attach(entry.parameter, INIT_SCALE, entry.scale.detach().clone())

    def _undress(self) -> None:
        for module in self._modules:
            if _STATE in vars(module):
                _undress(module, vars(module)[_STATE])

    def _own(self, module: nn.Module, before: _Own | None = None) -> _Own:
        """What a module is now; parameters that it was given meanwhile are taken as new values of the old ones."""
        for name, entry in before.scaled.items() if before is not None else ():
            current = module._parameters.get(name)
            if current is not None and current is not entry.parameter and current.shape == entry.parameter.shape:
                self._by_parameter[id(current)] = entry
                entry.parameter = current
        parameters = dict(module._parameters)
        scaled = {
            name: self._by_parameter[id(parameter)]
            for name, parameter in parameters.items()
            if parameter is not None and id(parameter) in self._by_parameter
        }
        return _Own(self, type(module), parameters, scaled)

    def __repr__(self) -> str:
        return f"Scales({len(self.entries)} of {type(self.model).__name__})"


class _Times(torch.autograd.Function):
    """``scale * weight`` whose graph survives a backward pass: it holds nothing that backward frees."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.dtype = weight, scale.dtype
        return scale_weight(weight, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad.to(ctx.dtype) * ctx.weight.to(ctx.dtype)).sum(), None


def _dress(module: nn.Module, own: _Own) -> None:
    """Put the scales in the place of the parameters."""
    names = tuple(name for name, parameter in own.parameters.items() if parameter is not None)
    object.__setattr__(
        module, "__class__", _class_with_scales(cast(Any, own.kind), names)
    )  # past a __setattr__ of its own
    vars(module)[_STATE] = own
    module._parameters.clear()
    for name, parameter in own.parameters.items():
        if parameter is None:
            module._parameters[name] = None
        elif name in own.scaled:
            module._parameters[name] = own.scaled[name].scale


def _undress(module: nn.Module, own: _Own) -> None:
    """Put the parameters in the place of the scales."""
    object.__setattr__(module, "__class__", own.kind)
    del vars(module)[_STATE]
    given = {
        name: value
        for name, value in module._parameters.items()
        if name not in own.parameters or (name in own.scaled and value is not own.scaled[name].scale)
    }
    module._parameters.clear()
    module._parameters.update({**own.parameters, **given})


class _Quiet(nn.Module):
    """Keeps classes with scales from classes that register or check those derived from them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


@functools.cache
def _class_with_scales(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A class that reads each of these parameters as ``scale * weight``."""

    def reader(name: str) -> property:
        def read(self: nn.Module) -> Tensor | None:
            own: _Own = vars(self)[_STATE]
            entry = own.scaled.get(name)
            if entry is None or self._parameters.get(name) is not entry.scale:
                return self._parameters.get(name, own.parameters[name])
            return entry.effective()

        return property(read)

    is_recurrent = issubclass(kind, nn.RNNBase | nn.RNNCellBase)

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        vars(self)[_STATE].scales.note_autocast()
        with contextlib.ExitStack() as stack:
            stack.enter_context(differentiable_kernels())
            if is_recurrent:  # those of cuDNN and oneDNN have no second derivative
                stack.enter_context(_compat.plain_recurrent_kernels())
            return kind.__call__(self, *args, **kwargs)

    def _save_to_state_dict(self: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        own: _Own = vars(self)[_STATE]
        with own.scales.as_written([self]):
            kind._save_to_state_dict(self, destination, prefix, keep_vars)
        for name, entry in own.scaled.items():
            if prefix + name in destination:
                destination[prefix + name] = entry.effective().detach()

    def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own: _Own = vars(self)[_STATE]
        with own.scales.as_written([self]):
            kind._load_from_state_dict(self, state_dict, prefix, *args)
        for name, entry in own.scaled.items():
            if prefix + name in state_dict:  # what was saved is scaled
                with torch.no_grad():
                    entry.scale.fill_(1)

    def _apply(self: nn.Module, fn: Any, *args: Any, **kwargs: Any) -> Any:
        own: _Own = vars(self)[_STATE]
        with own.scales.as_written([self]):
            kind._apply(self, fn, *args, **kwargs)
        for entry in own.scaled.values():
            wide = torch.promote_types(entry.parameter.dtype, torch.float32)
            entry.scale.data = entry.scale.data.to(entry.parameter.device, wide)
            entry.probe, entry.weight = _probe(entry.parameter), None
            attach(entry.parameter, INIT_SCALE, entry.scale)
            attach(entry.parameter, INIT_PROBE, entry.probe)
        return self

    def __deepcopy__(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return _plain_copy(self, memo)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _plain_copy(self, {}).__reduce_ex__(1)  # a later protocol wants the copy to be of this very class

    namespace: dict[str, Any] = {name: reader(name) for name in names}
    namespace |= {
        "__call__": __call__,
        "_save_to_state_dict": _save_to_state_dict,
        "_load_from_state_dict": _load_from_state_dict,
        "_apply": _apply,
        "__deepcopy__": __deepcopy__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    if issubclass(kind, _compat.WeightNorm):
        namespace["forward"] = lambda self, g, v: weight_norm(v, g, self.dim)
    if issubclass(kind, nn.RNNBase):
        namespace["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
        )
    if issubclass(kind, nn.Embedding):
        namespace["sparse"] = property(
            lambda self: False, lambda self, value: None
        )  # sparse gradients are differentiable once
    return type(kind.__name__, (_Quiet, kind), namespace)


def _plain_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy without scales: they are multiplied into its parameters."""
    own: _Own = vars(module)[_STATE]
    with own.scales.as_written():
        copied = copy.deepcopy(module, memo)
    with torch.no_grad():
        for entry in own.scales.entries:
            clone = memo.get(id(entry.parameter))
            if isinstance(clone, nn.Parameter):
                clone.copy_(scale_weight(clone, entry.scale))
    return copied


def _probe(parameter: nn.Parameter) -> Tensor:
    zeros = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    return zeros.detach().requires_grad_()


def _check(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    kind = type(model).__name__
    if any(_STATE in vars(module) for module in modules):
        raise OptionError(f"{kind} is in a GradInitWrapper already; leave it first: ginit.detach()")
    if script := [type(m).__name__ for m in modules if isinstance(m, torch.jit.ScriptModule)]:
        raise OptionError(f"{kind} holds {script[0]}, a scripted module, which computes with its own parameters only")
    if any(isinstance(hook, _compat.WeightNormHook) for m in modules for hook in m._forward_pre_hooks.values()):
        raise OptionError(
            f"{kind} uses torch.nn.utils.weight_norm, whose second derivative torch gets wrong: use "
            "torch.nn.utils.parametrizations.weight_norm"
        )
    if lazy := [n for n, p in model.named_parameters() if isinstance(p, nn.UninitializedParameter)]:
        raise OptionError(f"{lazy[0]} of {kind} has no shape yet: call the model once before")
    if meta := [n for n, p in model.named_parameters() if p.is_meta]:
        raise OptionError(f"{meta[0]} of {kind} is on the meta device and has no values to scale")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise OptionError(f"{kind} has no trainable parameter, so there is nothing to initialise")
    if odd := [n for n, p in model.named_parameters() if p.requires_grad and not p.is_floating_point()]:
        raise OptionError(f"{odd[0]} of {kind} is complex, and GradInit scales real parameters")


_NOTHING = (
    "the loss depends on no parameter of {kind} with its present scales. Call the model inside the block, compute the loss from "
    "its output, and hand it over before the scales change (optimizer.step(), clamp_scales())"
)
