"""What ``graphopt::sums`` costs on a GPU: the Triton kernel and the chunked bmm against the gradient's product alone.

Not measured yet: no GPU was at hand when the kernel was written. What to expect of one layer of a large transformer on an H200
(4.8 TB/s of memory and 990 TFLOP/s in bfloat16 by its data sheet, of which matrix products reach some 700), with N = 8 samples
of S = 2048 positions and O = I = 4096:

    products             2 * N * S * O * I                    = 0.55 TFLOP              0.79 ms at 700 TFLOP/s
    read, by all         2 * N * S * (O + I) bytes            = 268 MB                  0.06 ms
    written, by all      4 * O * I bytes of float32           =  67 MB                  0.01 ms
    the kernel, besides  4 * O * I bytes of squares           =  67 MB                  0.01 ms
                         3 * N * O * I instructions           = 0.4 G                   0.01 ms at 33 T/s
    bmm, besides         24 * N * O * I bytes                 = 3.2 GB                  0.67 ms
                         written 2, widened 2 + 4, read for the sum 4, squared 4 + 4, read for the sum 4

So the gradient alone takes 0.8 ms, and with bmm it cannot take less than 1.5 ms (1.8 times as much, if bmm is as fast as one
large product). The kernel is bound by its products: with 128 x 128 tiles it reads 2 * N * S * O * I * 2 / 128 bytes = 8.6 GB
through the L2, and Triton's products of that form reach two thirds to three quarters of cuBLAS's rate: 1.1 to 1.2 ms.
At S = 128, otherwise alike, the gradient takes 0.05 ms, bmm 0.72 ms (14 times as much) and the kernel 0.08 ms.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from benchmarks.harness import Benchmark, Case, Rival
from benchmarks.worker import Task

LARGEST_ERROR = {"bfloat16": 2e-2, "float16": 2e-3, "float32": 1e-5}  # of bmm; the kernel rounds no product

SHAPES = {  # N, S, O, I
    "large": (8, 2048, 4096, 4096, "bfloat16"),
    "large-short": (8, 128, 4096, 4096, "bfloat16"),
    "bert": (16, 128, 3072, 768, "bfloat16"),
    "bert-float32": (16, 32, 3072, 768, "float32"),
    "few-positions": (256, 4, 1024, 1024, "bfloat16"),
    "convolution": (64, 3136, 64, 576, "bfloat16"),
    "odd": (8, 128, 50257, 768, "bfloat16"),  # rows of the gradient begin at odd addresses
}


def build(*, how: str, shape: list[int], dtype: str, norms: bool = False) -> Task:
    """The sums of one layer, on random numbers.

    Args:
        how: ``"gradient"``, ``"bmm"``, ``"kernel"``, or ``"tile-0"``, ``"tile-1"``: the kernel with that candidate tile.
        shape: N, S, O, I.
        dtype: of gradient and input.
        norms: whether the norms are wanted, too.
    """
    grad, input = _tensors(shape, dtype)
    function = _function(how)
    return Task(lambda: function(grad, input, norms), lambda: _plan(shape, dtype) if how == "kernel" else {})


def check(*, how: str, shape: list[int], dtype: str, norms: bool = False) -> dict[str, Any]:
    """Compare with the definition in float64, on few samples."""
    num = min(shape[0], 4)
    grad, input = _tensors([num, *shape[1:]], dtype)
    found = _function(how)(grad, input, norms)
    total = squares = 0.0
    for grad_SO, input_SI in zip(grad.double(), input.double(), strict=True):
        product = grad_SO.t() @ input_SI
        total, squares = total + product, squares + product * product
    errors = {
        name: ((value.double() - want).abs().max() / want.abs().max()).item()
        for name, value, want in (("total", found[0], total), ("squares", found[1], squares))
    }
    verdict = "exact" if max(errors.values()) <= 1e-4 else "rounded"
    return {"verdict": verdict if max(errors.values()) <= LARGEST_ERROR[dtype] else "wrong", "errors": errors}


def _tensors(shape: list[int], dtype: str) -> tuple[Any, Any]:
    import torch

    num, positions, outputs, inputs = shape
    options = {"device": "cuda", "dtype": getattr(torch, dtype)}
    return torch.randn(num, positions, outputs, **options), torch.randn(num, positions, inputs, **options)


def _function(how: str) -> Any:
    """``(grad, input, norms) -> (total, squares, norms)``, or total alone for the gradient."""
    import torch

    import graphopt.passes.truegrad.ops  # noqa: F401  # registers graphopt::sums
    from graphopt.passes.truegrad.ops import sums_kernel

    if how == "gradient":
        return lambda grad, input, norms: grad.flatten(0, 1).t() @ input.flatten(0, 1)
    if how == "bmm":
        sums_kernel.is_profitable = lambda grad, input: False  # in this process, which times nothing else
        return torch.ops.graphopt.sums
    if how.startswith("tile-"):
        every, number = sums_kernel.candidates, int(how.removeprefix("tile-"))

        def one(*args: Any, **kwargs: Any) -> Any:
            tiles = list(every(*args, **kwargs))
            return [tiles[min(number, len(tiles) - 1)]]

        sums_kernel.candidates = one  # likewise
    return sums_kernel.triton_sums


def _plan(shape: list[int], dtype: str) -> dict[str, Any]:
    """How the kernel cuts up this shape here."""
    from graphopt.passes.truegrad.ops import sums_kernel

    grad, input = _tensors(shape, dtype)
    plan = sums_kernel.plan(grad, input)
    return {"is_profitable": sums_kernel.is_profitable(grad, input), **dataclasses.asdict(plan)}


def unavailable() -> str:
    """Why nothing can be measured here; empty where it can."""
    import torch

    if not torch.cuda.is_available():
        return "the kernel of graphopt::sums runs on CUDA devices, and torch finds none here"
    if importlib.util.find_spec("triton") is None:
        return "the kernel of graphopt::sums needs triton; type: pip install triton"
    return ""


# --- the cases --------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> tuple[Case, ...]:
    """Layers of several models; few samples in the quick form."""
    return tuple(
        _case(name, [min(shape[0], 2) if quick else shape[0], *shape[1:4]], shape[4]) for name, shape in SHAPES.items()
    )


def _case(name: str, shape: list[int], dtype: str) -> Case:
    num, positions, outputs, inputs = shape
    labels = {
        "gradient": "the gradient alone",
        "bmm": "chunked bmm",
        "kernel": "Triton kernel",
        "kernel-norms": "Triton kernel, with norms",
        "tile-0": "its first tile",
        "tile-1": "its second tile",
    }
    return Case(
        name=name,
        title=f"{num} samples of {positions} positions, {outputs} outputs, {inputs} inputs, {dtype}",
        rivals=tuple(
            Rival(
                name=rival,
                label=label,
                build=build,
                check=None if rival == "gradient" else check,
                options={
                    "how": rival.removesuffix("-norms"),
                    "shape": shape,
                    "dtype": dtype,
                    "norms": rival.endswith("-norms"),
                },
                ours=rival.startswith("kernel"),
            )
            for rival, label in labels.items()
        ),
        baseline="gradient",
    )


BENCHMARK = Benchmark(
    name="sums",
    title="Sum and sum of squares of per-sample products, on a GPU",
    text=(
        "Every rival computes a layer's gradient; all but the first also the sum over samples of its squared "
        "contributions. *First* and *second tile* are the candidates among which the kernel chooses by shape."
    ),
    cases=cases,
    unavailable=unavailable,
)
