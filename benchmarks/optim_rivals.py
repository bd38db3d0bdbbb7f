"""Parameters with gradients, chains of optimizer modules, and who takes a step of them.

A chain is data: names of modules and their arguments, the same for graphopt and for torchzero. `Foreach` carries it out with
PyTorch's ``torch._foreach_*`` functions, one module after the other; it is a rival, and in float64 it is what all are checked
against.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Tensors = list[Tensor]
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Module:
    """A module of a chain, by name: ``Module("ClipValue", 10)`` stands for ``m.ClipValue(10)``.

    Args:
        name: In ``graphopt.optim.m`` and in ``torchzero.m``.
        first: Its first argument.
        options: By keyword.
        theirs: Likewise, for torchzero alone, where its default is another.
    """

    name: str
    first: float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    theirs: tuple[tuple[str, Any], ...] = ()

    def make(self, library: Any) -> Any:
        """The module itself, from one of the two."""
        if not hasattr(library, self.name):
            raise LookupError(f"{library.__name__} has no module {self.name}")
        first = () if self.first is None else (self.first,)
        theirs = self.theirs if library.__name__.startswith("torchzero") else ()
        return getattr(library, self.name)(*first, **dict(self.options), **dict(theirs))


@dataclass(frozen=True)
class Chain:
    """A chain and how many floats it must move for each element of the parameters, states in memory and nothing in caches."""

    title: str
    modules: tuple[Module, ...]
    num_floats: int

    @property
    def num_bytes(self) -> int:
        """For each element."""
        return FLOAT * self.num_floats


CHAINS = {
    "adamw": Chain(
        "Adam, WeightDecay, LR",
        (Module("Adam"), Module("WeightDecay", 0.01), Module("LR", 1e-3)),
        7,  # reads p, g, m, v; writes p, m, v
    ),
    "readme": Chain(
        "ClipValue, Adam, NormalizeByEMA, WeightDecay, LR",
        (
            Module("ClipValue", 10),
            Module("Adam"),
            Module("NormalizeByEMA", options=(("max_ema_growth", 1.1),)),
            Module("WeightDecay", 1e-4),
            Module("LR", 1e-1),
        ),
        11,  # reads g, m, v, e; writes m, v, e; when the norms of a tensor are known, reads m, v, p and writes p
    ),
    "lion": Chain(
        "Lion, LR",
        (Module("Lion"), Module("LR", 1e-4)),
        5,  # reads p, g, m; writes p, m
    ),
    "laprop": Chain(
        "RMSprop, EMA, LR (LaProp)",
        (Module("RMSprop", options=(("init", "zeros"),)), Module("EMA", 0.9), Module("LR", 1e-3)),
        7,  # reads p, g, v, m; writes p, v, m
    ),
    "signum": Chain(
        "HeavyBall, Sign, LR (Signum)",
        (Module("HeavyBall", theirs=(("ema_init", "zeros"),)), Module("Sign"), Module("LR", 1e-4)),
        5,  # reads p, g, b; writes p, b
    ),
    "cautious": Chain(
        "Adam, Cautious, LR",
        (Module("Adam"), Module("Cautious"), Module("LR", 1e-3)),
        7,  # reads p, g, m, v; writes p, m, v: it only masks, so the gradient is still at hand
    ),
}


# --- parameters -------------------------------------------------------------------------------------------------------


def shapes(*, kind: str, **sizes: int) -> list[tuple[int, ...]]:
    """Of ``"bert"``, with its head for masked words, or of tensors that are all ``"equal"``."""
    return {"bert": _bert, "equal": _equal}[kind](**sizes)


def _equal(*, number: int, elements: int) -> list[tuple[int, ...]]:
    return [(elements,)] * number


def _bert(*, layers: int, hidden: int, intermediate: int, vocabulary: int, positions: int) -> list[tuple[int, ...]]:
    square, vector, norm = (hidden, hidden), (hidden,), [(hidden,)] * 2
    embeddings = [(vocabulary, hidden), (positions, hidden), (2, hidden), *norm]
    attention = [*[square, vector] * 4, *norm]
    layer = [*attention, (intermediate, hidden), (intermediate,), (hidden, intermediate), vector, *norm]
    return [*embeddings, *layer * layers, square, vector, *norm, (vocabulary,)]


def make_parameters(
    given: Iterable[tuple[int, ...]], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Random parameters that have random gradients."""
    parameters = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in given]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


# --- rivals -----------------------------------------------------------------------------------------------------------


def prepare(method: str) -> None:
    """Import what the method needs; constructing and stepping come later, and are timed."""
    package = {"graphopt": "graphopt.optim", "torchzero": "torchzero", "heavyball": "heavyball"}.get(method)
    if package is not None:
        importlib.import_module(package)


def optimizer(method: str, chain: str, parameters: Sequence[nn.Parameter]) -> Any:
    """Something with a method ``step``; of all but ``foreach`` a true ``torch.optim.Optimizer``."""
    if method.startswith("torch-"):
        return _adamw(parameters, **TORCH[method])
    return METHODS[method](parameters, CHAINS[chain])


def step_of(method: str, made: Any) -> Callable[[], object]:
    """What takes a step, compiled if that is the method."""
    step: Callable[[], object] = torch.compile(made.step) if method == "torch-compiled" else made.step
    return step


TORCH: dict[str, dict[str, bool]] = {
    "torch-fused": {"fused": True},
    "torch-foreach": {"foreach": True},
    "torch-loop": {"foreach": False, "fused": False},
    "torch-compiled": {"foreach": True},
}


def _adamw(parameters: Iterable[nn.Parameter], **how: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, **how)


def _graphopt(parameters: Sequence[nn.Parameter], chain: Chain) -> Any:
    from graphopt.optim import Modular, m

    return Modular(parameters, *(module.make(m) for module in chain.modules))


def _torchzero(parameters: Sequence[nn.Parameter], chain: Chain) -> Any:
    import torchzero

    return torchzero.Optimizer(parameters, *(module.make(torchzero.m) for module in chain.modules))


def _heavyball(parameters: Sequence[nn.Parameter], chain: Chain) -> Any:
    """Its AdamW; it takes the gradients away unless told not to, and its betas are others by default."""
    import heavyball

    assert chain is CHAINS["adamw"]
    return heavyball.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, consume_grad=False)


class Foreach:
    """A chain as ``torch._foreach_*`` calls: no update is copied that need not be.

    Args:
        parameters: all in one group, with gradients.
        chain: its last module is LR, which becomes a factor.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], chain: Chain) -> None:
        *modules, rate = chain.modules
        assert rate.name == "LR"
        assert rate.first is not None
        self._parameters, self._rate = list(parameters), rate.first
        self._modules = [FOREACH[module.name](self._parameters, module) for module in modules]

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters."""
        grads: Tensors = [parameter.grad for parameter in self._parameters]  # type: ignore[misc]  # all have one
        update = grads
        for module in self._modules:
            update = module(update, grads)
        torch._foreach_add_(self._parameters, update, alpha=-self._rate)


METHODS: dict[str, Callable[[Sequence[nn.Parameter], Chain], Any]] = {
    "graphopt": _graphopt,
    "torchzero": _torchzero,
    "heavyball": _heavyball,
    "foreach": Foreach,
}

# Each of these makes a function of the update so far and of the gradients, from the parameters and the module's arguments.
Made = Callable[[Tensors, Tensors], Tensors]


def _clip_value(parameters: Tensors, module: Module) -> Made:
    limit = module.first
    assert limit is not None

    def clip(update: Tensors, grads: Tensors) -> Tensors:
        clipped = torch._foreach_clamp_max(update, limit)
        torch._foreach_clamp_min_(clipped, -limit)
        return list(clipped)

    return clip


def _adam(parameters: Tensors, module: Module) -> Made:
    exp_avg, exp_avg_sq, num_steps = _zeros(parameters), _zeros(parameters), 0

    def adam(update: Tensors, grads: Tensors) -> Tensors:
        nonlocal num_steps
        num_steps += 1
        torch._foreach_lerp_(exp_avg, update, 0.1)
        torch._foreach_mul_(exp_avg_sq, 0.999)
        torch._foreach_addcmul_(exp_avg_sq, update, update, 0.001)
        debias = (1 - 0.999**num_steps) ** 0.5
        denominator = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(denominator, debias)
        torch._foreach_add_(denominator, 1e-8)
        torch._foreach_mul_(denominator, 1 - 0.9**num_steps)
        return list(torch._foreach_div(exp_avg, denominator))

    return adam


def _normalize_by_ema(parameters: Tensors, module: Module) -> Made:
    """Each tensor's norm becomes that of the average of its updates, which grows by no more than a factor in a step."""
    growth: float = dict(module.options)["max_ema_growth"]
    average = _zeros(parameters)
    before: Tensor | None = None

    def normalize(update: Tensors, grads: Tensors) -> Tensors:
        nonlocal before
        torch._foreach_lerp_(average, update, 0.01)
        norm, wanted = (torch.stack(list(torch._foreach_norm(tensors))) for tensors in (update, average))
        allowed = (growth * (wanted if before is None else before)).clamp(min=1e-6)
        excess = (wanted / allowed).clamp(min=1)
        torch._foreach_div_(average, list(excess))
        before = wanted / excess
        tiny = 2 * torch.finfo(norm.dtype).tiny
        torch._foreach_div_(update, list((norm / before.clamp(min=tiny)).clamp(min=tiny)))
        return update

    return normalize


def _weight_decay(parameters: Tensors, module: Module) -> Made:
    def decay(update: Tensors, grads: Tensors) -> Tensors:
        torch._foreach_add_(update, parameters, alpha=module.first)
        return update

    return decay


def _lion(parameters: Tensors, module: Module) -> Made:
    exp_avg = _zeros(parameters)

    def lion(update: Tensors, grads: Tensors) -> Tensors:
        found = list(torch._foreach_lerp(exp_avg, update, 0.1))
        torch._foreach_lerp_(exp_avg, update, 0.01)
        torch._foreach_sign_(found)
        return found

    return lion


def _rmsprop(parameters: Tensors, module: Module) -> Made:
    exp_avg_sq = _zeros(parameters)

    def rmsprop(update: Tensors, grads: Tensors) -> Tensors:
        torch._foreach_mul_(exp_avg_sq, 0.99)
        torch._foreach_addcmul_(exp_avg_sq, update, update, 0.01)
        denominator = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_add_(denominator, 1e-8)
        return list(torch._foreach_div(update, denominator))

    return rmsprop


def _ema(parameters: Tensors, module: Module) -> Made:
    assert module.first is not None
    exp_avg, weight = _zeros(parameters), 1 - module.first

    def ema(update: Tensors, grads: Tensors) -> Tensors:
        torch._foreach_lerp_(exp_avg, update, weight)
        return exp_avg

    return ema


def _heavy_ball(parameters: Tensors, module: Module) -> Made:
    velocity = _zeros(parameters)

    def heavy_ball(update: Tensors, grads: Tensors) -> Tensors:
        torch._foreach_mul_(velocity, 0.9)
        torch._foreach_add_(velocity, update)
        return velocity

    return heavy_ball


def _sign(parameters: Tensors, module: Module) -> Made:
    return lambda update, grads: list(torch._foreach_sign(update))


def _cautious(parameters: Tensors, module: Module) -> Made:
    def cautious(update: Tensors, grads: Tensors) -> Tensors:
        mask = torch._foreach_mul(update, grads)
        torch._foreach_sign_(mask)
        torch._foreach_clamp_min_(mask, 0)
        torch._foreach_mul_(update, mask)
        return update

    return cautious


FOREACH: dict[str, Callable[[Tensors, Module], Made]] = {
    "ClipValue": _clip_value,
    "Adam": _adam,
    "NormalizeByEMA": _normalize_by_ema,
    "WeightDecay": _weight_decay,
    "Lion": _lion,
    "RMSprop": _rmsprop,
    "EMA": _ema,
    "HeavyBall": _heavy_ball,
    "Sign": _sign,
    "Cautious": _cautious,
}


def _zeros(parameters: Tensors) -> Tensors:
    return [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
