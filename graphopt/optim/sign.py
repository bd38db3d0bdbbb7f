"""Sign: the signs of another optimizer's step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt.optim.foreach import foreach, norms
from graphopt.optim.weight_decay import WeightDecay, WeightDecayChain
from graphopt.optim.wrapping_optimizer import Entry, WrappingOptimizer, rates


class Sign(WrappingOptimizer):
    r"""Move every entry of a tensor equally far, in the direction that another optimizer gives it.

    With θ the parameter, Δ the step that ``base`` makes from θ, and D the `WeightDecayChain` (the identity for ``None``)::

        θ = θ - lr λ D(θ) + lr sign(Δ) f      f = ‖Δ‖ / max(‖sign(Δ)‖, ε) for each tensor if graft_to_self, else 1

    So ``Sign(params, SGD(params, lr=1.0), lr=0.01, graft_to_self=False)`` is signSGD, and with a momentum in SGD Signum.

    Args:
        params: parameters, ``named_parameters()``, or groups with options of their own.
        base: an optimizer of the same parameters.
        lr: factor of the step; 1 leaves its size to ``base`` if ``graft_to_self``, else it is how far every entry moves.
        weight_decay: λ, decoupled, applied once per parameter and step.
        eps: ε, lower limit of the norm of the signs.
        graft_to_self: give the step of every tensor the norm that it has in ``base``.
        weight_decay_cls: a `WeightDecayChain`, or one link of it; ``None`` for plain decay.

    Raises:
        OptionError: an option is not valid, or the optimizers have different parameters.
        UnsupportedError: a parameter is complex, or ``base`` needs a closure.

    Reference: Bernstein, Wang, Azizzadenesheli, Anandkumar, "signSGD: Compressed Optimisation for Non-Convex Problems",
    arXiv:1802.04434, 2018, algorithm 1.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = Sign([weight], torch.optim.SGD([weight], lr=0.1))
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> optimizer.step()
        >>> weight.detach()  # as long as (0.3, 0.4)
        tensor([0.6464, 1.3536])
    """

    def __init__(
        self,
        params: ParamsT,
        base: torch.optim.Optimizer,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        eps: float = 1e-12,
        graft_to_self: bool = True,
        weight_decay_cls: WeightDecayChain | WeightDecay | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "graft_to_self": graft_to_self}
        super().__init__(params, {"base": base}, defaults, weight_decay_cls)

    @property
    def base(self) -> torch.optim.Optimizer:
        """The optimizer whose signs are taken."""
        return self.inner["base"]

    def _steps(self, entries: Sequence[Entry]) -> tuple[list[Tensor], list[Any]]:
        steps = self._ask("base", entries)
        signs = foreach("sign", steps)
        grafted = [index for index, entry in enumerate(entries) if entry.group["graft_to_self"]]
        own_signs = [signs[index] for index in grafted]
        floors = [float(entries[index].group["eps"]) for index in grafted]
        factors = norms([steps[index] for index in grafted])
        foreach("div_", factors, foreach("clamp_min_", norms(own_signs), floors))
        foreach("mul_", own_signs, factors)
        foreach("mul_", signs, rates(entries))
        return signs, rates(entries)
