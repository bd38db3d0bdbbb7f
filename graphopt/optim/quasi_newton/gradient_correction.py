"""The gradient at the minimum along the last step."""

from __future__ import annotations

from torch import Tensor

from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Number, Settings
from graphopt.optim.core.store import StateView
from graphopt.optim.core.vector_module import VectorModule


class GradientCorrection(VectorModule):
    """``ĝ = g - y ⟨s, g⟩ / ⟨s, y⟩``, ``s = θ - θ_prev``, ``y = g - g_prev``: the gradient where the last line search should end.

    Exactly so for quadratics, whose gradient is linear along a line. As ``inner`` of a quasi-Newton method it makes up for
    line searches that are not exact. The update is left as it is if ``⟨s, y⟩ <= tol ‖s‖ ‖y‖``: then there is no minimum.

    Cost: O(n) for n elements; keeps 2 n numbers.

    Args:
        tol: the least curvature, as the cosine of the angle between ``s`` and ``y``.
        concat_params: one line for all parameters, or else one for each.

    Reference: Hoshino, "A formulation of variable metric methods", IMA Journal of Applied Mathematics 10(3), 1972.
    """

    bounds = numbers(tol=NON_NEGATIVE)

    def __init__(self, *, tol: Number = 1e-10, concat_params: bool = True) -> None:
        super().__init__({"tol": tol, "concat_params": concat_params})

    def direct(self, update: Tensor, inner: Tensor, param: Tensor, state: StateView, settings: Settings) -> Tensor:
        """Go back along the last step."""
        direction = update
        if "prev_param" in state:
            s, y = param - state["prev_param"], update - state["prev_grad"]
            sy = s.dot(y)
            if bool(sy > settings.tol * s.norm() * y.norm()):
                direction = update - y * (s.dot(update) / sy)
        state["prev_param"], state["prev_grad"] = param, update
        return direction
