"""Values move into a store and come back, and a store is taken for the values of the model it was written for alone."""

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import graphopt
from graphopt.errors import StoreError, StreamError
from graphopt.passes import LayerToLayer
from graphopt.runtime.stores import StoredTensor
from graphopt.runtime.streaming.filling import fill_store
from tests.layered_models import D, Stack, ids
from tests.models import Block
from tests.runtime.streaming.filled_models import assert_on_meta, on_meta
from tests.runtime.streaming.sides import CLOSE


def test_husks(pair):
    """The parameters stay what they are, but for their values."""
    torch.manual_seed(0)
    model = Stack([Block(D)])
    before = {name: id(param) for name, param in model.named_parameters()}
    graphopt.transform(model, [LayerToLayer(store="cpu")], compiler="eager")
    assert {name: id(param) for name, param in model.named_parameters()} == before
    weight = model.head.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((11, D), torch.float32, "cpu")
    assert weight.untyped_storage().nbytes() == 4
    assert weight.isnan().all()
    assert isinstance(graphopt.stream(model).value("head.weight"), StoredTensor)
    model(ids())
    assert weight.stage.store == "cpu"
    with pytest.raises(
        RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"
    ):
        weight.data.normal_()
    nn.init.zeros_(weight)  # which torch lets pass
    with pytest.raises(StreamError, match=r"head\.weight was given a value of its own"):
        model(ids())


def test_restore_brings_everything_back(pair):
    sides = pair("transformer", store="disk")
    optimizers = [AdamW(side.parameters(), lr=1e-2) for side in (sides.model, sides.plain)]
    for number in range(4):
        if number == 2:
            graphopt.restore(sides.model)
            assert all(param.untyped_storage().nbytes() == param.nbytes for param in sides.model.parameters())
        sides.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    sides.assert_equal(**CLOSE)


def test_a_store_of_another_model(tmp_path):
    options = {"store": "disk", "store_path": tmp_path / "store"}
    model = graphopt.transform(nn.Linear(3, 2), [LayerToLayer(**options)], compiler="eager")
    graphopt.stream(model).close()
    with pytest.raises(StoreError, match="weight"):
        graphopt.transform(nn.Linear(3, 4), [LayerToLayer(**options, resume=True)], compiler="eager")


def test_a_store_in_memory_has_no_values(tmp_path):
    with pytest.raises(
        StoreError,
        match=r"2 parameters are on the meta device \(weight, bias\), and store='cpu' takes the values that are in memory",
    ):
        graphopt.transform(on_meta(lambda: nn.Linear(3, 4)), [LayerToLayer(store="cpu")])


class WithTable(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        if size is not None:
            self.register_buffer("table", torch.empty(size), persistent=False)

    def reset_parameters(self):
        nn.init.ones_(self.table)


def test_buffers_that_do_not_fit(tmp_path):
    fill_store(on_meta(lambda: WithTable(4)), tmp_path / "store")
    model = on_meta(lambda: WithTable(5))
    with pytest.raises(
        StoreError, match=r"belongs to another model: the buffer table is \[4\] in it and \[5\] in the model"
    ):
        graphopt.transform(model, [LayerToLayer(store="disk", store_path=tmp_path / "store")])
    assert_on_meta(model)
    plain = nn.ModuleDict({"linear": nn.Linear(3, 4)})
    graphopt.transform(plain, [LayerToLayer(store="disk", store_path=tmp_path / "plain")])
    graphopt.stream(plain).close()
    with pytest.raises(StoreError, match=r"has no values for table: it was not filled to the end; fill it anew"):
        graphopt.transform(on_meta(lambda: WithTable(5)), [LayerToLayer(store="disk", store_path=tmp_path / "plain")])
