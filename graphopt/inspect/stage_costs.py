"""What the regions of a streamed graph take and give, in bytes and floating-point operations, found out on fake tensors.

`StageCosts` describe what the runtime will do with a region, by the names that the runtime uses: they come from the same
functions that prepare a graph for streaming. Each distinct region is run once, forward and backward, on fake tensors of the
size of one micro-batch; that gives its operations and what it keeps for its backward when nothing fuses.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Interpreter
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from graphopt import _compat
from graphopt.annotations import SAMPLE_GRAD_NORM, SUM_GRAD_SQUARED
from graphopt.capture import CapturedGraph, InputKind
from graphopt.dry_run import DryGraph
from graphopt.pipeline import Coverage
from graphopt.regions import MicroBatches, Region, split
from graphopt.runtime.streaming.micro_batches import Cut, Sizes, evaluate, expression_of, read_sizes
from graphopt.runtime.streaming.stages import Companion, Parameter, Size, Stage, differentiable_names, prepare

aten = torch.ops.aten


@dataclass(frozen=True)
class Weight:
    """A parameter as a stage sees it.

    Attributes:
        nbytes: of its value, its gradient, and of each of the optimizer's tensors of its dtype.
        is_trainable: whether it requires a gradient.
    """

    name: str
    numel: int
    nbytes: int
    dtype: torch.dtype
    is_trainable: bool


@dataclass(frozen=True)
class Between:
    """A value that passes from one stage to others.

    Attributes:
        parts: bytes of each part that is kept; one for a value that is whole.
        has_samples: whether it is cut at samples, or could be.
        takes_memory: whether it is more than one number, expanded.
        is_differentiable: whether a gradient comes back for it.
        is_scalar: whether it is one number, as losses are.
    """

    parts: tuple[int, ...]
    has_samples: bool
    takes_memory: bool
    is_differentiable: bool
    is_scalar: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts)


@dataclass(frozen=True)
class Work:
    """What one call of a region costs.

    Attributes:
        forward_flops: operations of its matrix products, convolutions and attention.
        backward_flops: those of its backward, without computing forward again.
        forward_bytes: the most that values within it take at once when nothing is kept.
        backward_bytes: what it keeps for its backward, and the gradients on their way.
        reached: positions of the inputs that get a gradient.
        weight_flops: of ``forward_flops``, those of products with parameters, which have two for each element and row.
        weight_numel: elements of these parameters.
    """

    forward_flops: int
    backward_flops: int
    forward_bytes: int
    backward_bytes: int
    reached: frozenset[int]
    weight_flops: int
    weight_numel: int


@dataclass(frozen=True)
class StageCosts:
    """One stage of a streamed graph.

    Attributes:
        name: module path of the layer, or a word for what lies between layers.
        structure: equal for stages that are compiled once.
        weights: the parameters that it reads.
        reached: names of those that get a gradient from it.
        statistics: bytes of each record of statistics that it adds to, by parameter.
        reads: names of the values of earlier stages that it reads, each once.
        outputs: names of the values that it returns.
        last_uses: values that no later stage reads.
        is_differentiated: whether backward goes through it.
        num_parts: micro-batches that it runs; 1 if it is not split.
        whole: why it is not split, if it is not.
        work: of one micro-batch.
        forward_flops: of the whole batch.
        backward_flops: of the whole batch, without computing forward again.
        statistics_bytes: working memory of the statistics.
        weight_flops: of ``forward_flops``, those of products with parameters.
        weight_numel: elements of these parameters.
    """

    name: str
    structure: str
    weights: tuple[Weight, ...]
    reached: frozenset[str]
    statistics: Mapping[str, tuple[int, ...]]
    reads: tuple[str, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...]
    is_differentiated: bool
    num_parts: int
    whole: str | None
    work: Work
    forward_flops: int
    backward_flops: int
    statistics_bytes: int
    weight_flops: int
    weight_numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters."""
        return sum(weight.nbytes for weight in self.weights)

    @property
    def numel(self) -> int:
        """Elements of its parameters."""
        return sum(weight.numel for weight in self.weights)


@dataclass(frozen=True)
class GraphCosts:
    """One graph.

    Attributes:
        stages: in order.
        values: what passes between them, or is returned, by name.
        num_samples: of the call, if the inputs say so.
    """

    stages: tuple[StageCosts, ...]
    values: Mapping[str, Between]
    num_samples: int | None

    @property
    def returned(self) -> list[str]:
        """Names of the values that the graph returns."""
        used = {name for stage in self.stages for name in stage.last_uses}
        return [name for name in self.values if name not in used]


def costs_of(captured: DryGraph, microbatch_size: int | None) -> GraphCosts:
    """What the stages of a graph cost; the graph must have been rewritten by `graphopt.passes.LayerToLayer`."""
    graph = cast(CapturedGraph, captured.graph)
    regions = split(graph)
    prepared, _ = prepare(graph, regions, dict.fromkeys((region.structure for region in regions), _never_run))
    cut = _cut(graph, captured.inputs, microbatch_size)
    num_samples = _num_samples(graph, captured.inputs)
    differentiable = differentiable_names(graph)
    rows = frozenset() if graph.micro_batches is None else frozenset(graph.micro_batches.rows)
    values: dict[str, Between] = {}
    for region, stage in zip(regions, prepared, strict=True):
        parts = cut.parts(stage.is_whole)
        for node in region.outputs:
            values[node.name] = _between(node.meta["val"], node.name in rows, node.name in differentiable, cut, parts)
    work = _work_of_all(graph, regions, prepared, cut)
    flops = _flops(captured, work, prepared, microbatch_size)
    stages = [
        _costs_of_stage(graph, stage, region.structure, done, counted, cut, differentiable, captured.record.coverage)
        for region, stage, done, counted in zip(regions, prepared, work, flops, strict=True)
    ]
    return GraphCosts(tuple(stages), values, num_samples)


def _costs_of_stage(
    graph: CapturedGraph,
    stage: Stage,
    structure: str,
    work: Work,
    flops: Work,
    cut: Cut,
    differentiable: set[str],
    coverage: Sequence[Coverage],
) -> StageCosts:
    parts = cut.parts(stage.is_whole)
    reached, statistics = set(), dict[str, tuple[int, ...]]()
    for position, source in enumerate(stage.sources):
        if isinstance(source, Parameter) and position in work.reached:
            reached.add(graph.inputs[source.position].name)
        if isinstance(source, Companion) and source.key is not SAMPLE_GRAD_NORM:
            weight = _weight(graph, source.position)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            before = statistics.get(weight.name, ())
            records = (*before, weight.numel * dtype.itemsize)
            statistics[weight.name] = (
                records[::-1] if source.key is SUM_GRAD_SQUARED else records
            )  # the first is for the optimizer
    is_differentiated = any(name in differentiable for name in stage.outputs)
    weights = tuple(_weight(graph, position) for position in stage.parameters)
    names = {weight.name for weight in weights}
    added = [row for row in coverage if row.name in names]
    return StageCosts(
        name=stage.layer,
        structure=structure,
        weights=weights,
        reached=frozenset(reached) if is_differentiated else frozenset(),
        statistics=statistics if is_differentiated else {},
        reads=tuple(dict.fromkeys(stage.values)),
        outputs=tuple(stage.outputs),
        last_uses=tuple(stage.last_uses),
        is_differentiated=is_differentiated,
        num_parts=len(parts),
        whole=_why_whole(graph, stage, cut),
        work=work,
        forward_flops=flops.forward_flops,
        backward_flops=flops.backward_flops + sum(row.extra_flops for row in added) if is_differentiated else 0,
        statistics_bytes=max((row.extra_bytes for row in added), default=0),
        weight_flops=flops.weight_flops,
        weight_numel=flops.weight_numel,
    )


def _work_of_all(graph: CapturedGraph, regions: Sequence[Region], stages: Sequence[Stage], cut: Cut) -> list[Work]:
    """The work of one micro-batch of each stage; equal ones are found out once."""
    known: dict[tuple[Any, ...], Work] = {}
    found = []
    for region, stage in zip(regions, stages, strict=True):
        sizes = cut.sizes_of(cut.parts(stage.is_whole)[0])
        key = (region.structure, tuple(sorted(sizes.items(), key=str)))
        if key not in known:
            known[key] = _work_of(region, stage, graph, sizes)
        found.append(known[key])
    return found


def _flops(
    captured: DryGraph, work: Sequence[Work], stages: Sequence[Stage], microbatch_size: int | None
) -> list[Work]:
    """The operations of each stage for the whole batch, as the model itself has them.

    Operators that a pass has put in count for nothing, so they are counted in the graph without them.
    """
    names, graph = [stage.layer for stage in stages], captured.beside or cast(CapturedGraph, captured.graph)
    if graph is not captured.graph:
        regions = split(graph)
        prepared, _ = prepare(graph, regions, dict.fromkeys((region.structure for region in regions), _never_run))
        if [stage.layer for stage in prepared] == names:
            stages = prepared
            work = _work_of_all(graph, regions, prepared, _cut(graph, captured.inputs, microbatch_size))
    cut = _cut(graph, captured.inputs, microbatch_size)
    shares = [
        1.0 if cut.bounds is None or stage.is_whole else cut.bounds[-1][1] / (cut.bounds[0][1] - cut.bounds[0][0])
        for stage in stages
    ]
    return [
        replace(
            done,
            forward_flops=round(done.forward_flops * share),
            backward_flops=round(done.backward_flops * share),
            weight_flops=round(done.weight_flops * share),
        )
        for done, share in zip(work, shares, strict=True)
    ]


def _why_whole(graph: CapturedGraph, stage: Stage, cut: Cut) -> str | None:
    if graph.micro_batches is None:
        return "microbatch_size is not given"
    if stage.index in graph.micro_batches.whole:
        return graph.micro_batches.whole[stage.index]
    return None if cut.bounds is not None else "the inputs do not agree on the number of samples"


def _weight(graph: CapturedGraph, position: int) -> Weight:
    described, fake = graph.inputs[position], graph.fake_inputs[position]
    numel = prod(int(size) for size in fake.shape)
    return Weight(described.name, numel, numel * fake.dtype.itemsize, fake.dtype, described.requires_grad)


def _cut(graph: CapturedGraph, values: Sequence[Any], microbatch_size: int | None) -> Cut:
    """How the batch of the capture is cut."""
    batches, shape_env = graph.micro_batches or MicroBatches({}, {}), graph.fake_mode.shape_env
    symbols = frozenset(
        found for s in batches.symbols if (found := s if shape_env is None else shape_env.replace(s)).is_Symbol
    )
    return Cut(read_sizes(graph)(values), symbols, microbatch_size)


def _num_samples(graph: CapturedGraph, values: Sequence[Any]) -> int | None:
    for described, value in zip(graph.inputs, values, strict=False):
        if described.kind is InputKind.SAMPLES and described.sample_axis is not None:
            return int(value.shape[described.sample_axis])
    return None


def _between(value: Any, has_samples: bool, is_differentiable: bool, cut: Cut, parts: Sequence[int | None]) -> Between:
    if not isinstance(value, Tensor):
        return Between((0,), False, False, False, False)
    of_parts = parts if has_samples else parts[:1]
    sizes = [_memory(value, cut.sizes_of(part)) for part in of_parts]
    numels = [prod(_shape(value, cut.sizes_of(part))) * value.dtype.itemsize for part in of_parts]
    return Between(tuple(sizes), has_samples, sizes == numels, is_differentiable, value.ndim == 0)


def _shape(value: Tensor, sizes: Sizes) -> list[int]:
    return [evaluate(expression_of(size), sizes) for size in value.shape]


def _strides(value: Tensor, sizes: Sizes) -> list[int]:
    return [evaluate(expression_of(stride), sizes) for stride in value.stride()]


def _memory(value: Tensor, sizes: Sizes) -> int:
    """Bytes of a tensor, of which expanded axes take none."""
    shape = zip(_shape(value, sizes), _strides(value, sizes), strict=True)
    return prod(size for size, stride in shape if stride or size == 0) * value.dtype.itemsize


def _never_run(*inputs: Any) -> Any:
    raise AssertionError("a plan runs no region")


# ------------------------------------------------------------------------------------------------------- on fake tensors


def _work_of(region: Region, stage: Stage, graph: CapturedGraph, sizes: Sizes) -> Work:
    """Run a region on fake tensors."""
    with _compat.FakeTensorMode() as mode, torch.enable_grad(), _compat.quiet_fake_tensors():
        inputs = [
            _concrete(source, fake, graph, sizes, mode)
            for source, fake in zip(stage.sources, region.fake_inputs, strict=True)
        ]
        meter = _Meter(inputs)
        weights = [
            value.numel() if isinstance(source, Parameter) and value.ndim > 1 else None
            for source, value in zip(stage.sources, inputs, strict=True)
        ]
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as forward:
            interpreter = _Metered(region.graph_module, meter, forward, weights)
            with torch.autograd.graph.saved_tensors_hooks(meter.keep, lambda value: value):
                outputs = interpreter.run(*inputs)
        for value in pytree.tree_leaves(outputs):
            meter.keep(value)
        leaves = {
            position: value
            for position, value in enumerate(inputs)
            if isinstance(value, Tensor) and value.requires_grad
        }
        ends = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        reached: frozenset[int] = frozenset()
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as backward:
            if ends and leaves:
                ones = [torch.ones_like(value) for value in ends]
                found = torch.autograd.grad(ends, list(leaves.values()), ones, allow_unused=True)
                reached = frozenset(at for at, value in zip(leaves, found, strict=True) if value is not None)
    flops = forward.get_total_flops()
    return Work(
        flops,
        backward.get_total_flops(),
        meter.peak,
        meter.kept + 2 * meter.largest,
        reached,
        *interpreter.weight_products(),
    )


def _concrete(source: Any, fake: Any, graph: CapturedGraph, sizes: Sizes, mode: Any) -> Any:
    """An input of a region as it would be for one micro-batch."""
    if isinstance(source, Size):
        return evaluate(source.expression, sizes)
    if not isinstance(fake, Tensor):
        return fake
    value = torch.empty_strided(_shape(fake, sizes), _strides(fake, sizes), dtype=fake.dtype, device=fake.device)
    if isinstance(source, Parameter):
        return value.requires_grad_(graph.inputs[source.position].requires_grad)
    return value.requires_grad_(fake.requires_grad)


class _Meter:
    """Bytes of the storages of fake tensors, inputs not counted.

    Attributes:
        kept: those that autograd has saved.
        peak: the most that were alive at once.
        largest: the largest one.
    """

    def __init__(self, inputs: Sequence[Any]) -> None:
        self._inputs = {id(s): s for value in inputs if (s := _storage(value)) is not None}
        self._kept: dict[int, Any] = {}
        self.kept = self.peak = self.largest = 0

    def keep(self, value: Any) -> Any:
        """Count what is saved, once; also the hook that autograd calls."""
        storage = _storage(value)
        if storage is not None and id(storage) not in self._inputs and id(storage) not in self._kept:
            self._kept[id(storage)] = storage
            self.kept += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return value

    def see(self, alive: Sequence[Any]) -> None:
        """Count what is alive now."""
        found = {id(s): s.nbytes() for value in alive if (s := _storage(value)) is not None}
        sizes = [nbytes for key, nbytes in found.items() if key not in self._inputs]
        self.peak = max(self.peak, sum(sizes))
        self.largest = max([self.largest, *sizes])


def _storage(value: Any) -> Any:
    """The storage of a tensor: one Python object for as long as somebody holds it."""
    return value.untyped_storage() if isinstance(value, Tensor) else None


class _Metered(Interpreter):
    """Runs a region, and looks after each operator what is alive and whether it was a product with parameters."""

    def __init__(self, module: Any, meter: _Meter, counter: FlopCounterMode, weights: Sequence[int | None]) -> None:
        super().__init__(module)
        self._meter, self._counter = meter, counter
        self._flops = 0
        inputs = zip(module.graph.find_nodes(op="placeholder"), weights, strict=True)
        self._numels = {node: numel for node, numel in inputs if numel is not None}
        self._made_of = {node: {node} for node in self._numels}  # also casts and views of parameters
        self._used: set[Any] = set()

    def run_node(self, n: Any) -> Any:
        before = self._counter.get_total_flops()
        result = super().run_node(n)
        self._meter.see(pytree.tree_leaves([list(self.env.values()), result]))
        own = [self._made_of[node] for node in n.all_input_nodes if node in self._made_of]
        if n.op != "call_function" or not own:
            return result
        if len(own) == len(n.all_input_nodes):
            self._made_of[n] = set().union(*own)
        elif flops := self._counter.get_total_flops() - before:
            self._flops += flops
            self._used.update(*own)
        return result

    def weight_products(self) -> tuple[int, int]:
        """Operations of products with parameters, and elements of these parameters."""
        return self._flops, sum(self._numels[node] for node in self._used)


@functools.cache
def _formulas() -> dict[Any, Any]:
    """Operators that torch's counter does not know: attention on the CPU."""
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products: of queries with keys, and of the weights with values."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """Five products: the weights again, two for the gradients of weights and values, two for those of queries and keys."""
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])
