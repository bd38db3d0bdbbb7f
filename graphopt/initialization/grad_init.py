"""The search of GradInit: lower the norm of the gradient where it is large, else the loss after a step of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import InitError
from graphopt.initialization.batches import Draws
from graphopt.initialization.init_result import InitStep
from graphopt.initialization.rescale_adam import RescaleAdam
from graphopt.initialization.searching import Search, listed, norm_of


class GradInitSearch:
    """Iterations of GradInit on a model with scales; arguments as in `graphopt.learn_init`.

    The constraint needs a gradient that can be differentiated, which costs memory and time; the look-ahead step does not. Which
    one an iteration takes is known only when the gradient is there, so it is computed as the last iteration needed it, and again
    if that was wrong.
    """

    def __init__(
        self,
        search: Search,
        adam: RescaleAdam,
        *,
        optimizer: str,
        eta: float,
        gamma: float,
        normalize_grad: bool,
    ) -> None:
        self._search, self._adam = search, adam
        self._is_adam, self._eta, self._gamma, self._normalize_grad = optimizer == "adam", eta, gamma, normalize_grad
        self._expects_constraint = True
        self._signs = torch.empty(0)

    def run(self, draws: Draws, steps: int) -> Iterator[InitStep]:
        """Iterate; the scales in the model are up to date after each."""
        self._search.set_scales(self._adam.scales)
        for number in range(steps):
            yield self._iterate(number, draws)
            self._search.set_scales(self._adam.scales)

    def _iterate(self, number: int, draws: Draws) -> InitStep:
        batches = draws.draw()
        scales = self._adam.scales
        at_once = self._expects_constraint and len(batches) == 1 and self._search.scaled.group is None
        if at_once:
            loss, grads, differentiable = self._twice_differentiable(batches[0])
        else:
            loss, grads = self._search.first_order(self._search.scaled_weights(scales), batches)
            differentiable = None
        norm = self._norm(grads)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InitError(
                f"iteration {number}: the loss is {loss:.4g} and the norm of its gradient {norm:.4g}. The model was not changed. "
                f"Lower lr (of the scales), or give max_scale; the scales are between {float(scales.min()):.3g} and "
                f"{float(scales.max()):.3g}"
            )
        self._expects_constraint = is_constraint = norm > self._gamma
        lookahead = None
        if is_constraint:
            directions = self._directions(grads, norm)
            if differentiable is not None:
                found = self._derivative(differentiable, directions)
            else:
                found = sum(
                    (
                        self._derivative(self._twice_differentiable(batch)[2], directions) / len(batches)
                        for batch in batches
                    ),
                    torch.zeros_like(scales),
                )
            found = self._search.scaled.average(found)
        else:
            del differentiable
            lookahead, found = self._look_ahead(grads, norm, draws.look_ahead())
        self._adam.step(found, is_constraint=is_constraint)
        self._check_scales(number, lookahead)
        return InitStep(number, loss, norm, is_constraint, lookahead)

    def _check_scales(self, number: int, lookahead: float | None) -> None:
        is_finite = torch.isfinite(self._adam.scales).tolist()
        if all(is_finite):
            return
        names = listed([name for name, good in zip(self._search.names, is_finite, strict=True) if not good])
        raise InitError(
            f"iteration {number}: the norm of the gradient has no finite derivative with respect to the scales of {names}. The "
            "model was not changed. A larger gamma does without second derivatives"
            if lookahead is None
            else f"iteration {number}: the loss after a step of the optimizer, {lookahead:.4g}, has no finite derivative with "
            f"respect to the scales of {names}. The model was not changed. Lower eta, the length of that step"
        )

    def _twice_differentiable(self, batch: Any) -> tuple[float, list[Tensor | None], list[Tensor | None]]:
        """Loss and gradient of the scaled model on one batch; the second time with its graph."""
        loss = self._search.loss(batch)
        grads = self._search.scaled.scales.gradients(loss, create_graph=True)
        return float(loss.detach()), [None if grad is None else grad.detach() for grad in grads], grads

    def _sign(self, grad: Tensor) -> Tensor:
        """In memory that the next call uses again: fresh memory takes longer than the signs do."""
        if self._signs.numel() < grad.numel() or self._signs.dtype != grad.dtype or self._signs.device != grad.device:
            largest = max(weight.numel() for weight in self._search.weights)
            self._signs = grad.new_empty(largest)
        return torch.sign(grad, out=self._signs[: grad.numel()].view(grad.shape))

    def _norm(self, grads: Sequence[Tensor | None]) -> float:
        return float(norm_of([grad for grad in grads if grad is not None], 1 if self._is_adam else 2))

    def _directions(self, grads: Sequence[Tensor | None], norm: float) -> list[Tensor | None]:
        """The derivative of the norm with respect to the gradient."""
        if self._is_adam:
            return [None if grad is None else grad.sign() for grad in grads]
        return [None if grad is None else grad / norm for grad in grads]

    def _derivative(self, grads: Sequence[Tensor | None], directions: Sequence[Tensor | None]) -> Tensor:
        """The derivative of <gradient, direction> with respect to the scales, (n,)."""
        pairs = [
            (grad, direction)
            for grad, direction in zip(grads, directions, strict=True)
            if grad is not None and direction is not None and grad.requires_grad
        ]
        leaves = self._search.scaled.scales.scales
        found = torch.autograd.grad([g for g, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)
        like = self._adam.scales
        return torch.stack([torch.zeros_like(like[0]) if value is None else value.to(like) for value in found])

    def _look_ahead(self, grads: Sequence[Tensor | None], norm: float, batches: Sequence[Any]) -> tuple[float, Tensor]:
        """The loss after a step of the optimizer, and the derivative of loss / eta with respect to the scales."""
        values = self._search.scaled_weights(self._adam.scales)
        for value, grad in zip(values, grads, strict=True):
            if grad is not None and self._is_adam:
                value.sub_(self._sign(grad).to(value.dtype), alpha=self._eta)
            elif grad is not None:
                value.sub_(grad.to(value.dtype), alpha=self._eta / (norm if self._normalize_grad else 1.0))
        del grads
        loss, after = self._search.first_order(values, batches)
        return loss, self._search.products(after) / self._eta
