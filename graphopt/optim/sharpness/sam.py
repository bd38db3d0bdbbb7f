"""Sharpness-aware minimisation."""

from __future__ import annotations

from torch import Tensor

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.sharpness.sharpness_aware import SharpnessAware


class SAM(SharpnessAware):
    """Let all modules that follow see the gradient at a point uphill: ``∇f(θ + ε)``, ``ε = rho g / ‖g‖``, ``g = ∇f(θ)``.

    The norm is that of all tensors as one vector. The loss remains ``f(θ)``, which is also what the step returns: a line search
    that follows looks for less of it along the direction that it is given. Where the gradient is zero, so is ε.

    Put it first, behind modules at most that replace the closure as it does; a gradient approximation that follows would not
    see it, since it asks for losses only. Buffers of the model, such as running means, see both points.

    Cost: two evaluations of the gradient for each one that a module asks for. No state.

    Args:
        rho: the length of ε, in units of the parameters.

    Raises:
        OptionError: ``rho`` is negative.

    Reference: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", arXiv:2010.01412, 2020,
    equation 2 and algorithm 1.
    """

    bounds = numbers(rho=NON_NEGATIVE)

    def __init__(self, rho: Number = 0.05) -> None:
        super().__init__({"rho": rho})

    def sizes(self, param: Tensor, settings: Settings) -> Number:
        """All alike."""
        return 1.0
