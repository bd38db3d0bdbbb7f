"""Capture a model for one call as a training step would, without memory for its weights and without computing anything.

The model is copied with parameters that hold one number each, Dynamo captures the copy, and the captured graphs return zeros.
The model itself is not touched. It may be on the meta device, transformed, or streamed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.capture import CapturedGraph, NamedTensors, capture_settings, mark_samples
from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.pipeline import Record
from graphopt.runtime.bound_graph import BoundGraph, UnboundGraph
from graphopt.runtime.streaming.slots import make_husk
from graphopt.transform import _HANDLE, Setup, with_own_code

# What `transform` and the streaming of layers put into modules. Some of it refuses to be copied; torch gives a copy empty hooks.
_NOT_COPIED = (
    *(_HANDLE, "_compiled_call_impl", "__deepcopy__", "__reduce_ex__", "_apply"),
    *("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


@dataclass(frozen=True)
class Captured:
    """One graph of a model.

    Attributes:
        graph: after all passes; ``None`` if it is to be compiled as it is.
        record: what the passes did.
        values: the inputs of Dynamo's graph, flat; parameters are husks.
        plain: the graph after the last pass alone, as if no pass had changed what is computed.
    """

    graph: CapturedGraph | None
    record: Record
    values: tuple[Any, ...]
    plain: CapturedGraph | None = None


def capture(
    model: nn.Module,
    setup: Setup,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    what: str,
    instead: str,
    device: torch.device | None = None,
) -> tuple[nn.Module, list[Captured]]:
    """The graphs of a call, rewritten but not compiled, in order.

    Args:
        model: stays as it is.
        setup: the passes and options.
        args: positional arguments of the call; tensors may be on the meta device.
        kwargs: keyword arguments of the call.
        what: past participle for the error's text: what is done to the model.
        instead: the end of that text: what to do with a model that needs values.
        device: where parameters seem to be; ``None``: where they are, or the CPU for those on the meta device.

    Returns:
        The copy, and its graphs.

    Raises:
        UnsupportedError: the model cannot be traced without values, for example because Python code depends on them.
    """
    clone = without_memory(model, device)
    target = next((parameter.device for parameter in clone.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda value: _on_device(value, target), (tuple(args), dict(kwargs)))
    found: list[Captured] = []
    alone = replace(setup, passes=setup.passes[-1:])

    def collect(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph, record = setup.rewrite(graph_module, example_inputs, NamedTensors.of(clone))
        plain = (
            graph if len(setup.passes) < 2 else alone.rewrite(graph_module, example_inputs, NamedTensors.of(clone))[0]
        )
        found.append(Captured(graph, record, tuple(map(_without_symbol, example_inputs)), plain))
        zeros = _zeros(graph_module)
        return UnboundGraph(zeros) if graph is None else BoundGraph(graph, lambda: zeros)

    mark_samples(clone.forward, args, kwargs, setup.sample_axis)
    try:
        with capture_settings(), torch.enable_grad():
            torch.compile(_call_of(clone), backend=collect)(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        inner = getattr(error, "inner_exception", error)
        if isinstance(inner, GraphoptError):
            raise inner from inner.__cause__
        raise UnsupportedError(
            f"{type(model).__name__} cannot be {what} without running it ({type(inner).__name__}: "
            f"{(str(inner) or 'no text').splitlines()[0]}). {instead}"
        ) from error
    return clone, found


def without_memory(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy, as it was written, whose parameters hold one number each; ties stay ties, buffers are shared."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        place = device or _off_meta(parameter)
        memo[id(parameter)] = nn.Parameter(make_husk(parameter, place), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _on_device(buffer, device or _off_meta(buffer))
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
    def call(*args: Any, **kwargs: Any) -> Any:  # as in `transform`: operators are named after this variable
        return model._call_impl(*args, **kwargs)

    return with_own_code(cast(FunctionType, call))


def _off_meta(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device


def _on_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor where it is wanted; one on the meta device gets memory that nothing touches."""
    if value.device == device:
        return value
    if value.device.type == "meta":
        return torch.zeros(value.shape, dtype=value.dtype, device=device).requires_grad_(value.requires_grad)
    return value.to(device)


def _zeros(graph_module: GraphModule) -> Callable[..., Any]:
    """A stand-in for the graph: outputs of the right shapes, one number each."""
    (output,) = graph_module.graph.find_nodes(op="output")
    fakes = torch.fx.map_arg(output.args[0], lambda node: node.meta["example_value"])

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = [_hint(size) for size in value.shape]
        blank = torch.zeros((), dtype=value.dtype, device=value.device).expand(shape)
        return blank.requires_grad_(value.requires_grad) if value.is_floating_point() else blank

    return lambda *inputs: pytree.tree_map(zeros, fakes)


def _without_symbol(value: Any) -> Any:
    """Dynamo passes sizes as symbols; to make an int of one would be a guard that fixes it."""
    return _hint(value) if isinstance(value, torch.SymInt) else value


def _hint(size: int | torch.SymInt) -> int:
    return _compat.size_hint(size.node.shape_env, size.node.expr) if isinstance(size, torch.SymInt) else size
