"""MetaInit's gradient quotient against the explicit Hessian, and the variances that LSUV leaves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

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


def mlp(factor=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for layer in (model[0], model[2]):
        layer.weight.data.mul_(factor)
    return model


def quotient(model, batch):
    """The definition, by the Hessian of the loss in all parameters."""
    params = dict(model.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in params.values()])

    def loss(values):
        parts = values.split([p.numel() for p in params.values()])
        given = {n: part.view(p.shape) for part, (n, p) in zip(parts, params.items(), strict=True)}
        return F.cross_entropy(functional_call(model, given, (batch[0],)), batch[1])

    grad = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    sign = torch.where(grad >= 0, 1.0, -1.0)
    return ((grad - hessian @ grad) / (grad + 1e-5 * sign) - 1).abs().mean()


def slopes_of(model, batch, step=1e-6):
    """The derivative of the quotient with respect to a factor of each parameter, by finite differences."""
    found = []
    for p in model.parameters():
        weight, sides = p.detach().clone(), []
        for factor in (1 + step, 1 - step):
            p.data = factor * weight
            sides.append(quotient(model, batch))
        p.data = weight
        found.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(found)


def authors_loop(model, data, steps, lr=0.1, momentum=0.9):
    """Algorithm 1: norms of matrices move by signs with momentum; the quotient is over all parameters."""
    norms = {n: p.detach().norm().item() for n, p in model.named_parameters() if p.ndim > 1}
    velocities = dict.fromkeys(norms, 0.0)
    quotients = []
    for batch in data[:steps]:
        quotients.append(quotient(model, batch).item())
        slopes = dict(zip(dict(model.named_parameters()), slopes_of(model, batch), strict=True))
        for n, p in model.named_parameters():
            if n in norms:
                norm = p.detach().norm().item()
                velocities[n] = momentum * velocities[n] - lr * torch.sign(slopes[n]).item()
                p.data = p.data * ((norm + velocities[n]) / norm)
    return quotients


def test_gradient_quotient():
    (batch, *_) = batches()
    scaled = ScaledModel(mlp(), in_graphs=False)
    search = MetaInitSearch(Search(scaled, loss_fn), torch.ones(4, dtype=torch.float64), lr=None)
    _, _, found, slopes = search._quotient(Draws([batch]))
    scaled.detach(fold=False)
    torch.testing.assert_close(found, quotient(mlp(), batch), rtol=1e-9, atol=0)
    torch.testing.assert_close(slopes, slopes_of(mlp(), batch), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("factor", "lr"), [(1.0, None), (2.0, 0.7)], ids=["default", "a norm passes 0"])
def test_meta_init_as_its_authors_have_it(factor, lr):
    model, theirs = mlp(factor), mlp(factor)
    data = batches(num=12)
    result = graphopt.learn_init(model, loss_fn, data, method="metainit", lr=lr, steps=12, progress=False)
    quotients = authors_loop(theirs, data, 12, lr=lr or 0.1)
    assert [step.objective for step in result.trajectory] == pytest.approx(quotients, rel=1e-6)  # gradients near 0
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=0)
    assert (min(result.scales.values()) < 0) == (lr == 0.7)


def test_meta_init_lowers_the_quotient():
    result = graphopt.learn_init(mlp(4.0), loss_fn, batches()[:1], method="metainit", steps=60, progress=False)
    first, last = result.trajectory[0].objective, result.trajectory[-1].objective
    assert last < 0.4 * first
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
