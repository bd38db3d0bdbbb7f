"""Where the samples are: for each value of a graph, the axis that counts samples and how rows are grouped along it.

Dynamo's symbol says how many samples there are; it does not say in which order rows lie after a flattening: both
``(N, T, D) -> (N*T, D)`` and ``(T, N, D) -> (T*N, D)`` have ``N*T`` rows. So the axis is followed operator by operator, from
the inputs that hold samples. What an operator does to it is looked up in the tables below; an operator that is in none of them
loses it, and a parameter that meets such a value is refused by name.

A value is one of three kinds:

* `Free`: does not depend on any sample (parameters, constants, what is computed from them alone);
* `SampleAxis`: row ``i`` of ``axis`` belongs to sample ``(i // inner) % num``;
* `Lost`: depends on samples, but no axis tells them apart any more; says which node did that.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from graphopt.capture import CapturedGraph, InputKind
from graphopt.errors import SampleAxisError
from graphopt.inspect.location import describe

Size: TypeAlias = sympy.Expr


@dataclass(frozen=True)
class Free:
    """Depends on no sample."""


@dataclass(frozen=True)
class Lost:
    """Depends on samples that no axis tells apart any more."""

    node: Node
    why: str


@dataclass(frozen=True)
class SampleAxis:
    """Row ``i`` of ``axis`` belongs to sample ``(i // inner) % num``; the axis has ``outer * num * inner`` rows.

    Attributes:
        axis: position among the value's axes.
        num: number of samples.
        source: the input, and its axis, that counts them.
        outer: how often the samples are repeated along the axis.
        inner: consecutive rows that belong to one sample.
        is_iota: the values along the axis are the sample's own numbers, as in ``torch.arange(batch_size)``.
    """

    axis: int
    num: Size
    source: tuple[int, int]
    outer: Size = sympy.S.One
    inner: Size = sympy.S.One
    is_iota: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the axis counts samples and nothing else."""
        return bool(self.outer == 1 and self.inner == 1)

    def at(self, axis: int) -> SampleAxis:
        """The same grouping at another position."""
        return replace(self, axis=axis, is_iota=False)


Layout = Free | Lost | SampleAxis
Layouts = dict[Node, Layout | list[Layout]]

FREE = Free()


def find_sample_axes(graph: CapturedGraph) -> Layouts:
    """The layout of every value of the graph.

    Raises:
        SampleAxisError: two inputs count samples differently and meet in one operator.
    """
    return _Propagation(graph).run()


def size_of(size: int | torch.SymInt) -> Size:
    """A size as an expression, with what Dynamo has learnt about its symbols."""
    if isinstance(size, torch.SymInt):
        return cast(Size, size.node.shape_env.replace(size.node.expr))
    return sympy.Integer(size)


def shape_of(value: Any) -> list[Size]:
    """The sizes of a fake tensor as expressions."""
    return [size_of(size) for size in value.shape]


# Operators that treat every row alike and keep the shape of their first argument, with the position of the argument that names
# the axes they work along (None: not the leading axes).
_ROW_WISE: dict[str, int | None] = {
    "prelu": None, "one_hot": None, "topk": 2, "argsort": 1,
    "softmax": 1, "_softmax": 1, "log_softmax": 1, "_log_softmax": 1, "cumsum": 1, "cumprod": 1, "flip": 1, "sort": 1,
    "layer_norm": None, "native_layer_norm": None, "rms_norm": None, "_fused_rms_norm": None, "group_norm": None,
    "batch_norm": None, "instance_norm": None, "dropout": None,
    "native_dropout": None, "feature_dropout": None, "alpha_dropout": None,
    "to": None, "_to_copy": None, "clone": None, "contiguous": None, "detach": None, "alias": None, "lift_fresh_copy": None,
    "type_as": None, "zeros_like": None, "ones_like": None, "full_like": None, "empty_like": None, "rand_like": None,
    "randn_like": None, "tril": None, "triu": None, "constant_pad_nd": None, "pad": None, "glu": None, "normal_functional": None,
    "bernoulli": None, "masked_fill": None, "masked_fill_": None, "copy": None, "gelu": None, "silu": None,
}  # fmt: skip
_REDUCTIONS = frozenset(
    "sum mean amax amin max min argmax argmin any all var std var_mean std_mean norm logsumexp prod linalg_vector_norm "
    "count_nonzero median".split()
)
_RESHAPES = frozenset(
    "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as _reshape_alias".split()
)
_PERMUTATIONS = frozenset("permute transpose t numpy_T movedim swapaxes swapdims mT adjoint moveaxis".split())
_EXPANSIONS = frozenset("expand expand_as broadcast_to".split())
_SPLITS = frozenset("split split_with_sizes chunk tensor_split unsafe_split unsafe_chunk".split())
_ON_FIRST_AXIS = frozenset(
    "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
    "max_pool2d_with_indices upsample_nearest2d upsample_bilinear2d upsample_bicubic2d pixel_shuffle pixel_unshuffle".split()
)
_LOSSES = frozenset(
    "cross_entropy_loss nll_loss nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits kl_div".split()
)
_SCATTERS = frozenset("scatter scatter_add scatter_reduce slice_scatter select_scatter".split())


_CREATIONS = frozenset("new_zeros new_ones new_empty new_full new_empty_strided".split())


class _Propagation:
    def __init__(self, graph: CapturedGraph) -> None:
        self.graph = graph
        self.layouts: Layouts = {}
        self.sources: dict[Size, tuple[int, int]] = {}  # number of samples -> the input that counts them

    def run(self) -> Layouts:
        candidates = [
            (position, described.sample_axis, shape_of(fake)[described.sample_axis])
            for position, (described, fake) in enumerate(zip(self.graph.inputs, self.graph.fake_inputs, strict=True))
            if described.kind is InputKind.SAMPLES and described.sample_axis is not None
        ]
        # Dynamo keeps a size symbolic unless the model insists on its value; a size that it fixed beside one that it kept
        # (a mask or a table that was passed in) does not count samples.
        symbolic = [candidate for candidate in candidates if candidate[2].free_symbols]
        samples = {position: (axis, num) for position, axis, num in symbolic or candidates}
        for position, (node, described) in enumerate(zip(self.graph.placeholders, self.graph.inputs, strict=True)):
            self.layouts[node] = FREE
            if position in samples:
                axis, num = samples[position]
                source = self.sources.setdefault(num, (position, axis))
                self.layouts[node] = SampleAxis(axis, num, source)
            elif described.kind is InputKind.SAMPLES and described.requires_grad:
                self.layouts[node] = Lost(node, "an input without samples that depends on parameters")
        for node in self.graph.graph_module.graph.nodes:
            if node.op == "call_function":
                self.layouts[node] = self._visit(node)
            elif node.op == "get_attr":
                self.layouts[node] = FREE
        return self.layouts

    def layout(self, node: Any) -> Layout:
        """The layout of a node with one output; `Free` for anything that is not a node."""
        found = self.layouts.get(node, FREE) if isinstance(node, Node) else FREE
        return found if not isinstance(found, list) else FREE

    def _visit(self, node: Node) -> Layout | list[Layout]:
        if not isinstance(node.target, torch._ops.OpOverload):
            if node.target is operator.getitem:
                whole = self.layouts[cast(Node, node.args[0])]
                return whole[cast(int, node.args[1])] if isinstance(whole, list) else whole
            return FREE  # sizes and grad mode
        value = node.meta.get("val")
        outputs = list(value) if isinstance(value, list | tuple) else [value]
        found = [self._visit_output(node, output) for output in outputs]
        if cast(Any, node.target)._schema.is_mutable:
            self._written(node, found[0])
        return found if isinstance(value, list | tuple) else found[0]

    def _visit_output(self, node: Node, value: Any) -> Layout:
        if not isinstance(value, Tensor):
            return FREE
        inputs = [self.layout(argument) for argument in node.all_input_nodes if _is_tensor(argument)]
        known = [layout for layout in inputs if isinstance(layout, SampleAxis)]
        if not known:
            lost = next((layout for layout in inputs if isinstance(layout, Lost)), None)
            return lost if lost is not None else self._fresh(node, value)
        if {layout.num for layout in known} != {known[0].num}:
            self._refuse(node, known)
        op = cast(Any, node.target).overloadpacket.__name__
        if op in _CREATIONS:
            return self._fresh(node, value)
        axis = self._follow(op, node, value, known[0])
        if isinstance(axis, SampleAxis) and axis.axis >= value.ndim:
            raise AssertionError(f"sample axis {axis.axis} of {describe(node)} with {value.ndim} axes")
        return axis

    def _written(self, node: Node, result: Layout) -> None:
        """An operator writes in place: what it wrote to, and every view of it, now holds samples."""
        target: Any = node.args[0] if node.args else None
        if isinstance(result, Free) or not isinstance(target, Node):
            return
        while target is not None:
            if isinstance(self.layout(target), Free):
                self.layouts[target] = Lost(node, "samples are written into a tensor that has no axis for them")
            target = target.args[0] if target.op == "call_function" and _is_view(target) else None

    def _follow(self, op: str, node: Node, value: Tensor, known: SampleAxis) -> Layout:
        first = node.args[0] if node.args else None
        layout = self.layout(first)
        if op in _RESHAPES and isinstance(layout, SampleAxis):
            return _reshaped(layout, shape_of(_value(first)), shape_of(value)) or Lost(
                node, "a view cuts through samples"
            )
        if op in _ROW_WISE and isinstance(layout, SampleAxis):
            axes = _axes(node, _ROW_WISE[op], value.ndim)
            if op in ("sort", "argsort", "topk") and axes is None:
                axes = [value.ndim - 1]
            if op in ("pad", "constant_pad_nd"):
                axes = _padded(node, value.ndim)
            mixes = axes is not None and layout.axis in axes
            keeps = layout.axis < value.ndim and shape_of(value)[layout.axis] == shape_of(_value(first))[layout.axis]
            return layout if keeps and not mixes else Lost(node, f"{op} works across samples")
        if op in _PERMUTATIONS and isinstance(layout, SampleAxis):
            return layout.at(_permuted(op, node, _value(first).ndim).index(layout.axis))
        if op in _EXPANSIONS and isinstance(layout, SampleAxis):
            return layout.at(layout.axis + value.ndim - _value(first).ndim)
        if op in _REDUCTIONS and isinstance(layout, SampleAxis):
            return self._reduced(node, value, layout)
        if op in _ON_FIRST_AXIS:
            same = isinstance(layout, SampleAxis) and layout.axis == 0 and value.ndim == _value(first).ndim
            return layout if same else Lost(node, f"{op} with samples that are not on the first axis")
        if op in _LOSSES:
            return (
                layout
                if isinstance(layout, SampleAxis) and 0 < value.ndim > layout.axis
                else Lost(node, "a loss over all samples")
            )
        if op in _SPLITS:
            return self._along(node, layout, _argument(node, 2, "dim", 0))
        handler = getattr(self, f"_op_{op}", None)
        if handler is not None:
            return cast(Layout, handler(node, value, layout))
        if op in _SCATTERS:
            return self._along(node, layout, _argument(node, 1, "dim", 0))
        if op.startswith(("scaled_dot_product", "_scaled_dot_product")):
            return (
                layout
                if isinstance(layout, SampleAxis) and layout.axis < value.ndim - 2
                else Lost(node, "attention across samples")
            )
        if is_pointwise(node.target) or op in _ROW_WISE:
            return self._pointwise(node, value)
        return Lost(node, f"{op} is not known to keep samples apart")

    def _fresh(self, node: Node, value: Tensor) -> Layout:
        """A value that no sample enters may still have rows for them: ``x.new_zeros(batch)``, ``token.expand(batch, 1, d)``."""
        symbols = {symbol for num in self.sources for symbol in num.free_symbols}
        sizes = shape_of(value)
        axes = [axis for axis, size in enumerate(sizes) if size.free_symbols & symbols]
        if not axes:
            return FREE
        if len(axes) == 1 and sizes[axes[0]] in self.sources:
            num = sizes[axes[0]]
            return SampleAxis(axes[0], num, self.sources[num], is_iota=_counts_up(node))
        return Lost(node, "rows in an order that is not known")

    def _pointwise(self, node: Node, value: Tensor) -> Layout:
        found = {
            layout.at(layout.axis + value.ndim - _value(argument).ndim)
            for argument in node.all_input_nodes
            if isinstance(layout := self.layout(argument), SampleAxis)
        }
        return found.pop() if len(found) == 1 else Lost(node, "samples meet on different axes")

    def _reduced(self, node: Node, value: Tensor, layout: SampleAxis) -> Layout:
        before = _value(node.args[0]).ndim
        op = cast(Any, node.target).overloadpacket.__name__
        axes = _axes(node, 2 if op in ("linalg_vector_norm", "norm") else 1, before)
        if axes is None or layout.axis in axes:
            return Lost(node, "a reduction over the samples")
        return layout.at(layout.axis - (sum(axis < layout.axis for axis in axes) if value.ndim < before else 0))

    def _along(self, node: Node, layout: Layout, dim: Any) -> Layout:
        """Operators that cut or write along one axis and leave the others alone."""
        if not isinstance(layout, SampleAxis):
            return Lost(node, "samples enter only a part")
        dim = cast(int, dim) % _value(node.args[0]).ndim
        return layout if dim != layout.axis else Lost(node, "samples are cut apart")

    def _op_slice(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        if isinstance(layout, SampleAxis) and shape_of(value) == shape_of(_value(node.args[0])):
            return layout
        return self._along(node, layout, _argument(node, 1, "dim", 0))

    _op_narrow = _op_slice

    def _op_select(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        kept = self._along(node, layout, node.args[1])
        if not isinstance(kept, SampleAxis):
            return kept
        dim = cast(int, node.args[1]) % _value(node.args[0]).ndim
        return kept.at(kept.axis - (dim < kept.axis))

    def _op_unbind(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        kept = self._along(node, layout, _argument(node, 1, "dim", 0))
        if not isinstance(kept, SampleAxis):
            return kept
        dim = cast(int, _argument(node, 1, "dim", 0)) % _value(node.args[0]).ndim
        return kept.at(kept.axis - (dim < kept.axis))

    def _op_cat(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        dim = cast(int, _argument(node, 1, "dim", 0)) % value.ndim
        layouts = [self.layout(part) for part in cast(Sequence[Any], node.args[0])]
        found = {part.at(part.axis) for part in layouts if isinstance(part, SampleAxis)}
        if len(found) == 1 and next(iter(found)).axis != dim:
            return found.pop()
        return Lost(node, "samples are joined end to end")

    _op_concat = _op_cat

    def _op_stack(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        dim = cast(int, _argument(node, 1, "dim", 0)) % value.ndim
        layouts = [self.layout(part) for part in cast(Sequence[Any], node.args[0])]
        found = {part.at(part.axis) for part in layouts if isinstance(part, SampleAxis)}
        if len(found) != 1:
            return Lost(node, "samples meet on different axes")
        part = found.pop()
        return part.at(part.axis + (dim <= part.axis))

    def _op_repeat(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        if not isinstance(layout, SampleAxis):
            return Lost(node, "samples enter only a part")
        shift = value.ndim - _value(node.args[0]).ndim
        times = cast(Sequence[Any], node.args[1])[layout.axis + shift]
        return layout.at(layout.axis + shift) if times == 1 else Lost(node, "samples are repeated")

    def _op_repeat_interleave(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        dim = _argument(node, 2, "dim", None)
        if not isinstance(layout, SampleAxis) or dim is None:
            return Lost(node, "samples are repeated")
        if cast(int, dim) % value.ndim != layout.axis:
            return layout
        if isinstance(node.args[1], int):
            return replace(layout, inner=layout.inner * node.args[1], is_iota=False)
        return Lost(node, "samples are repeated")

    def _op_copy_(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        source = self.layout(node.args[1])
        return source if isinstance(source, Lost) else self._pointwise(node, value)

    def _op_linear(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        if isinstance(layout, SampleAxis) and layout.axis < value.ndim - 1:
            return layout
        return Lost(node, "a product over the samples")

    def _op_matmul(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        return self._product(node, value, node.args[0], node.args[1])

    _op_mm = _op_bmm = _op_matmul

    def _op_addmm(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        return self._product(node, value, node.args[1], node.args[2])

    _op_baddbmm = _op_addmm

    def _product(self, node: Node, value: Tensor, left: Any, right: Any) -> Layout:
        found = set()
        for operand, contracted in ((left, -1), (right, -2)):
            layout, ndim = self.layout(operand), _value(operand).ndim
            if not isinstance(layout, SampleAxis):
                continue
            if ndim == 1 or layout.axis == ndim + contracted or value.ndim < 2:
                return Lost(node, "a product over the samples")
            found.add(layout.at(layout.axis + value.ndim - ndim))
        return found.pop() if len(found) == 1 else Lost(node, "samples meet on different axes")

    def _op_einsum(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        equation = cast(str, node.args[0]).replace(" ", "")
        if "." in equation or "->" not in equation:
            return Lost(node, "an einsum whose equation is not explicit")
        sides, output = equation.split("->")
        found = set()
        for letters, operand in zip(sides.split(","), cast(Sequence[Any], node.args[1]), strict=True):
            axis = self.layout(operand)
            if isinstance(axis, SampleAxis):
                if letters[axis.axis] not in output:
                    return Lost(node, "a product over the samples")
                found.add(axis.at(output.index(letters[axis.axis])))
        return found.pop() if len(found) == 1 else Lost(node, "samples meet on different axes")

    def _op_embedding(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        indices = self.layout(node.args[1])
        if isinstance(indices, SampleAxis) and not isinstance(layout, SampleAxis):
            return indices.at(indices.axis)
        return Lost(node, "a table that differs from sample to sample")

    def _op_index_select(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        dim = cast(int, node.args[1]) % value.ndim
        indices = self.layout(node.args[2])
        if isinstance(layout, Free) and isinstance(indices, SampleAxis):
            return indices.at(dim)
        if isinstance(indices, Free) and isinstance(layout, SampleAxis) and dim != layout.axis:
            return layout
        return Lost(node, "samples are reordered")

    def _op_gather(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        dim = cast(int, node.args[1]) % value.ndim
        indices = self.layout(node.args[2])
        axis = layout if isinstance(layout, SampleAxis) else indices
        if isinstance(axis, SampleAxis) and axis.axis != dim and isinstance(indices, SampleAxis):
            return axis.at(axis.axis)
        return Lost(node, "samples are reordered")

    _op_take_along_dim = _op_gather

    def _op_index(self, node: Node, value: Tensor, layout: Layout) -> Layout:
        """``x[:, rows]``, ``x[arange(batch), last]``, ``table[ids]``."""
        indices = list(cast(Sequence[Any], node.args[1]))
        given = [position for position, index in enumerate(indices) if index is not None]
        if any(_value(indices[position]).dtype is torch.bool for position in given):
            return Lost(node, "samples are selected by a mask")
        adjacent = given == list(range(given[0], given[-1] + 1))
        block = max(_value(indices[position]).ndim for position in given)
        start = given[0] if adjacent else 0
        rows = {
            axis.at(start + axis.axis + block - _value(indices[position]).ndim)
            for position in given
            if isinstance(axis := self.layout(indices[position]), SampleAxis)
        }
        if isinstance(layout, SampleAxis):
            if layout.axis in given:
                own = self.layout(indices[layout.axis])
                follows = isinstance(own, SampleAxis) and own.is_iota and layout.is_plain
                return rows.pop() if follows and len(rows) == 1 else Lost(node, "samples are reordered")
            if rows:
                return Lost(node, "samples meet on different axes")
            before = sum(position < layout.axis for position in given)
            shifted = layout.axis - before + (block if start <= layout.axis - before or not adjacent else 0)
            return layout.at(shifted)
        return rows.pop() if len(rows) == 1 else Lost(node, "samples are reordered")

    def _refuse(self, node: Node, known: Sequence[SampleAxis]) -> None:
        names = sorted({self.graph.inputs[layout.source[0]].name for layout in known})
        option = {name.rpartition(".")[2]: None for name in names[1:]}
        raise SampleAxisError(
            f"{describe(node)} joins values whose samples are counted by different inputs: {', '.join(names)}. Say which input "
            f"holds samples and on which axis, for example options={{'sample_axis': {option}}} for inputs without samples"
        )


def is_pointwise(target: Any) -> bool:
    """Whether an operator works element by element, with broadcasting; in-place forms included."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if (
        torch.Tag.pointwise in target.tags or target.overloadpacket is torch.ops.aten.where
    ):  # not all of its forms are tagged
        return True
    name = target.overloadpacket.__name__
    if name.startswith("__"):  # what ``a & b`` becomes
        return name.strip("_").removeprefix("i") in ("and", "or", "xor", "lshift", "rshift")
    if not name.endswith("_") or not hasattr(torch.ops.aten, name[:-1]):
        return False
    functional = getattr(torch.ops.aten, name[:-1])
    overload = target._overloadname
    return overload in functional.overloads() and torch.Tag.pointwise in getattr(functional, overload).tags


def _is_view(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _counts_up(node: Node) -> bool:
    """Whether a node gives 0, 1, 2, ..."""
    op, args = node.target, cast(Any, node.args)
    return op is torch.ops.aten.arange.default or (
        (op is torch.ops.aten.arange.start and args[0] == 0)
        or (op is torch.ops.aten.arange.start_step and args[0] == 0 and (len(args) < 3 or args[2] == 1))
    )


def _reshaped(layout: SampleAxis, before: list[Size], after: list[Size]) -> SampleAxis | None:
    """Row-major views: find the axis that holds the whole block of samples."""
    step = layout.inner * sympy.prod(before[layout.axis + 1 :])  # elements of one sample's block
    block = step * layout.num
    below = sympy.S.One
    for axis in reversed(range(len(after))):
        inner = _quotient(step, below)
        outer = _quotient(below * after[axis], block)
        if inner is not None and outer is not None:
            return SampleAxis(axis, layout.num, layout.source, outer, inner, layout.is_iota and inner == 1 == outer)
        below = below * after[axis]
    return None


def _quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` if it is an integer for all sizes."""
    ratio = sympy.cancel(a / b)
    return ratio if ratio.as_numer_denom()[1] == 1 else None


def _permuted(op: str, node: Node, ndim: int) -> list[int]:
    """For each output axis, the input axis that it shows."""
    order = list(range(ndim))
    if op == "permute":
        return [cast(int, axis) % ndim for axis in cast(Sequence[Any], node.args[1])]
    if op in ("t", "numpy_T"):
        return order[::-1]
    if op in ("mT", "adjoint"):
        return [*order[:-2], *order[:-3:-1]]
    first, second = node.args[1], node.args[2]
    if op in ("movedim", "moveaxis"):
        return _moved(order, first, second)
    a, b = cast(int, first) % ndim, cast(int, second) % ndim
    order[a], order[b] = order[b], order[a]
    return order


def _moved(order: list[int], source: Any, destination: Any) -> list[int]:
    sources = [source] if isinstance(source, int) else list(source)
    destinations = [destination] if isinstance(destination, int) else list(destination)
    ndim = len(order)
    rest = [axis for axis in order if axis not in [s % ndim for s in sources]]
    for target, axis in sorted((d % ndim, s % ndim) for s, d in zip(sources, destinations, strict=True)):
        rest.insert(target, axis)
    return rest


def _padded(node: Node, ndim: int) -> list[int]:
    """The axes that a padding changes."""
    amounts = cast(Sequence[Any], node.args[1])
    return [
        ndim - 1 - pair for pair in range(len(amounts) // 2) if amounts[2 * pair] != 0 or amounts[2 * pair + 1] != 0
    ]


def _axes(node: Node, position: int | None, ndim: int) -> list[int] | None:
    """The axes that an argument names; ``None`` if it names none (all axes, or not an axis argument)."""
    if position is None:
        return None
    given = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if given is None or (isinstance(given, Sequence) and not given):
        return None
    if isinstance(given, bool) or not isinstance(given, int | Sequence):
        return None
    return [cast(int, axis) % ndim for axis in (given if isinstance(given, Sequence) else [given])]


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _value(node: Any) -> Tensor:
    return cast(Tensor, node.meta["val"])


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or isinstance(value, list | tuple)
