"""Limits of norms and values against torch, numbers of the catalogue, and loops over numbers."""

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import assert_equal_steps, make_tensors, on_numbers, outputs, pure_outputs

WAYS = [{"foreach": False}, {"foreach": True}]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)
INF = float("inf")


def on_vector(make, vector):
    (out,) = outputs(lambda: [make()], [[torch.tensor(vector, dtype=torch.float64)]])
    return out[0].tolist()


@accepts("S1", "S3")
@every_way
@pytest.mark.parametrize("order", [1, 2, 3, INF])
def test_norms_of_each_tensor(order, way):
    grads = [make_tensors(1)]
    lengths = [torch.linalg.vector_norm(g, order) for g in grads[0]]
    expected = [[g * min(1, 0.5 / n.item()) for g, n in zip(grads[0], lengths, strict=True)]]
    assert_equal_steps(outputs(lambda: [m.ClipNorm(0.5, order)], grads, **way), expected)
    expected = [[g * 0.5 / n for g, n in zip(grads[0], lengths, strict=True)]]
    assert_equal_steps(outputs(lambda: [m.Normalize(0.5, order)], grads, **way), expected)


@accepts("S1", "S3")
@pytest.mark.parametrize("order", [1, 2, INF])
@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_one_norm_of_all_tensors_is_that_of_torch(order, limit):
    grads = [make_tensors(1)]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads[0]]
    for p, g in zip(params, grads[0], strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(params, limit, order)
    expected = [[p.grad for p in params]]
    make = lambda: [m.ClipNorm(limit, order, "global")]  # noqa: E731
    assert_equal_steps(outputs(make, grads), expected, atol=1e-5)  # torch adds 1e-6 to the norm
    assert_equal_steps(pure_outputs(make, grads), expected, atol=1e-5)
    (out,) = outputs(lambda: [m.Normalize(3.0, order, "global")], grads)
    assert torch.linalg.vector_norm(torch.cat([t.flatten() for t in out]), order).item() == pytest.approx(3.0)


@accepts("S1", "S3")
def test_clip_norm_and_normalize_of_small_vectors():
    assert on_vector(lambda: m.ClipNorm(1.0), [3.0, 4.0]) == pytest.approx([0.6, 0.8])
    assert on_vector(lambda: m.ClipNorm(10.0), [3.0, 4.0]) == [3, 4]
    assert on_vector(lambda: m.ClipNorm(1.0), [0.0, 0.0]) == [0, 0]
    assert on_vector(lambda: m.Normalize(), [0.0, 0.0]) == [0, 0]
    assert on_vector(lambda: m.Normalize(2.0), [3.0, 4.0]) == pytest.approx([1.2, 1.6])
    for module in (m.ClipNorm, m.Normalize):
        assert on_vector(lambda c=module: c(1.0, min_size=3), [3.0, 4.0]) == [3, 4]
    assert on_vector(lambda: m.ClipNorm(1.0, min_size=2), [3.0, 4.0]) == pytest.approx([0.6, 0.8])


@accepts("S1", "S3", "S4")
@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({"dim": 0}, {1: (0,), 2: (0,), 3: (0,)}),
        ({"dim": -1}, {1: (0,), 2: (1,), 3: (2,)}),
        ({"dim": [1, 2]}, {1: (), 2: (1,), 3: (1, 2)}),
        ({"dim": 0, "inverse_dims": True}, {1: (), 2: (1,), 3: (1, 2)}),
        ({"dim": 1, "min_size": 3}, {1: (), 2: (1,), 3: ()}),
    ],
    ids=str,
)
def test_slices(options, axes):
    """Axes that a tensor lacks are left out; tensors with none of them, and short slices, stay as they are."""
    grads = [make_tensors(1)]

    def expected(function):
        return [[function(g, axes[g.dim()]) if axes.get(g.dim()) else g for g in grads[0]]]

    def length(g, a):
        return (g * g).sum(a, keepdim=True).sqrt()

    unit = expected(lambda g, a: g / length(g, a))
    assert_equal_steps(outputs(lambda: [m.Normalize(**options)], grads), unit)
    clipped = expected(lambda g, a: g / (length(g, a) / 0.7).clamp(min=1))
    assert_equal_steps(outputs(lambda: [m.ClipNorm(0.7, **options)], grads), clipped)
    centred = expected(lambda g, a: g - g.mean(a, keepdim=True))
    assert_equal_steps(outputs(lambda: [m.Centralize(**{"min_size": 1, **options})], grads), centred)


@accepts("S4")
@every_way
def test_centralize(way):
    grads = [make_tensors(1)]
    expected = [[g if g.numel() < 2 else g - g.mean() for g in grads[0]]]
    assert_equal_steps(outputs(lambda: [m.Centralize()], grads, **way), expected)
    mean = torch.cat([g.flatten() for g in grads[0]]).mean()
    expected = [[g if g.numel() < 2 else g - mean for g in grads[0]]]
    assert_equal_steps(outputs(lambda: [m.Centralize("global")], grads, **way), expected)


@accepts("S5", "S6", "S7", "S8", "S9")
@pytest.mark.parametrize(
    ("make", "updates", "expected"),
    [
        (lambda: m.NormalizeByEMA(), [5] * 4, [0.05, 0.075, 0.1125, 0.16138]),
        (lambda: m.NormalizeByEMA(ema_init="update"), [5] * 2, [5, 5]),
        (lambda: m.ClipNormByEMA(), [5] * 4, [0.05, 0.075, 0.1125, 0.16138]),
        (lambda: m.ClipNormByEMA(max_ema_growth=None), [5] * 3, [0.05, 0.0995, 0.148505]),
        (lambda: m.ClipNormByEMA(0.5, ema_init="update"), [2, 1, 9], [2, 1, 2.25]),  # 2, 1.5, 5.25 -> 2.25
        (lambda: m.ClipValueByEMA(), [1, 1, -3], [0.01, 0.0199, -0.049701]),
        (lambda: m.ClipValueByEMA(0.5, ema_init="update"), [2, 1, -9], [2, 1, -5.25]),
        (lambda: m.ClipNormGrowth(), [1, 10, 10, 0.01, 0.01, 1], [1, 1.5, 2.25, 0.01, 0.01, 0.84375]),
        (lambda: m.ClipValueGrowth(), [1, 10, 10, 0.01, 0.01, 1], [1, 1.5, 2.25, 0.01, 0.01, 0.84375]),
        (lambda: m.ClipValueGrowth(), [1, -10, 10], [1, -1.5, 2.25]),
        (lambda: m.ClipNormGrowth(add=1, mul=None), [1, 10, 10], [1, 2, 3]),
        (lambda: m.ClipValueGrowth(add=1, mul=2), [1, 10, 10], [1, 3, 7]),
        (lambda: m.ClipNormGrowth(max_decay=None), [1, 0.01, 1], [1, 0.01, 0.015]),
        (lambda: m.ClipValueGrowth(max_decay=None), [1, 0, 1], [1, 0, 1.5e-4]),
        (lambda: m.ClipNormGrowth(), [0, 0, 1], [0, 0, 1.5e-4]),
    ],
)
def test_sequences(make, updates, expected):
    assert on_numbers(lambda: [make()], updates) == pytest.approx(expected, rel=1e-4)


FOLLOWING = {
    "NormalizeByEMA": lambda **o: m.NormalizeByEMA(0.6, **o),
    "ClipNormByEMA": lambda **o: m.ClipNormByEMA(0.6, **o),
    "first": lambda **o: m.NormalizeByEMA(0.6, ema_init="update", max_ema_growth=None, **o),
}


@accepts("S5", "S6")
@pytest.mark.parametrize("name", FOLLOWING)
def test_one_norm_of_all_tensors_is_that_of_one_long_tensor(name):
    make = FOLLOWING[name]
    grads = [make_tensors(seed) for seed in range(5)]
    joined = [[torch.cat([g.flatten() for g in step])] for step in grads]
    wanted = outputs(lambda: [make()], joined)
    for got in (
        outputs(lambda: [make(tensorwise=False)], grads),
        pure_outputs(lambda: [make(tensorwise=False)], grads),
    ):
        assert_equal_steps([[torch.cat([u.flatten() for u in step])] for step in got], wanted)


@accepts("S8")
def test_growth_of_one_norm_of_all_tensors():
    grads = [[factor * g for g in make_tensors(1)] for factor in (1, 10, 0.1)]
    joined = [[torch.cat([g.flatten() for g in step])] for step in grads]
    got = outputs(lambda: [m.ClipNormGrowth(parameterwise=False)], grads)
    wanted = outputs(lambda: [m.ClipNormGrowth()], joined)
    assert_equal_steps([[torch.cat([u.flatten() for u in step])] for step in got], wanted)


@pytest.mark.parametrize("make", [m.ClipNormByEMA, m.NormalizeByEMA, m.ClipNormGrowth, m.ClipValueGrowth, m.Normalize])
def test_all_ways_agree(make):
    grads = [make_tensors(seed) for seed in range(4)]
    wanted = outputs(lambda: [make()], grads, foreach=False)
    assert_equal_steps(outputs(lambda: [make()], grads, foreach=True), wanted)
    assert_equal_steps(pure_outputs(lambda: [make()], grads), wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda: m.ClipNorm(1.0, INF),
        lambda: m.ClipNorm(1.0, INF, "global"),
        m.Centralize,
        lambda: m.NormalizeByEMA(ord=INF),
    ],
)
def test_empty_tensors(make):
    grads = [[torch.zeros(0, 4), torch.ones(2, 3)]]
    (out,) = outputs(lambda: [make()], grads)
    assert [tuple(t.shape) for t in out] == [(0, 4), (2, 3)]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: m.ClipNorm(0.0), "ClipNorm: max_norm=0.0; expected a number in"),
        (lambda: m.ClipNorm(1.0, 0), "ClipNorm: ord=0; expected a number above 0"),
        (lambda: m.Normalize(dim="all"), "Normalize: dim='all'; expected None, an axis, several axes, or 'global'"),
        (lambda: m.Centralize(inverse_dims=True), "inverse_dims=True with dim=None; name the axes"),
        (lambda: m.Centralize(min_size=1.5), "min_size=1.5; expected a whole number"),
        (lambda: m.ClipNormByEMA(max_ema_growth=0.5), "max_ema_growth=0.5; expected a number in"),
        (lambda: m.ClipValueByEMA(ema_init=1), "ema_init=1; expected 'zeros' or 'update'"),
        (lambda: m.ClipNormGrowth(None, None), "add=None and mul=None limit nothing"),
        (lambda: m.ClipValueGrowth(max_decay=0.5), "max_decay=0.5; expected a number in"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(OptionError, match=text):
        make()


@pytest.mark.parametrize(
    ("module", "option"),
    [
        (m.ClipNorm(1.0), {"dim": 0}),
        (m.ClipNormByEMA(), {"tensorwise": False}),
        (m.ClipNormGrowth(), {"parameterwise": False}),
    ],
)
def test_what_concerns_all_tensors_cannot_differ_between_them(module, option):
    params = [torch.zeros(3, requires_grad=True)]
    with pytest.raises(OptionError, match="for some parameters, but"):
        Modular([{"params": params, **option}], module)
