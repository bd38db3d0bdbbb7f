"""Normalisation: batch statistics taken as given, running statistics updated once, samples that are not in front."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import graphopt
from graphopt.passes import TrueGrad
from graphopt.passes.truegrad.propagation import find_sample_axes
from graphopt.passes.truegrad.sample_axis import Lost
from graphopt.pipeline import Status
from tests.models import double, smooth
from tests.oracle import Statistic, loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, check, trace, train_step


class Model(nn.Module):
    """A forward function over parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def rows(model):
    return {row.name: row for record in graphopt.records(model) for row in record.coverage}


# --- the oracle for operators that mix samples --------------------------------------------------------------------------------


class OwnCopies(TorchFunctionMode):
    """Gives each sample a copy of every parameter, in the few functions that the models below are made of.

    The model runs once, on the whole batch, so what samples do to each other through statistics of the batch is in the
    gradients; a copy's gradient is what its sample's rows add to the gradient of the parameter.
    """

    def __init__(self, num, sample_of_row):
        super().__init__()
        self.num, self.sample_of_row, self.copies = num, sample_of_row, {}

    def own(self, param):
        """One row of the parameter for each row of the batch."""
        if param not in self.copies:
            self.copies[param] = param.detach().expand(self.num, *param.shape).clone().requires_grad_()
        return self.copies[param][self.sample_of_row]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.conv2d, F.conv2d):
            input, weight, bias, *tail = args
            weights = self.own(weight)
            each = [F.conv2d(input[row : row + 1], weights[row], None, *tail) for row in range(len(input))]
            return torch.cat(each) + (0 if bias is None else self.own(bias)[:, :, None, None])
        if func is F.linear:
            input, weight, bias = args
            return (self.own(weight) @ input[..., None])[..., 0] + self.own(bias)
        if func is F.batch_norm or func is F.instance_norm:
            given = inspect.signature(func).bind(*args, **kwargs).arguments
            output = func(**{**given, "weight": None, "bias": None})
            shape = (-1, output.shape[1], *[1] * (output.dim() - 2))
            return output * self.own(given["weight"]).reshape(shape) + self.own(given["bias"]).reshape(shape)
        return func(*args, **kwargs)


def from_copies(model, inputs, num, sample_of_row):
    names = {param: name for name, param in model.named_parameters()}
    with OwnCopies(num, sample_of_row) as mode:
        loss = smooth(model(*inputs))
    found = {}
    for param, copies in mode.copies.items():
        (grads,) = torch.autograd.grad(loss, copies, retain_graph=True)
        found[names[param]] = Statistic(grads.sum(0), grads.square().sum(0))
    return found


def network(norm, width=4):
    return nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(width, 3, 2), nn.Flatten(), nn.Linear(36, 3)
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.second, self.other = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2, momentum=0.5)

    def forward(self, x):
        return torch.tanh(x + self.other(self.second(torch.relu(self.norm(self.first(x))))))


TRAINING = {
    "batch norm": lambda: (network(nn.BatchNorm2d(4)), torch.randn(4, 2, 5, 4)),
    "without running statistics": lambda: (network(nn.BatchNorm2d(4, track_running_stats=False)), torch.randn(4, 2, 5, 4)),
    "residual": lambda: (Residual(), torch.randn(4, 2, 4, 3)),
    "instance norm": lambda: (network(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), torch.randn(4, 2, 5, 4)),
    "one dimension": lambda: (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)),
    "three dimensions": lambda: (nn.BatchNorm3d(2), torch.randn(4, 2, 2, 3, 2)),
    "channels of a sequence": lambda: (nn.BatchNorm1d(3), torch.randn(4, 3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_in_training(name):
    """Against a copy of every parameter for each sample; two steps, so that running statistics matter."""
    module, x = TRAINING[name]()
    model, inputs = double(module.train(), (x,))
    plain = copy.deepcopy(model)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    for step in range(2):
        reference = copy.deepcopy(plain)
        expected = from_copies(reference, inputs, 4, torch.arange(4))
        torch.testing.assert_close(train_step(model, inputs), train_step(plain, inputs), rtol=1e-12, atol=1e-12)
        assert_statistics(model, expected, 4, f"step {step}:", rtol=1e-8, atol=1e-11)
        for (key, param), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-9, atol=1e-11, msg=key)
        for (key, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, rtol=1e-12, atol=1e-12, msg=key)


def test_the_oracle_agrees_with_the_loop_where_samples_do_not_meet():
    model, inputs = double(network(nn.BatchNorm2d(4).eval()), (torch.randn(4, 2, 5, 4),))
    model.eval()
    loop, copies = (
        loop_over_samples(model, inputs, smooth, reduction="sum"),
        from_copies(model, inputs, 4, torch.arange(4)),
    )
    for name, expected in loop.items():
        torch.testing.assert_close(copies[name].sum_grad_squared, expected.sum_grad_squared)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ["frames behind samples", "samples behind frames"])
def test_several_rows_for_each_sample(order, training):
    if order == "frames behind samples":
        function = lambda m, x: m.head(m.norm(m.layer(x.flatten(0, 1))).tanh()).unflatten(0, (-1, 3))  # noqa: E731
        sample_of_row = torch.arange(4).repeat_interleave(3)
    else:
        function = lambda m, x: m.head(m.norm(m.layer(x.transpose(0, 1).flatten(0, 1))).tanh()).unflatten(0, (3, -1))  # noqa: E731
        sample_of_row = torch.arange(4).repeat(3)
    module = Model(function, layer=nn.Linear(2, 5), norm=nn.BatchNorm1d(5), head=nn.Linear(5, 2))
    model, inputs = double(module.train(training), (torch.randn(4, 3, 2),))
    expected = from_copies(copy.deepcopy(model), inputs, 4, sample_of_row)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    train_step(model, inputs)
    assert_statistics(model, expected, 4, rtol=1e-8, atol=1e-11)


LAYERS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, eval": lambda: nn.BatchNorm2d(4).eval(),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance, eval": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm([4, 3, 3]),
    "layer, last axis": lambda: nn.LayerNorm(3),
    "root mean square": lambda: nn.RMSNorm(3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(LAYERS))
def test_outputs_and_input_gradients_are_bitwise_the_plain_model(name, dtype):
    layer = LAYERS[name]().to(dtype)
    for param in layer.parameters():
        nn.init.normal_(param)
    plain = copy.deepcopy(layer)
    graphopt.transform(layer, [TrueGrad()], compiler="aot_eager")
    found = []
    for model in (layer, plain):
        x = torch.linspace(-1, 2, 4 * 36, dtype=dtype).sin().reshape(4, 4, 3, 3).requires_grad_()
        output = model(x)
        smooth(output.float()).backward()
        found.append((output, x.grad, *model.buffers()))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        difference = (ours.grad.float() - theirs.grad.float()).norm() / theirs.grad.float().norm()
        assert difference <= {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
        assert ours.sum_grad_squared.dtype == torch.float32


FORMS = {
    "local response": lambda: (nn.Sequential(nn.Conv2d(2, 4, 1), nn.LocalResponseNorm(3), nn.Conv2d(4, 2, 1)), torch.randn(4, 2, 3, 3)),
    "local response, one dimension": lambda: (nn.Sequential(nn.Conv1d(2, 4, 1), nn.LocalResponseNorm(2)), torch.randn(4, 2, 3)),
    "root mean square without a weight": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4, elementwise_affine=False)), torch.randn(4, 2, 3)
    ),
    "group norm without parameters": lambda: (nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4, affine=False)), torch.randn(4, 3)),
    "samples on the second axis": lambda: (
        Model(lambda m, x: m.norm(x.transpose(0, 1)).transpose(0, 1), norm=nn.LayerNorm(3)), torch.randn(4, 5, 3)
    ),
    "channels last": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval(),
        torch.randn(4, 2, 5, 5).to(memory_format=torch.channels_last),
    ),
    "one norm, used twice": lambda: (Model(lambda m, x: m.norm(m.norm(x).sin()), norm=nn.GroupNorm(2, 4)), torch.randn(4, 4, 3)),
    "computed weight": lambda: (
        Model(lambda m, x: F.layer_norm(x, (3,), m.scale.exp(), m.shift), scale=nn.Parameter(torch.randn(3)),
              shift=nn.Parameter(torch.randn(3))),
        torch.randn(4, 5, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORMS))
def test_forms(name):
    module, x = FORMS[name]()
    check(module, (x,))


@pytest.mark.parametrize("name", ["batch", "group", "instance", "layer, last axis"])
def test_per_token(name):
    """Every place counts by itself: the equation, with the normalised input written out."""
    layer, (x,) = double(LAYERS[name](), (torch.randn(2, 4, 3, 3),))
    over = {"batch": (0, 2, 3), "group": None, "instance": (2, 3), "layer, last axis": (3,)}[name]
    if over is None:
        groups = x.reshape(2, 2, -1)
        normal = (
            (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        ).view_as(x)
    else:
        normal = (x - x.mean(over, keepdim=True)) / (x.var(over, correction=0, keepdim=True) + 1e-5).sqrt()
    output = layer(x)
    (grad,) = torch.autograd.grad(smooth(output), output)
    features = 3 if "layer" in name else 1
    others = [axis for axis in range(4) if axis != features]
    graphopt.transform(layer, [TrueGrad(per="token")], compiler="aot_eager")
    train_step(layer, (x,))
    torch.testing.assert_close(layer.weight.sum_grad_squared, (grad * normal).square().sum(others))
    torch.testing.assert_close(layer.bias.sum_grad_squared, grad.square().sum(others))
    assert layer.weight.num_samples == x.numel() // x.shape[features]
    assert {row.status for row in rows(layer).values()} == {Status.PER_TOKEN}


@pytest.mark.parametrize(
    ("function", "shape", "axis", "why"),
    [
        (lambda x: F.layer_norm(x, (5, 3)), (5, 4, 3), 1, "layer_norm works across samples"),
        (lambda x: F.layer_norm(x, x.shape[1:]), (4, 5, 3), 0, None),
        (lambda x: F.layer_norm(x.transpose(0, 1), (4, 3)), (4, 5, 3), 0, "layer_norm works across samples"),
        (lambda x: F.rms_norm(x.mT.mT, (3,)), (4, 5, 3), 1, None),
        (lambda x: F.rms_norm(x.movedim(0, -1), (4,)), (4, 5, 3), 0, "rms_norm works across samples"),
        (lambda x: F.group_norm(x.transpose(0, 2), 1), (4, 5, 3), 0, "group_norm works across samples"),
        (lambda x: F.instance_norm(x.transpose(0, 2)), (4, 5, 3), 0, "instance_norm works across samples"),
        (lambda x: F.instance_norm(x.transpose(0, 1)), (4, 5, 3), 0, "instance_norm works across samples"),
        (lambda x: F.batch_norm(x.transpose(0, 1), None, None, training=True), (4, 5, 3), 0, "channels where the samples are"),
        (lambda x: F.batch_norm(x.movedim(0, 2), None, None, training=True), (4, 5, 3), 0, None),
    ],
)  # fmt: skip
def test_where_the_samples_are(function, shape, axis, why):
    if why == "layer_norm works across samples" and axis == 1:
        function = lambda x: F.layer_norm(x, (4, 3))  # noqa: E731
    graph = trace(lambda x: function(x), torch.randn(*shape), axes=(axis,))
    layout = find_sample_axes(graph)[graph.output_nodes[0]]
    assert (isinstance(layout, Lost) and why in layout.why) if why else not isinstance(layout, Lost)


def test_synchronised_batch_norm_of_one_process_is_batch_norm():
    model, inputs = double(nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4)), (torch.randn(4, 3),))
    expected = from_copies(copy.deepcopy(model), inputs, 4, torch.arange(4))
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    train_step(model, inputs)
    assert_statistics(model, expected, 4, rtol=1e-8, atol=1e-11)


def test_another_number_of_samples_does_not_compile_again():
    model, (x,) = double(network(nn.BatchNorm2d(4)), (torch.randn(6, 2, 5, 4),))
    plain = copy.deepcopy(model)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    for num in (6, 3, 5):
        expected = from_copies(copy.deepcopy(plain), (x[:num],), num, torch.arange(num))
        with torch._dynamo.config.patch(error_on_recompile=num != 6):
            train_step(model, (x[:num],))
        assert_statistics(model, expected, num, rtol=1e-8, atol=1e-11)


@pytest.mark.slow
def test_inductor():
    model, inputs = double(Residual(), (torch.randn(4, 2, 4, 4),))
    expected = from_copies(copy.deepcopy(model), inputs, 4, torch.arange(4))
    graphopt.transform(model, [TrueGrad()])
    train_step(model, inputs)
    assert_statistics(model, expected, 4, rtol=1e-8, atol=1e-11)
