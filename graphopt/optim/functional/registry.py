"""Optimizers by name: their default configs, how their state begins, and their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from graphopt.errors import OptionError
from graphopt.optim.functional.configs import AdamConfig, LARSConfig, SGDConfig
from graphopt.optim.functional.steps import adam_step, lars_step, sgd_step, transform_of

Value = TypeVar("Value")

DEFAULT_OPTIMIZER_CONFIGS: dict[str, Any] = {}
"""For each name the config that is used if none is given."""

DEFAULT_OPTIMIZER_STATES: dict[str, Callable[[Any, Any], Any]] = {}
"""For each name a function of parameters and config that returns the state before the first step."""

OPTIMIZER_STEP: dict[str, Callable[..., tuple[Any, Any]]] = {}
"""For each name the step: ``(params, grads, state, config) -> (params, state)``."""


def register_optimizer(
    name: str, config: Any, init_state: Callable[[Any, Any], Any], step: Callable[..., tuple[Any, Any]]
) -> None:
    """Add an optimizer under a name.

    Args:
        name: a new one.
        config: its default hyper-parameters.
        init_state: of parameters and config, returns the state before the first step.
        step: ``(params, grads, state, config) -> (params, state)``.

    Raises:
        OptionError: the name is taken.
    """
    if name in OPTIMIZER_STEP:
        raise OptionError(f"register_optimizer: {name!r} is registered already; choose another name")
    DEFAULT_OPTIMIZER_CONFIGS[name] = config
    DEFAULT_OPTIMIZER_STATES[name] = init_state
    OPTIMIZER_STEP[name] = step


def init_optimizer_state(name: str, params: Any, config: Any = None) -> Any:
    """The state of an optimizer before its first step.

    Args:
        name: a key of `OPTIMIZER_STEP`.
        params: a pytree of tensors.
        config: its hyper-parameters; the default ones if ``None``.

    Raises:
        OptionError: there is no optimizer of that name.
    """
    init = _find(DEFAULT_OPTIMIZER_STATES, name)
    return init(params, DEFAULT_OPTIMIZER_CONFIGS[name] if config is None else config)


def get_optimizer_step(name: str) -> Callable[..., tuple[Any, Any]]:
    """The step of an optimizer.

    Raises:
        OptionError: there is no optimizer of that name.
    """
    return _find(OPTIMIZER_STEP, name)


def _find(registry: dict[str, Value], name: str) -> Value:
    if name not in registry:
        raise OptionError(
            f"there is no optimizer {name!r}; there are {sorted(registry)}, and register_optimizer adds others"
        )
    return registry[name]


def _init(params: Any, config: Any) -> Any:
    return transform_of(config).init(params)


register_optimizer("sgd", SGDConfig(), _init, sgd_step)
register_optimizer("adam", AdamConfig(), _init, adam_step)
register_optimizer("adamw", AdamConfig(mode="adamw", weight_decay=1e-2), _init, adam_step)
register_optimizer("decoupled_adam", AdamConfig(mode="decoupled"), _init, adam_step)
register_optimizer("lars", LARSConfig(), _init, lars_step)
