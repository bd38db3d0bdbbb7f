"""A fixture for modules that compile kernels but no model."""

import pytest

from graphopt.optim import truegrad_update


@pytest.fixture(scope="module")
def own_kernels():
    """Kernels that were compiled before belong to a compiler that was reset since."""
    truegrad_update._compile_kernels.cache_clear()
    yield
    truegrad_update._compile_kernels.cache_clear()
