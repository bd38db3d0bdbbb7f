"""Call a model without computing anything and without memory for its weights, to see the graphs that a call gives.

The call is that of a copy whose parameters hold one number each; Dynamo captures it, the passes rewrite its graphs, and each
graph returns zeros. The model itself is not touched. It may be on the meta device, transformed, or streamed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
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
from graphopt.pipeline import Record
from graphopt.runtime import fully_sharded
from graphopt.runtime.bound_graph import BoundGraph, UnboundGraph
from graphopt.runtime.streaming.slots import make_husk
from graphopt.transform import HANDLE, Setup, with_own_code

# What `transform` and the streaming of layers put into modules. Some of it refuses to be copied; torch gives a copy empty hooks.
_NOT_COPIED = (
    *(HANDLE, "__deepcopy__", "__reduce_ex__", "_apply"),
    *("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


@dataclass(frozen=True)
class DryGraph:
    """One graph of a call that computed nothing.

    Attributes:
        graph: after the passes; ``None`` if it is to be compiled as it is.
        record: what the passes did.
        inputs: what the graph was called with, flat: parameters and buffers of the copy, and sizes as numbers.
        outputs: zeros in the place of what it would have returned; no two are one object.
        beside: the graph after the other passes that were asked for.
    """

    graph: CapturedGraph | None
    record: Record
    inputs: tuple[Any, ...]
    outputs: list[Any]
    beside: CapturedGraph | None = None


@dataclass(frozen=True)
class DryRun:
    """A call that computed nothing.

    Attributes:
        model: the copy that was called, as the model was written.
        arguments: of ``forward``, by name, with defaults left out.
        result: what the call returned, with zeros for what its graphs compute.
        graphs: in the order of the call.
    """

    model: nn.Module
    arguments: dict[str, Any]
    result: Any
    graphs: list[DryGraph]


def dry_run(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    setup: Setup,
    *,
    cannot: str,
    instead: str,
    is_whole: bool = False,
    device: torch.device | None = None,
    beside: Setup | None = None,
) -> DryRun:
    """Call a copy of ``model``.

    Args:
        model: stays as it is.
        args: positional arguments of the call; tensors may be on the meta device.
        kwargs: keyword arguments of the call.
        setup: the passes and options.
        cannot: for an error's text: what cannot be done with the model, as in ``"be planned without running it"``.
        instead: the end of that text: what to do.
        is_whole: whether it is an error if the model is more than one graph. Without code between graphs nothing can write to
            parameters, so the copy shares those that are where they are wanted: their strides will be compiled for.
        device: where the model seems to be; ``None``: where it is, or the CPU for what is on the meta device.
        beside: passes that rewrite each graph as well, for comparison.

    Raises:
        OptionError: the arguments do not fit ``forward``.
        UnsupportedError: the model is sharded, cannot be traced without values, or is not one graph where it has to be.
    """
    if fully_sharded.is_sharded(model):
        raise UnsupportedError(
            f"{type(model).__name__} cannot {cannot} after fully_shard: FSDP does not let it be copied. Ask before fully_shard"
        )
    _bind(model, args, kwargs)
    clone = _without_memory(model, device, shares=is_whole)
    args, kwargs = pytree.tree_map_only(Tensor, _placed_with(clone, device), (tuple(args), dict(kwargs)))
    found: list[DryGraph] = []
    here = [(clone, found)]  # Dynamo keeps backends for ever: this one lets go of the model

    def collect(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        own, graphs = here[0]
        named = NamedTensors.of(own)
        graph, record = setup.rewrite(graph_module, example_inputs, named)
        other = None if beside is None else beside.rewrite(graph_module, example_inputs, named)[0]
        outputs = _zeros(graph_module)
        graphs.append(DryGraph(graph, record, tuple(map(_number, example_inputs)), list(outputs), other))
        return UnboundGraph(lambda *_: outputs) if graph is None else BoundGraph(graph, lambda: lambda *inputs: outputs)

    mark_samples(clone.forward, args, kwargs, setup.sample_axis)
    # Sizes of other models that were tried before, by code of the same name, say nothing about those of this one.
    own_sizes = torch._dynamo.config.patch(automatic_dynamic_shapes=False)
    try:
        with capture_settings(), own_sizes, torch.enable_grad():
            result = torch.compile(_call_of(clone), backend=collect, fullgraph=is_whole)(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        inner = getattr(error, "inner_exception", error)
        if isinstance(inner, GraphoptError):
            raise inner from inner.__cause__
        raise UnsupportedError(f"{type(model).__name__} cannot {cannot} ({_reason(inner)}). {instead}") from error
    finally:
        here.clear()
    return DryRun(clone, _bind(clone, args, kwargs), result, found)


def _without_memory(model: nn.Module, device: torch.device | None, *, shares: bool) -> nn.Module:
    """A copy, as it was written, that takes no memory; ties stay ties, buffers are shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        place = device or _off_meta(parameter)
        is_there = shares and parameter.device == place
        value = parameter.detach() if is_there else make_husk(parameter, place)
        memo[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _placed(buffer, device or _off_meta(buffer))
    hidden = [
        (module, {name: vars(module).pop(name) for name in _NOT_COPIED if name in vars(module)})
        for module in model.modules()
    ]
    try:
        return copy.deepcopy(model, memo)
    finally:
        for module, attributes in hidden:
            vars(module).update(attributes)


def _call_of(model: nn.Module) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:  # as in `transform`: the graph's inputs are named after these variables
        return model._call_impl(*args, **kwargs)

    return with_own_code(cast(FunctionType, call))


def _bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise OptionError(
            f"the arguments do not fit the forward of {type(model).__name__} ({error}); give those of one call, as in "
            f"model(...): forward{inspect.signature(model.forward)}"
        ) from error


def _placed_with(model: nn.Module, device: torch.device | None) -> Callable[[Tensor], Tensor]:
    """A function that brings arguments to the model; if that is in several places, only what is nowhere."""
    places = list(dict.fromkeys(parameter.device for parameter in model.parameters())) or [torch.device("cpu")]
    if device is not None or len(places) == 1:
        return lambda value: _placed(value, device or places[0])
    return lambda value: _placed(value, places[0]) if value.is_meta else value


def _off_meta(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _placed(value: Tensor, device: torch.device) -> Tensor:
    """A tensor where it is wanted; one from the meta device gets memory that nothing touches."""
    if value.device == device:
        return value
    if value.is_meta:
        return torch.zeros_like(value, device=device).requires_grad_(value.requires_grad)
    return value.to(device)


def _zeros(graph_module: GraphModule) -> Any:
    """What a graph returns, as zeros that hold one number each."""
    (output,) = graph_module.graph.find_nodes(op="output")
    fakes = torch.fx.map_arg(output.args[0], lambda node: node.meta["example_value"])

    def blank(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return _number(value)
        shape = [_number(size) for size in value.shape]
        zeros = torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)
        return zeros.requires_grad_(value.requires_grad) if value.is_floating_point() else zeros

    return pytree.tree_map(blank, fakes)


def _number(value: Any) -> Any:
    """Dynamo passes sizes as symbols; to make an int of one would be a guard that fixes it."""
    return _compat.size_hint(value.node.shape_env, value.node.expr) if isinstance(value, torch.SymInt) else value


def _reason(error: BaseException) -> str:
    """What Dynamo says about a model that it cannot trace, and where in the user's code that is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no text"]
    explained = next((line for line in lines if line.startswith("Explanation: ")), "").removeprefix("Explanation: ")
    explained = explained.rpartition("): got ")[2]  # of a failed operator, without all its arguments
    places = [line for line in lines if line.startswith('File "')]
    reason = f"{type(error).__name__}: {lines[0]}{f': {explained[:300]}' if explained else ''}"
    return f"{reason}, at {places[-1]}" if places else reason
