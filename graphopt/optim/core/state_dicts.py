"""Loading what `Modular` has saved: only into the same chain and the same parameters, and in the dtypes it was saved in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphopt.errors import ModuleError
from graphopt.optim.base_optimizer import is_count
from graphopt.optim.core.module import Rule
from graphopt.optim.core.naming import Named


def restore_dtypes(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Torch casts what it loads to the parameter's dtype."""
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    for identifier, param in zip(saved, all_params(optimizer), strict=True):
        for key, value in state_dict["state"].get(identifier, {}).items():
            if isinstance(value, Tensor):
                device = value.device if is_count(key) and not optimizer.defaults["capturable"] else param.device
                optimizer.state[param][key] = value.detach().to(device, copy=True)


def check_state_dict(
    optimizer: Optimizer, named: Sequence[Named], name: Callable[[Tensor], str], state_dict: Mapping[str, Any]
) -> None:
    """Check what is to be loaded against the optimizer's chain and parameters.

    Args:
        optimizer: whose parameter groups say ``modules``.
        named: its modules.
        name: a parameter for an error.
        state_dict: what is to be loaded.

    Raises:
        ModuleError: it was saved by another chain, or for another model.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise ModuleError(
            f"load_state_dict() was given a dictionary with {sorted(map(str, state_dict))}, not what state_dict() returned, "
            "which has 'state' and 'param_groups'; pass that entry of the checkpoint. Nothing was changed"
        )
    groups = state_dict["param_groups"]
    own = optimizer.defaults["modules"]
    for group in groups:
        theirs = group.get("modules")
        if theirs is None:
            raise ModuleError(
                f"the state_dict was not saved by Modular: no group names its modules, but this optimizer is [{own}]. "
                "Load it into an optimizer of the class that saved it; nothing was changed"
            )
        if theirs != own:
            pairs = zip((own + ",").split(","), (theirs + ",").split(","), strict=False)
            place, (mine, other) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
            raise ModuleError(
                f"the state_dict was saved by the chain [{theirs}], but this optimizer is [{own}]; they differ at "
                f"module {place}: {other or 'none'} there, {mine or 'none'} here. Build the same chain, then load; "
                "nothing was changed"
            )
    mine, other = [len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in groups]
    if mine != other:
        raise ModuleError(
            f"the state_dict is of another model: its groups hold {other} parameters, those of this optimizer {mine}. "
            "Give the optimizer the same parameters in the same groups; nothing was changed"
        )
    saved = chain.from_iterable(group["params"] for group in groups)
    for identifier, param in zip(saved, all_params(optimizer), strict=True):
        entry = state_dict["state"].get(identifier, {})
        _check_entry(named, name, param, entry)


def _check_entry(
    named: Sequence[Named], name: Callable[[Tensor], str], param: Tensor, entry: Mapping[str, Any]
) -> None:
    for module, path, place, _ in named:
        if not isinstance(module, Rule) or not entry:
            continue
        like = torch.empty_like(torch.view_as_real(param) if param.is_complex() else param, device="meta")
        settings = module.get_settings(param)
        fields = getattr(module.state_type(settings), "_fields", ())
        if not any(f"{path}.{field}" in entry for field in fields):
            continue
        for field, expected in zip(fields, module.init(like, settings), strict=True):
            value = entry.get(f"{path}.{field}")
            if value is None or (isinstance(value, Tensor) and value.shape != expected.shape):
                got = "nothing" if value is None else f"shape {tuple(value.shape)}"
                raise ModuleError(
                    f"the state_dict is of another model: {place} expects {field} of shape {tuple(expected.shape)} for "
                    f"{name(param)}, and found {got}. Load it into the model that it was saved with; "
                    "nothing was changed"
                )


def all_params(optimizer: Optimizer) -> Iterator[Tensor]:
    """The parameters of all groups, in order."""
    return chain.from_iterable(group["params"] for group in optimizer.param_groups)
