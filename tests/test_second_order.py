"""Compiled gradients of every kind of operator are differentiated again: as eager autograd does, and as finite differences say."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt import compilation, second_order
from graphopt.errors import UnsupportedError
from graphopt.passes import GradInit, LayerToLayer
from tests import models
from tests.layered_models import MODELS, scalar

IMAGE, SEQUENCE, ROWS = (3, 4, 8, 8), (3, 5, 8), (4, 6)


class Of(nn.Module):
    """A function of parameters or modules, and an input."""

    def __init__(self, function, *parts):
        super().__init__()
        self.modules_ = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.parameters_ = nn.ParameterList(nn.Parameter(torch.randn(p)) for p in parts if isinstance(p, tuple))
        self.function = function

    def forward(self, x):
        return self.function(*self.modules_, *self.parameters_, x)


def in_place(a, b, x):
    hidden = a(x).mul(2.0)
    hidden.add_(b(x))
    hidden[:, 0] = hidden[:, 1]
    return F.silu(hidden, inplace=True)


def without_gradient(a, b, x):
    hidden = a(x)
    with torch.no_grad():
        largest = hidden.abs().amax(-1, keepdim=True)
    return b((hidden / largest).tanh()) + hidden.detach() * a(x)


def attention(linear, x, **options):
    return F.scaled_dot_product_attention(*linear(x).chunk(3, -1), **options)


S = nn.Sequential
CASES = {
    "linear": (lambda: S(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), ROWS),
    "linear_of_a_vector": (lambda: S(nn.Linear(6, 5), nn.Tanh()), (6,)),
    "conv2d": (
        lambda: S(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(6, 5, 3, stride=2), nn.GELU()),
        IMAGE,
    ),
    "conv1d": (lambda: S(nn.Conv1d(5, 6, 3), nn.SiLU()), SEQUENCE),
    "conv3d": (lambda: S(nn.Conv3d(2, 3, 2), nn.Softplus()), (2, 2, 3, 4, 4)),
    "transposed_and_same": (
        lambda: S(nn.ConvTranspose2d(4, 3, 3, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 3, padding="same")),
        IMAGE,
    ),
    "pooling": (
        lambda: S(
            nn.Conv2d(4, 6, 3),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 2),
            nn.Sigmoid(),
        ),
        IMAGE,
    ),
    "batch_norm": (
        lambda: S(
            nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3), nn.BatchNorm2d(2, affine=False)
        ),
        IMAGE,
    ),
    "group_norm": (lambda: S(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.Tanh()), IMAGE),
    "layer_norm": (
        lambda: S(nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8, elementwise_affine=False)),
        SEQUENCE,
    ),
    "rms_norm": (lambda: S(nn.Linear(8, 8), nn.RMSNorm(8), nn.Tanh()), SEQUENCE),
    "weight_norm": (lambda: S(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh()), SEQUENCE),
    "embedding": (lambda: S(nn.Embedding(9, 6, padding_idx=0), nn.Linear(6, 4), nn.Tanh()), None),
    "multi_head_attention": (
        lambda: Of(lambda m, x: m(x, x, x)[0].tanh(), nn.MultiheadAttention(8, 2, batch_first=True)),
        SEQUENCE,
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), 3, enable_nested_tensor=False),
        SEQUENCE,
    ),
    "causal_attention": (lambda: Of(lambda m, x: attention(m, x, is_causal=True), nn.Linear(8, 24)), SEQUENCE),
    "masked_attention": (
        lambda: Of(lambda m, x: attention(m, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()), nn.Linear(8, 24)),
        SEQUENCE,
    ),
    "activations": (
        lambda: S(
            nn.Linear(8, 8),
            nn.LeakyReLU(),
            nn.Hardswish(),
            nn.Mish(),
            nn.SELU(),
            nn.CELU(),
            nn.LogSigmoid(),
            nn.PReLU(),
            nn.GLU(),
            nn.Softmax(-1),
        ),
        SEQUENCE,
    ),
    "bilinear": (lambda: Of(lambda m, x: m(x, x).tanh(), nn.Bilinear(6, 6, 3)), ROWS),
    "matmul": (lambda: Of(lambda p, q, x: torch.tanh(torch.tanh(x @ p) @ q), (8, 3), (3, 3, 2)), SEQUENCE),
    "einsum": (lambda: Of(lambda p, x: torch.einsum("nsi,io->nso", x, p).tanh(), (8, 3)), SEQUENCE),
    "addmm": (lambda: Of(lambda p, b, x: torch.addmm(b, x, p).tanh(), (6, 3), (3,)), ROWS),
    "weight_on_the_left": (lambda: Of(lambda p, x: torch.tanh(p @ x), (3, 5)), SEQUENCE),
    "product_of_weights": (lambda: Of(lambda p, q, x: torch.tanh(x @ (p @ q)), (8, 3), (3, 4)), SEQUENCE),
    "weight_used_twice": (
        lambda: Of(lambda p, x: torch.tanh(F.linear(F.linear(x, p).tanh(), p) @ p), (8, 8)),
        SEQUENCE,
    ),
    "weight_times_itself": (lambda: Of(lambda p, x: F.linear(p, p).tanh().sum() + x.mean(), (5, 5)), SEQUENCE),
    "expanded": (
        lambda: Of(lambda p, q, x: torch.cat([p.expand(3, 1, 8), x], 1).tanh() @ q, (1, 1, 8), (8, 2)),
        SEQUENCE,
    ),
    "in_place": (lambda: Of(in_place, nn.Linear(6, 6), nn.Linear(6, 6)), ROWS),
    "without_gradient": (lambda: Of(without_gradient, nn.Linear(6, 6), nn.Linear(6, 6)), ROWS),
    "indexing": (
        lambda: Of(
            lambda m, x: torch.topk(torch.where(x > 0, m(x).tanh(), x * x).cumsum(1).flip(1)[:, [0, 2]], 3)[0],
            nn.Linear(8, 8),
        ),
        SEQUENCE,
    ),
    "checkpoint": (
        lambda: Of(lambda m, x: checkpoint(lambda y: m(y).tanh(), x, use_reentrant=False) * x, nn.Linear(8, 8)),
        SEQUENCE,
    ),
    "loss": (
        lambda: Of(
            lambda m, x: F.cross_entropy(
                m(x).transpose(1, 2), torch.zeros(3, 5, dtype=torch.long), label_smoothing=0.1
            ),
            nn.Linear(8, 8),
        ),
        SEQUENCE,
    ),
}
COMPILED = ["conv2d", "embedding"]  # with Inductor
STOPPED = ["without_gradient"]  # where finite differences see what gradients do not


OPERATORS = {
    "scale_parameter": (
        torch.randn(3, 2),
        torch.tensor(1.5, requires_grad=True),
        torch.zeros(()).expand(3, 2).requires_grad_(),
    ),
    "stop_gradient": (torch.randn(3, 2),),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    opcheck(getattr(torch.ops.graphopt, name).default, OPERATORS[name], test_utils=["test_schema", "test_faketensor"])


def test_scale_parameter():
    weight, scale, probe = torch.randn(3, 2, requires_grad=True), *OPERATORS["scale_parameter"][1:]
    scaled = second_order.SCALE_PARAMETER(weight, scale, probe)
    torch.testing.assert_close(scaled, 1.5 * weight, rtol=0, atol=0)
    cotangent = torch.randn(3, 2)
    of_weight, of_scale, of_probe = torch.autograd.grad(scaled, (weight, scale, probe), cotangent, allow_unused=True)
    assert of_weight is None  # the parameter itself gets no gradient
    torch.testing.assert_close(of_scale, (cotangent * weight).sum().detach())
    torch.testing.assert_close(of_probe, cotangent, rtol=0, atol=0)


def double(name):
    torch.manual_seed(0)
    build, shape = CASES[name]
    model = build().double()
    return model, torch.randint(0, 9, (3, 5)) if shape is None else torch.randn(shape, dtype=torch.float64)


def loss_of(output):
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (output * weight).sum() + output.square().mean()


def differentiate(model, x, scales):
    """2-norm of the gradient, its derivative with respect to the scales, and that of the loss."""
    with graphopt.GradInitWrapper(model) as ginit:
        leaves = list(ginit.parameters())
        with torch.no_grad():
            for leaf, scale in zip(leaves, scales, strict=False):
                leaf.fill_(scale)
        norm = ginit.grad_loss(loss_of(model(x)), norm=2, gamma=0.0)
        second = torch.autograd.grad(norm, leaves, allow_unused=True)
        first = torch.autograd.grad(loss_of(model(x)), leaves, allow_unused=True)
    together = [torch.stack([torch.zeros_like(norm) if g is None else g for g in grads]) for grads in (second, first)]
    return norm.detach(), *together


SCALES = [1 + 0.1 * position for position in range(60)]


@pytest.mark.parametrize("name", [name for name in CASES if name not in STOPPED])
def test_as_finite_differences(name):
    model, x = double(name)
    norm, second, first = differentiate(graphopt.transform(copy.deepcopy(model), compiler="aot_eager"), x, SCALES)
    step, direction = 1e-6, torch.cos(torch.arange(60.0, dtype=torch.float64))
    ends = []
    for sign in (1, -1):
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            for param, scale, way in zip(scaled.parameters(), SCALES, direction, strict=False):
                param.mul_(scale + sign * step * way)
        with second_order.differentiable_kernels():
            loss = loss_of(scaled(x))
        grads = torch.autograd.grad(loss, list(scaled.parameters()), allow_unused=True)
        ends.append((torch.cat([g.flatten() for g in grads if g is not None]).norm(), loss.detach()))
    middle = (ends[0][0] + ends[1][0]) / 2
    torch.testing.assert_close(norm, middle, rtol=1e-6, atol=1e-9)
    for found, (up, down) in ((second, [e[0] for e in ends]), (first, [e[1] for e in ends])):
        slope = (up - down) / (2 * step)
        torch.testing.assert_close((found * direction[: len(found)]).sum(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "compiler"), [*((n, "inductor") for n in COMPILED), *((n, "aot_eager") for n in STOPPED)]
)
def test_as_eager(name, compiler):
    model, x = double(name)
    expected = differentiate(copy.deepcopy(model), x, SCALES)
    found = differentiate(graphopt.transform(model, compiler=compiler), x, SCALES)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", MODELS)
def test_values_between_layers(name):
    """Regions that hand each other several values, with and without gradients, are differentiated as one."""
    torch.manual_seed(0)
    model, kwargs = MODELS[name].build()
    model, values = models.double(model.eval(), tuple(kwargs.values()))
    kwargs = dict(zip(kwargs, values, strict=True))
    found = []
    for wrapped in (copy.deepcopy(model), graphopt.transform(model, compiler="aot_eager")):
        with graphopt.GradInitWrapper(wrapped) as ginit:
            total = ginit.grad_loss(scalar(wrapped(**kwargs)), norm=2, gamma=0.0)
            total.backward()
            found.append((total.detach(), [scale.grad for scale in ginit.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


def test_equal_layers_are_compiled_once(monkeypatch):
    compiled, compile_one = [], compilation._compile_one
    monkeypatch.setattr(compilation, "_compile_one", lambda *args: compiled.append(args) or compile_one(*args))
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    for num_layers in (4, 8):
        compiled.clear()
        model = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        graphopt.transform(model, [GradInit(), LayerToLayer()], compiler="aot_eager")
        with graphopt.GradInitWrapper(model) as ginit:
            ginit.grad_loss(model(torch.randn(SEQUENCE)).square().mean(), gamma=0.0).backward()
        assert len(compiled) == 4  # forward and backward of the first, whose input has no gradient, and of another


def test_no_product_is_made_of_a_scale_and_a_matrix():
    """And the second pass sums no gradient of a weight: 4 products for a linear layer in the middle instead of 6."""
    graphs = []

    def keep(module, fakes):
        graphs.append(module)
        return torch.fx.Interpreter(module).run

    graph = torch.fx.Graph()
    weight, scale, probe, x = [graph.placeholder(name) for name in ("weight", "scale", "probe", "x")]
    scaled = graph.call_function(second_order.SCALE_PARAMETER, (weight, scale, probe))
    graph.output([graph.call_function(torch.ops.aten.linear.default, (x, scaled))])
    scaled.meta["val"] = torch.empty(3, 2)
    module = torch.fx.GraphModule({}, graph)
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    values = [torch.randn(3, 2), torch.tensor(2.0), torch.zeros(()).expand(3, 2), torch.randn(5, 2)]
    fakes = [
        mode.from_tensor(value).detach().requires_grad_(needs)
        for value, needs in zip(values, (False, True, True, True), strict=True)
    ]
    second_order.compile_twice_differentiable(module, fakes, keep)
    products = [[n for n in g.graph.nodes if n.target is torch.ops.aten.mm.default] for g in graphs]
    assert [len(found) for found in products] == [1, 2]
    of_scale = [n for n in graphs[0].graph.nodes if n.target is torch.ops.aten.mul.Tensor]
    assert [tuple(n.meta["val"].shape) for n in of_scale] == [(5, 3)]


def test_what_cannot_be_differentiated_twice_is_refused():
    model = graphopt.transform(Of(lambda m, x: torch.fft.rfft(m(x)).abs(), nn.Linear(8, 8)), compiler="aot_eager")
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(UnsupportedError, match=r"cannot be differentiated twice .*compiler='eager'"),
        graphopt.GradInitWrapper(model),
    ):
        model(torch.randn(SEQUENCE))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model = graphopt.transform(Of(lambda m, x: m(x)[0], nn.LSTM(8, 4)), compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=r"recurrent layer.*compiler='eager'"), graphopt.GradInitWrapper(model):
        model(torch.randn(SEQUENCE))


def test_a_gradient_that_autograd_is_asked_for_is_refused():
    model = graphopt.transform(nn.Linear(8, 8), compiler="aot_eager")
    with graphopt.GradInitWrapper(model) as ginit:
        loss = model(torch.randn(SEQUENCE)).square().mean()
        with pytest.raises(UnsupportedError, match=r"ask ginit\.gradients\(loss\)"):
            torch.autograd.grad(loss, list(ginit.parameters()), create_graph=True)
