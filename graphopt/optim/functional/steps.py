"""One step of SGD, Adam and LARS: each is a chain of modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import OptionError
from graphopt.optim.adaptive.adam import Adam
from graphopt.optim.adaptive.lars import LARS
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.transform import ChainState, Transform, apply_updates, chain
from graphopt.optim.decay.weight_decay import WeightDecay
from graphopt.optim.functional.configs import AdamConfig, LARSConfig, Schedule, SGDConfig
from graphopt.optim.momentum.heavy_ball import HeavyBall
from graphopt.optim.momentum.nag import NAG
from graphopt.optim.step_size.lr import LR

Config = SGDConfig | AdamConfig | LARSConfig


def transform_of(config: Config, step: Number = 0.0) -> Transform:
    """The chain that a config describes.

    Args:
        config: the hyper-parameters.
        step: how many steps were made before, for the schedule.
    """
    return chain(*_CHAINS[type(config)](config, _value(config.lr_schedule_value, step)))


def sgd_step(
    params: Any, grads: Any, state: ChainState, config: SGDConfig, *, inplace: bool = False
) -> tuple[Any, ChainState]:
    """One step of stochastic gradient descent.

    Args:
        params: a pytree of tensors.
        grads: gradients of the same structure.
        state: what ``init_optimizer_state("sgd", params, config)`` or an earlier step returned.
        config: the hyper-parameters; they may change from step to step, but for whether there is momentum.
        inplace: write the results into the tensors of ``params`` and ``state``, which are returned.

    Returns:
        New parameters and state. Without ``inplace`` nothing that was passed in is changed.

    Raises:
        OptionError: the structures differ, or the config is of another optimizer.
    """
    return _step(params, grads, state, config, SGDConfig, inplace)


def adam_step(
    params: Any, grads: Any, state: ChainState, config: AdamConfig, *, inplace: bool = False
) -> tuple[Any, ChainState]:
    """One step of Adam, AdamW or decoupled Adam; arguments as in `sgd_step`."""
    return _step(params, grads, state, config, AdamConfig, inplace)


def lars_step(
    params: Any, grads: Any, state: ChainState, config: LARSConfig, *, inplace: bool = False
) -> tuple[Any, ChainState]:
    """One step of LARS; arguments as in `sgd_step`."""
    return _step(params, grads, state, config, LARSConfig, inplace)


def _step(
    params: Any, grads: Any, state: ChainState, config: Config, kind: type[Config], inplace: bool
) -> tuple[Any, ChainState]:
    if not isinstance(config, kind):
        raise OptionError(f"config={config!r}; expected a {kind.__name__}")
    updates, new_state = transform_of(config, state.step).update(grads, state, params)
    new_params = apply_updates(params, updates)
    if not inplace:
        return new_params, new_state
    with torch.no_grad():
        _write((params, state), (new_params, new_state))
    return params, state


def _write(old: Any, new: Any) -> None:
    for target, value in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True):
        target.copy_(value)


def _value(schedule: Schedule | None, step: Number) -> Number:
    if schedule is None:
        return 1.0
    return cast("Callable[[Number], Number]", schedule)(step) if callable(schedule) else schedule


def _is_zero(number: Number) -> bool:
    return not isinstance(number, Tensor) and number == 0


def _sgd(config: SGDConfig, value: Number) -> list[Module]:
    modules: list[Module] = [WeightDecay(config.weight_decay)]
    if not _is_zero(config.momentum):
        modules.append((NAG if config.nesterov else HeavyBall)(config.momentum, config.dampening))
    return [*modules, LR(config.max_lr * value)]


def _adam(config: AdamConfig, value: Number) -> list[Module]:
    adam, rate = Adam(*config.betas, config.eps), LR(config.max_lr * value)
    if config.mode == "original":
        return [WeightDecay(config.weight_decay), adam, rate]
    if config.mode == "adamw":
        return [adam, WeightDecay(config.weight_decay), rate]
    return [adam, rate, WeightDecay(config.weight_decay * value)]


def _lars(config: LARSConfig, value: Number) -> list[Module]:
    modules: list[Module] = [WeightDecay(config.weight_decay), LARS(config.trust, config.eps), LR(config.max_lr * value)]
    return modules if _is_zero(config.momentum) else [*modules, HeavyBall(config.momentum)]


_CHAINS: dict[type, Callable[[Any, Number], list[Module]]] = {SGDConfig: _sgd, AdamConfig: _adam, LARSConfig: _lars}
