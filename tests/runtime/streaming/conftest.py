"""A model that is streamed, and the same one trained as ever."""

import copy

import pytest
import torch
import transformers

import graphopt
from graphopt.passes import LayerToLayer
from tests.layered_models import MODELS, scalar
from tests.models import double


class Pair:
    """A streamed model and a plain copy, which are trained side by side."""

    def __init__(self, model, kwargs, passes, **options):
        self.plain, self.kwargs = copy.deepcopy(model), kwargs
        self.model = graphopt.transform(model, passes, **options)

    def backward(self, scale=1.0):
        """One backward pass of each; the two losses."""
        expected, found = scalar(self.plain(**self.kwargs)), scalar(self.model(**self.kwargs))
        (scale * expected).backward()
        (scale * found).backward()
        return found.detach(), expected.detach()

    def train(self, make, steps=2, between=lambda params: None):
        """Steps of an optimizer for each: ``make(params)``."""
        optimizers = make(self.model.parameters()), make(self.plain.parameters())
        for _ in range(steps):
            losses = self.backward()
            for side in (self.model, self.plain):
                between(list(side.parameters()))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            yield losses

    def assert_equal(self, **tolerance):
        """Parameters and buffers."""
        expected = self.plain.state_dict()
        for name, value in self.model.state_dict().items():
            torch.testing.assert_close(
                value.cpu(), expected[name], msg=lambda text, n=name: f"{n}: {text}", **tolerance
            )

    def assert_gradients_equal(self, **tolerance):
        for (name, param), reference in zip(self.model.named_parameters(), self.plain.parameters(), strict=True):
            assert (param.grad is None) == (reference.grad is None), name
            if reference.grad is not None:
                torch.testing.assert_close(
                    param.grad.cpu(), reference.grad, msg=lambda text, n=name: f"{n}.grad: {text}", **tolerance
                )


@pytest.fixture
def pair(tmp_path):
    """``pair("transformer", store="disk", microbatch_size=2)``: one of `tests.layered_models` in float64."""
    made = []

    def build(name_or_model, kwargs=None, *, before=(), compiler="eager", options=None, **streaming):
        torch.manual_seed(0)
        model, given = (name_or_model, kwargs) if kwargs is not None else MODELS[name_or_model].build()
        model, values = double(model, tuple(given.values()))
        if streaming.get("store") == "disk":
            streaming.setdefault("store_path", tmp_path / "store")
        passes = [*before, LayerToLayer(**streaming)]
        made.append(Pair(model, dict(zip(given, values, strict=True)), passes, compiler=compiler, options=options))
        return made[-1]

    yield build
    for found in made:
        handle = found.model.__dict__.get("_graphopt")
        if handle is not None and handle.stream is not None:
            handle.stream.close()


@pytest.fixture
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
