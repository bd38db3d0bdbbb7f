"""Hand a rewritten graph to a compiler: whole, or region by region, each distinct one once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch.fx import Graph, GraphModule, Interpreter

from graphopt import _compat
from graphopt.capture import CapturedGraph
from graphopt.errors import OptionError
from graphopt.pipeline import Pass
from graphopt.regions import Region, has_boundaries, split, stages_of
from graphopt.runtime.region_program import RegionProgram
from graphopt.runtime.streaming.stream import Stream
from graphopt.runtime.streaming.streamed_graph import StreamedGraph
from graphopt.second_order import TwiceDifferentiable, compile_twice_differentiable

Compiler = Literal["inductor", "aot_eager", "eager"]


def check_compiler(compiler: str) -> None:
    """Raise `OptionError` unless ``compiler`` is one that `compile_graph` knows."""
    if compiler not in get_args(Compiler):
        raise OptionError(f"compiler={compiler!r} is unknown; it is one of {list(get_args(Compiler))}")


def compile_graph(
    graph: CapturedGraph, compiler: str, passes: Sequence[Pass] = (), config: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile the graph, forward and backward.

    Args:
        graph: after all passes.
        compiler: ``"inductor"`` (AOTAutograd and Inductor), ``"aot_eager"`` (AOTAutograd only) or ``"eager"`` (an interpreter).
        passes: what made the graph; their uuids enter the keys of the compile caches.
        config: Inductor settings for this graph.

    Returns:
        A function of the graph's inputs, flat and in order.
    """
    if has_boundaries(graph):
        regions = split(graph)
        return RegionProgram(graph, regions, compile_regions(regions, compiler, passes, config))
    return _compile(graph.copy().graph_module, graph.fake_inputs, compiler, passes, config)


def stream_graph(
    graph: CapturedGraph,
    stream: Stream,
    compiler: str,
    passes: Sequence[Pass] = (),
    config: Mapping[str, Any] | None = None,
) -> StreamedGraph:
    """Compile a graph's regions and bind them to the store of a model; other arguments as in `compile_graph`."""
    regions = split(graph)
    compiled = compile_regions(regions, compiler, passes, config)
    return StreamedGraph(graph, regions, compiled, stream, stages_of(graph, stream.options.store))


def compile_regions(
    regions: Sequence[Region], compiler: str, passes: Sequence[Pass] = (), config: Mapping[str, Any] | None = None
) -> dict[str, Callable[..., Any]]:
    """Compile each distinct region once; other arguments as in `compile_graph`.

    Returns:
        For each structure a function of a region's inputs that returns the list of its outputs.
    """
    compiled: dict[str, Callable[..., Any]] = {}
    for region in regions:
        if region.structure not in compiled:
            compiled[region.structure] = _compile(region.graph_module, region.fake_inputs, compiler, passes, config)
    return compiled


def _compile(
    module: GraphModule,
    fake_inputs: Sequence[Any],
    compiler: str,
    passes: Sequence[Pass],
    config: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    """A region as its passes need it: differentiable once, or twice."""
    if not any(item.differentiates_twice for item in passes):
        return _compile_one(module, fake_inputs, compiler, passes, config)
    if compiler == "eager":
        return TwiceDifferentiable(module).run
    return compile_twice_differentiable(
        module, fake_inputs, lambda part, fakes: _compile_one(part, fakes, compiler, passes, config)
    )


def _compile_one(
    module: GraphModule,
    fake_inputs: Sequence[Any],
    compiler: str,
    passes: Sequence[Pass],
    config: Mapping[str, Any] | None,
) -> Callable[..., Any]:
    """``module`` becomes the compiler's own."""
    if compiler == "eager":
        return Interpreter(module).run
    with _compat.disable_autocast():  # the casts are nodes already
        if compiler == "aot_eager":
            from torch._dynamo.backends.registry import lookup_backend

            return lookup_backend("aot_eager")(module, list(fake_inputs))
        settings = {"post_grad_custom_pre_pass": _cache_key(tuple(item.uuid for item in passes)), **(config or {})}
        return _compat.compile_fx(module, list(fake_inputs), config_patches=settings)  # type: ignore[return-value]


def compile_unlowered(
    graph_module: GraphModule, example_inputs: Sequence[Any], compiler: str, config: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs as ``torch.compile`` does; arguments as in `compile_graph`."""
    if compiler == "eager":
        return graph_module.forward
    if compiler == "aot_eager":
        from torch._dynamo.backends.registry import lookup_backend

        return lookup_backend("aot_eager")(graph_module, list(example_inputs))
    return _compat.compile_fx(graph_module, list(example_inputs), config_patches=dict(config or {}))  # type: ignore[return-value]


@functools.cache
def _cache_key(uuids: tuple[str, ...]) -> Any:
    """A pass of Inductor's that changes nothing: it carries the identity of graphopt's passes into the keys of its caches.

    Without it, a new version of a ``graphopt::`` op's decomposition would find the code that the old one was compiled to.
    """

    class CacheKey(_compat.CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            pass

        def uuid(self) -> Any:
            return "graphopt-" + hashlib.sha256(repr(uuids).encode()).hexdigest()

    return CacheKey()
