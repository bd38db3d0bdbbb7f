"""MetaInit's gradient quotient against the explicit Hessian, and the variances that LSUV leaves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.errors import InitError
from graphopt.initialization.batches import Draws
from graphopt.initialization.meta_init import MetaInitSearch
from graphopt.initialization.scaled_model import ScaledModel
from graphopt.initialization.searching import Search


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(shape=(16, 5), num=8, classes=3):
    torch.manual_seed(1)
    return [(torch.randn(shape, dtype=torch.float64), torch.randint(0, classes, shape[:1])) for _ in range(num)]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def quotient(scales, batch):
    """The definition, by the Hessian of the loss in the two weight matrices."""
    model = mlp()
    shapes = [model[0].weight.shape, model[2].weight.shape]
    flat = torch.cat([(s * m.weight.detach()).flatten() for s, m in zip(scales, (model[0], model[2]), strict=True)])

    def loss(values):
        first, last = (
            part.view(shape) for part, shape in zip(values.split([s.numel() for s in shapes]), shapes, strict=True)
        )
        return F.cross_entropy(F.linear(F.linear(batch[0], first, model[0].bias).tanh(), last, model[2].bias), batch[1])

    grad = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    sign = torch.where(grad >= 0, 1.0, -1.0)
    return ((grad - hessian @ grad) / (grad + 1e-5 * sign) - 1).abs().mean()


def test_gradient_quotient():
    (batch, *_) = batches()
    scaled = ScaledModel(mlp(), in_graphs=False)
    search = MetaInitSearch(Search(scaled, loss_fn), torch.ones(4, dtype=torch.float64), lr=None)
    _, _, found, slopes = search._quotient(Draws([batch]))
    scaled.detach(fold=False)
    ones, step = torch.ones(2, dtype=torch.float64), 1e-6
    torch.testing.assert_close(found, quotient(ones, batch), rtol=1e-9, atol=0)
    for position, place in ((0, 0), (2, 1)):
        move = step * F.one_hot(torch.tensor(place), 2)
        slope = (quotient(ones + move, batch) - quotient(ones - move, batch)) / (2 * step)
        torch.testing.assert_close(slopes[position], slope, rtol=1e-4, atol=1e-6)


def test_meta_init_lowers_the_quotient():
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[2].weight.mul_(8)
    result = graphopt.learn_init(model, loss_fn, batches()[:1], method="metainit", steps=60, progress=False)
    first, last = result.trajectory[0].objective, result.trajectory[-1].objective
    assert last < 0.6 * first
    assert result.scales["0.bias"] == 1


class Net(nn.Module):
    """Layers that stand in another order than they compute in."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(6, 3)
        self.conv = nn.Conv2d(2, 4, 3)
        self.middle = nn.Linear(16, 6)

    def forward(self, x):
        return self.last(self.middle(self.conv(x).relu().flatten(1)).relu())


def test_lsuv_brings_variances_to_one():
    torch.manual_seed(0)
    model = Net().double()
    (batch, *_) = data = batches((32, 2, 4, 4))
    result = graphopt.learn_init(model, loss_fn, data, method="lsuv", progress=False)
    variances = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, output, name=name: variances.__setitem__(name, output.var().item()))
    model(batch[0])
    assert list(variances) == ["conv", "middle", "last"]
    assert all(abs(variance - 1) < 0.1 for variance in variances.values())
    assert [step.objective for step in result.trajectory] == pytest.approx(list(variances.values()))
    assert result.scales["conv.bias"] == 1


def test_lsuv_refuses_a_layer_that_says_nothing():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(0 * self.first(x)) + self.last(x)

    model = nn.Sequential(Silent()).double()
    nn.init.zeros_(model[0].last.bias)
    with pytest.raises(InitError, match=r"layer with 0\.last\.weight has the variance 0\.0.*was not changed"):
        graphopt.learn_init(model, loss_fn, batches(), method="lsuv", progress=False)
