"""Linear algebra of matrices that lie on the last two axes: the samples are a batch of them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import (
    Known,
    Layout,
    Lost,
    SampleAxis,
    argument_of,
    axis_rule,
    functional_name,
    value_of,
)

_BATCHED = (
    "inverse linalg_inv linalg_inv_ex linalg_pinv pinverse cholesky linalg_cholesky linalg_cholesky_ex cholesky_inverse "
    "cholesky_solve det linalg_det logdet slogdet linalg_slogdet linalg_eig linalg_eigvals linalg_eigh linalg_eigvalsh "
    "linalg_svd linalg_svdvals svd linalg_qr qr linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_matrix_exp matrix_exp "
    "linalg_matrix_power matrix_power linalg_matrix_rank linalg_cond linalg_solve linalg_solve_ex linalg_solve_triangular "
    "triangular_solve linalg_lu_solve linalg_lstsq linalg_householder_product linalg_ldl_factor"
).split()


@axis_rule(*_BATCHED)
def matrices(node: Node, value: Tensor, known: Known) -> Layout:
    """The axes in front of the matrices stay."""
    name = functional_name(node)
    inputs = [argument for argument in node.all_input_nodes if isinstance(argument.meta.get("val"), Tensor)]
    batches = {argument: value_of(argument).ndim - 2 for argument in inputs}
    if name.startswith("linalg_solve") and len(inputs) == 2 and _is_vector(*inputs):
        batches[inputs[1]] += 1
    most, found = max(batches.values()), set()
    for argument, count in batches.items():
        layout = known.layout(argument)
        if isinstance(layout, SampleAxis):
            if layout.axis >= count:
                return Lost(node, f"{name} works across samples")
            found.add(layout.at(layout.axis + most - count))
    if len(found) != 1:
        return Lost(node, "samples meet on different axes")
    layout = found.pop()
    return layout if layout.axis < value.ndim else Lost(node, f"{name} works across samples")


@axis_rule("cross")
def cross(node: Node, value: Tensor, known: Known) -> Layout:
    """``torch.cross`` without an axis takes the first of size 3, which depends on the batch."""
    return Lost(node, "torch.cross looks for an axis of size 3: say which, as in torch.linalg.cross(a, b, dim=-1)")


@axis_rule("diag_embed")
def diag_embed(node: Node, value: Tensor, known: Known) -> Layout:
    """The last axis becomes two."""
    layout, ndim = known.layout(node.args[0]), value.ndim
    pair = sorted(
        cast(int, argument_of(node, position, f"dim{position - 1}", default)) % ndim
        for position, default in ((2, -2), (3, -1))
    )
    if not isinstance(layout, SampleAxis) or layout.axis == ndim - 2:
        return Lost(node, "diag_embed works across samples")
    others = [axis for axis in range(ndim) if axis not in pair]
    return layout.at(others[layout.axis])


@axis_rule("diagonal", "linalg_diagonal", "diagonal_copy")
def diagonal(node: Node, value: Tensor, known: Known) -> Layout:
    """Two axes become the last."""
    layout, ndim = known.layout(node.args[0]), value.ndim + 1
    first, second = (0, 1) if "linalg" not in str(node.target) else (-2, -1)
    pair = [
        cast(int, argument_of(node, position, name, default)) % ndim
        for position, name, default in ((2, "dim1", first), (3, "dim2", second))
    ]
    if not isinstance(layout, SampleAxis) or layout.axis in pair:
        return Lost(node, "a diagonal through the samples")
    return layout.at(layout.axis - sum(axis < layout.axis for axis in pair))


def _is_vector(left: Node, right: Node) -> bool:
    """Whether ``solve`` reads its right-hand side as a batch of vectors."""
    matrices, other = value_of(left), value_of(right)
    if other.ndim == 1:
        return True
    return other.ndim == matrices.ndim - 1 and isinstance(other, torch.Tensor)
