"""A transformed model with scales computes in graphs what it computes as it was written; what cannot be scaled is refused."""

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import MixedPrecisionInit, OptionError, UnsupportedError
from graphopt.passes import GradInit


class Model(nn.Module):
    """One linear layer, and a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))


class Average(Model):
    def forward(self, x):
        hidden = self.linear(x)
        with torch.no_grad():
            self.steps += 1
            self.mean.mul_(0.9).add_(0.1 * hidden.mean(0))
        return (hidden - self.mean).tanh()


class Assigned(Model):
    def forward(self, x):
        hidden = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * hidden.mean(0).detach()
        return (hidden - self.mean).tanh()


class Part(Model):
    def forward(self, x):
        hidden = self.linear(x)
        with torch.no_grad():
            self.mean[1:] = hidden.mean(0)[1:]
        return (hidden - self.mean).tanh()


class Detached(Model):
    def forward(self, x):
        hidden = self.linear(x)
        self.mean.detach().mul_(0.9).add_(hidden.detach().mean(0))
        return (hidden - self.mean).tanh()


class Out(Model):
    def forward(self, x):
        hidden = self.linear(x)
        with torch.no_grad():
            torch.mul(hidden.mean(0), 2, out=self.mean)
        return (hidden - self.mean).tanh()


class Foreach(Model):
    def forward(self, x):
        hidden = self.linear(x)
        with torch.no_grad():
            torch._foreach_add_([self.mean], [hidden.mean(0)])
        return (hidden - self.mean).tanh()


class Activations(Model):
    def forward(self, x):
        hidden = self.linear(x)
        with torch.no_grad():
            size = hidden.abs()
            size[:, 0] = 5
            size[:, 1:].mul_(2)
            largest = size.amax(1, keepdim=True)
            largest.add_(1)
        return (hidden / largest).tanh()


class Broken(Model):
    """Two graphs, with a weight in both."""

    def forward(self, x):
        x = self.linear(x).tanh()
        torch._dynamo.graph_break()
        return nn.functional.linear(x, self.linear.weight).tanh()


def instance_norm():
    return nn.Sequential(nn.Conv1d(3, 3, 1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True), nn.Tanh())


S = nn.Sequential
KINDS = {
    "average": Average,
    "assigned": Assigned,
    "part": Part,
    "detached": Detached,
    "out": Out,
    "foreach": Foreach,
    "activations": Activations,
    "broken": Broken,
    "instance_norm": instance_norm,
    "batch_norm in eval": lambda: S(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).eval(),
    "spectral_norm": lambda: S(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Tanh()),
    "sparse": lambda: S(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2), nn.Tanh()),
}


def built(name):
    torch.manual_seed(0)
    x = torch.arange(15).reshape(5, 3) % 5 if name == "sparse" else torch.randn(5, 3, dtype=torch.float64)
    return KINDS[name]().double(), x[..., None] * torch.arange(4) if name == "instance_norm" else x


def set_scales(ginit):
    with torch.no_grad():
        for position, scale in enumerate(ginit.parameters()):
            scale.fill_(1 + 0.1 * position)


def differentiate(model, x):
    """Output, norm of the gradient, and its derivative; buffers are those that were."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        output = model(x)
        total = ginit.grad_loss(output.square().sum(), 2, gamma=0.0)
        slopes = torch.autograd.grad(total, list(ginit.parameters()))
    torch.testing.assert_close(dict(model.named_buffers()), buffers, rtol=0, atol=0)
    return output.detach(), total.detach(), torch.stack(slopes)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", KINDS)
def test_graphs_compute_what_the_model_does(name, compiler):
    expected = differentiate(*built(name))
    model, x = built(name)
    graphopt.transform(model, [GradInit()], compiler=compiler)
    torch.testing.assert_close(differentiate(model, x), expected, rtol=1e-11, atol=1e-13)


def test_batches_of_any_size():
    """Also after graphs with other passes have seen the same tensors."""
    torch.manual_seed(0)
    model, x = S(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(5, 3, dtype=torch.float64)
    plain = copy.deepcopy(model)
    graphopt.transform(model, compiler="aot_eager")
    model(x).sum().backward()
    found = []
    for one in (model, plain):
        with graphopt.GradInitWrapper(one) as ginit:
            set_scales(ginit)
            totals = [ginit.grad_loss(one(x[:size]).square().sum(), gamma=0.0) for size in (5, 3, 2, 1, 5)]
            found.append(torch.autograd.grad(sum(totals), list(ginit.parameters())))
    torch.testing.assert_close(*found, rtol=1e-11, atol=0)
    assert len(graphopt.records(model)) <= 4  # asleep; awake for one size, for any, and for 1


@pytest.mark.parametrize("compiler", [None, "eager", "aot_eager"])
def test_autocast(compiler):
    torch.manual_seed(0)
    model, x = S(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2)), torch.randn(32, 8)
    exact = differentiate(copy.deepcopy(model), x)
    if compiler is not None:
        graphopt.transform(model, [GradInit()], compiler=compiler)
    with pytest.warns(MixedPrecisionInit), graphopt.GradInitWrapper(model) as ginit:  # noqa: PT031
        set_scales(ginit)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        assert output.dtype == torch.bfloat16
        total = ginit.grad_loss(output.float().square().sum(), 2, gamma=0.0)
        slopes = torch.stack(torch.autograd.grad(total, list(ginit.parameters())))
    torch.testing.assert_close((output.float(), total, slopes), exact, rtol=0.02, atol=0.02)


def test_writing_to_a_weight_is_refused():
    """Such writes pass autograd by, which a graph of plain operators cannot."""
    for model, name in (
        (S(nn.Embedding(5, 3, max_norm=1.0)), r"embedding_renorm_.* writes to 0\.weight"),
        (Clamped(), r"aten\.clamp_.* writes to linear\.weight"),
    ):
        graphopt.transform(model, [GradInit()], compiler="eager")
        with (
            pytest.raises(UnsupportedError, match=rf"{name}, which has a scale.*GradInitWrapper\(graphopt\.restore"),
            graphopt.GradInitWrapper(model),
        ):
            model(torch.arange(3) if isinstance(model, S) else torch.randn(5, 3))
        with graphopt.GradInitWrapper(graphopt.restore(model)) as ginit:
            output = model(torch.arange(3) if isinstance(model, S) else torch.randn(5, 3))
            ginit.grad_loss(output.square().sum(), gamma=0.0).backward()


class Clamped(Model):
    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.clamp_(-0.1, 0.1)
        return self.linear(x).tanh()


def compiled_part():
    return S(torch.compile(nn.Linear(3, 3)), nn.Tanh())


def compiled_in_place():
    model = S(nn.Linear(3, 3), nn.Tanh())
    model.compile()
    return model


def transformed_part():
    return S(graphopt.transform(nn.Linear(3, 3)), nn.Tanh())


PARTS = {
    compiled_part: "0 of Sequential is compiled by torch.compile, and so is differentiable once",
    compiled_in_place: "all of Sequential is compiled by torch.compile",
    transformed_part: r"0 of Sequential is transformed by itself.*graphopt\.restore\(model\.get_submodule\('0'\)\) first",
}


@pytest.mark.parametrize("make", PARTS)
def test_parts_that_are_compiled_by_themselves(make):
    model = make()
    with pytest.raises(OptionError, match=PARTS[make]):
        graphopt.GradInitWrapper(model)
    assert [p.ndim for p in model.parameters()] == [2, 1]


def test_losing_the_wrapper_leaves_no_detour():
    model = graphopt.transform(S(nn.Linear(3, 3)), compiler="eager")
    x = torch.randn(5, 3)
    graphopt.GradInitWrapper(model)
    model(x).sum().backward()
    assert model[0].weight.sum_grad_squared.shape == (3, 3)


def test_restored_inside():
    torch.manual_seed(0)
    model, x = S(nn.Linear(3, 3), nn.Tanh()).double(), torch.randn(5, 3, dtype=torch.float64)
    expected = differentiate(copy.deepcopy(model), x)
    graphopt.transform(model, compiler="eager")
    with graphopt.GradInitWrapper(model) as ginit:
        set_scales(ginit)
        torch.testing.assert_close(model(x).detach(), expected[0])
        graphopt.restore(model)
        total = ginit.grad_loss(model(x).square().sum(), 2, gamma=0.0)
    torch.testing.assert_close(total.detach(), expected[1])
    torch.testing.assert_close(model(x).detach(), expected[0])
