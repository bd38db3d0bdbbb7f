"""Convolutions in every form: against the loop over samples, position by position, and the reductions by themselves."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.passes import TrueGrad
from graphopt.passes.truegrad.ops import convolution as operators
from graphopt.pipeline import Status
from tests.models import double, smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, check, train_step


class Model(nn.Module):
    """A forward function over parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


def rows(model):
    return {row.name: row for record in graphopt.records(model) for row in record.coverage}


def channels_last(shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


FORMS = {
    "reflected": lambda: (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), torch.randn(4, 2, 5, 4)),
    "replicated": lambda: (nn.Conv1d(2, 3, 3, padding=2, padding_mode="replicate"), torch.randn(4, 2, 5)),
    "circular": lambda: (nn.Conv3d(2, 3, 3, padding=1, padding_mode="circular"), torch.randn(4, 2, 3, 3, 3)),
    "same, reflected": lambda: (nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect"), torch.randn(4, 2, 5, 4)),
    "same, even kernel": lambda: (nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(3, 1)), torch.randn(4, 2, 6, 5)),
    "same, in one dimension": lambda: (nn.Conv1d(2, 3, 4, padding="same"), torch.randn(4, 2, 6)),
    "same, in three": lambda: (nn.Conv3d(2, 3, (1, 2, 3), padding="same"), torch.randn(4, 2, 2, 3, 3)),
    "valid": lambda: (nn.Conv2d(2, 3, 2, padding="valid"), torch.randn(4, 2, 4, 3)),
    "input left over": lambda: (nn.Conv2d(2, 3, 2, stride=3), torch.randn(4, 2, 7, 6)),
    "stride beyond the kernel": lambda: (nn.Conv1d(2, 3, 1, stride=3), torch.randn(4, 2, 8)),
    "one by one in groups": lambda: (nn.Conv2d(4, 6, 1, groups=2), torch.randn(4, 4, 3, 2)),
    "depth multiplier": lambda: (nn.Conv2d(3, 6, 3, padding=1, stride=2, groups=3), torch.randn(4, 3, 5, 4)),
    "depthwise in three": lambda: (nn.Conv3d(2, 2, 2, groups=2), torch.randn(4, 2, 3, 3, 2)),
    "wide groups": lambda: (nn.Conv1d(66, 68, 2, groups=2), torch.randn(4, 66, 3)),
    "channels last": lambda: (nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last), channels_last((4, 3, 5, 4))),
    "one position": lambda: (nn.Conv2d(2, 3, 3, bias=False), torch.randn(4, 2, 3, 3)),
    "one position and groups": lambda: (nn.Conv2d(2, 4, 3, groups=2), torch.randn(4, 2, 3, 3)),
    "patches of a transformer": lambda: (
        Model(lambda m, x: m.layer(x).flatten(2).transpose(1, 2), layer=nn.Conv2d(3, 4, 2, stride=2)), torch.randn(4, 3, 4, 6)
    ),
    "constant gradient": lambda: (Model(lambda m, x: m.layer(x).mean((2, 3)), layer=nn.Conv2d(2, 3, 2)), torch.randn(4, 2, 4, 3)),
    "strided input": lambda: (Model(lambda m, x: m.layer(x[:, :, ::2].mT), layer=nn.Conv2d(2, 3, 2)), torch.randn(4, 2, 6, 3)),
    "transposed, channels last": lambda: (nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), channels_last((4, 3, 3, 2))),
    "transposed, depthwise": lambda: (nn.ConvTranspose2d(3, 6, 3, stride=2, groups=3), torch.randn(4, 3, 3, 2)),
    "transposed, wide groups": lambda: (nn.ConvTranspose1d(66, 68, 2, groups=2), torch.randn(4, 66, 3)),
    "transposed, in three": lambda: (nn.ConvTranspose3d(2, 3, 3, 2, 1, (1, 0, 1), dilation=(1, 2, 1)), torch.randn(4, 2, 2, 3, 2)),
    "transposed, output size": lambda: (
        Model(lambda m, x: m.layer(x, output_size=(6, 8)), layer=nn.ConvTranspose2d(2, 3, 3, stride=2)), torch.randn(4, 2, 2, 3)
    ),
    "transposed by torch.convolution": lambda: (
        Model(lambda m, x: torch.convolution(x, m.w, m.b, [2], [1], [2], True, [1], 2), w=weight(4, 3, 2), b=weight(6)),
        torch.randn(4, 4, 5),
    ),
    "spectral norm": lambda: (nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 3, 2)).eval(), torch.randn(4, 2, 4, 3)),
    "weight norm, transposed": lambda: (
        nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(2, 4, 2, groups=2), dim=1), torch.randn(4, 2, 3, 3)
    ),
    "standardised weight": lambda: (
        Model(lambda m, x: F.conv2d(x, (m.w - m.w.mean((1, 2, 3), keepdim=True)) * m.s, m.b), w=weight(3, 2, 2, 2), s=weight(3, 1, 1, 1),
              b=weight(3)),
        torch.randn(4, 2, 4, 3),
    ),
    "one weight both ways": lambda: (
        Model(lambda m, x: F.conv_transpose2d(torch.tanh(F.conv2d(x, m.w, m.b)), m.w), w=weight(3, 2, 2, 2), b=weight(3)),
        torch.randn(4, 2, 4, 3),
    ),
    "a matrix and a kernel": lambda: (
        Model(lambda m, x: F.linear(F.conv1d(x, m.w[..., None]).mT, m.w.T), w=weight(3, 2)), torch.randn(4, 2, 5)
    ),
    "parts of a weight": lambda: (
        Model(lambda m, x: F.conv1d(x, m.w[:2]) + F.conv1d(torch.sin(x), m.w[2:]), w=weight(4, 2, 3)), torch.randn(4, 2, 5)
    ),
}  # fmt: skip


COMPUTED = (
    "spectral norm",
    "weight norm, transposed",
    "standardised weight",
    "one weight both ways",
    "a matrix and a kernel",
)


@pytest.mark.parametrize("name", sorted(FORMS))
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_forms(name):
    """Exact; and closed, unless the weight is computed."""
    module, x = FORMS[name]()
    model = check(module, (x,))
    assert name in COMPUTED or {row.status for row in rows(model).values()} == {Status.EXACT}


def test_input_gradients_and_outputs_are_those_of_the_plain_model():
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(4, 4, 2, groups=2))
    x = torch.randn(4, 2, 5, 4, requires_grad=True)
    plain = copy.deepcopy(model)
    expected = plain(x)
    (from_plain,) = torch.autograd.grad(smooth(expected), x)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    output = model(x)
    smooth(output).backward()
    assert torch.equal(output, expected)
    assert torch.equal(x.grad, from_plain)


# --- rows -----------------------------------------------------------------------------------------------------------------------


VIDEOS = {
    "frames behind samples": lambda m, x: m.layer(x.flatten(0, 1)).unflatten(0, (-1, 3)).tanh().mean(1),
    "samples behind frames": lambda m, x: m.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).tanh().mean(0),
    "transposed": lambda m, x: m.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (3, -1)).tanh().mean(0),
    "used twice": lambda m, x: (
        m.layer(m.layer(x.transpose(0, 1).flatten(0, 1)).tanh()).unflatten(0, (3, -1)).tanh().mean(0)
    ),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", sorted(VIDEOS))
def test_several_images_for_each_sample(name, groups):
    layer = nn.ConvTranspose2d(4, 4, 2, groups=groups) if name == "transposed" else nn.Conv2d(4, 4, 2, groups=groups)
    check(Model(VIDEOS[name], layer=layer), (torch.randn(4, 3, 4, 4, 3),), compiler="eager")


def test_samples_on_the_second_axis():
    module = Model(lambda m, x: m.layer(x.flatten(0, 1)).unflatten(0, (3, -1)), layer=nn.Conv1d(2, 3, 2))
    check(module, (torch.randn(3, 4, 2, 5),), axes=1, options={"sample_axis": 1})


def test_an_image_without_samples_is_refused():
    for layer, x in ((nn.Conv2d(4, 3, 2), torch.randn(4, 5, 5)), (nn.ConvTranspose1d(4, 3, 2), torch.randn(4, 5))):
        torch._dynamo.reset()
        model = graphopt.transform(layer, [TrueGrad()], compiler="aot_eager")
        with pytest.raises(UnsupportedError, match=r"(?s)weight: .*without an axis for samples.*unsqueeze\(0\)"):
            model(x)


def test_one_image_is_one_sample():
    model, (x,) = double(nn.Conv2d(1, 3, 2), (torch.randn(1, 5, 5),))
    expected = loop_over_samples(model, (x,), smooth, reduction="sum")
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    train_step(model, (x,))
    assert_statistics(model, expected, 1)


def modulated(m, x, style):
    """StyleGAN2: each sample has a kernel of its own, and is a group of one convolution."""
    kernels = m.kernel * style[:, None, :, None, None]
    num, channels = x.shape[:2]
    together = F.conv2d(x.reshape(1, num * channels, *x.shape[2:]), kernels.flatten(0, 1), groups=num)
    return m.head(together.reshape(num, -1, *together.shape[2:]))


def test_kernels_that_differ_between_samples():
    module = Model(modulated, kernel=weight(3, 2, 2, 2), head=nn.Conv2d(3, 2, 1))
    model, inputs = double(module, (torch.randn(4, 2, 4, 3), torch.randn(4, 2)))
    expected = loop_over_samples(copy.deepcopy(model), inputs, smooth, reduction="sum")
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    train_step(model, inputs)
    assert_statistics(model, expected, 4)


def test_another_number_of_samples_does_not_compile_again():
    model, (x,) = double(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 2, 2, stride=2)),
        (torch.randn(6, 2, 5, 5),),
    )  # fmt: skip
    plain = copy.deepcopy(model)
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    for num in (6, 3, 5):
        with torch._dynamo.config.patch(error_on_recompile=num != 6):
            train_step(model, (x[:num],))
        assert_statistics(model, loop_over_samples(plain, (x[:num],), smooth, reduction="sum"), num)


# --- other statistics, other types ----------------------------------------------------------------------------------------------


def positions(layer, x):
    """Squares summed over every output position by itself, (weight, bias): the equation, one derivative for each position."""
    y = layer(x)
    (grad,) = torch.autograd.grad(smooth(y), y, retain_graph=True)
    squares = [torch.zeros_like(layer.weight), torch.zeros_like(layer.bias)]
    for n in range(len(x)):
        for place in torch.cartesian_prod(*(torch.arange(size) for size in y.shape[2:])).reshape(-1, y.dim() - 2):
            at = (n, slice(None), *place)
            found = torch.autograd.grad(y[at] @ grad[at], [layer.weight, layer.bias], retain_graph=True)
            squares = [square + g.square() for square, g in zip(squares, found, strict=True)]
    return squares


LAYERS = {
    "plain": lambda: (nn.Conv2d(2, 3, 2, padding=1), torch.randn(3, 2, 4, 5)),
    "groups": lambda: (nn.Conv1d(4, 6, 3, stride=2, groups=2), torch.randn(3, 4, 7)),
    "depthwise": lambda: (nn.Conv2d(3, 3, 2, groups=3), torch.randn(3, 3, 3, 4)),
    "one position": lambda: (nn.Conv2d(2, 3, 2), torch.randn(3, 2, 2, 2)),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_positions_by_themselves(name):
    layer, (x,) = (lambda built: double(built[0], built[1:]))(LAYERS[name]())
    expected = positions(layer, x)
    per_token, both = (copy.deepcopy(layer) for _ in range(2))
    graphopt.transform(per_token, [TrueGrad(per="token")], compiler="aot_eager")
    train_step(per_token, (x,))
    all_statistics = ("sum_grad_squared", "sample_grad_norm", "sum_position_grad_squared")
    graphopt.transform(both, [TrueGrad(statistics=all_statistics)], compiler="aot_eager")
    train_step(both, (x,))
    for index, key in enumerate(("weight", "bias")):
        torch.testing.assert_close(getattr(per_token, key).sum_grad_squared, expected[index])
        torch.testing.assert_close(getattr(both, key).sum_position_grad_squared, expected[index])
        assert getattr(per_token, key).num_samples == layer(x)[:, 0].numel()


def test_a_transposed_one_has_no_positions_of_its_own():
    model = graphopt.transform(nn.ConvTranspose1d(2, 3, 2), [TrueGrad(per="token")], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match="per-token statistics of a transposed convolution are not defined"):
        model(torch.randn(4, 2, 5))


@pytest.mark.parametrize("name", ["plain", "groups", "depthwise", "one position", "transposed", "frames"])
def test_norms_of_samples(name):
    if name == "transposed":
        layer, x = nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), torch.randn(3, 4, 5)
    elif name == "frames":
        layer, x = Model(VIDEOS["samples behind frames"], layer=nn.Conv2d(4, 4, 2)), torch.randn(4, 3, 4, 4, 3)
    else:
        layer, x = LAYERS[name]()
    model, (x,) = double(layer, (x,))
    expected = [torch.autograd.grad(smooth(model(x[n : n + 1])), list(model.parameters())) for n in range(len(x))]
    graphopt.transform(model, [TrueGrad(statistics=("sum_grad_squared", "sample_grad_norm"))], compiler="aot_eager")
    train_step(model, (x,))
    for index, param in enumerate(model.parameters()):
        norms = torch.stack([found[index].norm() for found in expected])
        torch.testing.assert_close(param.sample_grad_norm, norms)
        squares = torch.stack([found[index] for found in expected]).square().sum(0)
        torch.testing.assert_close(param.sum_grad_squared, squares)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_other_types(dtype, tolerance):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2)
    )
    model, x = model.to(dtype), torch.randn(4, 3, 6, 6).to(dtype)
    expected = loop_over_samples(copy.deepcopy(model).double(), (x.double(),), smooth, reduction="sum")
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    train_step(model, (x,))
    for key, param in model.named_parameters():
        assert param.sum_grad_squared.dtype == torch.float32
        reference = expected[key].sum_grad_squared
        assert (param.sum_grad_squared - reference).norm() <= tolerance * reference.norm(), key


def test_autocast_keeps_squares_in_float32():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 1)), torch.randn(4, 3, 6, 6)
    expected = loop_over_samples(copy.deepcopy(model), (x,), smooth, reduction="sum")
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    smooth(output.float()).backward()
    assert output.dtype == torch.bfloat16
    for key, param in model.named_parameters():
        assert param.sum_grad_squared.dtype == param.grad.dtype == torch.float32
        reference = expected[key].sum_grad_squared
        assert (param.sum_grad_squared - reference).norm() <= 5e-2 * reference.norm(), key


# --- the reductions ------------------------------------------------------------------------------------------------------------


# channels in and out, kernel, stride, padding, dilation, transposed, output padding, groups, places
GEOMETRIES = {
    "plain": (3, 8, (3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (9, 8)),
    "one by one": (3, 8, (1, 1), (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (9, 8)),
    "one by one, strided": (3, 8, (1, 1), (2, 2), (0, 0), (1, 1), False, (0, 0), 1, (9, 8)),
    "one dimension": (4, 8, (3,), (1,), (0,), (1,), False, (0,), 2, (9,)),
    "wide groups": (70, 80, (3, 3), (2, 1), (0, 1), (1, 2), False, (0, 0), 2, (9, 8)),
    "depthwise": (8, 8, (3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 8, (9, 8)),
    "transposed": (8, 6, (3, 3), (2, 2), (1, 1), (1, 1), True, (1, 1), 2, (4, 5)),
    "transposed, wide groups": (70, 70, (2, 2), (2, 2), (0, 0), (1, 1), True, (0, 0), 2, (4, 5)),
    "transposed, dilated": (6, 4, (2, 2), (1, 1), (0, 0), (3, 3), True, (2, 2), 1, (4, 5)),
}


def gradient(kind, like):
    if kind == "channels last":
        return (
            torch.randn_like(like).to(memory_format=torch.channels_last) if like.dim() == 4 else torch.randn_like(like)
        )
    if kind == "expanded":
        return torch.ones((), dtype=like.dtype).expand(like.shape)
    if kind == "constant in space":
        return torch.randn(like.shape[:2], dtype=like.dtype)[(..., *[None] * (like.dim() - 2))].expand(like.shape)
    return torch.randn_like(like)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [2 << 20, 256], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_sums_against_one_convolution_for_each_sample(name, budget, dtype, monkeypatch):
    channels, outputs, kernel, *geometry, places = GEOMETRIES[name]
    transposed, groups, num = geometry[3], geometry[5], 5
    shape = (channels, outputs // groups, *kernel) if transposed else (outputs, channels // groups, *kernel)
    monkeypatch.setitem(operators._CHUNK_BYTES, "cpu", budget)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    for images in (1, 3):
        x = torch.randn(num * images, channels, *places, dtype=dtype)
        leaf = torch.zeros(num, *shape, dtype=dtype, requires_grad=True)
        for kind in ("plain", "channels last", "expanded", "constant in space"):
            own = [torch.convolution(x[n * images : (n + 1) * images], leaf[n], None, *geometry) for n in range(num)]
            grad = gradient(kind, torch.cat(own))
            if kind == "channels last" and grad.dim() == 4:
                x = x.to(memory_format=torch.channels_last)
            (expected,) = torch.autograd.grad(torch.cat(own), leaf, grad)
            sides = [side.unflatten(0, (num, images)) for side in (grad, x)]
            products = torch.ops.graphopt.convolution_products(*sides, kernel, *geometry)
            total, squares, norms = torch.ops.graphopt.convolution_sums(*sides, kernel, *geometry, True)
            torch.testing.assert_close(products, expected, **tolerance, msg=lambda text, kind=kind: f"{kind}: {text}")
            torch.testing.assert_close(total, expected.sum(0), **tolerance)
            torch.testing.assert_close(squares, expected.square().sum(0), **tolerance)
            torch.testing.assert_close(norms, expected.square().flatten(1).sum(1), **tolerance)


@pytest.mark.parametrize("at_a_time", [2, 5])
@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_samples_as_groups_of_float32(name, at_a_time, monkeypatch):
    monkeypatch.setattr(operators, "_samples_as_groups", lambda *_: at_a_time)
    test_sums_against_one_convolution_for_each_sample(name, 2 << 20, torch.float32, monkeypatch)


@pytest.mark.parametrize(("kind", "channels"), [("patches", 15), ("groups", 16)])
def test_memory_does_not_grow_with_the_number_of_samples(monkeypatch, kind, channels):
    """What exists beside inputs and results at one time is counted by the allocator of the profiler."""
    monkeypatch.setitem(operators._CHUNK_BYTES, "cpu", 1 << 18)
    monkeypatch.setattr(operators, "_NEAR_BYTES", 1 << 20)
    plain = operators.Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    peaks = []
    for num in (16, 64):
        sides = torch.randn(num, 1, channels, 32, 32), torch.randn(num, 1, channels, 32, 32)
        shape = operators._weight_shape(*sides, (3, 3), plain)
        assert bool(operators._samples_as_groups(*sides, shape, plain)) == (kind == "groups")
        geometry = ((3, 3), (1, 1), (1, 1), (1, 1), False, (0, 0), 1, False)
        torch.ops.graphopt.convolution_sums(*sides, *geometry)
        peaks.append(
            peak_bytes(lambda sides=sides, geometry=geometry: torch.ops.graphopt.convolution_sums(*sides, *geometry))
        )
    patches_of_one = channels * 9 * 32 * 32 * 4
    assert peaks[1] <= 1.05 * peaks[0]
    assert peaks[1] < 3 * patches_of_one  # all samples' patches would be 64 of them


def peak_bytes(function):
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    current = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


# --- compiled --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inductor():
    model, (x,) = double(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 16, 1),
            nn.ConvTranspose2d(16, 4, 2, stride=2),
        ),
        (torch.randn(4, 3, 8, 8),),
    )  # fmt: skip
    expected = loop_over_samples(model, (x,), smooth, reduction="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's own
        graphopt.transform(model, [TrueGrad()])
        train_step(model, (x,))
    assert_statistics(model, expected, 4)
