"""Optimizers by name: a config, a state before the first step, and a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from graphopt.errors import OptionError
from graphopt.optim.functional.configs import AdamConfig, AdamWDMode, LARSConfig, SGDConfig
from graphopt.optim.functional.steps import (
    OPTIMIZER_STATE_TYPE,
    adam_step,
    default_adam_state,
    default_sgd_state,
    lars_step,
    sgd_step,
)

DEFAULT_OPTIMIZER_CONFIGS: dict[str, Callable[..., Any]] = {
    "adam": AdamConfig,
    "adamw": functools.partial(AdamConfig, mode=AdamWDMode.ADAMW),
    "decoupled_adam": functools.partial(AdamConfig, mode=AdamWDMode.DECOUPLED),
    "lars": LARSConfig,
    "sgd": SGDConfig,
}
"""By name what makes a config; arguments are hyper-parameters."""

DEFAULT_OPTIMIZER_STATES: dict[str, Callable[[Any], OPTIMIZER_STATE_TYPE]] = {
    "adam": default_adam_state,
    "adamw": default_adam_state,
    "decoupled_adam": default_adam_state,
    "lars": default_sgd_state,
    "sgd": default_sgd_state,
}
"""By name what makes the state of a model, or of a pytree of parameters."""

OPTIMIZER_STEP: dict[str, Callable[..., tuple[Any, OPTIMIZER_STATE_TYPE]]] = {
    "adam": adam_step,
    "adamw": adam_step,
    "decoupled_adam": adam_step,
    "lars": lars_step,
    "sgd": sgd_step,
}
"""By name ``step(params, grads, opt_state, config) -> (params, opt_state)``."""


def register_optimizer(
    name: str,
    *,
    config: Callable[..., Any],
    state: Callable[[Any], OPTIMIZER_STATE_TYPE],
    step: Callable[..., tuple[Any, OPTIMIZER_STATE_TYPE]],
    replace: bool = False,
) -> None:
    """Add an optimizer to all three registries.

    Args:
        name: the name to find it by.
        config: makes a config.
        state: makes the state of a model before the first step, such as `default_sgd_state`.
        step: ``step(params, grads, opt_state, config) -> (params, opt_state)``.
        replace: whether the name may be that of another one.

    Raises:
        OptionError: the name is taken.
    """
    if name in OPTIMIZER_STEP and not replace:
        raise OptionError(
            f"register_optimizer({name!r}): there is one of this name; choose another name, or pass replace=True"
        )
    DEFAULT_OPTIMIZER_CONFIGS[name] = config
    DEFAULT_OPTIMIZER_STATES[name] = state
    OPTIMIZER_STEP[name] = step


def init_optimizer_state(optimizer_name: str, model: Any) -> OPTIMIZER_STATE_TYPE:
    """The state of an optimizer before the first step.

    Args:
        optimizer_name: a name in the registries.
        model: a module, whose parameters are a dictionary by name then, or a pytree of tensors.

    Raises:
        OptionError: there is no optimizer of this name.

    Example:
        >>> import torch
        >>> params = {"w": torch.ones(2)}
        >>> state = init_optimizer_state("sgd", params)
        >>> step, config = get_optimizer_step("sgd"), DEFAULT_OPTIMIZER_CONFIGS["sgd"](max_lr=0.5)
        >>> new, state = step(params, {"w": torch.ones(2)}, state, config)
        >>> new["w"], params["w"], state["step"]
        (tensor([0.5000, 0.5000]), tensor([1., 1.]), tensor(1., dtype=torch.float64))
    """
    state: OPTIMIZER_STATE_TYPE = _find(DEFAULT_OPTIMIZER_STATES, optimizer_name)(model)
    return state


def get_optimizer_step(optimizer_name: str) -> Callable[..., tuple[Any, OPTIMIZER_STATE_TYPE]]:
    """The step of an optimizer: ``step(params, grads, opt_state, config) -> (params, opt_state)``.

    Raises:
        OptionError: there is no optimizer of this name.
    """
    return _find(OPTIMIZER_STEP, optimizer_name)


def _find(registry: dict[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    if name not in registry:
        raise OptionError(f"no optimizer {name!r}; there are {sorted(registry)}, and register_optimizer() adds one")
    return registry[name]
