"""The pass ``GradInit``: one scale in front of every parameter, asleep until somebody learns it.

The graph before, and after the pass is awake (`graphopt.GradInitWrapper` and `graphopt.learn_init` wake it):

>>> import torch, graphopt
>>> from graphopt.passes import GradInit
>>> model = graphopt.transform(torch.nn.Linear(3, 2, bias=False), [GradInit()], compiler="eager")
>>> with graphopt.GradInitWrapper(model):
...     output = model(torch.ones(4, 3))
>>> record = graphopt.records(model)[-1]
>>> [operator_name(node) for node in record.before.graph.nodes if node.op == "call_function"]
['aten.linear.default']
>>> [operator_name(node) for node in record.after.graph.nodes if node.op == "call_function"]
['graphopt.scale_parameter.default', 'aten.linear.default']
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.aliasing import root_of, written_arguments
from graphopt.annotations import INIT_PROBE, INIT_SCALE, Key
from graphopt.capture import CapturedGraph, InputKind
from graphopt.errors import UnsupportedError
from graphopt.inspect.location import describe
from graphopt.inspect.location import operator_name as operator_name
from graphopt.pipeline import Pass, PassResult
from graphopt.second_order import SCALE_PARAMETER

aten = torch.ops.aten

_RECURRENT = ("graphopt::lstm", "graphopt::gru", "graphopt::rnn")
_EAGERLY = (
    "Learn the initialisation without compiling the model: learn_init(..., compiler='eager'), or "
    "GradInitWrapper(graphopt.restore(model))"
)
# Normalisations: where their running statistics stand among the arguments, and the flag that says whether they are updated.
_RUNNING = {aten.batch_norm.default: (3, 5), aten.instance_norm.default: (3, 5)}


@final
@dataclass(frozen=True)
class GradInit(Pass):
    """Replace every trainable parameter ``w`` by ``scale * w``, with one scalar for each parameter.

    Asleep, as it is by default, the pass changes nothing, and no node of it is compiled. Awake, each use of a trainable parameter
    is preceded by ``graphopt.scale_parameter(w, scale, probe)``; ``scale`` and ``probe`` are companions, the graph is compiled so
    that its gradient can be differentiated (`graphopt.second_order`), and running statistics of normalisations stay as they are.
    Uses of a tied parameter share one scale; frozen parameters get none.

    Attributes:
        awake: set by `graphopt.GradInitWrapper` and `graphopt.learn_init`.

    Reference: Zhu, Ni, Xu, Kong, Huang, Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and Efficient
    Training", arXiv:2102.08098, 2021.
    """

    awake: bool = False

    name: ClassVar[str] = "gradinit"
    provides: ClassVar[frozenset[Key[Any]]] = frozenset({INIT_SCALE})
    changes_numerics: ClassVar[bool] = True

    @property
    def needs_samples(self) -> bool:
        """Never: a scale belongs to all samples."""
        return False

    @property
    def skips_unsupported(self) -> bool:
        """Asleep it changes nothing, and so need not read every graph."""
        return not self.awake

    @property
    def differentiates_twice(self) -> bool:
        """Whether the gradient of the graph is going to be differentiated."""
        return self.awake

    def run(self, graph: CapturedGraph) -> PassResult:
        """Insert the scales, if awake."""
        if not self.awake or graph.graph_module.graph.find_nodes(op="call_function", target=SCALE_PARAMETER):
            return PassResult(graph, 0)
        _refuse_recurrent(graph)
        _refuse_written(graph)
        _make_dense(graph)
        kept = _keep_running_statistics(graph)
        placeholders, inputs = graph.placeholders, list(graph.inputs)
        scaled = num_uses = 0
        for position, (node, described) in enumerate(zip(placeholders, inputs, strict=True)):
            if described.kind is not InputKind.PARAMETER or not described.requires_grad or not node.users:
                continue
            scale, probe = _companion(graph, position, INIT_SCALE), _companion(graph, position, INIT_PROBE)
            graph.inputs[position] = dataclasses.replace(described, requires_grad=False)
            with graph.fake_mode, torch.no_grad():
                graph.fake_inputs[position] = graph.fake_inputs[position].detach()
            for user in list(node.users):
                _scale(graph, node, scale, probe, user)
                num_uses += 1
            scaled += 1
        notes = [f"{scaled} parameters scaled at {num_uses} uses"] if scaled else []
        notes += [f"running statistics stay as they are in {kept} places"] if kept else []
        return PassResult(graph, num_uses + kept, tuple(notes))


def _refuse_recurrent(graph: CapturedGraph) -> None:
    for node in graph.graph_module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _RECURRENT:
            raise UnsupportedError(
                f"{describe(node)} is a recurrent layer, whose gradient cannot be differentiated in a captured graph. {_EAGERLY}"
            )


def _refuse_written(graph: CapturedGraph) -> None:
    """Autograd does not see such a write, and passes the gradient by; a graph of plain operators would pass it through."""
    parameters = {
        node: described
        for node, described in zip(graph.placeholders, graph.inputs, strict=True)
        if described.kind is InputKind.PARAMETER and described.requires_grad
    }
    for node in graph.graph_module.graph.nodes:
        for argument in written_arguments(node):
            if (described := parameters.get(root_of(argument))) is not None:
                raise UnsupportedError(f"{describe(node)} writes to {described.name}, which has a scale. {_EAGERLY}")


def _make_dense(graph: CapturedGraph) -> None:
    """Sparse gradients of embeddings can be differentiated once only."""
    for node in graph.graph_module.graph.find_nodes(op="call_function", target=aten.embedding.default):
        node.args = (*node.args[:4], False) if len(node.args) > 4 else node.args


def _scale(graph: CapturedGraph, weight: Node, scale: Node, probe: Node, user: Node) -> None:
    """Let one use of a parameter see the scaled one."""
    fx_graph = graph.graph_module.graph
    with fx_graph.inserting_before(user):
        node = fx_graph.call_function(SCALE_PARAMETER, (weight, scale, probe))
    node.meta = {key: value for key, value in user.meta.items() if key not in ("val", "example_value", "tensor_meta")}
    with graph.fake_mode, torch.no_grad():
        node.meta["val"] = torch.empty_like(cast(Tensor, weight.meta["val"]))
    user.replace_input_with(weight, node)


def _companion(graph: CapturedGraph, position: int, key: Key[Any]) -> Node:
    """Add an input that the runtime binds to what is attached to a parameter."""
    weight = cast(Tensor, graph.fake_inputs[position])
    wide = torch.promote_types(weight.dtype, torch.float32)
    with graph.fake_mode, torch.no_grad():
        if key is INIT_SCALE:
            value = torch.empty((), dtype=wide, device=weight.device)
        else:
            value = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return graph.add_companion(position, key, f"{graph.placeholders[position].name}_{key.name}", value)


def _keep_running_statistics(graph: CapturedGraph) -> int:
    """Let writes to buffers go to copies: learning an initialisation must leave them as they are."""
    buffers = {
        node
        for node, described in zip(graph.placeholders, graph.inputs, strict=True)
        if described.kind is InputKind.BUFFER
    }
    changed = 0
    for node in list(graph.graph_module.graph.nodes):
        if (where := _RUNNING.get(node.target)) is not None and node.args[where[1]] and node.args[where[0]] is not None:
            args = list(node.args)
            args[where[0]] = args[where[0] + 1] = None
            node.args = tuple(args)
            changed += 1
        elif written := {root_of(argument) for argument in written_arguments(node)} & buffers:
            if not node.users and written == set(node.all_input_nodes) and all(len(b.users) == 1 for b in written):
                graph.graph_module.graph.erase_node(node)  # nobody reads what was written
            else:
                for buffer in sorted(written, key=lambda node: node.name):
                    _copied(graph, buffer)
            changed += 1
    return changed


def _copied(graph: CapturedGraph, buffer: Node) -> None:
    """Let everybody use a copy of a buffer."""
    fx_graph = graph.graph_module.graph
    with fx_graph.inserting_after(graph.placeholders[-1]):
        copied = fx_graph.call_function(aten.clone.default, (buffer,))
    copied.meta = dict(buffer.meta)
    buffer.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
