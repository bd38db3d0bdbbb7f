"""Parameters that are computed with before they meet samples: norms, masks, low rank, parts, ties."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.errors import UnsupportedError
from graphopt.passes import TrueGrad
from tests.models import double, smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, check, train_step
from tests.passes.truegrad.formulas import formula

N = 4
X2, X3, IMAGE = torch.randn(N, 3), torch.randn(N, 5, 3), torch.randn(N, 2, 5, 5)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).transpose(-1, -2)


def symmetric():
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def identity(size):
    return torch.eye(size, dtype=torch.float64)


FORMS = {
    # Scalars and gates
    "temperature": formula(lambda x, t: (x / t.exp()).softmax(-1), X2, t=()),
    "layer scale": formula(lambda x, g, layer: x + g * layer(x), X3, g=(3,), layer=lambda: nn.Linear(3, 3)),
    "gate": formula(lambda x, g, layer: x + g.tanh() * layer(x), X3, g=(1,), layer=lambda: nn.Linear(3, 3)),
    "one scalar twice": formula(lambda x, a, layer: a * layer(x * a), X2, a=(), layer=lambda: nn.Linear(3, 3)),
    "learned power": formula(lambda x, p: (x.abs() + 0.1) ** p, X3, p=(3,)),
    "generalised mean": formula(lambda x, p: (x.abs() + 0.1).pow(p).mean((-1, -2)).pow(1 / p), IMAGE, p=(1,)),
    "interpolation": formula(lambda x, a, b: torch.lerp(x, a, b), X3, a=(3,), b=(3,)),
    "addcmul": formula(lambda x, a, b: torch.addcmul(x, a, b, value=0.5), X3, a=(3,), b=(5, 1)),
    "prelu, tied": formula(lambda x, p: p(p(x) * 2 - x), X3.transpose(1, 2), p=lambda: nn.PReLU(3)),
    "prelu, computed": formula(lambda x, p: F.prelu(x, p.sigmoid()), X3.transpose(1, 2), p=(3,)),
    # Masks
    "hard mask": formula(lambda x, w, p: torch.where(p.sigmoid() > 0.5, w, torch.zeros_like(w)) * x, X3, w=(3,), p=(3,)),
    "hard mask of a weight": formula(lambda x, w, p: F.linear(x, torch.where(p > 0, w, w * p)), X3, w=(2, 3), p=(2, 3)),
    "soft mask of a weight": formula(lambda x, w, p: F.linear(x, w * p.sigmoid()), X3, w=(2, 3), p=(2, 3)),
    "mask of samples": formula(lambda x, w, v: torch.where(x > 0, w, v), X3, w=(3,), v=(5, 1)),
    "straight through": formula(lambda x, w: F.linear(x, (w.sign() - w).detach() + w), X3, w=(2, 3)),
    "triangle": formula(lambda x, w: F.linear(x, w.triu()), X2, w=(3, 3)),
    # Norms and parametrizations
    "weight norm, rows": formula(lambda x, layer: layer(x), X3, layer=lambda: parametrizations.weight_norm(nn.Linear(3, 2))),
    "weight norm, columns": formula(
        lambda x, layer: layer(x), X3, layer=lambda: parametrizations.weight_norm(nn.Linear(3, 2), dim=1)
    ),
    "weight norm, all": formula(
        lambda x, layer: layer(x), X3, layer=lambda: parametrizations.weight_norm(nn.Linear(3, 2), dim=None)
    ),
    "weight norm, convolution": formula(
        lambda x, layer: layer(x), IMAGE, layer=lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 2), dim=2)
    ),
    "spectral norm, eval": formula(
        lambda x, layer: layer(x), X3, layer=lambda: parametrizations.spectral_norm(nn.Linear(3, 2)).eval()
    ),
    "orthogonal": formula(lambda x, layer: layer(x), X3, layer=lambda: parametrizations.orthogonal(nn.Linear(3, 3))),
    "orthogonal, exponential": formula(
        lambda x, layer: layer(x), X3, layer=lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="matrix_exp")
    ),
    "orthogonal, Cayley": formula(
        lambda x, layer: layer(x), X3, layer=lambda: parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")
    ),
    "symmetric": formula(lambda x, layer: layer(x), X3, layer=symmetric),
    "standardised convolution": formula(
        lambda x, w: F.conv2d(x, (w - w.mean((1, 2, 3), True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)), IMAGE, w=(3, 2, 3, 3)
    ),
    "cosine logits": formula(
        lambda x, w, s: F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)) * s, X2, w=(5, 3), s=(1,)
    ),
    # Low rank and other algebra
    "adapter": formula(
        lambda x, base, down, up: base(x) + 0.5 * up(down(x)), X3, base=lambda: nn.Linear(3, 4).requires_grad_(False),
        down=lambda: nn.Linear(3, 2, bias=False), up=lambda: nn.Linear(2, 4, bias=False),
    ),
    "merged adapter": formula(lambda x, w, a, b: F.linear(x, w + b @ a), X3, w=(4, 3), a=(2, 3), b=(4, 2)),
    "inverse": formula(lambda x, a: x @ torch.linalg.inv(a + 3 * identity(3)), X3, a=(3, 3)),
    "Cholesky factor": formula(lambda x, a: x @ torch.linalg.cholesky(a @ a.t() + identity(3)), X3, a=(3, 3)),
    "log-determinant": formula(lambda x, a: x * torch.linalg.slogdet(a + 3 * identity(3))[1], X3, a=(3, 3)),
    "solved for samples": formula(lambda x, a: torch.linalg.solve(a + 3 * identity(3), x.transpose(1, 2)), X3, a=(3, 3)),
    "exponential": formula(lambda x, a: x @ torch.linalg.matrix_exp(a), X3, a=(3, 3)),
    "hyper-network": formula(
        lambda x, layer: F.linear(x, layer(torch.ones(2, dtype=x.dtype)).view(2, 3)), X3, layer=lambda: nn.Linear(2, 6)
    ),
    "filter in frequencies": formula(
        lambda x, a: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.fft.rfft(a, dim=0), n=5, dim=1), X3, a=(5, 3)
    ),
    "complex filter as a real parameter": formula(
        lambda x, a: torch.fft.irfft(torch.fft.rfft(x, dim=1) * torch.view_as_complex(a), n=5, dim=1), X3, a=(3, 3, 2)
    ),
    "state-space kernel": formula(
        lambda x, a, b: torch.einsum("ntd,d->nt", x, torch.exp(torch.complex(-a.exp(), b)).real), X3, a=(3,), b=(3,)
    ),
    "rotary positions, complex": formula(
        lambda x, layer: torch.view_as_real(
            torch.view_as_complex(layer(x).unflatten(-1, (2, 2)).contiguous())
            * torch.polar(torch.ones(5, 2).double(), torch.arange(5.0).double()[:, None] * torch.tensor([1.0, 0.1]).double())
        ).flatten(-2),
        X3, layer=lambda: nn.Linear(3, 4),
    ),
    # Parts and ties
    "joined": formula(lambda x, a, b: F.linear(x, torch.cat([a, b])), X3, a=(2, 3), b=(1, 3)),
    "joined with zeros": formula(
        lambda x, a, b, c: F.linear(x, torch.cat([a, b]), torch.cat([c, torch.zeros(2, dtype=x.dtype)])),
        X3, a=(2, 3), b=(2, 3), c=(2,),
    ),
    "stacked": formula(lambda x, a, b: torch.einsum("nti,hio->ntho", x, torch.stack([a, b])), X3, a=(3, 2), b=(3, 2)),
    "slices": formula(lambda x, w: F.linear(F.linear(x, w[:3]), w[3:]), X3, w=(6, 3)),
    "slices that overlap": formula(lambda x, w: F.linear(F.linear(x, w[:3]), w[2:5]), X3, w=(6, 3)),
    "several results": formula(lambda x, a: x * sum(a.unbind(0)).softmax(-1), X3, a=(4, 3)),
    "written into a constant": formula(
        lambda x, a: x * torch.zeros(5, dtype=x.dtype).scatter(0, torch.tensor([0, 3]), a).unsqueeze(-1), X3, a=(2,)
    ),
    "autoencoder": formula(lambda x, w, b: F.linear(torch.tanh(F.linear(x, w)), w.t(), b), X2, w=(2, 3), b=(3,)),
    "linear and convolution": formula(
        lambda x, w: F.conv1d(torch.tanh(F.linear(x, w)).transpose(1, 2), w.unsqueeze(-1)).transpose(1, 2), X3, w=(3, 3)
    ),
    "functional_call": formula(
        lambda x, w, layer: torch.func.functional_call(layer, {"weight": w * 2, "bias": layer.bias}, (x,)),
        X2, w=(2, 3), layer=lambda: nn.Linear(3, 2),
    ),
    "learned queries": formula(
        lambda x, q: F.scaled_dot_product_attention(q.expand(x.shape[0], -1, -1), x, x), X3, q=(2, 3)
    ),
    "copies of rows": formula(
        lambda x, p: torch.bmm(x.flatten(0, 1), torch.tanh(p).repeat(x.shape[0], 5, 1).transpose(1, 2)).unflatten(0, x.shape[:2]),
        torch.randn(N, 2, 6, 3), p=(2, 1, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_against_the_loop(form):
    module, inputs = form()
    if hasattr(module, "layer") and not module.layer.training:
        module.layer.train = lambda mode=True: module.layer  # stays as it was built
    check(module, inputs, compiler="eager")  # what becomes of a parameter is decided before AOTAutograd sees the graph


def test_weight_norm_by_the_old_hook_is_refused_with_the_fix():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = torch.nn.utils.weight_norm(nn.Linear(3, 2))
    model = graphopt.transform(nn.Sequential(layer), [TrueGrad()], compiler="aot_eager")
    with pytest.raises(UnsupportedError, match=r"0\.weight_g: the hook of.*parametrizations\.weight_norm"):
        model(X3)


def test_spectral_norm_in_training_takes_its_vectors_as_given():
    layer, (x,) = double(parametrizations.spectral_norm(nn.Linear(3, 2)), (X3,))
    plain = copy.deepcopy(layer)
    graphopt.transform(layer, [TrueGrad()], compiler="aot_eager")
    output = train_step(layer, (x,))
    torch.testing.assert_close(output, train_step(plain, (x,)))
    for (name, buffer), other in zip(layer.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name)  # the power iteration ran once, as without graphopt
    assert_statistics(layer, loop_over_samples(plain.eval(), (x,), smooth, reduction="sum"), N)


def test_complex_parameters_are_refused_or_skipped():
    def build():
        layer = nn.Linear(3, 3)
        layer.register_parameter("filter", nn.Parameter(torch.randn(3, dtype=torch.complex64)))
        layer.forward = lambda x: (F.linear(x, layer.weight) * layer.filter).real
        return layer

    with pytest.raises(UnsupportedError, match=r"filter: it is complex.*view_as_complex"):
        graphopt.transform(build(), [TrueGrad()], compiler="aot_eager")(X2)
    model = graphopt.transform(build(), [TrueGrad(unsupported="skip")], compiler="aot_eager")
    model(X2).sum().backward()
    assert model.weight.sum_grad_squared.shape == model.weight.shape
    assert find(model.filter, SUM_GRAD_SQUARED) is None
    assert any(row.name == "filter" and "complex" in row.reason for r in graphopt.records(model) for row in r.coverage)


def test_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    check(model, (X3,))
