"""Every test starts from an empty compiler and a fixed seed. And the definition that a statistic is compared with."""

import copy
import gc

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from tests.oracle import from_losses, split_samples


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.manual_seed(0)
    yield
    if counters:  # Dynamo has seen something
        torch._dynamo.reset()
        counters.clear()
        gc.collect()  # compiled graphs lie in reference cycles, and hold the parameters that they were compiled for


@pytest.fixture(autouse=True, scope="module")
def _frozen_modules():
    """What a test file imports stays for good: the collections after each test need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def loop():
    """``loop(model, loss, *batch)``: for each trainable parameter its gradient and statistic, one sample at a time.

    ``loss(model, *batch)`` must add up over samples. The model runs as it was written, in a copy.
    """
    return _loop


@pytest.fixture
def assert_exact():
    """``assert_exact(model, loss, *batch)``: after backward, gradients and statistics are those of `loop`."""
    return _assert_exact


def _loop(model, loss, *batch):
    model = graphopt.restore(copy.deepcopy(model))
    return from_losses(model, (loss(model, *rows) for rows, _ in split_samples(batch, {})))


def _assert_exact(model, loss, *batch, **tolerance):
    expected = _loop(model, loss, *batch)
    assert expected
    for name, param in model.named_parameters():
        if name not in expected:
            assert param.grad is None, name
            assert find(param, SUM_GRAD_SQUARED) is None, name
            continue
        assert param.grad is not None, f"{name} has no gradient"
        assert find(param, SUM_GRAD_SQUARED) is not None, f"{name} has no statistic"
        for what in ("grad", "sum_grad_squared"):
            value, reference = getattr(param, what), getattr(expected[name], what)
            torch.testing.assert_close(
                value.to(reference.dtype), reference, msg=lambda text, w=what, n=name: f"{n}.{w}: {text}", **tolerance
            )
        assert param.sum_grad_squared.dtype == torch.promote_types(param.dtype, torch.float32), name
        assert find(param, NUM_SAMPLES) == _num_samples(batch), name


def _num_samples(batch):
    return len(pytree.tree_leaves(batch)[0])
