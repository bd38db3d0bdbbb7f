"""Run one module's forward through the pass `TrueGrad`, without Dynamo and without a compiler.

The forward of ``torch.nn`` is traced once for each signature, with a symbolic number of samples, and the pass rewrites the trace:
the statistic comes from the very rules that serve compiled models. The rewritten graph then runs as ordinary Python. A signature
is everything that the trace depends on, and parameters are inputs of the trace, so equal layers share one.
"""

from __future__ import annotations

import itertools
import traceback
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import sympy
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Graph, GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from graphopt import _compat
from graphopt.capture import CapturedGraph, Input, InputKind, lower
from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.nn.direct import without_dispatcher
from graphopt.passes import TrueGrad
from graphopt.pipeline import run_passes
from graphopt.recurrent import LOWERED, lower_recurrent
from graphopt.runtime.bound_graph import BoundGraph
from graphopt.runtime.statistics import EAGER_CALL

Forward = Callable[[dict[str, Any]], Any]

_MAX_TRACES = 1024
_traces: OrderedDict[Any, list[_Trace]] = OrderedDict()  # signature -> traces, the least recently made first
_call_ids = itertools.count(1)


def run(module: nn.Module, forward: Forward, arguments: dict[str, Any], axes: Mapping[str, int | None]) -> Any:
    """Call ``forward(arguments)`` so that its backward publishes the statistics of the module's parameters.

    Args:
        module: owns the parameters and buffers.
        forward: a method of ``module``; computes its result from ``arguments``.
        arguments: by name.
        axes: by name, the axis that counts samples, ``None`` for an argument without samples.

    Returns:
        What ``forward`` returns.

    Raises:
        UnsupportedError: the forward cannot be traced, or the pass cannot serve one of the parameters.
    """
    call = _Call(module, forward, arguments, axes)
    if call.is_plain:
        return forward(arguments)
    traces = _traces.get(call.signature)
    if traces is None:
        traces = _traces[call.signature] = []
        if len(_traces) > _MAX_TRACES:
            _traces.popitem(last=False)
    trace = next((trace for trace in traces if trace.fits(call)), None)
    if trace is None:
        trace = _make(call)
        traces.append(trace)
    return trace.run(call)


class _Call:
    """One call, flat: tensors in a fixed order, and everything else in the signature."""

    def __init__(
        self, module: nn.Module, forward: Forward, arguments: dict[str, Any], axes: Mapping[str, int | None]
    ) -> None:
        self.module, self.forward, self.arguments = module, forward, arguments
        params, buffers = _owned(module)
        self.names, self.owned = [name for name, _ in params + buffers], [tensor for _, tensor in params + buffers]
        self.num_params = len(params)
        self.tensors: list[Tensor] = []
        self.axes: list[int | None] = []
        # Tensors in place of parameters, by `torch.func.functional_call`, have no statistic.
        self.is_plain = not (
            any(param.requires_grad for _, param in params)
            and all(isinstance(param, nn.Parameter) for _, param in params)
        )
        if self.is_plain:
            return
        if module._modules:
            self._refuse_hooks()
        facts: list[Any] = [(name, self._describe(value, axes.get(name))) for name, value in arguments.items()]
        sizes = self.sample_sizes()
        if 0 in sizes:  # nothing to square
            self.is_plain = True
            return
        groups = tuple(1 if size == 1 else sizes.index(size) + 2 for size in sizes)
        self.signature = (
            type(module),
            getattr(forward, "__func__", forward),
            _config(module),
            tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in self.owned),
            tuple(self.names),
            tuple(facts),
            groups,
            _autocast(),
        )

    def sample_sizes(self) -> list[int]:
        """How many samples each tensor holds that holds any."""
        return [t.shape[axis] for t, axis in zip(self.tensors, self.axes, strict=True) if axis is not None]

    def sizes(self, places: Sequence[tuple[int, int]]) -> list[int]:
        """The sizes of some axes."""
        return [self.tensors[position].shape[axis] for position, axis in places]

    def describe(self) -> list[Input]:
        """What a pass must know about the module's own tensors and about those of the call."""
        described = []
        for position, (name, tensor) in enumerate(zip(self.names, self.owned, strict=True)):
            kind = InputKind.PARAMETER if position < self.num_params else InputKind.BUFFER
            described.append(Input(kind, name, requires_grad=tensor.requires_grad))
        for position, (tensor, axis) in enumerate(zip(self.tensors, self.axes, strict=True)):
            kind = InputKind.CONSTANT if axis is None else InputKind.SAMPLES
            name = f"input_{position}"
            described.append(Input(kind, name, sample_axis=axis, requires_grad=tensor.requires_grad))
        return described

    def run_on(self, flat: Sequence[Tensor]) -> Any:
        """The forward, with other tensors in place of the call's own."""
        others = iter(flat[len(self.owned) :])
        seen: dict[int, Tensor] = {}

        def other(tensor: Tensor) -> Tensor:
            if id(tensor) not in seen:
                seen[id(tensor)] = next(others)
            return seen[id(tensor)]

        arguments = pytree.tree_map_only(Tensor, other, self.arguments)
        owned = {f"module.{name}": tensor for name, tensor in zip(self.names, flat, strict=False)}
        return functional_call(_Forward(self.module, self.forward), owned, (arguments,))

    def run_plain(self) -> Any:
        """The forward as it is."""
        return self.forward(self.arguments)

    def __repr__(self) -> str:
        return f"{type(self.module).__name__}({', '.join(self.arguments)})"

    def _refuse_hooks(self) -> None:
        for name, child in self.module.named_modules():
            hooks = (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks)
            if child is not self.module and any(hooks):
                raise UnsupportedError(
                    f"{name} in a {type(self.module).__name__} of graphopt.nn has hooks, which would run while the layer is "
                    "traced and never again. Register them on the layer itself, or use graphopt.transform(model)"
                )

    def _describe(self, value: Any, axis: int | None) -> Any:
        """What the trace depends on; tensors are collected on the way."""
        if isinstance(value, Tensor):
            return self._describe_tensor(value, axis)
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            return value
        leaves, spec = pytree.tree_flatten(value)
        return spec, tuple(
            self._describe_tensor(leaf, axis) if isinstance(leaf, Tensor) else _frozen(leaf) for leaf in leaves
        )

    def _describe_tensor(self, tensor: Tensor, axis: int | None) -> Any:
        for position, known in enumerate(self.tensors):
            if known is tensor:
                return "again", position
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided or tensor.is_nested:
            raise UnsupportedError(
                f"{self} got a {'nested ' if tensor.is_nested else ''}{type(tensor).__name__} ({tensor.layout}), and modules of "
                "graphopt.nn take plain dense tensors. graphopt.transform(model) serves the same layer of torch.nn"
            )
        self.tensors.append(tensor)
        axis = axis if axis is not None and axis < tensor.ndim else None
        self.axes.append(axis)
        shape = list(tensor.shape)
        if axis is not None:
            shape[axis] = -1
        strides = None if tensor.is_contiguous() else tensor.stride()
        return axis, tuple(shape), strides, tensor.dtype, tensor.device, tensor.requires_grad


class _Forward(nn.Module):
    """A method of a module as a module, so that `torch.func.functional_call` can exchange its tensors."""

    def __init__(self, module: nn.Module, method: Forward) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, arguments: dict[str, Any]) -> Any:
        return self.method(arguments)


@dataclass
class _Trace:
    """A rewritten forward."""

    bound: BoundGraph
    spec: pytree.TreeSpec
    leaves: list[Any]  # of the result
    places: list[tuple[int, int]]  # the numbers of samples: position among the call's tensors, axis
    guard: Callable[..., bool] | None

    def fits(self, call: _Call) -> bool:
        """Whether the trace holds for this number of samples."""
        return self.guard is None or bool(self.guard(*call.sizes(self.places)))

    def run(self, call: _Call) -> Any:
        """Run it on the call's tensors."""
        outputs = self.bound(*call.sizes(self.places), *call.owned, *call.tensors)
        if self.spec.is_leaf():
            return outputs[0]
        tensors = iter(outputs)
        leaves = [next(tensors) if leaf is _TENSOR else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


_TENSOR = object()  # stands for a tensor among the leaves of a result


def _make(call: _Call) -> _Trace:
    """Trace the forward on fake tensors and rewrite it."""
    try:
        leaves, spec, places, captured = _capture(call)
        graph, _ = run_passes(captured, [TrueGrad()])
    except GraphoptError as error:
        call.run_plain()  # a mistake in the call is torch's to report
        error.add_note(
            f"in the call of {call} of graphopt.nn{_where()}. graphopt.transform(model) sees the whole model and serves more of "
            "them; the same module of torch.nn works without the statistic"
        )
        raise
    name = repr(call)
    bound = BoundGraph(
        graph, lambda: without_dispatcher(graph.graph_module).forward, lambda: f"{EAGER_CALL}{name} {next(_call_ids)}"
    )
    return _Trace(bound, spec, leaves, places, _guard(captured, len(places)))


def _capture(call: _Call) -> tuple[list[Any], pytree.TreeSpec, list[tuple[int, int]], CapturedGraph]:
    """The forward as passes take it: `lower` is given a graph of one node that calls it."""
    fake_mode = _compat.FakeTensorMode(shape_env=_compat.ShapeEnv())
    result: dict[str, Any] = {}

    def function(*flat: Any) -> list[Tensor]:
        try:
            with _LowerRecurrent():
                leaves, result["spec"] = pytree.tree_flatten(call.run_on(flat[len(places) :]))
        except Exception as error:
            if isinstance(error, GraphoptError):
                raise
            why = str(error).splitlines()[0] if str(error) else "no text"
            raise UnsupportedError(f"{call} cannot be traced ({type(error).__name__}: {why})") from error
        result["leaves"] = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    inputs = call.describe()
    fakes = [
        fake_mode.from_tensor(tensor, symbolic_context=_compat.one_symbolic_axis(tensor.ndim, described.sample_axis))
        for tensor, described in zip([*call.owned, *call.tensors], inputs, strict=True)
    ]
    symbols = _symbols(call, fakes[len(call.owned) :])
    places = [place for _, place in symbols]
    inputs = [Input(InputKind.SIZE, str(symbol)) for symbol, _ in symbols] + inputs
    graph = Graph()
    for described, fake in zip(inputs, [*(symbol for symbol, _ in symbols), *fakes], strict=True):
        graph.placeholder(described.name.replace(".", "_")).meta["example_value"] = fake
    node = graph.call_function(function, tuple(graph.find_nodes(op="placeholder")))
    node.meta["stack_trace"] = _stack_trace()
    graph.output(node)
    with torch.autograd.graph.saved_tensors_hooks(_keep, _keep):  # activation checkpointing counts what a forward saves
        captured = lower(GraphModule(nn.Module(), graph), inputs)
    return result["leaves"], result["spec"], places, captured


def _keep(value: Any) -> Any:
    return value


class _LowerRecurrent(TorchFunctionMode):
    """Recurrent operators in the form that captured graphs hold them in; `lower` meets them only as nodes of Dynamo's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in LOWERED and not kwargs:
            return lower_recurrent(func, args, _where())
        return func(*args, **(kwargs or {}))


def _symbols(call: _Call, fakes: list[Any]) -> list[tuple[torch.SymInt, tuple[int, int]]]:
    """The numbers of samples, each with a tensor of the call and the axis of it that has this size."""
    found: dict[Any, tuple[torch.SymInt, tuple[int, int]]] = {}
    for position, (fake, axis) in enumerate(zip(fakes, call.axes, strict=True)):
        if axis is not None and isinstance(fake.shape[axis], torch.SymInt):
            found.setdefault(fake.shape[axis].node.expr, (fake.shape[axis], (position, axis)))
    return list(found.values())


def _guard(captured: CapturedGraph, num_sizes: int) -> Callable[..., bool] | None:
    """What the trace has taken for granted about the numbers of samples; ``None`` if it holds for any."""
    shape_env = captured.fake_mode.shape_env
    assert shape_env is not None
    conditions = [guard.expr for guard in shape_env.guards]
    if not conditions:
        return None
    symbols = [size.node._expr for size in captured.fake_inputs[:num_sizes]]
    return cast(Callable[..., bool], sympy.lambdify(symbols, sympy.And(*conditions), modules="math"))


def _owned(module: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Parameters and buffers, by name."""
    own = (module._parameters.items(), module._buffers.items())
    params, buffers = (module.named_parameters(), module.named_buffers()) if module._modules else own
    return [(n, tensor) for n, tensor in params if tensor is not None], [(n, t) for n, t in buffers if t is not None]


def _config(module: nn.Module) -> Any:
    """The attributes that decide what a forward does; all of them, so that changing one makes another trace."""
    own = tuple(
        (name, value if value.__hash__ is not None else _frozen(value))
        for name, value in module.__dict__.items()
        if name[0] != "_" and not isinstance(value, Tensor)
    )
    if not module._modules:
        return own
    children = tuple(
        (name, type(child), _config(child)) for name, child in module._modules.items() if child is not None
    )
    return own, children


def _frozen(value: Any) -> Any:
    """Something hashable that differs whenever ``value`` does."""
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value if value.__hash__ is not None else repr(value)


def _autocast() -> Any:
    """The state of autocast, as far as it is on."""
    if not _compat.is_any_autocast_enabled():
        return None
    return tuple((d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d))


def _frames() -> traceback.StackSummary:
    """The caller's frames, without torch's and graphopt's own."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    return traceback.StackSummary.from_list([f for f in traceback.extract_stack() if not f.filename.startswith(own)])


def _stack_trace() -> str:
    return "".join(_frames().format())


def _where() -> str:
    frames = _frames()
    return f", {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
