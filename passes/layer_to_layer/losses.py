"""Losses over a batch in two steps: one number for each row, and their mean or sum.

So that the first, which holds the large tensors, runs in micro-batches.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.capture import CapturedGraph
from graphopt.passes.layer_to_layer.micro_batches import Samples
from graphopt.passes.truegrad.sample_axis import SampleAxis, argument_of

aten = torch.ops.aten

_NONE, _MEAN, _SUM = 0, 1, 2
_BY_CLASS = frozenset([aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default,
                       aten.nll_loss2d.default])  # fmt: skip
_BY_ELEMENT = frozenset([aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default,
                         aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default, aten.kl_div.default,
                         aten.soft_margin_loss.default])  # fmt: skip


def split_losses(graph: CapturedGraph, samples: Samples) -> int:
    """Rewrite the losses whose rows are samples; returns how many. Equal but for the order in which numbers are added."""
    changed = 0
    for node in list(graph.graph_module.graph.nodes):
        if node.target not in _BY_CLASS | _BY_ELEMENT or not isinstance(samples.layouts.get(node.args[0]), SampleAxis):
            continue
        names = [argument.name for argument in node.target._schema.arguments]
        reduction = argument_of(node, names.index("reduction"), "reduction", _MEAN)
        if reduction == _NONE or (reduction == _MEAN and node.target in _BY_CLASS and not _counts_rows(node)):
            continue
        _rewrite(graph, node, names, reduction)
        changed += 1
    return changed


def _counts_rows(node: Node) -> bool:
    """Whether the mean divides by the number of rows whose class counts."""
    target = cast(Node, node.args[1]).meta["val"]
    return argument_of(node, 2, "weight") is None and not target.is_floating_point()


def _rewrite(graph: CapturedGraph, node: Node, names: list[str], reduction: int) -> None:
    schema = cast(torch._ops.OpOverload, node.target)._schema
    arguments = {
        argument.name: argument_of(node, position, argument.name, argument.default_value)
        for position, argument in enumerate(schema.arguments)
    }
    arguments["reduction"] = _NONE
    with graph.graph_module.graph.inserting_before(node):
        rows = _call(graph, node, node.target, *(arguments[name] for name in names))
        if reduction == _SUM:
            result = _call(graph, node, aten.sum.default, rows)
        elif node.target in _BY_ELEMENT:
            result = _call(graph, node, aten.mean.default, rows)
        else:
            counted = _call(graph, node, aten.ne.Scalar, arguments["target"], arguments["ignore_index"])
            count = _call(graph, node, aten.sum.default, counted)
            result = _call(graph, node, aten.div.Tensor, _call(graph, node, aten.sum.default, rows), count)
    node.replace_all_uses_with(result)
    graph.graph_module.graph.erase_node(node)


def _call(graph: CapturedGraph, like: Node, target: Any, *args: Any) -> Node:
    node = graph.graph_module.graph.call_function(target, args)
    values = torch.fx.map_arg(args, lambda argument: argument.meta["val"])
    with graph.fake_mode, torch.no_grad():
        value: Tensor = target(*values)
    node.meta = {
        **{k: v for k, v in like.meta.items() if k not in ("val", "example_value", "tensor_meta")},
        "val": value,
    }
    return node
