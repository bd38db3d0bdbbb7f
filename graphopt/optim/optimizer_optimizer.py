"""OptimizerOptimizer: learn the learning rate of every tensor while training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from graphopt.errors import OptionError
from graphopt.optim.foreach import foreach, whole
from graphopt.optim.weight_decay import WeightDecay, WeightDecayChain
from graphopt.optim.wrapping_optimizer import Entry, WrappingOptimizer


class OptimizerOptimizer(WrappingOptimizer):
    r"""Give every tensor a learning rate of its own, which grows while its steps agree and falls when they turn back.

    With α_t the learning rate of a tensor, α_1 that of its group in ``inner_optimizer``, Δ_t its step (without the weight
    decay), and D the `WeightDecayChain` (the identity for ``None``)::

        θ_{t+1} = θ_t - lr α_t λ D(θ_t) + Δ_t                  Δ_t = lr α_t / α_1 × the step of inner_optimizer
        α_{t+1} = max(α_t + κ ⟨Δ_t, Δ_{t-1}⟩, min_lr)          from the second step on

    ``inner_optimizer`` keeps its groups and its own learning rate; its step is scaled by α_t / α_1, which for all optimizers
    whose step is proportional to the learning rate is what they would do with α_t. A scheduler of it scales all learned
    rates, and so does one of this optimizer, whose ``lr`` is a factor. See `learning_rates`.

    The inner product has the scale of the step squared: where steps are small, κ has to be large to have any effect.

    Args:
        params: parameters, ``named_parameters()``, or groups with options of their own.
        inner_optimizer: an optimizer of the same parameters.
        learning_rate_learning_rate: κ; 0 leaves the learning rates as they are.
        weight_decay: λ, decoupled, applied once per parameter and step.
        weight_decay_cls: a `WeightDecayChain`, or one link of it; ``None`` for plain decay.
        lr: factor of the whole step.
        min_lr: lower limit of α. A rate of zero stays zero; a negative one (``-math.inf`` for no limit) climbs the loss.

    Raises:
        OptionError: an option is not valid, or the optimizers have different parameters.
        UnsupportedError: a parameter is complex, or ``inner_optimizer`` needs a closure.

    Reference: Baydin, Cornish, Martínez Rubio, Schmidt, Wood, "Online Learning Rate Adaptation with Hypergradient
    Descent", arXiv:1703.04782, 2017, with steps in the place of gradients.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = OptimizerOptimizer([weight], torch.optim.SGD([weight], lr=0.5))
        >>> for _ in range(2):  # minimises x² / 2: x = 1, 0.5, 0.25
        ...     weight.grad = weight.detach().clone()
        ...     optimizer.step()
        >>> optimizer.learning_rates()  # 0.5 + 0.5 * 0.25
        [0.625]
    """

    def __init__(
        self,
        params: ParamsT,
        inner_optimizer: torch.optim.Optimizer,
        learning_rate_learning_rate: float = 1.0,
        weight_decay: float = 0.0,
        weight_decay_cls: WeightDecayChain | WeightDecay | None = None,
        *,
        lr: float | Tensor = 1.0,
        min_lr: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "learning_rate_learning_rate": learning_rate_learning_rate,
            "weight_decay": weight_decay,
            "min_lr": min_lr,
        }
        super().__init__(params, {"inner_optimizer": inner_optimizer}, defaults, weight_decay_cls)

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose learning rates are learned."""
        return self.inner["inner_optimizer"]

    def learning_rates(self) -> list[float]:
        """The learned rate α of every parameter, in the order of the groups, without the factor ``lr``."""
        inner = self._inner_rates()
        params = [param for group in self.param_groups for param in group["params"]]
        return [inner[id(param)] * float(self.state[param].get("lr_factor", 1.0)) for param in params]

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        for option in ("learning_rate_learning_rate", "min_lr"):
            if float(group[option]) != float(group[option]):
                raise OptionError(f"{type(self).__name__}: {option}={group[option]}; expected a number")

    def _steps(self, entries: Sequence[Entry]) -> tuple[list[Tensor], list[Any]]:
        by_param = self._inner_rates()
        inner_rates = [by_param[id(entry.param)] for entry in entries]
        steps = self._ask("inner_optimizer", entries)
        states = [self.state[entry.param] for entry in entries]
        for state, step in zip(states, steps, strict=True):
            if "lr_factor" not in state:
                state["lr_factor"] = torch.ones((), dtype=step.dtype, device=step.device)
                state["previous_update"] = torch.zeros_like(step)
        factors = [state["lr_factor"] for state in states]
        previous = [state["previous_update"] for state in states]
        alphas = [factor * float(entry.group["lr"]) for factor, entry in zip(factors, entries, strict=True)]
        foreach("mul_", steps, alphas)
        rates = [alpha * inner_rate for alpha, inner_rate in zip(alphas, inner_rates, strict=True)]
        products = foreach("mul", steps, previous)
        for entry, inner_rate, factor, product in zip(entries, inner_rates, factors, products, strict=True):
            if inner_rate:
                kappa, lowest = float(entry.group["learning_rate_learning_rate"]), float(entry.group["min_lr"])
                factor.add_(whole(product.sum()), alpha=kappa / inner_rate).clamp_(min=lowest / inner_rate)
        foreach("copy_", previous, steps)
        return steps, rates

    def _inner_rates(self) -> dict[int, float]:
        """The learning rate of every parameter in the inner optimizer; 1 where that has none."""
        groups = self.inner_optimizer.param_groups
        return {id(param): float(group.get("lr", 1.0)) for group in groups for param in group["params"]}
