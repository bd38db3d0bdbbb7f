"""`OrthoGrad` against projections of vectors."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import assert_equal_steps, make_tensors, outputs


def vector(tensors):
    return torch.cat([t.flatten() for t in tensors])


def project(u, p, eps, renormalize):
    rest = u - p * (p @ u) / (p @ p + eps)
    return rest * u.norm() / rest.norm() if renormalize else rest


@accepts("O10")
@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_projections(renormalize, way):
    grads, params = [make_tensors(1), make_tensors(2)], make_tensors(3)
    got = outputs(lambda: [m.OrthoGrad(0.1, renormalize)], grads, params, **way)
    for step, given in zip(got, grads, strict=True):
        expected = project(vector(given), vector(params), 0.1, renormalize)
        torch.testing.assert_close(vector(step), expected, rtol=1e-12, atol=1e-12)
    big = [[t for t in step if t.numel() > 1] for step in (*grads, params)]
    got = outputs(lambda: [m.OrthoGrad(0.1, renormalize, tensorwise=True)], big[:2], big[2], **way)
    expected = [
        [project(u.flatten(), p.flatten(), 0.1, renormalize).view_as(u) for u, p in zip(step, big[2], strict=True)]
        for step in big[:2]
    ]
    assert_equal_steps(got, expected)


@accepts("O10")
@pytest.mark.parametrize("tensorwise", [False, True])
def test_right_angle_and_length_in_float32(tensorwise):
    grads, params = [make_tensors(1, [(20, 30), (7,)], torch.float32)], make_tensors(3, [(20, 30), (7,)], torch.float32)
    (out,) = outputs(lambda: [m.OrthoGrad(tensorwise=tensorwise)], grads, params)
    groups = list(zip(out, grads[0], params, strict=True)) if tensorwise else [map(vector, (out, grads[0], params))]
    for u, g, p in groups:
        assert abs(u @ p if u.dim() == 1 else (u * p).sum()) < 1e-6 * u.norm() * p.norm()
        assert abs(u.norm() - g.norm()) < 1e-6 * g.norm()


@accepts("O10")
def test_zeros_and_parallel_updates():
    """Of zero parameters nothing is taken out; of a parallel update nothing is left but rounding."""
    grads = [[torch.tensor([3.0, 4.0], dtype=torch.float64)]]
    for tensorwise in (False, True):
        make = lambda t=tensorwise: [m.OrthoGrad(0.0, tensorwise=t)]  # noqa: E731
        (out,) = outputs(make, grads)
        assert out[0].tolist() == pytest.approx([3, 4])
        for factor in (2.0, -1.0 / 3):
            (out,) = outputs(make, grads, [factor * grads[0][0]])
            assert out[0].tolist() == [0, 0]
        (out,) = outputs(make, [[torch.zeros(2)]], [torch.ones(2)])
        assert out[0].tolist() == [0, 0]


def test_what_concerns_all_tensors_cannot_differ_between_them():
    with pytest.raises(OptionError, match="for some parameters, but"):
        Modular([{"params": [torch.zeros(3, requires_grad=True)], "tensorwise": True}], m.OrthoGrad())
