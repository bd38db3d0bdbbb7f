"""From Dynamo's graph to the one representation that passes work on: ATen before autograd, inputs named, samples marked.

`lower` retraces Dynamo's graph with ``make_fx(pre_dispatch=True)``: about a hundred ATen operators with schemas, where
``aten.linear`` or ``aten.layer_norm`` still stand as single nodes and the graph is still differentiable. Three things that
Dynamo leaves implicit are made explicit on the way, so that no pass and no compiler has to know about them:

* autocast: the casts are nodes, the ``with torch.autocast(...)`` regions are gone;
* activation checkpointing: the body stands inline, its nodes tagged for the partitioner to recompute;
* which inputs hold samples: `mark_samples` marks one axis of each input as dynamic before Dynamo looks, and `sample_axis`
  finds the mark again. The symbol that Dynamo makes of it follows the samples through the graph.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from graphopt import _compat
from graphopt.annotations import Key
from graphopt.errors import GraphoptError, OptionError, UnsupportedError
from graphopt.inspect.location import describe, plain_name
from graphopt.recurrent import LOWERED, lower_recurrent, opaque_layers, packed_error
from graphopt.runtime.streaming.slots import is_husk

if TYPE_CHECKING:
    from graphopt.regions import MicroBatches

SampleAxisOption = int | None | Mapping[str, int | None]

_BETWEEN_GRAPHS = "Decorate the function that calls it with torch.compiler.disable, so that it runs between two graphs"

_sample_axes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> axis that counts samples, or None
_checkpoint_ids = itertools.count(1)


class InputKind(Enum):
    """What an input of a captured graph is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    SAMPLES = "samples"
    BETWEEN = "between"  # computed outside of any graph: nobody knows where its samples are
    CONSTANT = "constant"  # a tensor without samples: a table, a mask that all samples share
    SIZE = "size"  # a SymInt
    COMPANION = "companion"  # added by a pass, bound by the runtime


@dataclass(frozen=True)
class Input:
    """One placeholder of a captured graph.

    Attributes:
        kind: what it is.
        name: the parameter's qualified name, or the argument's name.
        sample_axis: the axis that counts samples, for `InputKind.SAMPLES`.
        requires_grad: whether gradients flow to it.
        companion_of: for a companion, the position of its parameter among the inputs.
        annotation: for a companion, what its gradient is.
        num_samples: for a companion, how many samples enter at each call, as an expression in the sizes of the inputs.
    """

    kind: InputKind
    name: str
    sample_axis: int | None = None
    requires_grad: bool = False
    companion_of: int | None = None
    annotation: Key[Any] | None = None
    num_samples: sympy.Expr = sympy.S.One


@dataclass
class CapturedGraph:
    """A lowered graph together with what its inputs are.

    Attributes:
        graph_module: ATen operators before autograd; ``node.meta["val"]`` holds fake values.
        inputs: one for each placeholder, in order.
        fake_inputs: the fake tensors and symbols of the inputs, in order.
        fake_mode: the mode they live in.
        grad_enabled: whether the graph is entered with gradients enabled.
        output_sample_axes: the axis of each output that counts samples, or ``None``, as far as a pass has found out; graphs
            behind a graph break read it off the tensors.
        micro_batches: how the regions of a graph that is streamed cut the batch, if they do.
    """

    graph_module: GraphModule
    inputs: list[Input]
    fake_inputs: list[Any]
    fake_mode: _compat.FakeTensorMode
    grad_enabled: bool = True
    output_sample_axes: tuple[int | None, ...] | None = None
    micro_batches: MicroBatches | None = None

    @property
    def placeholders(self) -> list[Node]:
        """The graph's placeholders, in the order of ``inputs``."""
        return list(self.graph_module.graph.find_nodes(op="placeholder"))

    @property
    def output_nodes(self) -> list[Any]:
        """What the graph returns: nodes, or constants."""
        (output,) = self.graph_module.graph.find_nodes(op="output")
        return pytree.tree_leaves(output.args[0])

    def add_companion(
        self, position: int, key: Key[Any], name: str, value: Tensor, num_samples: sympy.Expr = sympy.S.One
    ) -> Node:
        """Add an input, behind all others, that the runtime binds.

        Args:
            position: of the parameter that it accompanies, among the inputs.
            key: what it is, or what its gradient is.
            name: of the placeholder.
            value: a fake one that looks like it; the input requires a gradient.
            num_samples: as in `Input`.
        """
        with self.graph_module.graph.inserting_after(self.placeholders[-1]):
            node = self.graph_module.graph.placeholder(name)
        node.meta["val"] = value
        with self.fake_mode, torch.no_grad():
            self.fake_inputs.append(value.detach().requires_grad_())
        self.inputs.append(
            Input(
                InputKind.COMPANION,
                f"{self.inputs[position].name}.{key.name}",
                requires_grad=True,
                companion_of=position,
                annotation=key,
                num_samples=num_samples,
            )
        )
        return node

    def copy(self) -> CapturedGraph:
        """A graph that a pass may change; nodes are new, fake values are shared."""
        graph_module = GraphModule(self.graph_module, copy.deepcopy(self.graph_module.graph))
        graph_module.meta = dict(self.graph_module.meta)
        return replace(self, graph_module=graph_module, inputs=list(self.inputs), fake_inputs=list(self.fake_inputs))

    def __repr__(self) -> str:
        kinds = {kind.value: sum(i.kind is kind for i in self.inputs) for kind in InputKind}
        return f"CapturedGraph({len(self.graph_module.graph.nodes)} nodes, inputs={kinds})"


@dataclass
class NamedTensors:
    """Names of the parameters and buffers of a model that is known; empty for ``torch.compile(backend="graphopt")``."""

    names: dict[int, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()  # what forward calls its positional arguments

    def name_of(self, source: str) -> str:
        """The name that the user knows an input by, given Dynamo's for it."""
        name = plain_name(source)
        kind, _, rest = name.partition(".")
        number, _, inner = rest.partition(".")
        if kind == "args" and number.isdigit() and int(number) < len(self.arguments):
            return ".".join(filter(None, [self.arguments[int(number)], inner]))
        return rest if kind == "kwargs" and rest else name

    @classmethod
    def of(cls, model: nn.Module) -> NamedTensors:
        """Names by identity; a tied parameter has its first name."""
        named = itertools.chain(model.named_parameters(), model.named_buffers())
        takes = inspect.signature(model.forward).parameters.values()
        arguments = tuple(p.name for p in takes if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
        return cls({id(tensor): name for name, tensor in named}, arguments)


def mark_samples(forward: Callable[..., Any], args: Any, kwargs: Any, option: SampleAxisOption = 0) -> None:
    """Remember which axis of each input counts samples, and ask Dynamo to keep it symbolic.

    Args:
        forward: the model's forward; its signature names the arguments.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        option: the axis, or a mapping from argument name to axis or ``None`` (no samples); names not given use axis 0.

    Raises:
        OptionError: an axis that a tensor does not have, or a name that ``forward`` does not take.
        UnsupportedError: a packed sequence.
    """
    if any(isinstance(value, PackedSequence) for value in (*args, *kwargs.values())):
        raise packed_error("the model was called with a packed sequence")
    if isinstance(option, Mapping):
        bound = inspect.signature(forward).bind(*args, **kwargs).arguments
        named = {**{k: v for k, v in bound.items() if k != "kwargs"}, **bound.get("kwargs", {})}
        if unknown := sorted(set(option) - set(inspect.signature(forward).parameters) - set(named)):
            raise OptionError(f"sample_axis names {unknown}, which forward does not take; it takes {sorted(named)}")
        for name, value in named.items():
            for tensor in pytree.tree_leaves(value):
                _mark(tensor, option.get(name, 0), name)
    else:
        for tensor in pytree.tree_leaves((args, kwargs)):
            _mark(tensor, option, "an input")


def count_samples(args: Any, kwargs: Any) -> int | None:
    """How many samples the marked inputs of a call have; ``None`` if they disagree."""
    marked = [
        value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value in _sample_axes
    ]
    sizes = {value.shape[axis] for value in marked if (axis := _sample_axes[value]) is not None}
    shared = sizes - {1} or sizes  # what has one row may belong to all samples
    return shared.pop() if len(shared) == 1 else None


def mark_passed_on(args: Any, kwargs: Any, axis: int, num_samples: int | None) -> None:
    """Mark what one part of a model hands to the next, where FSDP's hooks or uncaptured operators have made new tensors.

    Such a tensor holds samples if it has as many rows on ``axis`` as the model was given samples, and none if it has one row;
    of others, and of vectors without gradient (positions), nobody knows.
    """
    for value in pytree.tree_leaves((args, kwargs)):
        if not isinstance(value, Tensor) or value in _sample_axes or not -value.ndim <= axis < value.ndim:
            continue
        if value.shape[axis] == num_samples and (value.requires_grad or value.ndim > 1):
            _mark(value, axis, "an input")
        elif value.shape[axis] == 1:
            _mark(value, None, "an input")


def set_sample_axis(tensor: Tensor, axis: int | None) -> None:
    """Remember the axis without asking Dynamo for a symbol: what the runtime does with a graph's outputs."""
    _sample_axes[tensor] = axis


@contextmanager
def capture_settings(has_passes: bool = True) -> Iterator[None]:
    """How Dynamo traces what graphopt captures; it wants to be told the same at every call.

    Hooks that are registered later must be seen: by default Dynamo does not guard on them. Passes need whole graphs: by default
    Dynamo splits those of a DistributedDataParallel at the edges of its buckets, and breaks off at recurrent layers and where
    ``torch.nn.Transformer`` reads a mask. Without passes recurrent layers stay outside, where torch runs them fastest.
    """
    settings = {"skip_nnmodule_hook_guards": False, "optimize_ddp": False, "allow_rnn": has_passes}
    with torch._dynamo.config.patch(settings), opaque_layers(), _compat.unread_masks():
        yield


def needs_restart(inputs: Sequence[Input], example_inputs: Sequence[Any]) -> bool:
    """Mark inputs that Dynamo saw before they were marked; true if it has to look again.

    This is how ``torch.compile(model, backend="graphopt")``, where nobody sees the inputs before Dynamo does, and the graphs
    behind a graph break find their samples. The caller raises `_compat.restart_capture`.
    """
    again = False
    for described, value in zip(inputs, example_inputs, strict=True):
        axis = described.sample_axis
        if axis is None or not isinstance(value, Tensor) or value.shape[axis] < 2:
            continue
        if axis not in getattr(value, "_dynamo_weak_dynamic_indices", ()):
            _compat.maybe_mark_dynamic(value, axis)
            again = True
    return again


def describe_inputs(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    named: NamedTensors,
    option: SampleAxisOption = 0,
    between: int | None = None,
) -> list[Input]:
    """Say what each placeholder of Dynamo's graph is; reads the real tensors, the fakes know nothing of identity.

    Args:
        graph_module: Dynamo's graph.
        example_inputs: its inputs.
        named: the model's tensors, if the model is known.
        option: where the model's arguments count samples.
        between: where tensors do that were computed between two graphs; ``None`` if that is not known. Of those without
            gradient only floating-point tensors do, and among others with samples only those with as many rows.
    """
    described: list[Input] = []
    for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        source = _source(node)
        name = named.names.get(id(value)) or named.name_of(source.name if source is not None else node.name)
        if not isinstance(value, Tensor):
            described.append(Input(InputKind.SIZE, name))
        elif isinstance(value, nn.Parameter):
            described.append(Input(InputKind.PARAMETER, name, requires_grad=value.requires_grad))
        elif id(value) in named.names or (value not in _sample_axes and not _is_argument(source)):
            described.append(Input(InputKind.BUFFER, name, requires_grad=value.requires_grad))
        elif _marked_alias(value) in _sample_axes or not _is_between(value, named):
            axis = _sample_axes[value] if value in _sample_axes else _default_axis(value, name, option)
            kind = InputKind.CONSTANT if axis is None else InputKind.SAMPLES
            described.append(Input(kind, name, sample_axis=axis, requires_grad=value.requires_grad))
        elif not value.requires_grad and not value.is_floating_point():  # indices and masks
            described.append(Input(InputKind.CONSTANT, name))
        else:
            described.append(Input(InputKind.BETWEEN, name, requires_grad=value.requires_grad))
    return described if between is None else _with_samples_between(described, example_inputs, between)


def _with_samples_between(described: Sequence[Input], values: Sequence[Any], axis: int) -> list[Input]:
    """What was computed between two graphs, with its samples where the user says that they are."""
    between = [item.kind is InputKind.BETWEEN for item in described]
    for item, value, is_between in zip(described, values, between, strict=True):
        if is_between and item.requires_grad and not -value.ndim <= axis < value.ndim:
            raise OptionError(
                f"sample_axis_between_graphs={axis}, but {item.name}, which was computed between two graphs, has shape "
                f"{tuple(value.shape)}. Give an axis that all such tensors have, or remove the graph break"
            )
    known = {
        value.shape[axis if is_between else item.sample_axis]
        for item, value, is_between in zip(described, values, between, strict=True)
        if item.sample_axis is not None or (is_between and item.requires_grad)
    }
    return [
        replace(item, kind=InputKind.SAMPLES, sample_axis=axis % value.ndim)
        if is_between
        and (item.requires_grad or (-value.ndim <= axis < value.ndim and (not known or value.shape[axis] in known)))
        else item
        for item, value, is_between in zip(described, values, between, strict=True)
    ]


def _is_between(value: Tensor, named: NamedTensors) -> bool:
    """Whether a tensor that nobody marked was computed between two graphs.

    The arguments of a known model are marked, and so are what its graphs return. Of another (``torch.compile(backend=...)``)
    nothing is, but its arguments have no history.
    """
    return value.ndim > 0 and (bool(named.names) or value.grad_fn is not None)


def _marked_alias(value: Tensor) -> Tensor:
    """The marked tensor that a tensor shows unchanged, as what ``nn.Module``'s backward hooks pass on does; else itself."""
    if value in _sample_axes or not value.numel():
        return value
    for marked in list(_sample_axes.keys()):
        same = marked.shape == value.shape and marked.stride() == value.stride() and marked.device == value.device
        if same and marked.dtype == value.dtype and marked.data_ptr() == value.data_ptr():
            _sample_axes[value] = _sample_axes[marked]
            return cast(Tensor, marked)
    return value


def lower(graph_module: GraphModule, inputs: list[Input]) -> CapturedGraph:
    """Retrace Dynamo's graph into ATen before autograd; Dynamo's own graph is not touched.

    Args:
        graph_module: what Dynamo handed to the backend.
        inputs: from `describe_inputs`.

    Returns:
        The graph that passes work on.

    Raises:
        UnsupportedError: the graph holds something that has no form in ATen before autograd; the text says what and where.
    """
    fakes = [node.meta["example_value"] for node in graph_module.graph.find_nodes(op="placeholder")]
    fake_mode = next((f.fake_mode for f in fakes if isinstance(f, _compat.FakeTensor)), None)
    fake_mode = fake_mode or _compat.FakeTensorMode()
    fakes = [
        _with_memory(fake, fake_mode) if described.kind is InputKind.PARAMETER else fake
        for described, fake in zip(inputs, fakes, strict=True)
    ]
    _join_sample_sizes(inputs, fakes)
    interpreter = _Lowering(graph_module)
    with fake_mode, torch.fx.traceback.preserve_node_meta(), _fresh_autocast_cache():
        try:
            lowered = _compat.make_fx(interpreter.run, pre_dispatch=True)(*fakes)
        except Exception as error:
            if isinstance(error, GraphoptError):
                raise
            why = str(error).splitlines()[0] if str(error) else "no text"
            raise UnsupportedError(
                f"{interpreter.place} has no form that passes can read ({type(error).__name__}: {why}). {_BETWEEN_GRAPHS}"
            ) from error
    for node, original in zip(
        lowered.graph.find_nodes(op="placeholder"), graph_module.graph.find_nodes(op="placeholder"), strict=True
    ):
        node.meta.pop("_dynamo_source", None)
        node.name = original.name.removeprefix("l_").rstrip("_") if original.name.startswith("l_") else original.name
    _check_constants(lowered)
    _make_autocast_explicit(lowered.graph)
    lowered.recompile()
    return CapturedGraph(lowered, list(inputs), list(fakes), fake_mode, torch.is_grad_enabled())


def _with_memory(fake: Tensor, fake_mode: _compat.FakeTensorMode) -> Tensor:
    """A parameter that is streamed stands in the model as one number, expanded; its graph gets it whole."""
    if not is_husk(fake):
        return fake
    with fake_mode:
        return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device).requires_grad_(fake.requires_grad)


def _check_constants(lowered: GraphModule) -> None:
    """A value that was traced by something else than `make_fx` (a function inside a higher-order operator) became a constant."""
    for node in lowered.graph.find_nodes(op="get_attr"):
        value = getattr(lowered, node.target, None)
        if isinstance(value, _compat.FakeTensor):
            user = next(iter(node.users), node)
            raise UnsupportedError(
                f"{describe(user)} stands inside an operator of higher order (a scan, a loop, a map), whose body passes cannot "
                f"read. {_BETWEEN_GRAPHS}"
            )


class _Lowering(Interpreter):
    """Runs Dynamo's graph for `make_fx`, with autocast regions as state and checkpointed bodies inline."""

    def __init__(self, graph_module: GraphModule, meta: Mapping[str, Any] | None = None) -> None:
        super().__init__(graph_module)
        self._extra_meta = dict(meta or {})
        self.place = "the model"  # the operator that is being lowered, and the user's line

    def run_node(self, n: Node) -> Any:
        with self._set_current_node(n):
            meta = torch.fx.traceback.get_current_meta()
            meta.update(self._extra_meta)
            if state := _autocast_state():
                meta["custom"] = {**meta.get("custom", {}), "autocast": state}
            if n.op.startswith("call"):
                self.place = f"{n.name} ({_name_of(n.target)}){_where()}"
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return getattr(self, n.op)(n.target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in (_compat.enter_autocast, _compat.exit_autocast):
            with torch._C.DisableTorchFunction():  # change the state, and leave no node
                return target(*args, **kwargs)
        if target is _compat.autograd_function_apply:
            raise UnsupportedError(
                f"the model calls a torch.autograd.Function of its own{_where()}: its backward would be lost in the capture. "
                f"{_BETWEEN_GRAPHS}"
            )
        if target is _compat.tag_activation_checkpoint:
            body, *operands = args
            tags = {"recompute": _compat.CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(_checkpoint_ids)}
            return _Lowering(body, {**self._extra_meta, **tags}).run(*operands)
        if target in LOWERED and not kwargs:
            return lower_recurrent(target, args, _where())
        return super().call_function(target, args, kwargs)


def _make_autocast_explicit(graph: Graph) -> None:
    """Insert the casts that autocast applies.

    The fake values already have the dtypes that autocast gives. All its policies (lower precision, float32, widest) amount to
    casting the floating arguments to the dtype of the result; float64 is left alone.
    """
    for node in list(graph.nodes):
        state = node.meta.get("custom", {}).pop("autocast", None)
        value = node.meta.get("val")
        if state is None or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if value.device.type not in state or not _compat.autocast_kernel(node.target, value.device.type):
            continue

        def cast(argument: Node, dtype: torch.dtype = value.dtype, user: Node = node) -> Node:
            fake = argument.meta.get("val")
            if not isinstance(fake, Tensor) or not fake.is_floating_point() or fake.dtype in (dtype, torch.float64):
                return argument
            with graph.inserting_before(user):
                copied = graph.call_function(torch.ops.aten._to_copy.default, (argument,), {"dtype": dtype})
            copied.meta = {k: v for k, v in user.meta.items() if k != "val"}
            copied.meta["val"] = fake.to(dtype)
            return copied

        node.args = torch.fx.map_arg(node.args, cast)
        node.kwargs = torch.fx.map_arg(node.kwargs, cast)


def _name_of(target: Any) -> str:
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _where() -> str:
    """The user's source line of the node that is being lowered."""
    trace = torch.fx.traceback.get_current_meta().get("stack_trace")
    lines = [line.strip() for line in (trace or "").splitlines() if line.strip() and set(line.strip()) != {"^"}]
    return f" at {lines[-2]}: {lines[-1]}" if len(lines) > 1 else ""


def _autocast_state() -> tuple[str, ...] | None:
    enabled = tuple(device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device))
    return enabled or None


@contextmanager
def _fresh_autocast_cache() -> Iterator[None]:
    """Autocast remembers casts of parameters: a cast that was traced must not be found again outside the trace."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _join_sample_sizes(inputs: Sequence[Input], fakes: Sequence[Any]) -> None:
    """Let inputs with as many samples as each other have one symbol for it, guarded, also where no operator demands it."""
    sizes = [
        fake.shape[described.sample_axis]
        for described, fake in zip(inputs, fakes, strict=True)
        if described.kind is InputKind.SAMPLES and described.sample_axis is not None
    ]
    symbolic = [size for size in sizes if isinstance(size, torch.SymInt)]
    for size in symbolic[1:]:
        bool(size == symbolic[0])  # evaluating it makes it a guard


def _mark(value: Any, axis: int | None, name: str) -> None:
    if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.ndim == 0:
        return
    if axis is not None:
        axis = _checked_axis(value, axis, name)
        if value.shape[axis] > 1 and axis not in getattr(value, "_dynamo_weak_dynamic_indices", ()):
            _compat.maybe_mark_dynamic(value, axis)
    _sample_axes[value] = axis


def _default_axis(value: Tensor, name: str, option: SampleAxisOption) -> int | None:
    axis = option.get(name.rpartition(".")[2], 0) if isinstance(option, Mapping) else option
    return None if axis is None or value.ndim == 0 else _checked_axis(value, axis, name)


def _checked_axis(value: Tensor, axis: int, name: str) -> int:
    if not -value.ndim <= axis < value.ndim:
        raise OptionError(
            f"sample_axis={axis}, but {name} has shape {tuple(value.shape)}. Give the axis by argument name, "
            "for example options={'sample_axis': {'input_ids': 0, 'table': None}}"
        )
    return operator.index(axis) % value.ndim


def _source(node: Node) -> _compat.Source | None:
    return getattr(node, "_dynamo_source", None) or getattr(node.meta.get("grapharg"), "source", None)


def _is_argument(source: _compat.Source | None) -> bool:
    """Whether an input came in through a call, rather than from a module's attribute or a global."""
    if source is None:
        return True
    if _compat.is_from_module_source(source):
        return False
    base = source
    while hasattr(base, "base"):
        base = base.base
    return isinstance(base, _compat.LocalSource)
