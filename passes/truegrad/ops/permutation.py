"""``graphopt::permutation``: an index that is checked to name each sample once."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.errors import UnsupportedError


@torch.library.custom_op("graphopt::permutation", mutates_args=())
def permutation(index: Tensor, num: int, where: str) -> Tensor:
    """(N,) -> the same.

    Raises:
        UnsupportedError: an entry occurs twice, so that a sample has several rows.
    """
    if index.remainder(num).unique().numel() != num:
        raise UnsupportedError(
            f"samples are selected by an index that names some of them several times, at {where}: which rows belong to one "
            "sample is not known beforehand. Select in front of the model, or leave out the parameters that follow: "
            "TrueGrad(where=...)"
        )
    return index.clone()


@permutation.register_fake
def _(index: Tensor, num: int, where: str) -> Tensor:
    return torch.empty_like(index)
