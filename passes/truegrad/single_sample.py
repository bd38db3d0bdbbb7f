"""A batch of one: Dynamo fixes its size, every gradient is that of the one sample, and its square is the statistic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphopt.annotations import Key
from graphopt.capture import CapturedGraph
from graphopt.passes.truegrad import ops  # noqa: F401  registers torch.ops.graphopt
from graphopt.passes.truegrad.editor import OPERATOR_NAMES, Editor
from graphopt.pipeline import Coverage, Status

aten = torch.ops.aten


def rewrite_single_sample(
    graph: CapturedGraph, tracked: list[Node], statistics: Sequence[Key[Any]]
) -> tuple[int, list[Coverage]]:
    """Route the gradient of every parameter, summed over all its uses, through ``graphopt::per_sample``."""
    wanted = ",".join(OPERATOR_NAMES[key] for key in statistics)
    editor = Editor(graph)
    rows = []
    names = {node: described.name for node, described in zip(graph.placeholders, graph.inputs, strict=True)}
    for param in tracked:
        users = list(param.users)
        if not users:
            continue
        with editor.after(param):
            companions = [editor.companion(param, key, sympy.S.One) for key in statistics]
            tangent = editor.call(torch.ops.graphopt.per_sample.default, param, companions, wanted, 1)
            value = editor.call(
                torch.ops.graphopt.with_tangent.default,
                editor.call(aten.detach.default, param),
                editor.call(aten.squeeze.dim, tangent, 0),
            )
        for user in users:
            user.replace_input_with(param, value)
        shape = tuple(int(size) for size in cast(Tensor, param.meta["val"]).shape)
        rows.append(Coverage(names[param], shape, Status.EXACT, "one sample", 2 * param.meta["val"].numel()))
    return len(rows), rows


def axes_of_one_sample(graph: CapturedGraph) -> tuple[int | None, ...]:
    """For each output an axis of one row, if it has one: there is one sample wherever it lies."""
    values = [value.meta.get("val") if isinstance(value, Node) else None for value in graph.output_nodes]
    return tuple(_first_of_size_one(value) if isinstance(value, Tensor) else None for value in values)


def _first_of_size_one(value: Tensor) -> int | None:
    return next((axis for axis, size in enumerate(value.shape) if isinstance(size, int) and size == 1), None)
