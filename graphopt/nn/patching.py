"""`patch_model` and `patch_torch`: the statistic for models that are written with ``torch.nn``, without a compiler."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.errors import OptionError
from graphopt.nn.mirror import is_mirror
from graphopt.nn.truegrad_parameter import TrueGradParameter, enlist, is_enlisted
from graphopt.passes import TrueGrad
from graphopt.runtime.statistics import Statistic
from graphopt.transform import is_transformed, restore, setup_of, transform

Model = TypeVar("Model", bound=nn.Module)

_setups: WeakIdKeyDictionary = WeakIdKeyDictionary()  # patched model -> the setup it was patched with


def patch_model(model: Model, recurse: bool = True) -> Model:
    """Let the parameters of a model carry the statistic, in place and without a compiler.

    The model is captured and rewritten as by `graphopt.transform`, and the rewritten graph runs as ordinary PyTorch operations.
    ``Parameter`` objects, ties, ``requires_grad`` and optimizers that exist already stay as they are; ``isinstance(param,
    graphopt.nn.TrueGradParameter)`` holds from now on. `graphopt.restore` undoes it.

    Args:
        model: any module; samples lie on the first axis of its inputs.
        recurse: whether its submodules' parameters count too; if not, only the model's own do, and those of submodules that
            have been patched before. A module without parameters of its own is left alone then.

    Returns:
        ``model``.

    Raises:
        OptionError: ``model`` is no module.
        GraphoptError: later, from the first call, if a parameter cannot be served; the error names it.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"patch_model takes a torch.nn.Module and got {type(model).__name__}")
    if recurse:
        chosen, where = dict(model.named_parameters()), None
    else:
        own = {id(param) for param in model.parameters(recurse=False)}
        if not own:
            return model
        chosen = {
            name: param
            for name, param in model.named_parameters()
            if id(param) in own or isinstance(param, TrueGradParameter)
        }
        where = tuple(chosen)
    transform(model, [TrueGrad(where=where)], compiler="eager")
    _setups[model] = setup_of(model)
    for param in chosen.values():
        enlist(param, model, _is_patched)
    return model


@contextmanager
def patch_torch() -> Iterator[None]:
    """While this is entered, every model that is called with gradients is patched, as `patch_model` does it.

    For code that builds and calls its models out of reach. Only the outermost module of a call is patched, with all that it
    contains; models without trainable parameters, and those that `graphopt.transform` serves already, are left alone. When it is
    left, ``torch`` and the models are as they were; statistics stay until their gradients are cleared. Entering it again inside
    changes nothing. Parameters that are used outside any module get no statistic, and reading one says so. Meant for one thread.

    Raises:
        GraphoptError: from the first call of a model, if a parameter cannot be served; the error names it.
    """
    original = nn.Module.__call__
    if getattr(original, "graphopt_patches", False):
        yield
        return
    patched: list[nn.Module] = []

    @functools.wraps(original)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nn.Module.__call__ = original  # type: ignore[method-assign]  # what the model calls is part of it
        try:
            if _can_be_patched(self):
                patched.append(patch_model(self))
            return original(self, *args, **kwargs)
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]

    call.graphopt_patches = True  # type: ignore[attr-defined]
    nn.Module.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
        for model in patched:
            restore(model)


def _can_be_patched(model: nn.Module) -> bool:
    if not torch.is_grad_enabled() or is_transformed(model) or is_mirror(model):
        return False
    return any(param.requires_grad for param in model.parameters())


def _is_patched(model: nn.Module) -> bool:
    return setup_of(model) is _setups.get(model)


def _by_patched(param: torch.Tensor) -> bool:
    return is_enlisted(param, _is_patched)


Statistic.apart.append(_by_patched)
