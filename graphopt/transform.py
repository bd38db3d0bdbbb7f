"""`transform`, `restore`, and the ``torch.compile`` backend: one road from a model to compiled, rewritten graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import itertools
import time
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.fx import GraphModule

from graphopt import _compat
from graphopt.annotations import STAGE, SUM_GRAD_SQUARED
from graphopt.capture import (
    CapturedGraph,
    Input,
    InputKind,
    NamedTensors,
    SampleAxisOption,
    capture_settings,
    count_samples,
    describe_inputs,
    lower,
    mark_passed_on,
    mark_samples,
    needs_restart,
)
from graphopt.compilation import check_compiler, compile_graph, compile_unlowered, stream_graph
from graphopt.errors import (
    GraphoptError,
    OptionError,
    StreamError,
    UncapturedCall,
    UnsupportedError,
)
from graphopt.pipeline import Coverage, Pass, Record, Status, resolve_passes, run_passes
from graphopt.regions import stages_of
from graphopt.runtime import data_parallel, fully_sharded
from graphopt.runtime.bound_graph import BoundGraph, UnboundGraph
from graphopt.runtime.streaming.options import Streaming
from graphopt.runtime.streaming.stream import Stream
from graphopt.runtime.uncaptured import records_of, refuse_uncaptured, watch_uncaptured

Model = TypeVar("Model", bound=nn.Module)

HANDLE = "_graphopt"  # where a transformed model keeps its `_Handle`
_OWN_OPTIONS = ("passes", "compiler", "disable", "sample_axis", "sample_axis_between_graphs", "fullgraph")

_numbers = itertools.count()


def default_passes() -> list[Pass]:
    """The passes that run when none are given."""
    from graphopt.passes import GradInit, LayerToLayer, TrueGrad

    return [GradInit(), TrueGrad(), LayerToLayer()]


def transform(
    model: Model,
    passes: Sequence[Pass | str] | None = None,
    *,
    compiler: str = "inductor",
    dynamic: bool | None = None,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """Compile ``model`` with graphopt's passes, in place.

    Class, ``Parameter`` objects, ``state_dict`` keys, hooks and methods stay; only calling the model now runs rewritten,
    compiled graphs. Graphs are captured at the first call, and again when a call does not fit those that exist.

    Args:
        model: any module. A model that is transformed already is transformed anew.
        passes: pass objects or names, in order; the default is ``[GradInit(), TrueGrad(), LayerToLayer()]``; ``[]`` compiles
            without rewriting. ``LayerToLayer(store=...)`` moves the model's values into a store (`stream`).
        compiler: ``"inductor"``, ``"aot_eager"`` or ``"eager"``.
        dynamic: as in ``torch.compile``. The sample axis is dynamic in any case, so a ragged last batch needs no recompile.
        options: ``sample_axis`` (int, or argument name to int or ``None``; default 0), ``sample_axis_between_graphs`` (int: where
            tensors that are computed between two graphs count samples), ``disable`` (names of passes), ``fullgraph`` (bool), and
            any setting of ``torch._inductor.config``.

    Returns:
        ``model``.

    Raises:
        OptionError: an unknown pass, compiler or option, before anything is changed.
        GraphoptError: later, from the first call, if a pass cannot serve the model; the model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"transform takes a torch.nn.Module and got {type(model).__name__}")
    setup = Setup.parse({**(options or {}), "passes": passes, "compiler": compiler})
    fully_sharded.check(model)
    restore(model)
    inner = data_parallel.unwrap(model)
    in_units = fully_sharded.is_sharded(inner)
    if setup.streaming is not None and (in_units or inner is not model):
        raise OptionError(
            f"a model in {'fully_shard' if in_units else type(model).__name__} cannot be streamed from a store as well: each "
            "rank would need a store of its own. Use LayerToLayer() without store, or one process"
        )
    _Handle(setup, dynamic).attach(inner, in_units=in_units)
    return model


def restore(model: Model) -> Model:
    """Undo `transform`: the model runs as it was written. Parameters keep their values; does nothing if not transformed."""
    inner = data_parallel.unwrap(model)
    handle = inner.__dict__.pop(HANDLE, None)
    if handle is not None:
        handle.detach(inner)
    return model


def records(model: nn.Module) -> list[Record]:
    """What was captured and rewritten so far, one record for each graph, in the order of compilation.

    Works for transformed models and for ``torch.compile(model, backend="graphopt")``.
    """
    handle = data_parallel.unwrap(model).__dict__.get(HANDLE)
    if isinstance(handle, _Handle):
        return list(handle.records)
    found: dict[int, Record] = {}
    for parameter in model.parameters():
        for record in records_of.get(parameter, ()):
            found.setdefault(id(record), record)
    return list(found.values())


def stream(model: nn.Module) -> Stream:
    """What ``LayerToLayer(store=...)`` keeps for a transformed model: its store, its finished steps, how to resume.

    Raises:
        StreamError: the model's layers are not streamed.
    """
    handle = data_parallel.unwrap(model).__dict__.get(HANDLE)
    if not isinstance(handle, _Handle) or handle.stream is None:
        raise StreamError(
            f"the layers of this {type(model).__name__} are not streamed: graphopt.transform(model, [LayerToLayer(store='cpu')])"
        )
    return handle.stream


def is_transformed(model: nn.Module) -> bool:
    """Whether `transform` serves the model."""
    return isinstance(data_parallel.unwrap(model).__dict__.get(HANDLE), _Handle)


def handle_of(model: nn.Module) -> _Handle | None:
    """What `transform` has put into the model, if it has."""
    handle = data_parallel.unwrap(model).__dict__.get(HANDLE)
    return handle if isinstance(handle, _Handle) else None


def setup_of(model: nn.Module) -> Setup:
    """The options of a transformed model, or the default ones."""
    handle = data_parallel.unwrap(model).__dict__.get(HANDLE)
    return handle.setup if isinstance(handle, _Handle) else Setup.parse({})


def backend(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The ``torch.compile`` backend ``"graphopt"``, registered by entry point.

    Args:
        graph_module: Dynamo's graph.
        example_inputs: its inputs.
        mode: one of Inductor's modes, such as ``"max-autotune"``.
        options: as in `transform`, and ``passes`` and ``compiler``.

    Returns:
        The callable that runs the rewritten graph.
    """
    settings = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    return Setup.parse({**settings, **(options or {})}).compile(graph_module, example_inputs)


@dataclass(frozen=True)
class Setup:
    """Checked options: everything that decides how a graph is compiled."""

    passes: tuple[Pass, ...]
    compiler: str = "inductor"
    sample_axis: SampleAxisOption = 0
    fullgraph: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    between: int | None = None  # axis of the samples in what is computed between two graphs

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Setup:
        """Split graphopt's options from Inductor's, and check both."""
        compiler = options.get("compiler") or "inductor"
        check_compiler(compiler)
        passes = options.get("passes")
        resolved = resolve_passes(default_passes() if passes is None else passes, options.get("disable", ()))
        config = {key.replace("-", "_"): value for key, value in options.items() if key not in _OWN_OPTIONS}
        known = torch._inductor.list_options()
        if unknown := sorted(set(config) - set(known)):
            near = difflib.get_close_matches(unknown[0], [*_OWN_OPTIONS, *known])
            hint = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise OptionError(
                f"unknown options {unknown}{hint}; graphopt's are {sorted(_OWN_OPTIONS)}, all others must be settings of "
                "torch._inductor.config (torch._inductor.list_options() names them)"
            )
        axis = options.get("sample_axis", 0)
        if isinstance(axis, bool) or not isinstance(axis, int | Mapping | None):
            raise OptionError(
                f"sample_axis is {axis!r}; it is an int, None, or a dict from argument name to int or None"
            )
        between = options.get("sample_axis_between_graphs")
        if isinstance(between, bool) or not isinstance(between, int | None):
            raise OptionError(f"sample_axis_between_graphs is {between!r}; it is an int or None")
        return cls(tuple(resolved), compiler, axis, bool(options.get("fullgraph", False)), config, between)

    @property
    def streaming(self) -> Streaming | None:
        """How layers are streamed, if a pass asks for it."""
        return next((item.streaming for item in self.passes if item.streaming is not None), None)

    @property
    def needs_samples(self) -> bool:
        """Whether a pass must know where the samples are."""
        return any(item.needs_samples for item in self.passes)

    @property
    def has_statistics(self) -> bool:
        """Whether a pass leaves statistics on parameters."""
        return any(SUM_GRAD_SQUARED in item.provides for item in self.passes)

    def for_units(self) -> Setup:
        """For the parts of a sharded model: names of the model's arguments mean nothing in them, so there must be one axis.

        Raises:
            OptionError: ``sample_axis`` names several.
        """
        if not isinstance(self.sample_axis, Mapping):
            return self
        axes = {axis for axis in self.sample_axis.values() if axis is not None} or {0}
        if len(axes) > 1:
            raise OptionError(
                f"sample_axis={dict(self.sample_axis)!r} names several axes, and a model with fully_shard is compiled in parts "
                "that pass on tensors without such names. Let all inputs count samples on one axis: options={'sample_axis': 0}"
            )
        return dataclasses.replace(self, sample_axis=axes.pop())

    def must_serve(self, name: str, param: nn.Parameter) -> bool:
        """Whether it is an error if this parameter gets no statistic."""
        strict = [item for item in self.passes if SUM_GRAD_SQUARED in item.provides and not item.skips_unsupported]
        return any(item.selects(name, param) for item in strict)

    def rewrite(
        self, graph_module: GraphModule, example_inputs: Sequence[Any], named: NamedTensors | None = None
    ) -> tuple[CapturedGraph | None, Record]:
        """Capture one graph of Dynamo's and run the passes over it; no graph if it is to be compiled as it is."""
        if self.passes and _compat.is_split_for_ddp():
            raise UnsupportedError(
                "Dynamo has split the model's graph at the edges of DistributedDataParallel's buckets, and passes need whole "
                "graphs. Set torch._dynamo.config.optimize_ddp = False before the first call, or use graphopt.transform(model) "
                "instead of torch.compile(model, backend='graphopt')"
            )
        inputs = describe_inputs(graph_module, example_inputs, named or NamedTensors(), self.sample_axis, self.between)
        if self.has_statistics:
            _refuse_distributed(inputs, example_inputs)
        if self.needs_samples and needs_restart(inputs, example_inputs):
            raise _compat.restart_capture("the sample axis of an input was not marked dynamic")
        start = time.perf_counter()
        try:
            captured = lower(graph_module, inputs)
        except UnsupportedError as error:
            return None, Record(graph_module, graph_module, uncaptured=self._skipped(inputs, example_inputs, error))
        lowered = time.perf_counter()
        graph, passes = run_passes(captured, self.passes)
        seconds = {"capture": lowered - start, "passes": time.perf_counter() - lowered}
        return graph, Record(captured.graph_module, graph.graph_module, passes, seconds)

    def _skipped(
        self, inputs: Sequence[Input], example_inputs: Sequence[Any], error: UnsupportedError
    ) -> tuple[Coverage, ...]:
        """Rows for the parameters of a graph that cannot be captured; raises if passes insist on them."""
        trainable = [
            (described.name, tuple(value.shape))
            for described, value in zip(inputs, example_inputs, strict=True)
            if described.kind is InputKind.PARAMETER and described.requires_grad
        ]
        text = str(error).partition("\n\nWhile executing")[0]  # what torch.fx.Interpreter adds says it again
        if trainable and not all(item.skips_unsupported for item in self.passes):
            names = ", ".join(name for name, _ in trainable[:10]) + (", ..." if len(trainable) > 10 else "")
            raise UnsupportedError(
                f"{text}.\nNo pass can serve the parameters of its graph: {names}. To train it without them, use "
                "TrueGrad(unsupported='skip')"
            ) from error
        return tuple(Coverage(name, shape, Status.SKIPPED, text) for name, shape in trainable)

    def compile(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        named: NamedTensors | None = None,
        keep: Callable[[Record], None] | None = None,
        stream: Stream | None = None,
    ) -> Callable[..., Any]:
        """Capture, rewrite, compile and bind one graph of Dynamo's."""
        if self.streaming is not None and stream is None:
            raise OptionError(
                "LayerToLayer(store=...) moves the model's weights into a store, but torch.compile(model, backend='graphopt') "
                "does not know the model: use graphopt.transform(model, [...])"
            )
        graph, record = self.rewrite(graph_module, example_inputs, named)
        start = time.perf_counter()
        bound: Callable[..., Any]
        if graph is None and stream is not None:
            raise UnsupportedError(
                "a graph of the model could not be captured, so its layers cannot be streamed: "
                + "; ".join(sorted({row.reason for row in record.uncaptured}))
            )
        if graph is None:
            bound = UnboundGraph(compile_unlowered(graph_module, example_inputs, self.compiler, self.config))
        elif stream is not None:
            bound = stream_graph(graph, stream, self.compiler, self.passes, self.config)
        else:
            rewritten = graph
            stages = stages_of(graph) if any(STAGE in item.provides for item in self.passes) else None
            bound = BoundGraph(
                graph, lambda: compile_graph(rewritten, self.compiler, self.passes, self.config), stages=stages
            )
        record.seconds["compile"] = time.perf_counter() - start
        if keep is not None:
            keep(record)
        for value in example_inputs:
            if isinstance(value, nn.Parameter):
                records_of.setdefault(value, []).append(record)
        return bound


def with_own_code(call: types.FunctionType) -> types.FunctionType:
    """The same closure with a code object and a name of its own.

    Dynamo counts recompilations by code object, and remembers by file, line and name which sizes it has seen change: without
    them, all models would share one limit, and one model's batch sizes would make another's image sizes symbolic.
    """
    code = call.__code__.replace(co_name=f"{call.__name__}_{next(_numbers)}")
    return types.FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)


def _refuse_distributed(inputs: Sequence[Input], example_inputs: Sequence[Any]) -> None:
    """Raise `UnsupportedError` for parameters that are DTensors while the model runs (`fully_shard` gathers its own before)."""
    names = [
        described.name
        for described, value in zip(inputs, example_inputs, strict=True)
        if isinstance(value, nn.Parameter) and _compat.local_part(value) is not value
    ]
    if names:
        raise UnsupportedError(
            f"parameters are DTensors in the graph: {', '.join(names[:10])}. Tensor parallelism (parallelize_module) computes a "
            "part of each sample on each rank, which TrueGrad does not follow. Use torch.distributed.fsdp.fully_shard instead, "
            "or transform the model without TrueGrad: graphopt.transform(model, [])"
        )


def _call_of(unit: nn.Module) -> Callable[..., Any]:
    """What runs the ``forward`` of a part of a sharded model, or of one like it."""
    if "forward" in vars(unit):
        forward = unit.forward
        return lambda module, *args, **kwargs: forward(*args, **kwargs)

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    return call


def _likeness(unit: nn.Module) -> Any:
    """Equal for parts of a sharded model that are likely to have the same graph; Dynamo's guards decide."""
    if "forward" in vars(unit):
        return id(unit)
    named = unit.named_parameters()
    return type(unit), repr(unit), tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in named)


class _Handle:
    """What a transformed model carries in its ``__dict__``: options, records, and the compiled call.

    ``deepcopy`` of the model makes a transformed copy with a handle of its own; pickling drops it, so that a saved model loads
    without graphopt.
    """

    def __init__(self, setup: Setup, dynamic: bool | None) -> None:
        self.setup = setup
        self.dynamic = dynamic
        self.records: list[Record] = []
        self._model: nn.Module | None = None
        self._units: list[nn.Module] = []
        self.num_samples: int | None = None  # of the running call, if the model is compiled in parts
        self.stream: Stream | None = None
        self.detour: Callable[..., Any] | None = None  # what calls of the model run instead, while scales are learned

    def attach(self, model: nn.Module, *, in_units: bool = False) -> None:
        self.detach(model)
        self._model = model
        if in_units:
            self._attach_units(model)
            return

        if self.setup.streaming is not None:
            self.stream = Stream(model, self.setup.streaming)

        def call(*args: Any, **kwargs: Any) -> Any:  # Dynamo skips frames of torch.nn's own classes, but not this one
            return model._call_impl(*args, **kwargs)

        model.__dict__[HANDLE] = self
        model.__dict__["_compiled_call_impl"] = _entry(model, self._compile(model, call, self.setup), self)

    def _attach_units(self, model: nn.Module) -> None:
        """Compile the parts of a sharded model; FSDP's hooks run between them, as they were written."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.setup.needs_samples:
                mark_samples(type(model).forward.__get__(model), args, kwargs, self.setup.sample_axis)
                self.num_samples = count_samples(args, kwargs)
            return model._call_impl(*args, **kwargs)

        setup = self.setup.for_units()
        alike: dict[Any, list[nn.Module]] = {}
        for _, unit in fully_sharded.units(model, setup.must_serve):
            alike.setdefault(_likeness(unit), []).append(unit)
        for units in alike.values():  # one code object: Dynamo finds the graph of the first for the others
            compiled = self._compile(model, _call_of(units[0]), setup)
            for unit in units:
                bound = functools.partial(compiled, unit)
                entry = _entry(unit, bound, self, is_unit=True, axis=setup.sample_axis, num_alike=len(units))
                unit.__dict__["forward"] = entry
                self._units.append(unit)
        model.__dict__[HANDLE] = self
        model.__dict__["_compiled_call_impl"] = call

    def detach(self, model: nn.Module) -> None:
        """Take back what `attach` has done."""
        model.__dict__.pop("_compiled_call_impl", None)
        for unit in self._units:
            unit.__dict__.pop("forward", None)
        self._units = []
        if self.stream is not None:
            stream, self.stream = self.stream, None
            stream.restore()

    def compile_detour(self, model: nn.Module, passes: Sequence[Pass]) -> Callable[..., Any]:
        """The model's call compiled with other passes; sizes are fixed, and nothing is asked of the samples."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return model._call_impl(*args, **kwargs)

        compiled = self._compile(model, call, dataclasses.replace(self.setup, passes=tuple(passes)))

        def run(*args: Any, **kwargs: Any) -> Any:
            with capture_settings(has_passes=True), _own_errors():
                return compiled(*args, **kwargs)

        return run

    def _compile(self, model: nn.Module, call: Callable[..., Any], setup: Setup) -> Callable[..., Any]:
        own_model, own_handle = weakref.ref(model), weakref.ref(self)  # Dynamo keeps backends for ever

        def compile_one(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            served, handle = own_model(), own_handle()
            assert served is not None
            assert handle is not None
            named = NamedTensors.of(served)
            return setup.compile(graph_module, example_inputs, named, handle.records.append, handle.stream)

        functools.update_wrapper(compile_one, backend)
        return torch.compile(
            with_own_code(cast(types.FunctionType, call)),
            backend=compile_one,
            dynamic=self.dynamic,
            fullgraph=setup.fullgraph,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        if self.stream is not None:
            raise StreamError(
                "a model whose layers are streamed cannot be copied: the copy would need a store of its own. Load its "
                "state_dict() into another model, or copy it before graphopt.transform"
            )
        clone = _Handle(self.setup, self.dynamic)
        copied = memo.get(id(self._model))
        if isinstance(copied, nn.Module):
            clone.attach(copied)
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __repr__(self) -> str:
        return f"_Handle(passes={[item.name for item in self.setup.passes]}, {len(self.records)} graphs)"


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Let errors of passes and compilation through as they are; Dynamo wraps them."""
    try:
        yield
    except _compat.BackendCompilerFailed as error:
        inner = error.inner_exception
        if isinstance(inner, GraphoptError):
            raise inner from inner.__cause__
        raise


def _limit_for(num_alike: int) -> contextlib.AbstractContextManager[Any]:
    """Parts that share a code object share Dynamo's limit of recompilations, and each may need graphs of its own."""
    if num_alike == 1:
        return contextlib.nullcontext()
    config = torch._dynamo.config
    return cast(
        contextlib.AbstractContextManager[Any], config.patch(recompile_limit=config.recompile_limit * num_alike)
    )


def _entry(
    model: nn.Module,
    compiled: Callable[..., Any],
    handle: _Handle,
    *,
    is_unit: bool = False,
    axis: SampleAxisOption = 0,
    num_alike: int = 1,
) -> Callable[..., Any]:
    """The function that ``model(...)`` calls, or the ``forward`` of a part of a sharded model."""
    warned, called, watched, setup = False, False, False, handle.setup

    @torch._dynamo.disable(recursive=False)  # type: ignore[untyped-decorator]
    def entry(*args: Any, **kwargs: Any) -> Any:
        nonlocal warned, called, watched
        if not is_unit and fully_sharded.was_sharded(model, look_inside=not called):
            handle.attach(model, in_units=True)  # fully_shard came after transform
            return model(*args, **kwargs)
        called = True
        if handle.detour is not None:
            return handle.detour(*args, **kwargs)
        if setup.needs_samples and is_unit and isinstance(axis, int):
            mark_passed_on(args, kwargs, axis, handle.num_samples)
        if setup.needs_samples and not is_unit:
            mark_samples(model.forward, args, kwargs, setup.sample_axis)
        if setup.has_statistics:
            data_parallel.enter_forward()  # on every rank, also on one whose batch reaches no graph
        before = BoundGraph.num_calls
        if handle.stream is not None:
            handle.stream.begin_call()
        with capture_settings(has_passes=bool(setup.passes)), _limit_for(num_alike), _own_errors():
            outputs = compiled(*args, **kwargs)
        if handle.stream is not None:
            handle.stream.end_call(outputs)
        if BoundGraph.num_calls == before and not warned and any(True for _ in model.parameters()):
            warned = True
            warnings.warn(
                f"a call of the transformed {type(model).__name__} ran outside any captured graph, so no pass had any effect: "
                "Dynamo skipped it (torch.compiler.disable, set_stance('force_eager'), TORCHDYNAMO_DISABLE or a model without "
                "tensor operations). TORCH_LOGS=dynamo says why",
                UncapturedCall,
                stacklevel=2,
            )
        elif (
            BoundGraph.num_calls > before
            and setup.has_statistics
            and not (is_unit or watched)
            and torch.is_grad_enabled()
        ):
            refuse_uncaptured(model, outputs, setup)
            watched = True
            watch_uncaptured(model, setup)
        return outputs

    return cast(Callable[..., Any], entry)
