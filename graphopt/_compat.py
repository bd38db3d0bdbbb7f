"""Every private or semi-private torch name that graphopt uses, with the version in which it was read.

Read in torch 2.13.0. The supported range is checked here, so that a torch outside of it fails at ``import graphopt`` with one
clear message, rather than later with an unexplained one.
"""

import ctypes
import functools
import importlib
import logging
import os
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._compile import _disable_dynamo
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

_OLDEST, _NEWEST = (2, 11), (2, 15)
_found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
if not _OLDEST <= _found <= _NEWEST:
    raise ImportError(
        f"graphopt needs torch >=2.11,<2.16 and found {torch.__version__}: it relies on parts of torch.compile that change "
        "between releases. Type: pip install 'torch>=2.11,<2.16'"
    )


enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
WeightNorm = torch.nn.utils.parametrizations._WeightNorm  # the module that a parametrized weight is computed by
WeightNormHook = torch.nn.utils.weight_norm.__globals__["WeightNorm"]  # of the older torch.nn.utils.weight_norm
disable_dynamo = _disable_dynamo  # torch.compiler.disable would import Dynamo at once
disable_autocast = torch._C._DisableAutocast
is_any_autocast_enabled = torch._C._is_any_autocast_enabled
set_grad_enabled_op = torch._C._set_grad_enabled  # the node that a torch.no_grad() region leaves in a lowered graph

# The compiler's own modules take seconds to import, so they are imported when a name is first used.
if TYPE_CHECKING:
    from torch._dispatch.python import enable_python_dispatcher as enable_python_dispatcher
    from torch._dynamo import maybe_mark_dynamic as maybe_mark_dynamic
    from torch._dynamo.exc import BackendCompilerFailed as BackendCompilerFailed
    from torch._dynamo.exc import RestartAnalysis as RestartAnalysis
    from torch._dynamo.source import LocalSource as LocalSource
    from torch._functorch.autograd_function import autograd_function_apply as autograd_function_apply
    from torch._guards import CompileContext as CompileContext
    from torch._guards import Source as Source
    from torch._guards import TracingContext as TracingContext
    from torch._higher_order_ops.wrap import tag_activation_checkpoint as tag_activation_checkpoint
    from torch._inductor.compile_fx import compile_fx as compile_fx
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
    from torch._library.custom_ops import CustomOpDef as CustomOpDef
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx as make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv
    from torch.utils.checkpoint import CheckpointPolicy as CheckpointPolicy

_LAZY = {
    "maybe_mark_dynamic": ("torch._dynamo", "maybe_mark_dynamic"),
    "BackendCompilerFailed": ("torch._dynamo.exc", "BackendCompilerFailed"),
    # Without it, kernels that are written in C++ meet symbolic sizes which they cannot read.
    "enable_python_dispatcher": ("torch._dispatch.python", "enable_python_dispatcher"),
    "RestartAnalysis": ("torch._dynamo.exc", "RestartAnalysis"),  # what asks Dynamo to trace anew
    "LocalSource": ("torch._dynamo.source", "LocalSource"),
    "is_from_module_source": ("torch._dynamo.source", "is_from_unspecialized_nn_module_source"),
    "CompileContext": ("torch._guards", "CompileContext"),
    "Source": ("torch._guards", "Source"),
    "TracingContext": ("torch._guards", "TracingContext"),
    "tracing": ("torch._guards", "tracing"),
    "autograd_function_apply": ("torch._functorch.autograd_function", "autograd_function_apply"),
    "tag_activation_checkpoint": ("torch._higher_order_ops.wrap", "tag_activation_checkpoint"),
    "compile_fx": ("torch._inductor.compile_fx", "compile_fx"),
    "CustomGraphPass": ("torch._inductor.custom_graph_pass", "CustomGraphPass"),
    "CustomOpDef": ("torch._library.custom_ops", "CustomOpDef"),
    "FakeTensor": ("torch._subclasses.fake_tensor", "FakeTensor"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    "make_fx": ("torch.fx.experimental.proxy_tensor", "make_fx"),
    "ShapeEnv": ("torch.fx.experimental.symbolic_shapes", "ShapeEnv"),
    "CheckpointPolicy": ("torch.utils.checkpoint", "CheckpointPolicy"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def aot_export_joint(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    decomposed: Sequence[torch._ops.OpOverload],
    written_out: Mapping[torch._ops.OpOverload, Callable[..., Any]],
) -> torch.fx.GraphModule:
    """A function and its derivative as one graph of plain operators: (inputs, tangents) -> (outputs, gradients).

    Read in torch 2.13: ``aot_export_joint_simple`` returns a GraphModule that takes and returns flat lists. ``decomposed`` names
    operators that shall be made of others by torch's own table, ``written_out`` says how for further ones.
    """
    from torch._decomp import get_decompositions
    from torch._functorch.aot_autograd import aot_export_joint_simple

    table: dict[Any, Callable[..., Any]] = {**get_decompositions(decomposed), **written_out}
    joint = aot_export_joint_simple(function, args, trace_joint=True, decompositions=table)
    assert isinstance(joint, torch.fx.GraphModule)
    return joint


def min_cut_partition(
    joint: torch.fx.GraphModule, num_outputs: int
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """Forward and backward of a joint graph: saved values are the last outputs of the one and the first inputs of the other."""
    from functorch.compile import min_cut_rematerialization_partition

    forward, backward = min_cut_rematerialization_partition(joint, None, num_fwd_outputs=num_outputs)
    return forward, backward


def restart_capture(reason: str) -> Exception:
    """What a backend raises to have the frame traced again.

    Dynamo replays where it speculated, and the new sizes may take another path through the user's code: it must forget.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis  # the only request that Dynamo accepts from a backend
    from torch._dynamo.symbolic_convert import InstructionTranslator

    InstructionTranslator.current_tx().speculation_log.clear()
    return TensorifyScalarRestartAnalysis(reason)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor, as a view; any other tensor itself."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return tensor
    module = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensor can exist
    if module is None or not isinstance(tensor, module.DTensor):
        return tensor
    local: torch.Tensor = tensor._local_tensor
    return local


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: no DTensor can exist
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a DTensor as a tensor, gathered from all processes; any other tensor itself."""
    if local_part(tensor) is tensor:
        return tensor
    gathered: torch.Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def replicated(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor of which every process has all; any other tensor itself."""
    if local_part(tensor) is tensor:
        return tensor
    from torch.distributed.tensor import Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    result: torch.Tensor = tensor.redistribute(mesh, [Replicate()] * mesh.ndim)  # type: ignore[attr-defined]
    return result


def placed_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A DTensor that is spread over processes as another one is; any other tensor itself."""
    if local_part(tensor) is tensor or tensor.placements == other.placements:  # type: ignore[attr-defined]
        return tensor
    result: torch.Tensor = tensor.redistribute(other.device_mesh, other.placements)  # type: ignore[attr-defined]
    return result


def sum_over_processes(number: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum of a number over all processes that hold a part of a DTensor; of any other tensor there is one, this."""
    if local_part(other) is other:
        return number
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = other.device_mesh  # type: ignore[attr-defined]
    parts = DTensor.from_local(number, mesh, [Partial()] * mesh.ndim)
    return parts.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()


def amax(tensor: torch.Tensor) -> torch.Tensor:
    """The largest element. Of a DTensor the parts of some processes may be empty, at which torch's own raises."""
    local = local_part(tensor)
    if local is tensor:
        return tensor.amax()
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    placements = [
        Partial("max") if placement.is_shard() else placement
        for placement in tensor.placements  # type: ignore[attr-defined]
    ]
    value = local.amax() if local.numel() else torch.full((), -torch.inf, dtype=local.dtype, device=local.device)
    return DTensor.from_local(value, mesh, placements).redistribute(mesh, [Replicate()] * mesh.ndim)


def is_split_for_ddp() -> bool:
    """Whether the graph that is compiled now is one of several that Dynamo's DDPOptimizer has cut a graph into."""
    context = sys.modules[__name__].TracingContext.try_get()
    return getattr(context, "ddp_optimizer_ctx", None) is not None


def composable_modules() -> list[torch.nn.Module]:
    """All modules that `fully_shard` or its like were applied to, if one was."""
    module = sys.modules.get("torch.distributed._composable_state")
    return [] if module is None else list(module._module_state_mapping)


def reduce_scatter(output: torch.Tensor, input: torch.Tensor, group: Any) -> None:
    """The sum over ranks of this rank's part of ``input``; torch 2.13 has renamed it."""
    distributed = torch.distributed
    function = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    function(output, input, group=group)


def reentrant_checkpoint_code() -> types.CodeType:
    """The code that runs a backward pass within a backward pass."""
    code: types.CodeType = torch.utils.checkpoint.CheckpointFunction.backward.__code__
    return code


def current_graph_task() -> int:
    """Number of the backward pass that is running on this thread, -1 outside one."""
    return torch._C._current_graph_task_id()


def call_after_backward(function: Callable[[], None]) -> None:
    """Call ``function()`` when the backward pass that is running on this thread has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def autocast_kernel(op: torch._ops.OpOverload, device_type: str) -> bool:
    """Whether autocast changes the dtypes of this operator's arguments on this kind of device."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA", "xpu": "AutocastXPU", "mps": "AutocastMPS"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)


def register_inductor_decompositions(table: Mapping[torch._ops.OpOverload, Callable[..., object]]) -> None:
    """Add to the table that Inductor decomposes with, also if it has compiled something before and kept a copy."""
    from torch._inductor import decomposition

    for op, function in table.items():
        decomposition.register_decomposition(op)(function)
    decomposition.fast_random_decomps.cache_clear()


def one_symbolic_axis(num_axes: int, axis: int | None) -> Any:
    """For ``FakeTensorMode.from_tensor``: all sizes fixed but that of ``axis``; equal sizes share a symbol, 0 and 1 are fixed."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    sizes = [DimDynamic.DUCK if position == axis else DimDynamic.STATIC for position in range(num_axes)]
    return StatelessSymbolicContext(dynamic_sizes=sizes)


def symbolic_size(mode: Any, hint: int, name: str) -> Any:
    """A symbol for a size of tensors of a fake mode; whatever its value, the code that is compiled for it is valid."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC], constraint_sizes=[None])
    sample = torch.empty(hint, device="meta")
    return mode.from_tensor(sample, symbolic_context=context, source=__getattr__("LocalSource")(name)).shape[0]


def custom_op_parts(
    op: torch._ops.OpOverload,
) -> tuple[Callable[..., Any], Callable[..., None], Callable[..., Any]] | None:
    """Forward, set-up of the context and backward of an operator made by ``torch.library.custom_op``, if it has a backward."""
    from torch._library.custom_ops import OPDEFS

    definition = OPDEFS.get(op._schema.name)
    if definition is None or definition._backward_fn is None:
        return None
    return (
        definition._init_fn,
        definition._setup_context_fn or (lambda ctx, inputs, output: None),
        definition._backward_fn,
    )


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for others: it is fake, or inside ``torch.func``, ``torch.compile`` or ``torch.jit.trace``."""
    if torch.compiler.is_dynamo_compiling():
        return True  # it cannot trace the questions below
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._C._is_tracing():
        return True
    return type(tensor).__name__ == "FakeTensor"


def wrap_composition(
    op: torch._ops.OpOverload, choose: Callable[[Callable[..., object]], Callable[..., object]]
) -> None:
    """Replace what tracers run for an operator that is composed of others, by ``choose(what they ran before)``."""
    for key in (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd):
        if key in op.py_kernels:
            op.py_kernels[key] = choose(op.py_kernels[key])
    op._dispatch_cache.clear()


_detect_is_causal_mask = torch.nn.modules.transformer._detect_is_causal_mask


def _is_declared_causal(mask: torch.Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    return is_causal is True


@contextmanager
def unread_masks() -> Iterator[None]:
    """While this is entered, the modules of ``torch.nn.Transformer`` do not look whether a mask happens to be the causal one.

    They would do so to take a shortcut that gives the same result; reading a mask's values breaks Dynamo off.
    """
    module = torch.nn.modules.transformer
    module._detect_is_causal_mask = _is_declared_causal  # one and the same object: Dynamo guards on it
    try:
        yield
    finally:
        module._detect_is_causal_mask = _detect_is_causal_mask


def onednn_linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``linear`` of matrices with any strides, by oneDNN where it has it: float32 on the CPU.

    oneDNN uses AVX-512 wherever it is; MKL, which is behind ``mm``, on Intel's processors only, and is two to four times as slow
    on others.
    """
    eligible = input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32
    if eligible and uses_onednn():
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")
        return result
    return torch.nn.functional.linear(input, weight, bias)


@contextmanager
def plain_recurrent_kernels() -> Iterator[None]:
    """Without cuDNN and oneDNN; ``torch.backends.mkldnn.flags`` would warn of settings for Intel's GPUs."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Keep `FakeTensorMode` from logging the errors that it raises."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Keep ``torch.func.vmap`` from warning that it takes an operator's samples one by one: no user can do anything about it."""
    switch = vars(torch._C._functorch)["_set_vmap_fallback_warning_enabled"]
    switch(False)
    try:
        yield
    finally:
        switch(True)


_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # malloc.h
_apart = threading.Lock(), [0]  # how many are within `large_blocks_apart`


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Let glibc take blocks of a megabyte and more from the system, and give them back when they are freed.

    Otherwise a small block that lives on lies between large ones that are freed, none of which fits the next: the heap grows.
    Afterwards the limits are those that glibc ends up with by itself in a process that frees large blocks. Limits that the user
    has set (``MALLOC_MMAP_THRESHOLD_``) stay.
    """
    mallopt = _mallopt()
    if mallopt is None:  # another allocator
        yield
        return
    lock, inside = _apart
    with lock:
        inside[0] += 1
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        with lock:
            inside[0] -= 1
            if not inside[0]:
                mallopt(_M_MMAP_THRESHOLD, 32 << 20)
                mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def return_freed_memory() -> None:
    """Let glibc give the system what lies free between small blocks that live on, as a compilation leaves it."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@functools.cache
def _mallopt() -> Callable[[int, int], int] | None:
    """The function of glibc; ``None`` if there is none, or if the user has set the limits."""
    chosen = "MALLOC_MMAP_THRESHOLD_" in os.environ or "malloc.mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    return None if chosen or sys.platform != "linux" else getattr(ctypes.CDLL(None), "mallopt", None)


def uses_onednn() -> bool:
    """Whether torch was built with oneDNN, and may use it."""
    return bool(torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled())


def own_symbol(size: torch.SymInt) -> Any:
    """The expression that a size was made with, which another may have replaced since."""
    return size.node._expr


def size_hint(shape_env: object, size: object) -> int:
    """The value that a symbolic size had when its graph was captured."""
    hint = getattr(shape_env, "optimization_hint", None) or shape_env.size_hint  # type: ignore[attr-defined]  # before 2.13
    return int(hint(size))


def inductor_decompositions() -> dict[Any, Any]:
    """What Inductor makes of ATen operators before it generates code; random ones aside."""
    from torch._inductor.decomposition import decompositions

    return dict(decompositions)


def compile_kernel(
    graph_module: torch.fx.GraphModule, inputs: Sequence[torch.Tensor], mode: Any, options: Mapping[str, Any]
) -> Callable[[list[torch.Tensor]], Any]:
    """Compile a graph of ATen operators, decomposed for Inductor, that writes to its inputs.

    Without Dynamo and AOTAutograd in front, a call takes a fifth of the time; nothing checks that inputs are as they were
    traced.

    Args:
        graph_module: the graph; it becomes the compiler's own.
        inputs: fakes of ``mode``.
        mode: where the symbols live.
        options: of Inductor; those that this version does not know are left out.

    Returns:
        A function of the list of inputs.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    known = torch._inductor.list_options()
    settings = {name: value for name, value in options.items() if name in known}

    def compile_() -> Any:
        with torch.no_grad(), config.patch(settings), __getattr__("tracing")(__getattr__("TracingContext")(mode)):
            return compile_fx_inner(graph_module, list(inputs))

    if all(tensor.device.type != "cpu" for tensor in inputs) or not _trust_cpu(True):
        return compile_()  # type: ignore[no-any-return]
    try:
        return compile_()  # type: ignore[no-any-return]
    except Exception:
        _forget_cpu()
        return compile_()  # type: ignore[no-any-return]
    finally:
        _trust_cpu(False)


_probe: list[Callable[..., bool]] = []


def _trust_cpu(trust: bool) -> bool:
    """Let Inductor take the processor's word for its vector instructions, unless it has asked already; or end that.

    With an empty cache it compiles and loads up to nine small programs first, for seven seconds on two cores (torch 2.13). A
    kernel that was compiled and loaded says as much as they do.
    """
    from torch._inductor import cpu_vec_isa

    if trust:
        if cpu_vec_isa.valid_vec_isa_list.cache_info().currsize:
            return False
        _probe.append(cpu_vec_isa.VecISA.check_build)
        cpu_vec_isa.VecISA.check_build = lambda self, code: True  # type: ignore[method-assign]
    elif _probe:
        cpu_vec_isa.VecISA.check_build = _probe.pop()  # type: ignore[method-assign]
    return True


def _forget_cpu() -> None:
    """The processor's word was not enough (an old compiler, say): let Inductor ask."""
    from torch._inductor import cpu_vec_isa

    _trust_cpu(False)
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    for isa in cpu_vec_isa.supported_vec_isa_list:
        for kind in type(isa).__mro__:
            for function in vars(kind).values():
                if hasattr(function, "cache_clear"):
                    function.cache_clear()
        for name in [name for name in vars(isa) if name.endswith("_supported")]:
            delattr(isa, name)
