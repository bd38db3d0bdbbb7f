"""Methods with matrices or a memory: SOAP, Shampoo, Muon and L-BFGS, in graphopt and in the libraries that have them.

Steps come in tens, because matrices are refreshed in every tenth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Parameters = Sequence[nn.Parameter]
Make = Callable[[Parameters], Any]

PERIOD = 10  # steps
RATE = 1e-3

# A transformer's matrices with a hidden size of 256, and many of those where calls cost more than arithmetic.
MATRIX_SETS: dict[str, list[tuple[int, ...]]] = {
    "matrices": [*[(256, 256)] * 4, (1024, 256), (256, 1024)] * 4,
    "tiny-matrices": [(16, 16)] * 200,
}
VECTOR_SETS: dict[str, list[tuple[int, ...]]] = {
    "1m": [(50, 1000)] * 20,
    "tiny": [(64,)] * 200,
}
QUICK_SETS: dict[str, list[tuple[int, ...]]] = {
    "matrices": [(24, 16)] * 2,
    "tiny-matrices": [(8, 8)] * 4,
    "1m": [(50, 10)] * 2,
    "tiny": [(8,)] * 4,
}
SET_LABELS = {
    "matrices": "24 matrices of 256 x 256 to 1024 x 256",
    "tiny-matrices": "200 matrices of 16 x 16",
    "1m": "1 M in 20 tensors",
    "tiny": "200 vectors of 64",
}


def _chain(*modules: Callable[[Any], Any]) -> Make:
    def make(parameters: Parameters) -> Any:
        from graphopt.optim import Modular, m

        return Modular(parameters, *(module(m) for module in modules))

    return make


def _torchzero(*modules: Callable[[Any], Any]) -> Make:
    def make(parameters: Parameters) -> Any:
        import torchzero

        return torchzero.Optimizer(parameters, *(module(torchzero.m) for module in modules))

    return make


def _heavyball(name: str, **options: Any) -> Make:
    def make(parameters: Parameters) -> Any:
        import heavyball

        return getattr(heavyball, name)(parameters, lr=RATE, weight_decay=0, consume_grad=False, **options)

    return make


def _rate(m: Any) -> Any:
    return m.LR(RATE)


def _search(m: Any) -> Any:
    return m.StrongWolfe()


METHODS: dict[str, dict[str, Make]] = {
    "soap": {
        "graphopt": _chain(lambda m: m.SOAP(precond_freq=PERIOD, merge_small=False), _rate),
        "torchzero": _torchzero(lambda m: m.SOAP(precond_freq=PERIOD), _rate),
        "heavyball": _heavyball(
            "SOAP", betas=(0.95, 0.95), precondition_frequency=PERIOD, use_precond_schedule=False, merge_dims=False
        ),
    },
    "shampoo": {
        "graphopt": _chain(lambda m: m.Shampoo(update_freq=PERIOD, merge_small=False), _rate),
        "torchzero": _torchzero(lambda m: m.Shampoo(precond_freq=PERIOD, merge_small=False), _rate),
    },
    "muon": {
        "torch": lambda parameters: torch.optim.Muon(parameters, lr=RATE, weight_decay=0),
        "graphopt": _chain(lambda m: m.Muon(), _rate),
        "torchzero": _torchzero(lambda m: m.NAG(0.95), lambda m: m.Orthogonalize(), _rate),
        "heavyball": _heavyball("Muon", betas=(0.95, 0.95)),
    },
    "lbfgs": {
        "torch": lambda parameters: torch.optim.LBFGS(parameters, lr=RATE, max_iter=1, history_size=10),
        "graphopt": _chain(lambda m: m.LBFGS(10), _rate),
        "torchzero": _torchzero(lambda m: m.LBFGS(10), _rate),
    },
    "lbfgs-wolfe": {
        "torch": lambda parameters: torch.optim.LBFGS(
            parameters, lr=1, max_iter=PERIOD, max_eval=10 * PERIOD, history_size=10, line_search_fn="strong_wolfe"
        ),
        "graphopt": _chain(lambda m: m.Multistep([m.LBFGS(10), m.StrongWolfe()], PERIOD)),
        "torchzero": _torchzero(lambda m: m.LBFGS(10), _search),
    },
}
TITLES = {
    "soap": "SOAP, bases refreshed in every tenth step",
    "shampoo": "Shampoo, roots refreshed in every tenth step",
    "muon": "Muon",
    "lbfgs": "L-BFGS, history 10, a fixed rate",
    "lbfgs-wolfe": "L-BFGS, history 10, strong Wolfe",
}
LABELS = {
    "graphopt": "graphopt",
    "torch": "torch.optim",
    "torchzero": "torchzero 0.4.4",
    "heavyball": "HeavyBall 3.2.1",
}


def make_parameters(shapes: Sequence[Sequence[int]], device: str) -> list[nn.Parameter]:
    """Random parameters with random gradients."""
    made = [nn.Parameter(torch.randn(*shape, device=device)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def stepper(method: str, library: str, parameters: Parameters) -> Callable[[], object]:
    """What makes `PERIOD` steps."""
    optimizer = METHODS[method][library](parameters)
    if not method.startswith("lbfgs"):
        return _repeated(optimizer.step)
    closure = Quartic(parameters)
    if method == "lbfgs-wolfe":
        whole = library in ("torch", "graphopt")  # one call makes all steps

        def restarted() -> object:
            closure.restart()
            return optimizer.step(closure) if whole else _repeated(lambda: optimizer.step(closure))()

        return restarted
    return _repeated(lambda: optimizer.step(closure))


def _repeated(step: Callable[[], object]) -> Callable[[], object]:
    def steps() -> None:
        for _ in range(PERIOD):
            step()

    return steps


class Quartic:
    """A loss that costs nothing to speak of: ``Σ a x² / 2 + x⁴ / 4`` with a from 1 to 10; gradients by its formula.

    Args:
        parameters: what it is a function of.
    """

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = list(parameters)
        self._starts = [parameter.detach().clone() for parameter in parameters]
        self._curvatures = [
            torch.linspace(1, 10, parameter.numel(), device=parameter.device).reshape(parameter.shape)
            for parameter in parameters
        ]
        self.num_evaluations = 0

    @torch.no_grad()
    def __call__(self, backward: bool = True) -> torch.Tensor:
        """The loss, and unless told otherwise the gradients."""
        self.num_evaluations += 1
        values = [parameter.detach() for parameter in self._parameters]
        squares = torch._foreach_mul(values, values)
        slopes = torch._foreach_add(squares, self._curvatures)
        if backward:
            for parameter, grad in zip(self._parameters, torch._foreach_mul(slopes, values), strict=True):
                parameter.grad = grad
        torch._foreach_add_(slopes, self._curvatures)
        torch._foreach_mul_(slopes, squares)
        return torch.stack([term.sum() for term in slopes]).sum() / 4

    @torch.no_grad()
    def restart(self) -> None:
        """Go back to where it began."""
        for parameter, start in zip(self._parameters, self._starts, strict=True):
            parameter.copy_(start)


def plan(quick: bool) -> list[tuple[str, str, Mapping[str, Make], list[tuple[int, ...]]]]:
    """Of each case the method, the set of parameters, who has it, and the shapes."""
    sets = QUICK_SETS if quick else {**MATRIX_SETS, **VECTOR_SETS}
    return [
        (method, name, rivals, sets[name])
        for method, rivals in METHODS.items()
        for name in (VECTOR_SETS if method.startswith("lbfgs") else MATRIX_SETS)
    ]
