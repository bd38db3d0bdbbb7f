"""What modules make of sequences of updates, for tests of single modules."""

import torch
from torch import nn

from graphopt.optim import Modular, Module
from graphopt.optim.core.transform import chain

SHAPES = [(), (1,), (4, 3), (5, 1, 2), (4, 3)]


class Noise(Module):
    """Makes the update differ from the gradient."""

    def step(self, var):
        var.update = [u + noise_like(u, 77 + i) for i, u in enumerate(var.get_update())]
        return var


class Spy(Module):
    """Copies the update at the end of a chain."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def step(self, var):
        self.seen.append([update.clone() for update in var.get_update()])
        return var


def noise_like(tensor, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)


def make_tensors(seed, shapes=SHAPES, dtype=torch.float64):
    return [noise_like(torch.empty(shape, dtype=dtype), 100 * seed + i) for i, shape in enumerate(shapes)]


def outputs(make_modules, grads, params=None, **way):
    """For each step the updates that modules make, of gradients (a list of lists), in `Modular`; parameters do not move."""
    params = [nn.Parameter(p.clone()) for p in (params or [torch.zeros_like(g) for g in grads[0]])]
    spy = Spy()
    optimizer = Modular(params, *make_modules(), spy, **way)
    before = [p.detach().clone() for p in params]
    for step in grads:
        for p, b, g in zip(params, before, step, strict=True):
            p.data.copy_(b)
            p.grad = g.clone()
        optimizer.step()
    return spy.seen


def pure_outputs(make_modules, grads, params=None):
    """The same by the pure functions."""
    params = params or [torch.zeros_like(g) for g in grads[0]]
    transform = chain(*make_modules())
    state = transform.init(params)
    seen = []
    for step in grads:
        updates, state = transform.update([g.clone() for g in step], state, params)
        seen.append(updates)
    return seen


def on_numbers(make_modules, updates):
    """What modules make of a sequence of numbers, as numbers."""
    seen = outputs(make_modules, [[torch.tensor([float(u)], dtype=torch.float64)] for u in updates])
    return [step[0].item() for step in seen]


def assert_equal_steps(left, right, atol=1e-12):
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=atol, atol=atol, equal_nan=True)
