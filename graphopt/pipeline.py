"""Passes and the driver that runs them.

A pass says what it changes; the driver does everything else: it copies the graph (so a failed pass leaves nothing behind),
checks the order, lints, recompiles, verifies the **returned** graph, times it and records the difference. The pipeline is a
plain list, and its order is the user's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor
from torch.fx import GraphModule

from graphopt.annotations import Key
from graphopt.capture import CapturedGraph
from graphopt.errors import GraphoptError, OptionError, PassError
from graphopt.inspect.location import operator_name

if TYPE_CHECKING:
    from graphopt.runtime.streaming.options import Streaming

_passes: dict[str, type[Pass]] = {}


class Status(StrEnum):
    """How a pass served one parameter."""

    EXACT = "exact"
    PER_TOKEN = "per token"
    FALLBACK = "fallback"  # exact too, at the cost of one gradient per sample
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Coverage:
    """What a pass did for one parameter.

    Attributes:
        name: the parameter's qualified name.
        shape: its shape.
        status: how it was served.
        reason: the rule that serves it, or why it is skipped.
        extra_flops: estimated additional floating-point operations of one step, at the batch size of the capture.
        extra_bytes: estimated additional bytes that live at once during backward.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    reason: str
    extra_flops: int = 0
    extra_bytes: int = 0


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Attributes:
        graph: the rewritten graph, or the one that came in if nothing applied.
        num_changed: number of nodes rewritten; without any, only the graph's ``output_sample_axes`` are kept.
        notes: what a reader of the record should know, one sentence each.
        coverage: one row for each parameter that the pass considered.
    """

    graph: CapturedGraph
    num_changed: int
    notes: tuple[str, ...] = ()
    coverage: tuple[Coverage, ...] = ()


class Pass(ABC):
    """A rewriting of a captured graph. Subclasses are frozen dataclasses whose fields are the options.

    A public method that this class does not have is taken for a misspelt one, which the driver would never call. A pass that
    offers its user more names it: ``class LayerToLayer(Pass, adds=["plan"])``.

    Attributes:
        name: unique, exact; the pass is selected and disabled by it.
        requires: annotations that a pass before it must provide.
        provides: annotations that the rewritten graph will provide.
        changes_numerics: whether the model's outputs may change.
        must_be_last: whether no pass may stand behind it.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Key[Any]]] = frozenset()
    provides: ClassVar[frozenset[Key[Any]]] = frozenset()
    changes_numerics: ClassVar[bool]
    must_be_last: ClassVar[bool] = False

    def __init_subclass__(cls, *, adds: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for attribute in ("name", "changes_numerics"):
            if attribute not in vars(cls):
                raise TypeError(f"{cls.__name__} must define the class attribute {attribute!r}")
        known = {name for base in Pass.__mro__ for name in vars(base)} | set(vars(cls).get("__annotations__", {}))
        known.update(adds)
        if misspelt := sorted(n for n, v in vars(cls).items() if n[0] != "_" and callable(v) and n not in known):
            raise TypeError(
                f"{cls.__name__} defines {misspelt}, which Pass does not declare: a misspelt 'run'? If it is meant for users: "
                f"class {cls.__name__}(Pass, adds={misspelt})"
            )
        other = _passes.get(cls.name)
        if other is not None and other.__qualname__ != cls.__qualname__:
            raise TypeError(f"two passes are called {cls.name!r}: {other.__qualname__} and {cls.__qualname__}")
        _passes[cls.name] = cls

    @abstractmethod
    def run(self, graph: CapturedGraph) -> PassResult:
        """Rewrite ``graph``, which is the pass's own copy, and return it; the same object if nothing applies."""

    @property
    def needs_samples(self) -> bool:
        """Whether the pass must know where the samples are; then the batch size stays symbolic in the graph."""
        return True

    def selects(self, name: str, value: Tensor) -> bool:
        """Whether the pass is asked to serve a trainable parameter; ``value`` may be fake."""
        return True

    @property
    def skips_unsupported(self) -> bool:
        """Whether a graph that cannot even be captured may run without the pass, with rows in the report that say so."""
        return False

    @property
    def differentiates_twice(self) -> bool:
        """Whether the gradient of the graph is going to be differentiated, which a compiler must be told."""
        return False

    @property
    def streaming(self) -> Streaming | None:
        """How the graph's regions are streamed, for the pass that makes them."""
        return None

    @property
    def uuid(self) -> str:
        """Identity for the compile caches: a hash of the pass's sources and options."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(cast(Any, self))}
        named = {
            k: getattr(v, "__qualname__", v) for k, v in options.items()
        }  # the address of a function is no identity
        digest = hashlib.sha256(repr(named).encode())
        module = Path(inspect.getfile(type(self)))
        in_a_folder = type(self).__module__.rpartition(".")[0] not in ("", "graphopt.passes")  # a pass with rules
        for file in sorted(module.parent.rglob("*.py")) if in_a_folder else [module]:
            digest.update(file.read_bytes())
        return f"{self.name}-{digest.hexdigest()[:16]}"

    def explain(self, graph: CapturedGraph) -> PassResult:
        """What the pass would do to ``graph``, which stays as it is."""
        return self.run(graph.copy())


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass.

    Attributes:
        name: the pass's name.
        result: what it returned.
        before: the graph that it was given.
        after: the graph that it returned.
        seconds: wall time.
    """

    name: str
    result: PassResult
    before: GraphModule
    after: GraphModule
    seconds: float

    @property
    def op_changes(self) -> dict[str, int]:
        """Operators whose count changed, with the difference."""
        before, after = count_ops(self.before), count_ops(self.after)
        return {op: after[op] - before[op] for op in sorted(before | after) if after[op] != before[op]}

    def __repr__(self) -> str:
        return f"PassRecord({self.name}, {self.result.num_changed} changed, {self.seconds * 1e3:.0f} ms)"


@dataclass(frozen=True)
class Record:
    """One captured graph and what the passes made of it.

    Attributes:
        before: the graph as captured and lowered.
        after: the graph that was compiled.
        passes: one entry for each pass, with the graph before and after it.
        seconds: wall time of capture, passes and hand-off (Dynamo's own time not included).
        uncaptured: rows of parameters in a graph that could not be lowered, and so was compiled as it is.
    """

    before: GraphModule
    after: GraphModule
    passes: tuple[PassRecord, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    uncaptured: tuple[Coverage, ...] = ()

    @property
    def results(self) -> tuple[PassResult, ...]:
        """What each pass returned."""
        return tuple(record.result for record in self.passes)

    @property
    def coverage(self) -> tuple[Coverage, ...]:
        """The rows of all passes."""
        return (*self.uncaptured, *(row for record in self.passes for row in record.result.coverage))

    def __repr__(self) -> str:
        return (
            f"Record({len(self.before.graph.nodes)} -> {len(self.after.graph.nodes)} nodes, passes={list(self.passes)})"
        )


def count_ops(graph_module: GraphModule) -> Counter[str]:
    """How often each operator is called."""
    return Counter(operator_name(node) for node in graph_module.graph.nodes if node.op == "call_function")


def resolve_passes(passes: Sequence[Pass | str], disable: Sequence[str] = ()) -> list[Pass]:
    """Make pass objects of names, drop the disabled ones, and check the order.

    Raises:
        OptionError: an unknown name, a pass that stands twice, something that is not a pass, or a missing requirement.
    """
    resolved: list[Pass] = []
    for item in passes:
        if isinstance(item, str):
            item = _by_name(item)()
        if not isinstance(item, Pass):
            hint = f"; write {item.__name__}()" if isinstance(item, type) and issubclass(item, Pass) else ""
            raise OptionError(f"passes holds {item!r}, which is not a pass{hint}")
        resolved.append(item)
    for name in disable:
        _by_name(name)
    resolved = [item for item in resolved if item.name not in disable]
    if twice := [name for name, count in Counter(item.name for item in resolved).items() if count > 1]:
        raise OptionError(f"passes holds {twice} more than once; each pass runs once")
    provided: set[Key[Any]] = set()
    for item in resolved:
        if missing := sorted(key.name for key in item.requires - provided):
            raise OptionError(f"the pass {item.name!r} requires {missing}, which no pass before it provides")
        provided |= item.provides
    for item, behind in pairwise(resolved):
        if item.must_be_last:
            raise OptionError(f"the pass {item.name!r} must be the last one, and {behind.name!r} stands behind it")
    return resolved


def run_passes(graph: CapturedGraph, passes: Sequence[Pass]) -> tuple[CapturedGraph, tuple[PassRecord, ...]]:
    """Run the passes in order, each on a copy.

    Returns:
        The last graph, and a record for each pass.

    Raises:
        GraphoptError: from the pass, with the pass's name in front; ``graph`` is as it was.
        PassError: the pass raised something unexpected, or returned an invalid graph.
    """
    records = []
    for item in passes:
        start = time.perf_counter()
        try:
            result = item.run(graph.copy())
            _verify(result.graph)
        except GraphoptError as error:
            error.add_note(
                f"raised by the pass {item.name!r}; the model is unchanged: graphopt.restore(model) trains it as it was"
            )
            raise
        except Exception as error:
            raise PassError(
                f"the pass {item.name!r} failed with {type(error).__name__}: {error}. The model is unchanged. Leave the pass "
                f"out with options={{'disable': ['{item.name}']}}, and please report the model"
            ) from error
        if not result.num_changed:
            axes = result.graph.output_sample_axes
            same = axes == graph.output_sample_axes
            result = dataclasses.replace(
                result, graph=graph if same else dataclasses.replace(graph, output_sample_axes=axes)
            )
        elapsed = time.perf_counter() - start
        records.append(PassRecord(item.name, result, graph.graph_module, result.graph.graph_module, elapsed))
        graph = result.graph
    return graph, tuple(records)


def _by_name(name: str) -> type[Pass]:
    import graphopt.passes  # noqa: F401  its import registers the passes

    if name not in _passes:
        raise OptionError(f"there is no pass {name!r}; the passes are {sorted(_passes)}")
    return _passes[name]


def _verify(graph: CapturedGraph) -> None:
    """Reject a graph that later stages could not run."""
    graph.graph_module.graph.lint()
    graph.graph_module.recompile()
    names = [node.name for node in graph.placeholders]
    if not len(names) == len(graph.inputs) == len(graph.fake_inputs):
        raise ValueError(
            f"{len(names)} placeholders, {len(graph.inputs)} inputs and {len(graph.fake_inputs)} fake inputs"
        )
    for node in graph.graph_module.graph.nodes:
        returns_nothing = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns
        if node.op == "call_function" and "val" not in node.meta and not returns_nothing:
            raise ValueError(f"the node {node.name} ({operator_name(node)}) has no meta['val']")
