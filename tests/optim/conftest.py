"""Fixtures of modules that compile kernels but no model."""

import pytest
import torch

from graphopt.optim import truegrad_update


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Instead of the one for all tests: kernels are compiled once in a process."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def own_kernels():
    """Kernels that were compiled before belong to a compiler that was reset since."""
    torch._dynamo.reset()
    truegrad_update._compile_kernels.cache_clear()
    yield
    truegrad_update._compile_kernels.cache_clear()
