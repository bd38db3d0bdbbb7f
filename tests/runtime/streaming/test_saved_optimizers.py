"""An optimizer goes on from what a commit has kept of it, as if training had not stopped; other optimizers are refused."""

import pytest
import torch
from torch.optim import SGD, AdamW

import graphopt
from graphopt.errors import StoreError, StreamError
from graphopt.passes import LayerToLayer
from tests.layered_models import D, N, T, scalar
from tests.runtime.streaming.sides import Dropped


def test_resume(tmp_path):
    """A second process (here: a second model) goes on where the first has stopped, with dropout, momentum and a scheduler's rate."""

    def build(resume):
        torch.manual_seed(0)
        model = Dropped().double()
        passes = [LayerToLayer(store="disk", store_path=tmp_path / "store", microbatch_size=2, resume=resume)]
        graphopt.transform(model, passes, compiler="eager")
        return model, SGD(model.parameters(), lr=0.1 if resume else 0.05, momentum=0.9)

    x = torch.randn(N, T, D, dtype=torch.float64)

    def train(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            loss = scalar(model(x))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = build(resume=False)
    train(model, optimizer, 2)
    scalar(model(x)).backward()  # an unfinished step
    graphopt.stream(model).close()
    with pytest.raises(
        StreamError, match=r"the store of this model is closed. Call graphopt.transform again, with resume=True"
    ):
        model(x)

    with pytest.raises(StoreError, match="holds a store already, and the model has values of its own"):
        build(resume=False)
    model, optimizer = build(resume=True)
    scalar(model(x)).backward()
    with pytest.raises(StoreError, match=r"Call graphopt.stream\(model\).resume\(optimizer\) before the first step"):
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(StoreError, match="holds the state of other optimizers"):
        graphopt.stream(model).resume(AdamW(model.parameters()))
    assert graphopt.stream(model).resume(optimizer) == 2
    assert optimizer.param_groups[0]["lr"] == 0.05
    resumed = train(model, optimizer, 2)
    graphopt.stream(model).close()

    path = tmp_path / "whole"
    torch.manual_seed(0)
    model = Dropped().double()
    graphopt.transform(model, [LayerToLayer(store="disk", store_path=path, microbatch_size=2)], compiler="eager")
    assert train(model, SGD(model.parameters(), lr=0.05, momentum=0.9), 4)[2:] == resumed
    graphopt.stream(model).close()
