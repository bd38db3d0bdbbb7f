"""Random models of random layers: every parameter exact, or refused by name.

CI runs a few; ``GRAPHOPT_RANDOM_MODELS=1000 pytest tests/passes/truegrad/test_random_models.py`` runs as many as asked for.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.annotations import find
from graphopt.errors import GraphoptError
from graphopt.passes import TrueGrad
from tests.models import smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, train_step
from tests.random_models import LAYERS, layers

NUM = int(os.environ.get("GRAPHOPT_RANDOM_MODELS", "30"))
OPTIONS = settings(
    max_examples=NUM, deadline=None, derandomize=NUM < 100, suppress_health_check=list(HealthCheck), print_blob=True
)


def scale(expected):
    return max((value.sum_grad_squared.abs().max().item() for value in expected.values()), default=0.0)


def check(model, x, max_bytes=2**27):
    """One step against the loop over samples; true unless it was refused."""
    torch._dynamo.reset()
    expected = loop_over_samples(model, (x,), smooth, reduction="sum")
    plain = train_step(model, (x,))
    model.zero_grad()
    graphopt.transform(model, [TrueGrad(max_bytes=max_bytes)], compiler="eager")
    try:
        output = train_step(model, (x,))
    except GraphoptError as error:
        names = [name for name, _ in model.named_parameters()]
        assert any(name in str(error) for name in names), error
        return str(error)
    torch.testing.assert_close(output, plain, rtol=1e-10, atol=1e-12)
    assert_statistics(model, expected, len(x), rtol=1e-9, atol=1e-13 * scale(expected) + 1e-15)
    return None


@OPTIONS
@given(drawn=layers(), max_bytes=st.sampled_from([1, 200, 2**27]))
def test_random_models(drawn, max_bytes):
    _, model, x = drawn
    refused = check(model, x, max_bytes)
    event("refused" if refused else "exact")
    if refused:
        event(f"refused: {refused.splitlines()[1].strip()[:60]}")
        assert all(find(param, graphopt.annotations.SUM_GRAD_SQUARED) is None for param in model.parameters())


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_exact(name):
    torch.manual_seed(4)
    model, x = LAYERS[name](3, 4, 2).double(), torch.randn(3, 3, 4, dtype=torch.float64)
    assert check(model, x) is None
