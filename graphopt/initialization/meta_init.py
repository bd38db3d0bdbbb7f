"""MetaInit: bring the gradient quotient down, the change of the gradient over a step relative to the gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.errors import InitError
from graphopt.initialization.batches import Draws
from graphopt.initialization.init_result import InitStep
from graphopt.initialization.searching import Search

STEPS = 500  # of the authors


class MetaInitSearch:
    """Iterations of MetaInit, by signs with momentum on the norms of weights.

    With g the gradient, H the Hessian, and N the number of parameters that have a gradient, the gradient quotient is

        GQ = 1/N sum |(g - H g) / (g + eps sign(g)) - 1|,

    of which the derivative is of third order; it runs eagerly. Vectors (biases, norms) count, and keep their scale. Over several
    batches or processes the quotients are averaged.

    Args:
        search: the model with scales.
        scales: (n,), the start.
        lr: what each norm moves at most in an iteration; default 0.1.

    Reference: Dauphin, Schoenholz, "MetaInit: Initializing learning by learning to initialize", NeurIPS 2019, algorithm 1.
    """

    def __init__(
        self, search: Search, scales: Tensor, *, lr: float | None, momentum: float = 0.9, eps: float = 1e-5
    ) -> None:
        self._search, self._scales = search, scales.clone()
        self._lr, self._momentum, self._eps = 0.1 if lr is None else lr, momentum, eps
        device = scales.device
        self._norms = torch.stack([weight.to(torch.float64).norm().to(device) for weight in search.weights])
        is_matrix = torch.tensor([weight.ndim > 1 for weight in search.weights], device=device)
        self._is_active = is_matrix & (self._norms > 0)
        self._velocity = torch.zeros_like(self._scales)

    def run(self, draws: Draws, steps: int | None) -> Iterator[InitStep]:
        """Iterate; the scales in the model are up to date after each."""
        self._search.set_scales(self._scales)
        for number in range(STEPS if steps is None else steps):
            loss, norm, quotient, derivative = self._quotient(draws)
            if not bool(torch.isfinite(quotient)) or not bool(torch.isfinite(derivative[self._is_active]).all()):
                raise InitError(
                    f"iteration {number}: the gradient quotient is {float(quotient):.4g}, and it or its derivative is not "
                    "finite. The model was not changed. Lower lr, or start='he'"
                )
            sides = self._scales.sign()  # a norm that passes 0 comes back as that of the opposite weight
            signs = torch.where(self._is_active, derivative.sign() * sides, 0)
            self._velocity = self._momentum * self._velocity - self._lr * signs
            moved = self._scales + sides * self._velocity / self._norms.clamp(min=1e-30)
            self._scales = torch.where(self._is_active, moved, self._scales)
            self._search.set_scales(self._scales)
            yield InitStep(number, loss, norm, objective=float(quotient))

    def _quotient(self, draws: Draws) -> tuple[float, float, Tensor, Tensor]:
        """Loss, 2-norm of its gradient, gradient quotient, and the derivative of that with respect to the scales."""
        batches = draws.draw()
        scales = self._search.scaled.scales
        losses, norms, quotients, derivative = [], [], [], torch.zeros_like(self._scales)
        for batch in batches:
            loss = self._search.loss(batch)
            grads = scales.gradients(loss)
            used = [position for position, grad in enumerate(grads) if grad is not None]
            present = [grad for position in used if (grad := grads[position]) is not None]
            half = torch.stack([grad.square().sum() for grad in present]).sum() / 2
            products = scales.gradients(half)
            terms = []
            for position, grad in zip(used, present, strict=True):
                product = products[position]
                change = grad if product is None else grad - product
                sign = torch.where(grad.detach() >= 0, 1.0, -1.0).to(grad.dtype)
                terms.append((change / (grad + self._eps * sign) - 1).abs().sum())
            quotient = torch.stack(terms).sum() / sum(grad.numel() for grad in present)
            found = torch.autograd.grad(quotient, scales.scales, allow_unused=True)
            derivative += torch.stack(
                [torch.zeros_like(derivative[0]) if value is None else value.to(derivative) for value in found]
            ) / len(batches)
            losses.append(loss.detach())
            norms.append((2 * half.detach()).sqrt())
            quotients.append(quotient.detach())
        average = self._search.scaled.average
        means = [average(torch.stack(values).mean()) for values in (losses, norms, quotients)]
        return float(means[0]), float(means[1]), means[2], average(derivative)
