"""Fourier and cosine coefficients, against dense transforms, SciPy, and derivatives by autograd."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, Module, m
from tests.optim.catalogue import accepts
from tests.optim.problems import in_plane, rosenbrock
from tests.optim.training import largest_difference, make_params, set_gradients

SHAPES = [(), (1,), (7,), (8,), (4, 5), (3, 1, 6), (2, 3, 4, 5), (0, 3), (1, 1)]


class Look(Module):
    """Keeps what stands for parameters, and updates."""

    def step(self, var):
        self.params = [p.clone() for p in var.params]
        self.updates = [u.clone() for u in var.get_update()]
        return var


def seen(make, shapes=SHAPES, **options):
    """Of a step from random parameters: they, their gradients, and what a module inside sees."""
    params, look = make_params(shapes), Look()
    set_gradients(params, 3)
    starts = [p.detach().clone() for p in params]
    Modular(params, make(look, **options), m.LR(0.1)).step()
    return starts, [p.grad for p in params], look, params


MAKE = {
    "fft": m.FFTProjection,
    "fft ortho": lambda x, **o: m.FFTProjection(x, norm="ortho", **o),
    "fft forward": lambda x, **o: m.FFTProjection(x, norm="forward", **o),
    "fft one_d": lambda x, **o: m.FFTProjection(x, one_d=True, **o),
    "dct": m.DCTProjection,
    "dct ortho": lambda x, **o: m.DCTProjection(x, norm="ortho", **o),
    "dct 1": lambda x, **o: m.DCTProjection(x, dims=1, **o),
}


@accepts("P1", "P2", "C11")
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_nothing_is_lost_on_the_way(make):
    """Even and odd sizes, scalars and empty tensors; with `LR` inside it is plain descent."""
    for inside in (Look(), m.LR(0.1)):
        params, others = make_params(SHAPES), make_params(SHAPES)
        set_gradients(params, 3), set_gradients(others, 3)
        Modular(params, make(inside), *([m.LR(0.1)] if isinstance(inside, Look) else [])).step()
        torch.optim.SGD(others, 0.1).step()
        assert largest_difference(params, others) < 1e-13


@accepts("P1")
@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("norm", [None, "ortho", "forward"])
def test_pairs_of_real_numbers(shape, norm):
    """Against a dense sum over all elements."""
    starts, grads, look, _ = seen(m.FFTProjection, [shape], norm=norm)
    for tensor, pairs in ((starts[0], look.params[0]), (grads[0], look.updates[0])):
        dense = tensor.to(torch.complex128)
        for axis, size in enumerate(shape):
            k = torch.arange(size, dtype=torch.float64)
            matrix = torch.polar(torch.ones(size, size).double(), -2 * torch.pi * torch.outer(k, k) / size)
            dense = torch.tensordot(dense, matrix, ([axis], [0])).movedim(-1, axis)
        factor = {None: 1.0, "ortho": tensor.numel() ** -0.5, "forward": 1 / tensor.numel()}[norm]
        expected = torch.view_as_real(dense[..., : shape[-1] // 2 + 1] * factor)
        torch.testing.assert_close(pairs, expected, rtol=0, atol=1e-12)


@accepts("P2")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("norm", [None, "ortho"])
def test_equals_scipy(norm, dims):
    fft = pytest.importorskip("scipy.fft")
    starts, grads, look, _ = seen(m.DCTProjection, norm=norm, dims=dims)
    for tensors, projected in ((starts, look.params), (grads, look.updates)):
        for tensor, found in zip(tensors, projected, strict=True):
            expected = tensor
            if tensor.numel() and tensor.dim():
                axes = range(min(dims, tensor.dim()))
                expected = torch.from_numpy(fft.dctn(tensor.numpy(), axes=axes, norm=norm or "backward"))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@accepts("P1", "P2", "C11")
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_gradients_inside_are_derivatives(make):
    """Of the loss by what the modules inside see; also of several modules one inside another."""

    class Compare(Module):
        needs_closure = True

        def step(self, var):
            grads, loss = var.get_grad(), var.evaluate(backward=False)
            for param, grad in zip(var.params, grads, strict=True):
                direction = torch.randn_like(param)
                param.add_(direction, alpha=1e-6)
                difference = (var.evaluate(backward=False) - loss) / 1e-6
                param.sub_(direction, alpha=1e-6)
                torch.testing.assert_close((grad * direction).sum(), difference, rtol=1e-4, atol=1e-4)
            return var

    params = make_params([(4, 5), (7,), (), (6,), (0, 3)])

    def closure(backward=True):
        loss = sum((p**2).sum() + p.sin().sum() for p in params)
        if backward:
            for p in params:
                p.grad = None
            loss.backward()
        return loss

    torch.manual_seed(0)
    Modular(params, make(Compare(), project_params=True, project_update=False)).step(closure)
    Modular(params, make(make(Compare(), project_params=True), project_params=True)).step(closure)


@accepts("C11")
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_line_searches_inside_reach_the_same_point(make):
    ends = []
    for inside in (True, False):
        problem = in_plane(rosenbrock)
        search = m.StrongWolfe()
        optimizer = Modular(problem.params, make(search, project_params=True) if inside else search)
        for _ in range(5):
            optimizer.step(problem.closure)
        ends.append(problem.vector)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-8, atol=1e-8)


@accepts("C11")
@pytest.mark.parametrize(("make", "options"), [("dct ortho", {}), ("dct", {"project_update": False})])
def test_quasi_newton_inside(make, options):
    """A rotation changes nothing for BFGS; nor does another linear map, once it starts from the derivatives."""
    problems = in_plane(rosenbrock), in_plane(rosenbrock)
    search = lambda: [m.BFGS(scale_first=False), m.StrongWolfe()]  # noqa: E731
    inside = Modular(problems[0].params, MAKE[make](search(), project_params=True, **options))
    outside = Modular(problems[1].params, *search())
    for _ in range(40):
        inside.step(problems[0].closure)
        outside.step(problems[1].closure)
    if make == "dct ortho":
        torch.testing.assert_close(problems[0].vector, problems[1].vector, rtol=1e-6, atol=1e-6)
    assert problems[0].loss < 1e-10


def test_bad_options():
    for make, text in [
        (
            lambda: m.FFTProjection(m.Adam(), norm="orto"),
            "FFTProjection: norm='orto'; expected one of None, 'backward'",
        ),
        (lambda: m.DCTProjection(m.Adam(), norm="forward"), "DCTProjection: norm='forward'; expected None or 'ortho'"),
        (lambda: m.DCTProjection(m.Adam(), dims=4), "DCTProjection: dims=4; expected 1, 2 or 3"),
    ]:
        with pytest.raises(OptionError, match=text):
            make()
