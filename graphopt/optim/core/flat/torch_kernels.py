"""Chains that equal one of torch's own optimizers, and its fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from graphopt.optim.core.context import Settings
from graphopt.optim.core.module import Rule


class TorchKernel(NamedTuple):
    """A fused kernel of torch.

    Attributes:
        name: of the optimizer in ``torch.optim``.
        states: paths of the state elements that it updates, in its own order.
        run: ``run(params, grads, states, steps, settings, maximize)``; ``settings`` by path, ``steps`` the number of steps made
            before, one tensor of float32 for each parameter; it adds one to each.
    """

    name: str
    states: tuple[str, ...]
    run: Callable[..., None]


def recognize(
    rules: Sequence[Rule], settings_of: Callable[[Rule], Settings], path_of: Callable[[Rule], str]
) -> TorchKernel | None:
    """The fused kernel that computes what the rules compute, if there is one."""
    names = tuple(type(rule).__name__ for rule in rules)
    found = _KERNELS.get(names)
    if found is None or any(rule.children or not type(rule).__module__.startswith("graphopt.optim.") for rule in rules):
        return None
    settings = {type(rule).__name__: settings_of(rule) for rule in rules}
    if not found.fits(settings):
        return None
    paths = {type(rule).__name__: path_of(rule) for rule in rules}

    def run(
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        steps: list[Tensor],
        settings: Mapping[str, Settings],
        maximize: bool,
    ) -> None:
        found.run(params, grads, states, steps, {name: settings[path] for name, path in paths.items()}, maximize)

    return TorchKernel(found.name, tuple(f"{paths[owner]}.{state}" for owner, state in found.states), run)


class _Entry(NamedTuple):
    name: str
    states: tuple[tuple[str, str], ...]
    fits: Callable[[Mapping[str, Settings]], bool]
    run: Callable[..., None]


def _lr(settings: Mapping[str, Settings]) -> Any:
    return settings["LR"].lr if "LR" in settings else 1.0


def _decay(settings: Mapping[str, Settings]) -> float:
    return float(settings["WeightDecay"].weight_decay) if "WeightDecay" in settings else 0.0


def _is_plain_decay(settings: Mapping[str, Settings]) -> bool:
    return "WeightDecay" not in settings or settings["WeightDecay"].ord == 2


def _is_plain_adam(settings: Mapping[str, Settings]) -> bool:
    s = settings["Adam"]
    return not s.amsgrad and s.debiased and not s.eps_inside and s.alpha == 1 and _is_plain_decay(settings)


def _adam(function: Callable[..., None]) -> Callable[..., None]:
    def run(
        params: list[Tensor],
        grads: list[Tensor],
        states: list[list[Tensor]],
        steps: list[Tensor],
        settings: Mapping[str, Settings],
        maximize: bool,
    ) -> None:
        s = settings["Adam"]
        function(
            params,
            grads,
            states[0],
            states[1],
            [],
            steps,
            fused=True,
            foreach=False,
            amsgrad=False,
            beta1=float(s.beta1),
            beta2=float(s.beta2),
            lr=_lr(settings),
            weight_decay=_decay(settings),
            eps=float(s.eps),
            maximize=maximize,
        )

    return run


def _is_plain_momentum(settings: Mapping[str, Settings]) -> bool:
    s = settings.get("HeavyBall") or settings.get("NAG")
    if s is None:
        return _is_plain_decay(settings)
    return s.dampening == 0 and not s.lerp and not s.get("debiased", False) and _is_plain_decay(settings)


def _sgd(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    steps: list[Tensor],
    settings: Mapping[str, Settings],
    maximize: bool,
) -> None:
    s = settings.get("HeavyBall") or settings.get("NAG")
    momentum: list[Tensor | None] = list(states[0]) if s is not None else [None] * len(params)
    sgd(
        params,
        grads,
        momentum,
        fused=True,
        foreach=False,
        weight_decay=_decay(settings),
        momentum=0.0 if s is None else float(s.momentum),
        lr=float(_lr(settings)),
        dampening=0.0,
        nesterov="NAG" in settings,
        maximize=maximize,
    )


def _is_plain_adagrad(settings: Mapping[str, Settings]) -> bool:
    s = settings["Adagrad"]
    return s.alpha == 1 and s.use_sqrt and s.pow == 2 and _is_plain_decay(settings)


def _adagrad(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[list[Tensor]],
    steps: list[Tensor],
    settings: Mapping[str, Settings],
    maximize: bool,
) -> None:
    s = settings["Adagrad"]
    adagrad(
        params,
        grads,
        states[0],
        steps,
        fused=True,
        foreach=False,
        has_sparse_grad=False,
        has_complex=False,
        differentiable=False,
        lr=float(_lr(settings)),
        weight_decay=_decay(settings),
        lr_decay=float(s.lr_decay),
        eps=float(s.eps),
        maximize=maximize,
    )


_ADAM = (("Adam", "exp_avg"), ("Adam", "exp_avg_sq"))
_KERNELS: dict[tuple[str, ...], _Entry] = {}
for _tail in ((), ("LR",)):
    _KERNELS["Adam", *_tail] = _Entry("Adam", _ADAM, _is_plain_adam, _adam(adam))
    _KERNELS["WeightDecay", "Adam", *_tail] = _Entry("Adam", _ADAM, _is_plain_adam, _adam(adam))
    _KERNELS["Adam", "WeightDecay", *_tail] = _Entry("AdamW", _ADAM, _is_plain_adam, _adam(adamw))
    for _head in ((), ("WeightDecay",)):
        if _head or _tail:
            _KERNELS[*_head, *_tail] = _Entry("SGD", (), _is_plain_momentum, _sgd)
        for _momentum in ("HeavyBall", "NAG"):
            _states = ((_momentum, "momentum_buffer"),)
            _KERNELS[*_head, _momentum, *_tail] = _Entry("SGD", _states, _is_plain_momentum, _sgd)
        _KERNELS[*_head, "Adagrad", *_tail] = _Entry("Adagrad", (("Adagrad", "sum"),), _is_plain_adagrad, _adagrad)


def supports(kernel: TorchKernel, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has the kernel for these parameters."""
    if dtype not in (torch.float32, torch.float64):
        return False  # it would keep state of low precision
    return device.type == "cpu" or (device.type == "cuda" and kernel.name != "Adagrad")
