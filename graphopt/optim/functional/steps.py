"""One step of SGD, Adam and LARS as pure functions of parameters, gradients, state and config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt._compat import is_transformed
from graphopt.errors import OptionError
from graphopt.optim.core.arithmetic import zeros
from graphopt.optim.core.transform import ChainState, Transform, apply_updates, chain, leaves_like
from graphopt.optim.functional.configs import AdamConfig, Config, LARSConfig, SGDConfig

PARAMS_GRADS_TYPE = list[Tensor] | dict[str, Tensor]
"""Parameters or gradients; every other pytree of tensors will do, too."""

OPTIMIZER_STATE_TYPE = dict[str, Any]
"""``step``, the number of steps made, of shape (), float64; and by name pytrees like the parameters."""


def sgd_step(
    params: Any,
    grads: Any,
    opt_state: OPTIMIZER_STATE_TYPE,
    config: SGDConfig,
    *,
    inplace: bool = False,
    differentiable: bool = False,
    found_inf: Tensor | None = None,
) -> tuple[Any, OPTIMIZER_STATE_TYPE]:
    """One step of stochastic gradient descent.

    Args:
        params: a pytree of tensors.
        grads: gradients, a pytree of the same structure.
        opt_state: of `init_optimizer_state`, or of the step before.
        config: hyper-parameters; only read.
        inplace: write to ``params`` and ``opt_state``, one tensor at a time, instead of making new tensors.
        differentiable: keep the graph of tensors that require gradients, so that backward goes through the step.
            ``torch.func.grad`` and ``vmap`` go through it in any case.
        found_inf: of `unscale_grads`; where it is not 0, parameters and state stay as they are.

    Returns:
        The new parameters, in their own dtypes, and the new state, at least float32. Unless ``inplace``, nothing that was
        passed in is changed.

    Raises:
        OptionError: gradients or state are not of the structure of the parameters; a hyper-parameter is out of range.
    """
    return _step(params, grads, opt_state, config, inplace, differentiable, found_inf)


def adam_step(
    params: Any,
    grads: Any,
    opt_state: OPTIMIZER_STATE_TYPE,
    config: AdamConfig,
    *,
    inplace: bool = False,
    differentiable: bool = False,
    found_inf: Tensor | None = None,
) -> tuple[Any, OPTIMIZER_STATE_TYPE]:
    """One step of Adam, AdamW, or fully decoupled Adam (``config.mode``); everything else as of `sgd_step`."""
    return _step(params, grads, opt_state, config, inplace, differentiable, found_inf)


def lars_step(
    params: Any,
    grads: Any,
    opt_state: OPTIMIZER_STATE_TYPE,
    config: LARSConfig,
    *,
    inplace: bool = False,
    differentiable: bool = False,
    found_inf: Tensor | None = None,
) -> tuple[Any, OPTIMIZER_STATE_TYPE]:
    """One step of LARS; everything else as of `sgd_step`."""
    return _step(params, grads, opt_state, config, inplace, differentiable, found_inf)


def sgd(params: Any, grads: Any, momentum: Any, config: SGDConfig) -> tuple[Any, Any]:
    """`sgd_step` on its buffers alone, as step number ``config.steps + 1``; returns parameters and momentum."""
    params, state = _step(params, grads, _state_before(params, momentum=momentum), config)
    return params, state["momentum"]


def adam(params: Any, grads: Any, exp_avg: Any, exp_avg_sq: Any, config: AdamConfig) -> tuple[Any, Any, Any]:
    """`adam_step` on its buffers alone, as step number ``config.steps + 1``; returns parameters and both averages."""
    state = _state_before(params, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    params, state = _step(params, grads, state, config)
    return params, state["exp_avg"], state["exp_avg_sq"]


def lars(params: Any, grads: Any, momentum: Any, config: LARSConfig) -> tuple[Any, Any]:
    """`lars_step` on its buffers alone, as step number ``config.steps + 1``; returns parameters and momentum."""
    params, state = _step(params, grads, _state_before(params, momentum=momentum), config)
    return params, state["momentum"]


def default_sgd_state(model: Any) -> OPTIMIZER_STATE_TYPE:
    """The state of SGD and LARS before the first step.

    Args:
        model: a module, whose parameters are a dictionary by name then, or a pytree of tensors.
    """
    params = _params_of(model)
    return _state_before(params, momentum=pytree.tree_map(zeros, params))


def default_adam_state(model: Any) -> OPTIMIZER_STATE_TYPE:
    """The state of Adam before the first step; argument as of `default_sgd_state`."""
    params = _params_of(model)
    return _state_before(params, exp_avg=pytree.tree_map(zeros, params), exp_avg_sq=pytree.tree_map(zeros, params))


# ------------------------------------------------------------------------------------------------------------ internals


def _params_of(model: Any) -> Any:
    return dict(model.named_parameters()) if isinstance(model, nn.Module) else model


def _state_before(params: Any, **buffers: Any) -> OPTIMIZER_STATE_TYPE:
    leaves = pytree.tree_leaves(params)
    device = leaves[0].device if leaves else None
    return {"step": torch.zeros((), dtype=torch.float64, device=device), **buffers}


def _step(
    params: Any,
    grads: Any,
    opt_state: OPTIMIZER_STATE_TYPE,
    config: Config,
    inplace: bool = False,
    differentiable: bool = False,
    found_inf: Tensor | None = None,
) -> tuple[Any, OPTIMIZER_STATE_TYPE]:
    name = type(config).__name__
    leaves, spec = pytree.tree_flatten(params)
    given = leaves_like(params, grads, f"a step of {name}: grads")
    missing = sorted({"step", *config.buffers} - set(opt_state))
    if missing:
        raise OptionError(
            f"a step of {name}: opt_state lacks {missing} and has {sorted(opt_state)}; make it by init_optimizer_state(), and "
            "pass on what the step before has returned"
        )
    buffers = {
        key: leaves_like(params, opt_state[key], f"a step of {name}: opt_state[{key!r}]") for key in config.buffers
    }
    if inplace:
        with torch.no_grad():
            return _write(params, leaves, given, opt_state, buffers, config, found_inf)
    if not differentiable:
        leaves, given = _without_graph(leaves), _without_graph(given)
        buffers = {key: _without_graph(tensors) for key, tensors in buffers.items()}
    count = opt_state["step"]
    transform = chain(*config.modules(config.scale(count + config.steps)))
    news, states = _advance(transform, leaves, given, count + config.steps, buffers, config.buffers)
    new_count = count + 1
    if found_inf is not None:
        news = _unless(found_inf, news, leaves)
        states = {key: _unless(found_inf, states[key], buffers[key]) for key in states}
        new_count = _unless(found_inf, [new_count], [count])[0]
    trees = {key: pytree.tree_unflatten(tensors, spec) for key, tensors in states.items()}
    return pytree.tree_unflatten(news, spec), {**opt_state, **trees, "step": new_count}


def _write(
    params: Any,
    leaves: list[Tensor],
    grads: list[Tensor],
    opt_state: OPTIMIZER_STATE_TYPE,
    buffers: Mapping[str, list[Tensor]],
    config: Config,
    found_inf: Tensor | None,
) -> tuple[Any, OPTIMIZER_STATE_TYPE]:
    """One tensor at a time, so that there is never more in memory than what one of them needs."""
    count = opt_state["step"]
    transform = chain(*config.modules(config.scale(count + config.steps)))
    for index, (param, grad) in enumerate(zip(leaves, grads, strict=True)):
        olds = {key: [tensors[index]] for key, tensors in buffers.items()}
        (new,), states = _advance(transform, [param], [grad], count + config.steps, olds, config.buffers)
        for old, value in [(param, new), *((olds[key][0], states[key][0]) for key in states)]:
            old.copy_(value if found_inf is None else _unless(found_inf, [value], [old])[0])
    count.copy_(count + 1 if found_inf is None else _unless(found_inf, [count + 1], [count])[0])
    return params, opt_state


def _advance(
    transform: Transform,
    leaves: list[Tensor],
    grads: list[Tensor],
    count: Tensor,
    buffers: Mapping[str, list[Tensor]],
    paths: Mapping[str, str],
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    entries: list[dict[str, Any]] = [
        {path: _as_real(buffers[key][index]) for key, path in paths.items()} for index in range(len(leaves))
    ]
    updates, state = transform.update(grads, ChainState(count, entries), leaves)
    news: list[Tensor] = apply_updates(leaves, updates)
    states = {
        key: [
            torch.view_as_complex(entry[path]) if old.is_complex() else entry[path]
            for entry, old in zip(state.states, buffers[key], strict=True)
        ]
        for key, path in paths.items()
    }
    return news, states


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _unless(found_inf: Tensor, news: list[Tensor], olds: list[Tensor]) -> list[Tensor]:
    return [
        torch.where(found_inf.to(old.device) > 0, old.to(new.dtype), new) for new, old in zip(news, olds, strict=True)
    ]


def _without_graph(tensors: list[Tensor]) -> list[Tensor]:
    """Cut off from autograd's own graph; what ``torch.func`` follows stays."""
    return [tensor.detach() if tensor.requires_grad and not is_transformed(tensor) else tensor for tensor in tensors]
