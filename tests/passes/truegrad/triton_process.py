"""Another process, because triton reads TRITON_INTERPRET when it is imported, and because no other test may see triton then.

The functions at the end of the file run there. Tensors cross as bytes: their strides and offsets survive.
"""

import io
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch


class TritonProcess:
    """Calls functions of this file in the other process: ``process(sums, grad, input, True)``."""

    def __init__(self, executor):
        self._executor = executor

    def __call__(self, function, *args, **kwargs):
        return _unpack(self._executor.submit(_answer, function, _pack((args, kwargs))).result())


@contextmanager
def triton_process(*, interpret):
    """A new process in which triton interprets its kernels, or compiles them."""
    context = multiprocessing.get_context("spawn")  # a fork would share this process's modules and threads
    with tempfile.TemporaryDirectory() as cache:
        variables = {"TRITON_INTERPRET": str(int(interpret)), "TRITON_CACHE_DIR": cache}
        with ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(variables,)) as executor:
            yield TritonProcess(executor)


def _start(variables):
    os.environ.update(variables)
    torch.set_num_threads(1)


def _answer(function, content):
    args, kwargs = _unpack(content)
    return _pack(function(*args, **kwargs))


def _pack(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _unpack(content):
    return torch.load(io.BytesIO(content), weights_only=False)


# --- what runs in the other process -------------------------------------------------------------------------------------------


def sums(grad, input, norms, multiprocessors=4):
    """What the kernel gives, cut up as for a card of that size."""
    from graphopt.passes.truegrad.ops import sums_kernel

    with patch.object(sums_kernel, "_card", lambda device: sums_kernel.Card((9, 0), multiprocessors)):
        return sums_kernel.triton_sums(grad, input, norms)


def is_profitable(shape, inputs, dtype, multiprocessors=4, precision="ieee"):
    """For a gradient of that shape and a number of inputs."""
    from graphopt.passes.truegrad.ops import sums_kernel

    grad, input = torch.empty(shape, dtype=dtype), torch.empty((*shape[:2], inputs), dtype=dtype)
    torch.backends.cuda.matmul.fp32_precision = precision  # of this process alone
    with patch.object(sums_kernel, "_card", lambda device: sums_kernel.Card((9, 0), multiprocessors)):
        return sums_kernel.is_profitable(grad, input)


def check_as_operator(grad, input, norms):
    """torch's own checks of an operator that is the kernel and nothing else, and a compiled function that calls it."""
    from graphopt.passes.truegrad.ops.sums import sums as registered
    from graphopt.passes.truegrad.ops.sums_kernel import triton_sums

    operator = torch.library.custom_op("graphopt_tests::triton_sums", triton_sums, mutates_args=())
    operator.register_fake(registered._abstract_fn)
    torch.library.opcheck(operator, (grad, input, norms), test_utils=["test_schema", "test_faketensor"])
    torch._dynamo.config.error_on_recompile = True
    compiled = torch.compile(lambda g, x: operator(2 * g, x, norms)[1] + 1, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    torch._dynamo.maybe_mark_dynamic(grad, 0)
    torch._dynamo.maybe_mark_dynamic(input, 0)
    return compiled(grad, input), compiled(grad[1:], input[1:])


def compile_tiles(capability, dtype, tf32, vectors, norms):
    """For each tile of that card: bytes of stack, loads that the loop leaves in flight, and names of matrix instructions."""
    from graphopt.passes.truegrad.ops import sums_kernel

    card = sums_kernel.Card(capability, 100)
    tiles = sums_kernel.candidates(card, (512, 1024, 1024), dtype, tf32=tf32, vectors=vectors)
    return {
        f"{tile.outputs}x{tile.inputs}": _compile(
            capability,
            {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype],
            {
                "WANT_NORMS": norms,
                "PRECISION": "tf32" if tf32 else "ieee",
                "WIDEN": False,
                "VECTOR_O": 16 // dtype.itemsize if vectors else 1,
                "VECTOR_I": 16 // dtype.itemsize if vectors else 1,
                "BLOCK_O": tile.outputs,
                "BLOCK_I": tile.inputs,
                "BLOCK_S": tile.positions,
                "GROUP": 8,
                "grad_stride_o": 1,
                "input_stride_i": 1,
            },
            {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
        )
        for tile in tiles
    }


def _compile(capability, element, constants, options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from graphopt.passes.truegrad.ops.sums_triton import sums_kernel

    types = {"grad": f"*{element}", "input": f"*{element}"} | dict.fromkeys(("total", "squares", "norms"), "*fp32")
    names = sums_kernel.arg_names
    source = ASTSource(
        fn=sums_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types},
    )
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True).stdout
    loop = compiled.asm["ttgir"].split("scf.for", 1)[1]
    return {
        "stack": max(int(found) for found in re.findall(r"STACK:(\d+)", usage)),
        "shared": compiled.metadata.shared,
        "in_flight": max(map(int, re.findall(r"async_wait .*?num = (\d+)", loop)), default=0),
        "matrix_instructions": sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTC\w*MMA)\b", code))),
    }
