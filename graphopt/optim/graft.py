"""Graft: the length of one optimizer's step in the direction of another's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt.optim.foreach import foreach, norms
from graphopt.optim.weight_decay import WeightDecay, WeightDecayChain
from graphopt.optim.wrapping_optimizer import Entry, WrappingOptimizer, rates


class Graft(WrappingOptimizer):
    r"""Take for every tensor the direction of one optimizer's step, and the norm of another's.

    With θ the parameter, Δ_m and Δ_d the steps that ``magnitude`` and ``direction`` make from θ, and D the
    `WeightDecayChain` (the identity for ``None``)::

        θ = θ - lr λ D(θ) + lr ‖Δ_m‖ Δ_d / max(‖Δ_d‖, ε)

    Both optimizers see the same parameters and gradients. Their learning rates and decays are part of their steps: that
    of ``direction`` cancels, and should keep its step well above the precision of the parameter (1 is a good choice).

    Args:
        params: parameters, ``named_parameters()``, or groups with options of their own.
        magnitude: an optimizer of the same parameters; gives the norm of the step.
        direction: an optimizer of the same parameters; gives its direction.
        weight_decay: λ, decoupled, applied once per parameter and step.
        eps: ε, lower limit of ‖Δ_d‖, in units of the parameter.
        lr: factor of the whole step; 1 leaves its size to ``magnitude``.
        weight_decay_cls: a `WeightDecayChain`, or one link of it; ``None`` for plain decay.

    Raises:
        OptionError: an option is not valid, or the optimizers have different parameters.
        UnsupportedError: a parameter is complex, or an optimizer needs a closure.

    Reference: Agarwal, Anil, Hazan, Koren, Zhang, "Disentangling Adaptive Gradient Methods from Learning Rates",
    arXiv:2002.11803, 2020, algorithm 1.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> adam = torch.optim.Adam([weight], lr=0.1)
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = Graft([weight], adam, sgd)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.detach()  # as long as Adam's step (0.1, 0.1), along (3, 4)
        tensor([0.9151, 0.8869])
    """

    def __init__(
        self,
        params: ParamsT,
        magnitude: torch.optim.Optimizer,
        direction: torch.optim.Optimizer,
        weight_decay: float = 0.0,
        eps: float = 1e-12,
        lr: float | Tensor = 1.0,
        weight_decay_cls: WeightDecayChain | WeightDecay | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {"magnitude": magnitude, "direction": direction}, defaults, weight_decay_cls)

    @property
    def magnitude(self) -> torch.optim.Optimizer:
        """The optimizer that gives the norm."""
        return self.inner["magnitude"]

    @property
    def direction(self) -> torch.optim.Optimizer:
        """The optimizer that gives the direction."""
        return self.inner["direction"]

    def _steps(self, entries: Sequence[Entry]) -> tuple[list[Tensor], list[Any]]:
        factors = norms(self._ask("magnitude", entries))
        steps = self._ask("direction", entries)
        floors = [float(entry.group["eps"]) for entry in entries]
        foreach("div_", factors, foreach("clamp_min_", norms(steps), floors))
        foreach("mul_", factors, rates(entries))
        foreach("mul_", steps, factors)
        return steps, rates(entries)
