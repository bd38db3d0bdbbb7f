"""Schedule-free learning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from graphopt.errors import ModuleError, OptionError
from graphopt.optim.core.arithmetic import choose, mix, scalar, zeros
from graphopt.optim.core.bounds import FRACTION, NON_NEGATIVE, numbers
from graphopt.optim.core.closures import restored
from graphopt.optim.core.context import Context, Number, Settings
from graphopt.optim.core.module import Rule, walk
from graphopt.optim.core.state_dicts import all_params

if TYPE_CHECKING:
    from graphopt.optim.core.modular import Modular


class ScheduleFreeState(NamedTuple):
    """What is remembered of a parameter, at least float32.

    Attributes:
        z: where the steps of the base optimizer lead, like the parameter.
        x: the average of ``z``, like the parameter; to be evaluated and deployed.
        lr_max: the largest learning rate so far, shape ().
        weight_sum: the sum of weights, shape ().
    """

    z: Tensor
    x: Tensor
    lr_max: Tensor
    weight_sum: Tensor


class ScheduleFree(Rule):
    """Steps of any optimizer, averaged in such a way that no learning rate schedule is needed.

    ``z = z - lr u``, ``x = (1 - c) x + c z``, and the parameters become ``y = (1 - momentum) z + momentum x``, where the next
    gradient is taken; ``c`` is the share of ``w = t^r lr_max^weight_lr_power`` in the sum of all w so far.

    It is the learning rate of its chain and must be last in it: ``[Adam(beta1=0), ScheduleFree(1e-3)]`` is the authors'
    AdamW (with `WeightDecay` in between), ``[ScheduleFree(0.1)]`` their SGD. A warm-up is a function ``lr`` of the number of
    steps.

    **Evaluate the model at x**, not at y, which is where training leaves it: inside of ``with
    ScheduleFree.averaged(optimizer):`` the parameters are x. (Running statistics of batch normalisation are those at y; let
    the model see a few batches in that block, in training mode, before it is evaluated.)

    Args:
        lr: the step size.
        momentum: how near to x gradients are taken; the paper's β.
        r: power of the number of steps in the weights.
        weight_lr_power: power of the largest learning rate in the weights.

    Raises:
        OptionError: a number is out of range.

    Reference: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky, "The Road Less Scheduled", arXiv:2405.15682, 2024,
    equations 2 to 4 and section 4.2.

    Example:
        >>> from graphopt.optim import Modular, m
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = Modular([weight], m.ScheduleFree(0.1))
        >>> for _ in range(2):
        ...     weight.grad = 2 * weight.detach()
        ...     optimizer.step()
        >>> weight.data
        tensor([0.7120])
        >>> with m.ScheduleFree.averaged(optimizer):
        ...     weight.data
        tensor([0.7200])
        >>> weight.data
        tensor([0.7120])
    """

    bounds = numbers(lr=NON_NEGATIVE, momentum=FRACTION, r=NON_NEGATIVE, weight_lr_power=NON_NEGATIVE)
    State = ScheduleFreeState
    is_learning_rate = True
    must_be_last = True

    def __init__(
        self, lr: Number = 1e-2, momentum: Number = 0.9, *, r: Number = 0.0, weight_lr_power: Number = 2.0
    ) -> None:
        super().__init__({"lr": lr, "momentum": momentum, "r": r, "weight_lr_power": weight_lr_power})

    def init(self, param: Tensor, settings: Settings) -> ScheduleFreeState:
        """Zeros; the first step fills in the parameter."""
        return ScheduleFreeState(zeros(param), zeros(param), scalar(param), scalar(param))

    def update(
        self, update: Tensor, state: ScheduleFreeState, settings: Settings, context: Context
    ) -> tuple[Tensor, ScheduleFreeState]:
        """One step."""
        is_first = context.count == 1
        param = context.param.to(update.dtype)
        lr = torch.ones_like(state.lr_max) * settings.lr
        lr_max = lr.to(state.lr_max.dtype).maximum(state.lr_max)
        weight = (lr_max**settings.weight_lr_power * context.count**settings.r).to(lr_max.dtype)
        weight_sum = state.weight_sum + weight
        share = weight / choose(weight_sum > 0, weight_sum, torch.ones_like(weight_sum))
        z = choose(is_first, param, state.z) - update * settings.lr
        x = mix(choose(is_first, param, state.x), z, share)
        return param - mix(z, x, settings.momentum), ScheduleFreeState(z, x, lr_max, weight_sum)

    @staticmethod
    @contextmanager
    def averaged(optimizer: Modular) -> Iterator[None]:
        """Let the parameters be the averages ``x`` inside of a ``with`` block; afterwards they are what they were, bit for bit.

        Do not step in it. ``model.state_dict()`` in it is what to deploy; to resume training, save the model outside of it.

        Args:
            optimizer: has a `ScheduleFree` in its chain. Parameters that have made no step yet stay as they are.

        Raises:
            OptionError: it has none.
            ModuleError: the averages are not those of the parameters, but of a projection.
        """
        modules = [module for module in walk(optimizer.modules) if isinstance(module, ScheduleFree)]
        if not modules:
            raise OptionError(
                f"ScheduleFree.averaged(optimizer): no ScheduleFree in {optimizer!r}; pass the Modular that has one"
            )
        names = [f"{module.binding.path}.x" for module in modules if module.binding is not None]
        averages = []
        for param in all_params(optimizer):
            entry = optimizer.state.get(param, {})
            if any(key.endswith(f":{name}") for key in entry for name in names):
                raise ModuleError(
                    "ScheduleFree.averaged(optimizer): a ScheduleFree inside of a projection averages projections, not "
                    "parameters; put it behind the projection"
                )
            found = [entry[name] for name in names if name in entry and float(entry.get("step", 1)) > 0]
            averages += [(param, average) for average in found]
        with restored([param for param, _ in averages]):
            with torch.no_grad():
                for param, average in averages:
                    param.copy_(torch.view_as_complex(average) if param.is_complex() else average)
            yield
