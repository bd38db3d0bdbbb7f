"""Other modules in the subspace of each matrix in which most of its gradient lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import NonFiniteError, OptionError
from graphopt.optim.core.arithmetic import state_dtype
from graphopt.optim.core.bounds import POSITIVE, numbers
from graphopt.optim.core.context import Number
from graphopt.optim.core.var import Var
from graphopt.optim.projections.projection import Projection, What
from graphopt.optim.routing.router import values_of


class GaLore(Projection):
    """Run modules on a projection of each matrix of gradients to low rank, so that what they remember is small.

    ``P`` (m x r) are the first r left singular vectors of the gradient ``G`` (m x n) in the first of each ``update_gap`` steps,
    for m <= n. The modules inside see ``Pᵀ G`` (r x n); what they make of it is multiplied by ``scale P``. For m > n they see
    ``G P`` (m x r), with right singular vectors. Any chain may run inside, also with its own `LR`.

    Parameters that are no matrices, or whose smaller side is at most r, pass whole, and are not multiplied by ``scale``.

    When ``P`` is computed anew, what the modules inside have learned is kept as it is, as in the paper: averages made in the
    old subspace go on in the new one. Weight decay belongs behind this module, as inside it decays only what lies in the
    subspace.

    Args:
        modules: what runs inside.
        rank: r; may differ between groups. ``None``: a quarter of the smaller side, at least 1, which is what the paper takes
            for its largest model.
        update_gap: how many steps ``P`` is used.
        scale: multiplies the update of projected matrices.
        project_update: pass the incoming update, and take ``P`` of it; otherwise the modules start from the gradient.
        project_params: let the modules inside evaluate the closure, on moves within the subspace.
        project_grad: pass the gradient, if the update is another.

    Raises:
        OptionError: an option is not valid.
        NonFiniteError: in a step that computes ``P``, if the update has NaN or infinities.

    Cost: for each matrix three products of order m n r per step, and in every ``update_gap``-th step a singular value
    decomposition of order m² n. The state is ``P``, with m r numbers, and what the modules remember, for r n numbers each.

    Reference: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv:2403.03507, 2024,
    algorithms 1 and 2.
    """

    bounds = numbers(scale=POSITIVE)
    _starts: Sequence[Tensor] | None = None

    def __init__(
        self,
        modules: Any,
        rank: int | None = None,
        update_gap: int = 200,
        scale: Number = 0.25,
        *,
        project_update: bool = True,
        project_params: bool = False,
        project_grad: bool = False,
    ) -> None:
        options = {"rank": rank, "update_gap": update_gap, "scale": scale}
        super().__init__(modules, project_update, project_params, project_grad, options)

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse numbers that mean nothing."""
        rank, gap = settings["rank"], settings["update_gap"]
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise OptionError(f"{self.place}: rank={rank!r}; expected a whole number of at least 1, or None")
        if isinstance(gap, bool) or not isinstance(gap, int) or gap < 1:
            raise OptionError(f"{self.place}: update_gap={gap!r}; expected a whole number of at least 1")

    def step(self, var: Var) -> Var:
        """Refresh the subspaces if it is time, and run the modules in them."""
        self._refresh(var)
        self._starts = [param.detach().clone() for param in var.params] if self.project_params else None
        try:
            return super().step(var)
        finally:
            self._starts = None

    def project(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """To low rank."""
        is_dual = current == "grads" and self.project_params
        news = []
        for tensor, param in zip(tensors, var.params, strict=True):
            basis, tensor = self._basis(param), tensor.detach().to(state_dtype(tensor))
            if basis is None:
                news.append(tensor.clone())
            else:
                new = _down(basis, tensor)
                # Moving by δ inside moves the parameter by scale P δ; the derivative by δ has the same factor.
                news.append(new * self.get_settings(param).scale if is_dual else new)
        return news

    def unproject(self, tensors: Sequence[Tensor], var: Var, current: What) -> list[Tensor]:
        """Back, times the scale; a parameter keeps what lies outside of the subspace."""
        starts = var.params if self._starts is None else self._starts
        news = []
        for tensor, param, start in zip(tensors, var.params, starts, strict=True):
            basis = self._basis(param)
            if basis is None:
                news.append(tensor.clone())
                continue
            scale = self.get_settings(param).scale
            if current != "params":
                news.append(_up(basis, tensor, param.shape) * scale)
            else:
                start = start.detach().to(tensor.dtype)
                news.append(start + _up(basis, tensor - _down(basis, start), param.shape) * scale)
        return news

    def _basis(self, param: Tensor) -> Tensor | None:
        """``P``, or ``None`` for what passes whole."""
        if self._rank(param) is None:
            return None
        basis: Tensor = self.state[param]["basis"]
        return basis

    def _rank(self, param: Tensor) -> int | None:
        if param.dim() != 2:
            return None
        side, rank = min(param.shape), self.get_settings(param).rank
        rank = max(1, side // 4) if rank is None else int(rank)
        return rank if rank < side else None

    def _refresh(self, var: Var) -> None:
        indices = [index for index, param in enumerate(var.params) if self._rank(param) is not None]
        if not indices:
            return
        sources = var.get_update() if self.project_update else var.get_grad()
        assert var.counts is not None
        counts = values_of(var.counts)
        news = {}
        for index in indices:
            param = var.params[index]
            rank, state = self._rank(param), self.state[param]
            is_due = (counts[index] - 1) % self.get_settings(param).update_gap == 0
            if is_due or "basis" not in state or state["basis"].shape[1] != rank:
                source = sources[index].detach().to(state_dtype(param))
                if not bool(source.isfinite().all()):
                    raise NonFiniteError(
                        f"{self.place}: the update of a parameter of shape {tuple(param.shape)} has NaN or infinities, of which "
                        "there are no singular vectors; no parameter was changed. Put m.NanToNum() in front, or skip the step"
                    )
                left, _, right = torch.linalg.svd(source, full_matrices=False)
                wide = param.shape[0] <= param.shape[1]
                news[index] = (left[:, :rank] if wide else right[:rank].mT).clone(memory_format=torch.contiguous_format)
        for index, basis in news.items():
            self.state[var.params[index]]["basis"] = basis


def _down(basis: Tensor, matrix: Tensor) -> Tensor:
    return basis.mT @ matrix if matrix.shape[0] <= matrix.shape[1] else matrix @ basis


def _up(basis: Tensor, matrix: Tensor, shape: torch.Size) -> Tensor:
    return basis @ matrix if shape[0] <= shape[1] else matrix @ basis.mT
