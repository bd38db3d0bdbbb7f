"""The pass: which boundaries are worth having, and the nodes that mark them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from graphopt.annotations import STAGE, Key
from graphopt.capture import CapturedGraph
from graphopt.passes.layer_to_layer.layers import (
    WORTH_COMPILING_ONCE,
    Boundaries,
    find_layers,
    num_saved,
    structures,
)
from graphopt.passes.layer_to_layer.segments import Segment, arrange, merged
from graphopt.pipeline import Pass, PassResult

@final
@dataclass(frozen=True)
class LayerToLayer(Pass):
    """Mark the boundaries between layers: each distinct layer is compiled once, and one layer at a time can be held in memory.

    Attributes:
        boundaries: ``"auto"``; the path of the module that holds the layers (``"encoder.layer"``), or several; or a function from
            a module's path to the name of its layer, or ``None``.
    """

    boundaries: Boundaries = "auto"

    name: ClassVar[str] = "layer_to_layer"
    provides: ClassVar[frozenset[Key[Any]]] = frozenset({STAGE})
    changes_numerics: ClassVar[bool] = False

    def run(self, graph: CapturedGraph) -> PassResult:
        """Insert the boundaries."""
        found = find_layers(graph, self.boundaries)
        if self.boundaries == "auto":
            found = _worthwhile(graph, found)
        if len(found) < 2:
            return PassResult(graph, 0)
        distinct = len(set(structures(graph, found)))
        arrange(graph, found)
        note = f"{len(found)} regions, {distinct} of them distinct: {', '.join(s.name for s in found)}"
        return PassResult(graph, len(found) - 1, (note,))


def _worthwhile(graph: CapturedGraph, found: Sequence[Segment]) -> list[Segment]:
    """Keep boundaries around layers that repeat, if that saves enough; join all others."""
    hashes = structures(graph, found)
    if num_saved(found, hashes) < WORTH_COMPILING_ONCE:
        return []
    counts = Counter(hashes)
    alone = [counts[h] == 1 for h in hashes]
    kept: list[Segment] = []
    for position, segment in enumerate(found):
        if kept and alone[position] and alone[position - 1]:
            kept[-1] = merged(kept[-1], segment)
        else:
            kept.append(segment)
    return kept
