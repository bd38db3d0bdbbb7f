"""The modules of a model that are its layers, found in a call that computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from graphopt.dry_run import dry_run
from graphopt.errors import OptionError
from graphopt.passes.layer_to_layer.layers import Boundaries, find_layers, module_stack
from graphopt.passes.layer_to_layer.segments import Segment
from graphopt.runtime import data_parallel, fully_sharded
from graphopt.transform import Setup


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
    run = dry_run(
        model,
        args,
        kwargs,
        setup,
        cannot="be traced without running it",
        instead="Remove what breaks the graph (TORCH_LOGS=graph_breaks shows where it is)",
    )
    found: dict[str, None] = {}
    for item in run.graphs:
        if item.graph is not None:
            found.update(dict.fromkeys(_paths(find_layers(item.graph, boundaries))))
    modules = dict(model.named_modules(remove_duplicate=False))
    known = [path for path in found if path in modules and any(True for _ in modules[path].parameters())]
    outermost = [path for path in known if not any(path.startswith(f"{other}.") for other in known)]
    return list({id(modules[path]): modules[path] for path in outermost}.values())


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
