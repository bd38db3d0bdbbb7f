"""`graphopt.layers`, and FSDP2 on each of them: two ranks train as one process does, and equal layers are compiled once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import OptionError
from graphopt.passes import LayerToLayer, TrueGrad
from graphopt.runtime.layer_modules import layers
from tests.layered_models import MODELS, Stack
from tests.oracle import from_losses
from tests.runtime import processes

WORLD = processes.WORLD
EXACT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture(scope="module")
def ranks():
    yield from processes.running()


class Layer(nn.Module):
    """A width that two ranks cannot share evenly, and a parameter that is smaller than that."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, 5)
        self.second = nn.Linear(5, 6)
        self.single = nn.Parameter(torch.rand(1))

    def forward(self, x):
        return x + self.single * self.second(self.first(self.norm(x)).tanh())


def stack(num_layers):
    torch.manual_seed(1)
    return Stack([Layer() for _ in range(num_layers)]).double()


def names_of(model, found):
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in found]


def test_numbered_modules():
    model, kwargs = MODELS["mask_table_and_skip"].build()
    found = layers(model, **kwargs)
    assert names_of(model, found) == ["layers.0", "layers.1", "layers.2"]
    assert all(module is model.layers[number] for number, module in enumerate(found))


def test_they_are_those_of_the_pass():
    model, ids = stack(6), batch(2, 0)
    found = names_of(model, layers(model, ids))
    graphopt.transform(model, [LayerToLayer()], compiler="eager")
    model(ids)
    (note, *_) = graphopt.records(model)[0].results[0].notes
    assert found == [f"layers.{number}" for number in range(6)]
    assert f"before {found[0]}, {', '.join(found)}, after {found[-1]}" in note
    assert {p.stage.layer for p in model.layers[1].parameters()} == {"layers.1"}
    assert names_of(model, layers(model, ids)) == found  # also of a transformed model


def test_the_meta_device_and_boundaries():
    with torch.device("meta"):
        model = stack(3)
    ids = batch(2, 0).to("meta")
    assert names_of(model, layers(model, ids)) == ["layers.0", "layers.1", "layers.2"]
    assert names_of(model, layers(model, ids, boundaries=["norm", "head"])) == ["norm", "head"]
    assert names_of(model, layers(model, ids, boundaries=lambda path: path if path == "layers.1" else None)) == [
        "layers.1"
    ]
    with pytest.raises(OptionError, match=r"boundaries='blocks'.*no operator of this graph"):
        layers(model, ids, boundaries="blocks")
    with pytest.raises(OptionError, match=r"arguments do not fit the forward of Stack .*'ids'"):
        layers(model)


def test_modules_called_several_times_and_modules_in_pairs():
    model, kwargs = MODELS["one_layer_four_times"].build()
    assert names_of(model, layers(model, **kwargs)) == ["inner"]
    pairs = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh())))
    assert names_of(pairs, layers(pairs, torch.randn(2, 4))) == ["0", "1", "3", "4", "6", "7"]
    assert layers(nn.Linear(4, 4), torch.randn(2, 4)) == []


# --- FSDP2 --------------------------------------------------------------------------------------------------------------------


def batch(num, seed):
    return torch.randint(11, (num, 4), generator=torch.Generator().manual_seed(seed))


def total(output):
    return (output + 0.3 * torch.arange(output.shape[-1])).sin().square().sum()


def sharded(model, ids):
    from torch.distributed.fsdp import fully_shard

    found = layers(model, ids)
    assert len(found) == len(model.layers)
    for layer in found:
        fully_shard(layer)
    fully_shard(model)
    with pytest.raises(OptionError, match=r"FSDPStack that fully_shard has changed: ask for the layers first"):
        layers(model, ids)
    return graphopt.transform(model, [TrueGrad(), LayerToLayer()], compiler="eager")


def trained(rank):
    plain = stack(3)
    model = sharded(copy.deepcopy(plain), batch(2, 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    reference = torch.optim.SGD(plain.parameters(), lr=0.05)
    for step in range(2):
        parts = [batch(2 + r, seed=10 * step + r) for r in range(WORLD)]
        total(model(parts[rank])).backward()
        exact = from_losses(plain, (total(plain(row[None])) / WORLD for ids in parts for row in ids))
        for name, param in plain.named_parameters():
            param.grad = exact[name].grad
            own = model.get_parameter(name)
            for found, wanted in (
                (own.grad, exact[name].grad),
                (find(own, SUM_GRAD_SQUARED), exact[name].sum_grad_squared),
            ):
                torch.testing.assert_close(found.full_tensor(), wanted, msg=lambda t, n=name: f"{n}: {t}", **EXACT)
            assert find(own, NUM_SAMPLES) == 5
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
        for name, param in plain.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).full_tensor(), param.detach(), **EXACT)
    report = graphopt.Report.of(model)
    assert {row.name for row in report.coverage} == {name for name, _ in plain.named_parameters()}
    assert report.num_covered == len(report.coverage)
    assert len(graphopt.records(model)) == 4


def test_training(ranks):
    ranks(trained)


def counted(rank):
    """Twice as many layers, and no more graphs: the embedding, a layer, the norm, the head."""
    model = sharded(stack(6), batch(2, 0))
    torch._dynamo.utils.counters.clear()
    total(model(batch(2, seed=rank))).backward()
    assert len(graphopt.records(model)) == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert all(find(param, SUM_GRAD_SQUARED) is not None for param in model.parameters())


def test_equal_layers_are_compiled_once(ranks):
    ranks(counted)
