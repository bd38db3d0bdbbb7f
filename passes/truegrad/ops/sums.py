"""``graphopt::sums``: gradient and statistics of a matrix from its two factors, without memory for one gradient per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.passes.truegrad.ops import sums_kernel
from graphopt.passes.truegrad.ops.product import multiply

# Bytes of per-sample gradients that exist at one time: small enough for the second-level cache of a CPU core, and on a GPU
# large enough to fill it.
_CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


@torch.library.custom_op("graphopt::sums", mutates_args=())
def sums(grad: Tensor, input: Tensor, norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(N, S, O), (N, S, I) -> sum over n of ``grad_n^T input_n``, sum of its squares, each (O, I), and squared norms (N,).

    All in at least float32; the norms are empty unless asked for. The per-sample products contain the gradient (their sum), so
    they replace its matmul; squares and sums are what is added. They are taken over a bounded slice of samples at a time, so
    that no more than that ever exists: in registers on a GPU that has Triton (`sums_kernel`), one sample at a time in float32 on
    the CPU, else in products of a few.
    """
    if sums_kernel.is_profitable(grad, input):
        return sums_kernel.triton_sums(grad, input, norms)
    num, out_features, in_features = grad.shape[0], grad.shape[2], input.shape[2]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros(out_features, in_features, dtype=dtype, device=grad.device)
    squares = torch.zeros_like(total)
    per_sample = torch.zeros(num if norms else 0, dtype=dtype, device=grad.device)
    if grad.device.type == "cpu" and grad.dtype == torch.float32:
        for n in range(num):  # a product stays in cache while it is added and squared
            product_OI = multiply(grad[n], input[n])
            total.add_(product_OI)
            squares.addcmul_(product_OI, product_OI)
            if norms:
                per_sample[n] = torch.linalg.vector_norm(product_OI).square()
        return total, squares, per_sample
    size = out_features * in_features
    budget = _CHUNK_BYTES.get(grad.device.type, _CHUNK_BYTES["cuda"])
    chunk = max(1, min(num, budget // max(1, size * grad.element_size())))
    with _compat.disable_autocast():
        products = torch.empty(chunk, out_features, in_features, dtype=grad.dtype, device=grad.device)
        start = 0
        for grad_CSO, input_CSI in zip(grad.split(chunk), input.split(chunk), strict=True):
            products_COI = torch.bmm(grad_CSO.transpose(1, 2), input_CSI, out=products[: grad_CSO.shape[0]]).to(dtype)
            if grad.device.type == "cpu":  # one sample at a time is read from cache, and squared and added in one go
                for product_OI in products_COI:
                    total.add_(product_OI)
                    squares.addcmul_(product_OI, product_OI)
            else:
                total.add_(products_COI.sum(0))
                squares.add_(products_COI.square().sum(0))
            if norms:
                flat = products_COI.flatten(1)
                torch.linalg.vecdot(flat, flat, out=per_sample[start : start + len(flat)])
                start += len(flat)
    return total, squares, per_sample


@sums.register_fake
def _(grad: Tensor, input: Tensor, norms: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    shape = (grad.shape[2], input.shape[2])
    per_sample = grad.new_empty((grad.shape[0] if norms else 0,), dtype=dtype)
    return grad.new_empty(shape, dtype=dtype), grad.new_empty(shape, dtype=dtype), per_sample
