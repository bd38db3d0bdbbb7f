"""What GradInit, MetaInit and LSUV have in common: a model with scales, made ready, and what is measured of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import InitError, OptionError
from graphopt.initialization.init_result import InitStatistics
from graphopt.initialization.scaled_model import ScaledModel

LossFunction = Callable[[nn.Module, Any], Tensor]


class Search:
    """A model whose scales are to be found.

    Args:
        scaled: the model with its scales.
        loss_fn: from the model and a batch to a scalar loss.

    Attributes:
        weights: the values of the parameters, unscaled, in the order of the scales.
        names: of the parameters.
        is_zero: which of them are all zero, and have no scale that would matter.
    """

    def __init__(self, scaled: ScaledModel, loss_fn: LossFunction) -> None:
        self.scaled = scaled
        self._loss_fn = loss_fn
        entries = scaled.scales.entries
        self.names = [entry.name for entry in entries]
        self.parameters = [entry.parameter for entry in entries]
        self.weights = [entry.parameter.data for entry in entries]
        self.is_zero = [not bool(weight.any()) for weight in self.weights]
        self._scratch: list[Tensor] = []

    def call(self, batch: Any) -> Any:
        """Whatever ``loss_fn`` does with the model."""
        return self._loss_fn(self.scaled.model, batch)

    def loss(self, batch: Any) -> Tensor:
        """The loss of the model as it computes now.

        Raises:
            OptionError: ``loss_fn`` returned something else than a scalar with a gradient.
        """
        loss = self.call(batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise OptionError(
                f"loss_fn(model, batch) returned {what}; it returns a scalar loss, such as model(**batch).loss"
            )
        if not loss.requires_grad:
            raise OptionError(
                "the loss that loss_fn(model, batch) returned has no gradient: was it computed under no_grad()?"
            )
        return loss.reshape(())

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Within, the parameters have other values, and the model computes with these, unscaled."""
        with self.scaled.unscaled():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.data = value
            torch.clear_autocast_cache()  # under the caller's autocast it holds casts of other values
            try:
                yield
            finally:
                for parameter, weight in zip(self.parameters, self.weights, strict=True):
                    parameter.data = weight
                torch.clear_autocast_cache()

    def scaled_weights(self, scales: Tensor) -> list[Tensor]:
        """``scale * weight`` for each parameter, in memory that the next call uses again."""
        if not self._scratch:
            self._scratch = [torch.empty_like(weight) for weight in self.weights]
        for weight, scale, out in zip(self.weights, scales.unbind(), self._scratch, strict=True):
            torch.mul(weight, scale, out=out)
        return list(self._scratch)

    def first_order(self, values: Sequence[Tensor], batches: Sequence[Any]) -> tuple[float, list[Tensor | None]]:
        """Mean loss over batches and processes, and its gradient, with the parameters at ``values``."""
        total, sums = torch.zeros(()), list[Tensor | None]([None] * len(self.parameters))
        with self.holding(values):
            for batch in batches:
                loss = self.loss(batch)
                found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
                total = total.to(loss.device) + loss.detach().to(_wide(loss)) / len(batches)
                sums = [_added(one, other, len(batches)) for one, other in zip(sums, found, strict=True)]
        return float(self.scaled.average(total)), self.scaled.average_each(sums, values)

    def set_scales(self, scales: Tensor) -> None:
        """Write the scales into the model."""
        with torch.no_grad():
            for scale, value in zip(self.scaled.scales.scales, scales.unbind(), strict=True):
                scale.copy_(value)

    def products(self, grads: Sequence[Tensor | None]) -> Tensor:
        """For each parameter, the inner product of a gradient with the unscaled weight, (n,), float64."""
        found = [
            torch.zeros((), dtype=torch.float64, device=weight.device)
            if grad is None
            else torch.dot(grad.flatten().to(wide := _wide(weight)), weight.flatten().to(wide)).to(torch.float64)
            for grad, weight in zip(grads, self.weights, strict=True)
        ]
        return torch.stack([value.to(found[0].device) for value in found])

    def measure(self, scales: Tensor, batches: Sequence[Any]) -> dict[str, InitStatistics]:
        """Norms and gradient variances with these scales."""
        values = self.scaled_weights(scales)
        rows = [self.first_order(values, [batch])[1] for batch in batches]
        found: dict[str, InitStatistics] = {}
        for position, (name, value) in enumerate(zip(self.names, values, strict=True)):
            grads = [row[position] for row in rows]
            present = torch.stack([torch.zeros_like(value) if grad is None else grad for grad in grads])
            variance = float(present.var(0).mean()) if len(rows) > 1 else None
            found[name] = InitStatistics(float(value.norm()), variance, float(present.mean(0).norm()))
        return found

    def check_start(self, scales: Tensor, batches: Sequence[Any], eps: float) -> list[str]:
        """Refuse a model in which no gradient reaches the weights.

        Returns:
            The matrices that no gradient to speak of reaches, if they are few.

        Raises:
            InitError: the loss or a gradient is not finite, or gradients of half of the matrices or more underflow.
        """
        loss, grads = self.first_order(self.scaled_weights(scales), batches)
        if not math.isfinite(loss):
            raise InitError(
                f"the loss is {loss} before anything is learned, and the model was not changed. Look for a NaN in the batch, or "
                "start with smaller weights: learn_init(..., start='he')"
            )
        if odd := [n for n, g in zip(self.names, grads, strict=True) if g is not None and not torch.isfinite(g).all()]:
            raise InitError(
                f"the gradient is not finite in {listed(odd)}, and the model was not changed. Start with smaller weights: "
                "learn_init(..., start='he')"
            )
        small = self._underflowing(grads, eps)
        if small:  # unless tensors of zeros block it, as in residual branches that start as nothing
            generator = torch.Generator(self.weights[0].device).manual_seed(0)
            values = [
                torch.randn(value.shape, generator=generator, device=value.device, dtype=value.dtype) * 0.02
                if zero
                else value
                for value, zero in zip(self.scaled_weights(scales), self.is_zero, strict=True)
            ]
            _, unblocked = self.first_order(values, batches)
            small = {name: small[name] for name in self._underflowing(unblocked, eps) if name in small}
        num_matrices = sum(w.ndim > 1 and not zero for w, zero in zip(self.weights, self.is_zero, strict=True))
        if small and 2 * len(small) >= num_matrices:
            worst = min(small, key=lambda name: small[name])
            raise InitError(
                f"gradients underflow before anything is learned, and no scale of these weights could move: "
                f"{listed(list(small))} (norm of gradient times norm of weight is {small[worst]:.2g} in {worst}). The model was "
                "not changed. Start from He's initialisation, learn_init(..., start='he'), or search in log space, "
                "learn_init(..., space='log'), which follows any gradient that is not zero"
            )
        return list(small)

    def _underflowing(self, grads: Sequence[Tensor | None], eps: float) -> dict[str, float]:
        """Matrices whose scale cannot have a gradient above ``eps``, by Cauchy and Schwarz."""
        found: dict[str, float] = {}
        for name, weight, zero, grad in zip(self.names, self.weights, self.is_zero, grads, strict=True):
            if grad is None or zero or weight.ndim < 2:
                continue
            bound = float(grad.to(torch.float64).norm() * weight.to(torch.float64).norm())
            if bound < eps:
                found[name] = bound
        return found


@contextmanager
def deterministic(model: nn.Module) -> Iterator[None]:
    """Dropout off, normalisations with the statistics of the batch, and no buffer of theirs written to."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    norms = [module for module in modules if isinstance(module, nn.modules.batchnorm._NormBase)]
    tracked = [module.track_running_stats for module in norms]
    try:
        for module in modules:
            module.training = False
        for module in norms:
            module.training, module.track_running_stats = True, False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for module, was_tracked in zip(norms, tracked, strict=True):
            module.track_running_stats = was_tracked


def he_scales(search: Search) -> Tensor:
    """For each weight, what brings its root mean square to sqrt(2 / fan_in); 1 for what has no fan-in.

    Reference: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", arXiv:1502.01852, 2015, equation 10.
    """
    owner: dict[int, nn.Module] = {}
    with search.scaled.scales.as_written():
        for module in search.scaled.model.modules():
            for parameter in module.parameters(recurse=False):
                owner.setdefault(id(parameter), module)
    scales = []
    for parameter, weight, zero in zip(search.parameters, search.weights, search.is_zero, strict=True):
        fan_in = None if zero else _fan_in(owner[id(parameter)], weight)
        root_mean_square = weight.to(torch.float64).square().mean().sqrt()
        scales.append(1.0 if fan_in is None else float(math.sqrt(2 / fan_in) / root_mean_square))
    return torch.tensor(scales, dtype=torch.float64, device=search.weights[0].device)


def norm_of(grads: Sequence[Tensor], norm: int) -> Tensor:
    """The 1-norm or 2-norm of all gradients together, in at least float32."""
    each = [torch.linalg.vector_norm(grad.to(_wide(grad)), norm) for grad in grads]
    total: Tensor = torch.linalg.vector_norm(torch.stack([value.to(each[0].device) for value in each]), norm)
    return total


def listed(names: Sequence[str]) -> str:
    """Names in a message, at most eight of them."""
    return ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")


def _fan_in(module: nn.Module, weight: Tensor) -> int | None:
    if weight.ndim < 2 or isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return weight.shape[0] * weight[0, 0].numel() // module.groups
    if type(module).__name__ == "Conv1D":  # of transformers, with inputs on the first axis
        return weight.shape[0]
    return weight[0].numel()


def _added(total: Tensor | None, grad: Tensor | None, num: int) -> Tensor | None:
    if grad is None:
        return total
    grad = grad.to_dense() if grad.is_sparse else grad
    part = grad / num if num > 1 else grad
    return part if total is None else total + part


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)
