"""Find a model's layers: in the paths of its modules, and in what their operators have in common.

``"auto"`` takes numbered modules (``encoder.layer.3``, ``blocks.0``, ``layer1`` beside ``layer2``), and modules that are called
several times, the outermost first; where those of one container are all different, it looks for numbered modules inside them.
Modules without parameters (activations in an ``nn.Sequential``) go with the layer in front of them, and a pattern that repeats
(linear, norm, linear, norm, ...) becomes one layer.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import groupby

from torch.fx import Node

from graphopt.capture import CapturedGraph, InputKind
from graphopt.errors import OptionError
from graphopt.inspect.location import plain_name
from graphopt.passes.layer_to_layer.segments import Layer, Segment, is_operator, merged, segments_of
from graphopt.regions import find_differentiable, structure_of

# Operators that need not be compiled again because an equal layer has them: from so many on it pays to have boundaries in a model
# whose weights stay on the device. Below, the compiler takes less than a second for them, and may fuse across layers.
WORTH_COMPILING_ONCE = 24

Boundaries = str | Sequence[str] | Callable[[str], str | None]


def find_layers(graph: CapturedGraph, boundaries: Boundaries) -> list[Segment]:
    """The segments of a graph, in order.

    Args:
        graph: stays as it is.
        boundaries: ``"auto"``; the path of a module that holds layers, or of one that is a layer (patterns such as
            ``"*.block"`` allowed), or several; or a function from a module path to the name of its layer, or ``None``.

    Raises:
        OptionError: a path that no operator of the graph comes from.
    """
    if callable(boundaries):
        return segments_of(graph, _by_function(boundaries))
    if boundaries != "auto":
        paths = [boundaries] if isinstance(boundaries, str) else list(boundaries)
        return segments_of(graph, _by_path(graph, paths))
    return _find_repeated(graph)


def structures(graph: CapturedGraph, segments: Sequence[Segment]) -> list[str]:
    """For each segment a hash of what it does; equal for equal layers."""
    differentiable = find_differentiable(graph)
    return [structure_of(segment.nodes, differentiable) for segment in segments]


def parameters_of(graph: CapturedGraph, segment: Segment) -> list[Node]:
    """The parameters that a segment reads, in the order of first use."""
    kinds = dict(zip(graph.placeholders, graph.inputs, strict=True))
    read = dict.fromkeys(argument for node in segment.nodes for argument in node.all_input_nodes)
    return [node for node in read if node in kinds and kinds[node].kind is InputKind.PARAMETER]


def _find_repeated(graph: CapturedGraph) -> list[Segment]:
    numbered = _numbered(graph)
    opened: set[str] = set()
    found = _pattern(graph, segments_of(graph, _by_number(numbered, opened)))
    while True:
        hashes = structures(graph, found)
        counts = Counter(hashes)
        repeat = {segment.container for segment, h in zip(found, hashes, strict=True) if counts[h] > 1}
        alone = {segment.name for segment in found if segment.layer is not None and segment.container not in repeat}
        inside = {path for path in alone if any(inner.startswith(path + ".") for inner in numbered)}
        if not inside - opened:
            return found
        opened |= inside
        deeper = _pattern(graph, segments_of(graph, _by_number(numbered, opened)))
        if num_saved(deeper, structures(graph, deeper)) >= num_saved(found, hashes) + WORTH_COMPILING_ONCE:
            found = deeper


def num_saved(segments: Sequence[Segment], hashes: Sequence[str]) -> int:
    """Operators that need not be compiled, because they stand in a layer that is equal to another."""
    first = dict(zip(reversed(hashes), reversed(segments), strict=True))
    return sum(len(segment.nodes) for segment, h in zip(segments, hashes, strict=True) if first[h] is not segment)


def module_stack(node: Node) -> list[tuple[str, str]]:
    """The modules whose forward made a node, from the outermost below the model itself: path, and which call of it."""
    stack = node.meta.get("nn_module_stack") or {}
    inner = {key: path for key, (path, _) in stack.items() if not re.fullmatch(r"[LG]\['\w+'\]", path)}
    return [(plain_name(path), key.partition("@")[2]) for key, path in inner.items()]


def _operators(graph: CapturedGraph) -> list[Node]:
    return [node for node in graph.graph_module.graph.nodes if is_operator(node)]


def _numbered(graph: CapturedGraph) -> dict[str, str]:
    """The modules that are one of several: path -> what they have in common.

    That are those whose path ends in a number and that have brothers with another, and those with parameters that are called
    several times.
    """
    entries = {entry for node in _operators(graph) for entry in module_stack(node)}
    owners = {described.name.rpartition(".")[0] for described in graph.inputs if described.kind is InputKind.PARAMETER}
    brothers: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for path, call in entries:
        if match := re.fullmatch(r"(.*?)(\d+)", path):
            brothers[match[1]].add((path, call))
        elif any(f"{owner}.".startswith(f"{path}.") for owner in owners):
            brothers[path].add((path, call))
    return {path: common for common, group in brothers.items() if len(group) > 1 for path, _ in group}


def _by_number(numbered: dict[str, str], opened: set[str]) -> Callable[[Node], Layer | None]:
    def layer_of(node: Node) -> Layer | None:
        for path, call in module_stack(node):
            if path in numbered and path not in opened:
                return Layer(path, call, numbered[path])
        return None

    return layer_of


def _by_path(graph: CapturedGraph, paths: Sequence[str]) -> Callable[[Node], Layer | None]:
    known = {path for node in _operators(graph) for path, _ in module_stack(node)}
    for pattern in paths:
        if not any(fnmatchcase(path, pattern) for path in known | {p.rpartition(".")[0] for p in known}):
            near = ", ".join(sorted({p.rpartition(".")[0] for p in known if re.search(r"\.\d+$", p)})) or "none"
            raise OptionError(
                f"LayerToLayer(boundaries={pattern!r}): no operator of this graph comes from such a module. Modules with "
                f"numbered layers: {near}"
            )

    def layer_of(node: Node) -> Layer | None:
        stack = module_stack(node)
        for path, call in stack:
            parent = path.rpartition(".")[0]
            if any(parent and fnmatchcase(parent, pattern) for pattern in paths):
                return Layer(path, call, parent)
            holds = any(inner.startswith(path + ".") and inner.removeprefix(path + ".").isdigit() for inner in known)
            if any(fnmatchcase(path, pattern) for pattern in paths) and not holds:
                return Layer(path, call, path)
        return None

    return layer_of


def _by_function(function: Callable[[str], str | None]) -> Callable[[Node], Layer | None]:
    def layer_of(node: Node) -> Layer | None:
        for path, call in reversed(module_stack(node)):
            name = function(path)
            if name is not None:
                return Layer(name, call if name == path else "", re.sub(r"\d+$", "", name))
        return None

    return layer_of


def _pattern(graph: CapturedGraph, found: list[Segment]) -> list[Segment]:
    """Modules without parameters go with the layer in front of them; a pattern that repeats becomes one layer."""
    joined: list[Segment] = []
    for segment in found:
        beside = bool(joined) and segment.layer is not None and joined[-1].container == segment.container
        if beside and not parameters_of(graph, segment):
            joined[-1] = merged(joined[-1], segment)
        else:
            joined.append(segment)
    hashes = dict(zip(map(id, joined), structures(graph, joined), strict=True))
    result: list[Segment] = []
    for (_, is_layer), group in groupby(joined, key=lambda s: (s.container, s.layer is not None)):
        members = list(group)
        result += _periods(members, [hashes[id(s)] for s in members]) if is_layer else members
    return result


def _periods(members: list[Segment], hashes: list[str]) -> list[Segment]:
    """Join the members of the shortest pattern of different parts that repeats; others stay as they are."""
    for length in range(2, len(members) // 2 + 1):
        for start in range(len(members) - 2 * length + 1):
            pattern = hashes[start : start + length]
            if len(set(pattern)) < length:
                continue
            times = 1
            while hashes[start + times * length : start + (times + 1) * length] == pattern:
                times += 1
            if times > 1:
                end = start + times * length
                layers = [members[at : at + length] for at in range(start, end, length)]
                return [
                    *_periods(members[:start], hashes[:start]),
                    *(_joined(layer) for layer in layers),
                    *_periods(members[end:], hashes[end:]),
                ]
    return members


def _joined(parts: Sequence[Segment]) -> Segment:
    whole = parts[0]
    for part in parts[1:]:
        whole = merged(whole, part)
    if len(parts) > 1:
        whole.name = f"{parts[0].name} to {parts[-1].name.rpartition('.')[2]}"
    return whole
