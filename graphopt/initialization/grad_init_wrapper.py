"""`GradInitWrapper`: learn an initialisation in your own loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from graphopt.errors import InitError, MixedPrecisionInit, OptionError
from graphopt.initialization.scaled_model import MIXED_PRECISION, ScaledModel
from graphopt.initialization.searching import norm_of


class GradInitWrapper:
    """Give every trainable parameter of a model a scale, and let the user's loop learn the scales.

    Inside the ``with`` block the model computes with ``scale * weight``, ``model.parameters()`` are the scales (all 1 at first),
    and everything else is as it was: ``state_dict()`` holds the scaled weights under their own names, optimizers made before hold
    the parameters. On exit the scales are multiplied into the parameters, in place. After an exception the model is as it was
    before the block. Buffers (running statistics) are restored in any case.

    Without ``with``, `detach` or deleting the wrapper ends it, as leaving the block does.

    A model that `graphopt.transform` has compiled computes in compiled graphs inside the block, which can be differentiated
    twice.

    Args:
        model: any module, also in ``DistributedDataParallel``.
        reinit_zeros: give parameters that are all zero a random start, as zeros have no scale.
        reinit_std: standard deviation of it.

    Raises:
        OptionError: the model has no trainable parameter, is wrapped already, or holds what cannot be scaled.

    Reference: Zhu, Ni, Xu, Kong, Huang, Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and Efficient
    Training", arXiv:2102.08098, 2021; the objective of `grad_loss` is the simplified one of the package ``gradinit``, whose
    interface this is. `graphopt.learn_init` is the paper's.
    """

    def __init__(self, model: nn.Module, reinit_zeros: bool = False, reinit_std: float = 1e-2) -> None:
        if not isinstance(reinit_std, float | int) or reinit_std <= 0:
            raise OptionError(f"GradInitWrapper(reinit_std={reinit_std!r}): a standard deviation is positive")
        self._scaled = ScaledModel(model)
        self._reinitialized = self._reinitialize(float(reinit_std)) if reinit_zeros else []
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        self._end(fold=kind is None)

    def __del__(self) -> None:
        if "_scaled" in vars(self):
            self.detach()

    def detach(self) -> None:
        """Multiply the scales into the parameters, in place, and give the model back; does nothing the second time."""
        self._end(fold=True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The scales, each of shape (): what an optimizer is to train."""
        return iter(self._scaled.scales.scales)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The scales with the names of their parameters."""
        return ((entry.name, entry.scale) for entry in self._scaled.scales.entries)

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradient of ``loss`` with respect to each scaled weight, by name; each can be differentiated again."""
        self._check()
        found = self._scaled.scales.gradients(loss)
        return {e.name: g for e, g in zip(self._scaled.scales.entries, found, strict=True) if g is not None}

    def grad_loss(
        self, loss: Tensor, norm: int = 1, gamma: float = 1.0, scaler: torch.amp.GradScaler | None = None
    ) -> Tensor:
        """The norm of the gradient, where that is larger than ``gamma``; else ``loss``.

        Args:
            loss: scalar, computed from the model's output inside the block.
            norm: 1 for optimizers of Adam's kind, 2 for SGD: the norm in which a step of given length lowers the loss most.
            gamma: bound of the norm of the gradient over all scaled weights together. The paper's scripts have 1 for ``norm=2``
                and 1000 for ``norm=1``.
            scaler: under autocast, what scales the loss. If gradients overflow, the result is not finite, and ``scaler.step``
                leaves this step out.

        Returns:
            A scalar to call ``backward()`` on (in the place of ``loss``, through the ``scaler`` if there is one).

        Raises:
            OptionError: ``norm`` is neither 1 nor 2, or the loss does not depend on the model.
            InitError: the gradient is not finite, and there is no scaler.
        """
        self._check()
        if norm not in (1, 2):
            raise OptionError(f"grad_loss(norm={norm!r}): 1 for optimizers of Adam's kind, 2 for SGD")
        if loss.numel() != 1:
            raise OptionError(
                f"grad_loss takes a scalar loss and got one of shape {tuple(loss.shape)}; take its mean or sum"
            )
        is_scaling = scaler is not None and scaler.is_enabled()
        if not self._warned and (is_scaling or self._scaled.saw_autocast):
            self._warned = True
            warnings.warn(MIXED_PRECISION, MixedPrecisionInit, stacklevel=2)
        factor = scaler.get_scale() if scaler is not None and is_scaling else 1.0
        found = self._scaled.scales.gradients(loss * factor if factor != 1 else loss)
        grads = [None if grad is None else grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in found]
        grads = grads if factor == 1 else [None if grad is None else grad / factor for grad in grads]
        total = self._norm(grads, norm)
        if not bool(torch.isfinite(total)):
            if not is_scaling:
                raise InitError(self._not_finite(found))
            return total
        return total if bool(total > gamma) else loss

    def clamp_scales(self, min_scale: float = 1e-2) -> None:
        """Raise every scale that is smaller to ``min_scale``, as after each step of the optimizer."""
        self._check()
        with torch.no_grad():
            for scale in self._scaled.scales.scales:
                scale.clamp_(min=min_scale)

    def _norm(self, grads: Sequence[Tensor | None], norm: int) -> Tensor:
        """Of the gradient over all processes, differentiable with respect to this one's part of it."""
        if self._scaled.group is None:
            return norm_of([grad for grad in grads if grad is not None], norm)
        own = [None if grad is None else grad.detach().clone() for grad in grads]
        averaged = self._scaled.average_each(own, self._scaled.scales.parameters)
        leaves = {position: value.requires_grad_() for position, value in enumerate(averaged) if value is not None}
        total = norm_of(list(leaves.values()), norm)
        directions = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
        parts = [(grad * directions[position]).sum() for position, grad in enumerate(grads) if grad is not None]
        part = torch.stack(parts).sum()
        return total.detach() + (part - part.detach())

    def _not_finite(self, grads: Sequence[Tensor | None]) -> str:
        names = [
            entry.name
            for entry, grad in zip(self._scaled.scales.entries, grads, strict=True)
            if grad is not None and not bool(torch.isfinite(grad).all())
        ]
        return (
            f"the gradient of the loss is not finite in {', '.join(names[:10]) or 'its norm'}"
            f"{', ...' if len(names) > 10 else ''}. The model was not changed. Start with smaller weights "
            "(learn_init(..., start='he')), or look for a NaN in the loss"
        )

    def _reinitialize(self, std: float) -> list[nn.Parameter]:
        zeros = [parameter for parameter in self._scaled.scales.parameters if not bool(parameter.any())]
        with torch.no_grad():
            for parameter in zeros:
                parameter.normal_(std=std)
        return zeros

    def _check(self) -> None:
        if not self._scaled.is_attached:
            raise OptionError("this GradInitWrapper is detached: wrap the model again")

    def _end(self, *, fold: bool) -> None:
        if not self._scaled.is_attached:
            return
        self._scaled.detach(fold=fold)
        if not fold:
            with torch.no_grad():
                for parameter in self._reinitialized:
                    parameter.zero_()

    def __repr__(self) -> str:
        state = "" if self._scaled.is_attached else ", detached"
        return f"GradInitWrapper({len(self._scaled.scales.entries)} scales{state})"
