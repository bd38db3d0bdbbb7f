"""Sharpness-aware minimisation that does not depend on the scale of parameters."""

from __future__ import annotations

from torch import Tensor

from graphopt.optim.core.arithmetic import state_dtype
from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.sharpness.sharpness_aware import SharpnessAware


class ASAM(SharpnessAware):
    """`SAM` with perturbations in proportion to the parameters: ``ε = rho T² g / ‖T g‖``, ``T = |θ| + eta``.

    Multiplying one layer by a number and dividing the next one by it changes nothing then (but for ``eta``).

    Cost: two evaluations of the gradient for each one that a module asks for. No state.

    Args:
        rho: the length of ``ε / T``, without unit.
        eta: what every element may move although it is zero, in units of the parameters.

    Raises:
        OptionError: an option is negative.

    Reference: Kwon et al., "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural
    Networks", arXiv:2102.11600, 2021, algorithm 1.
    """

    bounds = numbers(rho=NON_NEGATIVE, eta=NON_NEGATIVE)

    def __init__(self, rho: Number = 0.5, eta: Number = 0.01) -> None:
        super().__init__({"rho": rho, "eta": eta})

    def sizes(self, param: Tensor, settings: Settings) -> Number:
        """In proportion to the parameter."""
        eta: Number = settings.eta
        return param.abs().to(state_dtype(param)) + eta
