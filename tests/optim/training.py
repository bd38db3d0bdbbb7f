"""What tests of optimizers share: parameters, gradients with statistics, training without a model."""

import torch
from torch import nn

from graphopt import annotations
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED

SHAPES = [(), (1,), (3,), (3,), (4, 3), (5, 1, 2), (0, 4)]
KERNEL_SHAPES = [(97, 50), (4097,)]  # large enough for a compiled kernel
WAYS = [{"foreach": False}, {"foreach": True}, {"fused": True}]


def make_params(shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def shapes_for(way):
    return SHAPES + KERNEL_SHAPES * ("fused" in way)


def set_gradients(params, seed, *, factor=None):
    """Random gradients with statistics of 7 samples; with `factor`, n * statistic = factor * g**2."""
    generator = torch.Generator().manual_seed(seed)
    annotations.clear(params)
    for p in params:
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        noise = 1 + torch.rand(p.shape, generator=generator, dtype=torch.float64)
        wide = torch.promote_types(p.dtype, torch.float32)
        p.grad = grad.to(p.device, p.dtype)
        square = p.grad.to(wide) ** 2 * (noise.to(p.device, wide) if factor is None else factor)
        annotations.publish(p, square / 7, 7)


def mean_square(p):
    return annotations.get(p, SUM_GRAD_SQUARED) * annotations.get(p, NUM_SAMPLES)


def train(optimizer, params, steps=range(5), **options):
    for seed in steps:
        set_gradients(params, seed, **options)
        optimizer.step()


def largest_difference(left, right):
    return max(
        float((a.detach().double() - b.detach().double()).abs().max())
        for a, b in zip(left, right, strict=True)
        if a.numel()
    )


def snapshot(params):
    return [p.detach().clone() for p in params]
