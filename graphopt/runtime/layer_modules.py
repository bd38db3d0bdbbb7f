"""Capture a call of a model without computing anything, and name the modules that are its layers."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.capture import CapturedGraph, NamedTensors, capture_settings, mark_samples
from graphopt.errors import GraphoptError, OptionError, UnsupportedError
from graphopt.passes.layer_to_layer.layers import Boundaries, find_layers, module_stack
from graphopt.passes.layer_to_layer.segments import Segment
from graphopt.pipeline import Record
from graphopt.runtime import data_parallel, fully_sharded
from graphopt.transform import Setup, restore, with_own_code


@dataclass(frozen=True)
class TrialGraph:
    """One graph of a call that computed nothing.

    Attributes:
        graph: after the passes.
        record: of the passes.
        inputs: what the graph would have been called with.
        outputs: stand-ins for what it would have returned.
    """

    graph: CapturedGraph
    record: Record
    inputs: list[Any]
    outputs: list[Any]


@dataclass(frozen=True)
class Trial:
    """A call that computed nothing.

    Attributes:
        model: the copy of the model that was called.
        arguments: of ``forward``, by name, with defaults left out.
        result: what the call returned, with stand-ins for the tensors of its graphs.
        graphs: in the order of the call.
    """

    model: nn.Module
    arguments: dict[str, Any]
    result: Any
    graphs: list[TrialGraph]


def layers(model: nn.Module, *args: Any, boundaries: Boundaries = "auto", **kwargs: Any) -> list[nn.Module]:
    """The modules that `graphopt.passes.LayerToLayer` takes for layers, in the order in which they are called.

    For what is done to one layer at a time, such as FSDP2::

        for layer in graphopt.layers(model, ids):
            fully_shard(layer)
        fully_shard(model)

    Nothing is computed: the model may be on the meta device, and so may the arguments. A layer that consists of several modules
    (a linear and a norm that repeat side by side) gives each of them that has parameters.

    Args:
        model: as it is before ``fully_shard``.
        args: of one call of the model.
        boundaries: as in `graphopt.passes.LayerToLayer`.
        kwargs: of the same call.

    Returns:
        Submodules of ``model``, none inside another; none if nothing repeats.

    Raises:
        OptionError: the arguments do not fit ``forward``, the model is sharded already, or ``boundaries`` names no module.
        UnsupportedError: the model cannot be traced without values.
    """
    model = data_parallel.unwrap(model)
    if fully_sharded.is_sharded(model):
        raise OptionError(
            f"graphopt.layers was called with a {type(model).__name__} that fully_shard has changed: ask for the layers first, "
            "for layer in graphopt.layers(model, batch): fully_shard(layer)"
        )
    setup = Setup.parse({"passes": [], "compiler": "eager"})
    trial = try_call(model, args, kwargs, setup, is_whole=False)
    found: dict[str, None] = {}
    for item in trial.graphs:
        found.update(dict.fromkeys(_paths(find_layers(item.graph, boundaries))))
    modules = dict(model.named_modules(remove_duplicate=False))
    known = [path for path in found if path in modules and any(True for _ in modules[path].parameters())]
    outermost = [path for path in known if not any(path.startswith(f"{other}.") for other in known)]
    return list({id(modules[path]): modules[path] for path in outermost}.values())


def try_call(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    setup: Setup,
    *,
    is_whole: bool,
    device: torch.device | None = None,
) -> Trial:
    """Call a copy of ``model`` whose graphs return zeros that take no memory.

    Args:
        model: stays as it is. What lies on the meta device is taken for what lies on ``device``.
        args: of the call.
        kwargs: of the call.
        setup: the passes.
        is_whole: whether it is an error if the model is more than one graph.
        device: where the model is to compute; ``None``: where its parameters are.

    Raises:
        OptionError: the arguments do not fit ``forward``.
        UnsupportedError: the model is not one graph, or cannot be traced without values.
    """
    name = type(model).__name__
    _bind(model, args, kwargs)
    device = device or next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    own_args, own_kwargs = pytree.tree_map(lambda value: _placed(value, device), (tuple(args), dict(kwargs)))
    return _try_call(_without_values(model, device), name, own_args, own_kwargs, setup, is_whole)


def _try_call(
    model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], setup: Setup, is_whole: bool
) -> Trial:
    found: list[TrialGraph] = []
    here = [(model, found)]  # Dynamo keeps backends for ever: this one lets go of the model

    def collect(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        own, graphs = here[0]
        graph, record = setup.rewrite(graph_module, example_inputs, NamedTensors.of(own))
        outputs = _stand_ins(graph_module)
        if graph is not None:
            graphs.append(TrialGraph(graph, record, list(example_inputs), list(outputs)))
        elif is_whole:
            reasons = sorted({row.reason for row in record.uncaptured}) or ["it has no form in ATen"]
            raise UnsupportedError(f"{name} cannot be captured: {'; '.join(reasons)}")
        return lambda *inputs: outputs

    mark_samples(model.forward, args, kwargs, setup.sample_axis)
    # Sizes of other models that were tried before, by code of the same name, say nothing about those of this one.
    own_sizes = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    try:
        with capture_settings(), own_sizes, torch.enable_grad():
            compiled = torch.compile(_call_of(model), backend=collect, fullgraph=is_whole)
            result = compiled(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        inner = getattr(error, "inner_exception", error)
        if isinstance(inner, GraphoptError):
            raise inner from inner.__cause__
        what = "cannot be captured in one graph" if is_whole else "cannot be traced without running it"
        raise UnsupportedError(
            f"{name} {what} ({_reason(inner)}). Remove what breaks the graph "
            "(TORCH_LOGS=graph_breaks shows where it is)"
        ) from error
    finally:
        here.clear()
    return Trial(model, _bind(model, args, kwargs), result, found)


def _call_of(model: nn.Module) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:  # as in `transform`: the graph's inputs are named after these variables
        return model._call_impl(*args, **kwargs)

    return with_own_code(cast(FunctionType, call))


def _reason(error: BaseException) -> str:
    """What Dynamo says about a model that it cannot trace, and where in the user's code that is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no text"]
    explained = next((line for line in lines if line.startswith("Explanation: ")), "").removeprefix("Explanation: ")
    places = [line for line in lines if line.startswith('File "')]
    reason = f"{type(error).__name__}: {lines[0]}{f': {explained[:300]}' if explained else ''}"
    return f"{reason}, at {places[-1]}" if places else reason


def _bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise OptionError(
            f"the arguments do not fit the forward of {type(model).__name__} ({error}); give those of one call, as in "
            f"model(...): forward{inspect.signature(model.forward)}"
        ) from error


def _placed(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or value.device == device:
        return value
    return torch.zeros_like(value, device=device) if value.is_meta else value.to(device)


def _without_values(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy on ``device`` that takes no memory: parameters that lie there are shared, others hold one number each."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.device == device:
            memo[id(tensor)] = tensor
        elif not isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = _placed(tensor, device)
        else:
            husk = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
            memo[id(tensor)] = nn.Parameter(husk, tensor.requires_grad)
    return restore(copy.deepcopy(model, memo))


def _stand_ins(graph_module: GraphModule) -> Any:
    """What the graph returns, as zeros that hold one number each; no two are one object."""
    (output,) = graph_module.graph.find_nodes(op="output")
    fakes = torch.fx.map_arg(output.args[0], lambda node: node.meta["example_value"])

    def blank(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return _compat.size_hint(value.node.shape_env, value.node.expr)
        if not isinstance(value, Tensor):
            return value
        shape = [blank(size) for size in value.shape]
        zeros = torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)
        return zeros.requires_grad_(value.requires_grad) if value.is_floating_point() else zeros

    return pytree.tree_map(blank, fakes)


def _paths(segments: Sequence[Segment]) -> Iterator[str]:
    """Paths of the modules that lie within one layer each."""
    homes: dict[str, set[str]] = {}
    for segment in segments:
        for node in segment.nodes:
            for path, _ in module_stack(node):
                homes.setdefault(path, set()).add(segment.name)
    for segment in segments:
        if segment.layer is not None:
            for node in segment.nodes:
                yield from (path for path, _ in module_stack(node) if homes[path] == {segment.name})
