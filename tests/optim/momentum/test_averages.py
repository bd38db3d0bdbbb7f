"""Averages of updates, their corrections, and updates compared with gradients, against loops over numbers and torch."""

import math
import statistics

import pytest
import torch

from graphopt.errors import OptionError
from graphopt.optim import Modular, m
from tests.optim.catalogue import accepts
from tests.optim.outputs import Noise, assert_equal_steps, make_tensors, noise_like, on_numbers, outputs, pure_outputs
from tests.optim.training import largest_difference, make_params, train

UPDATES = [1.0, -2.0, 4.0, 0.5, 3.0]
B = 0.7


def ema(updates, debiased=False, dampening=0.0, lerp=True, start=False):
    average, result = 0.0, []
    for step, u in enumerate(updates, 1):
        average = B * average + (1 - B if lerp else 1) * (1 - dampening) * u
        if start and step == 1:
            average = u
        result.append(average / (1 - B**step) if debiased else average)
    return result


def largest_so_far(values):
    return [max(values[: index + 1]) for index in range(len(values))]


SQUARES = [u * u for u in UPDATES]
CUBES = [abs(u) ** 3 for u in UPDATES]
VARIANCE = [v - e * e for v, e in zip(ema(SQUARES), ema(UPDATES), strict=True)]
DEBIASED_VARIANCE = [v - e * e for v, e in zip(ema(SQUARES, True), ema(UPDATES, True), strict=True)]
STEPS = range(1, len(UPDATES) + 1)


def roots(values):
    return [math.sqrt(value) for value in values]


@accepts("M3", "M12")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: m.EMA(B), ema(UPDATES)),
        (lambda: m.EMA(B, debiased=True), ema(UPDATES, True)),
        (lambda: m.EMA(B, 0.2), ema(UPDATES, dampening=0.2)),
        (lambda: m.EMA(B, lerp=False), ema(UPDATES, lerp=False)),
        (lambda: m.EMA(B, ema_init="update"), ema(UPDATES, start=True)),
        (lambda: m.EMASquared(B), ema(SQUARES)),
        (lambda: m.EMASquared(B, pow=3), ema(CUBES)),
        (lambda: m.EMASquared(B, amsgrad=True), largest_so_far(ema(SQUARES))),
        (lambda: m.SqrtEMASquared(B), roots(ema(SQUARES))),
        (lambda: m.SqrtEMASquared(B, debiased=True), roots(ema(SQUARES, True))),
        (lambda: m.SqrtEMASquared(B, pow=3), [v ** (1 / 3) for v in ema(CUBES)]),
        (
            lambda: m.SqrtEMASquared(B, amsgrad=True, debiased=True),
            [math.sqrt(v / (1 - B**t)) for t, v in zip(STEPS, largest_so_far(ema(SQUARES)), strict=True)],
        ),
        (lambda: m.CenteredEMASquared(B), VARIANCE),
        (lambda: m.CenteredEMASquared(B, amsgrad=True), largest_so_far(VARIANCE)),
        (lambda: m.CenteredSqrtEMASquared(B), roots(VARIANCE)),
        (lambda: m.CenteredSqrtEMASquared(B, debiased=True), roots([max(v, 0) for v in DEBIASED_VARIANCE])),
        (lambda: m.Debias(0.9), [u / (1 - 0.9**t) for t, u in zip(STEPS, UPDATES, strict=True)]),
        (
            lambda: m.Debias(0.9, 0.99, 3.0),
            [3 * u * math.sqrt(1 - 0.99**t) / (1 - 0.9**t) for t, u in zip(STEPS, UPDATES, strict=True)],
        ),
        (lambda: m.Debias(beta2=0.9, pow=1), [u * (1 - 0.9**t) for t, u in zip(STEPS, UPDATES, strict=True)]),
        (lambda: m.Debias2(0.9), [u / math.sqrt(1 - 0.9**t) for t, u in zip(STEPS, UPDATES, strict=True)]),
    ],
)
def test_equals_a_loop(make, expected):
    assert on_numbers(lambda: [make()], UPDATES) == pytest.approx(expected, rel=1e-12, abs=1e-9)


@accepts("M3")
def test_constant_updates_come_out_of_a_debiased_average():
    assert on_numbers(lambda: [m.EMA(0.9, debiased=True)], [2.5] * 6) == pytest.approx([2.5] * 6, rel=1e-14)


@accepts("M12")
def test_centered_rmsprop_of_torch():
    params, others = make_params(), make_params()
    modules = [m.Div([m.CenteredSqrtEMASquared(0.99), m.Add(1e-8)]), m.LR(0.01)]
    train(Modular(params, *modules), params, range(20))
    train(torch.optim.RMSprop(others, 0.01, alpha=0.99, centered=True), others, range(20))
    assert largest_difference(params, others) < 1e-11


HISTORY = [
    (lambda: m.Averaging(3), [1, 5, 3, 9], [1, 3, 3, 17 / 3]),
    (lambda: m.MedianAveraging(3), [1, 5, 3, 9], [1, 3, 3, 5]),
    (lambda: m.WeightedAveraging([1, 2, 3]), [1, 1, 1, 1], [3, 2.5, 2, 2]),
    (lambda: m.WeightedAveraging([1, 2, 3], normalize=True), [1, 1, 1, 1], [1, 1, 1, 1]),
    (lambda: m.WeightedAveraging([1, 10]), [1, 2, 3], [10, 10.5, 16]),
]


@accepts("M4", "M5", "M6")
@pytest.mark.parametrize(("make", "updates", "expected"), HISTORY)
def test_averages_of_the_last_updates(make, updates, expected):
    assert on_numbers(lambda: [make()], updates) == pytest.approx(expected)


@accepts("M4", "M5")
@pytest.mark.parametrize("size", [1, 4])
def test_averages_of_the_last_updates_against_statistics(size):
    updates = noise_like(torch.empty(9), 3).tolist()
    windows = [updates[max(0, end - size) : end] for end in range(1, 10)]
    assert on_numbers(lambda: [m.Averaging(size)], updates) == pytest.approx([statistics.fmean(w) for w in windows])
    assert on_numbers(lambda: [m.MedianAveraging(size)], updates) == pytest.approx(
        [statistics.median(w) for w in windows]
    )


@accepts("M4")
def test_an_average_does_not_drift():
    """A number far from all others leaves nothing behind in float32."""
    p = torch.zeros(2, requires_grad=True)
    optimizer = Modular([p], m.Averaging(3))
    for update in [1e8, 1.0, 1.0, 1.0]:
        before = p.detach().clone()
        p.grad = torch.full_like(p, update)
        p.data.zero_()
        optimizer.step()
    assert (before - before - p).tolist() == [1.0, 1.0]


def cautious(u, g, mode, normalize):
    agrees = u * g > 0
    if mode == "zero":
        kept = torch.where(agrees, u, 0.0)
        return kept / max(agrees.double().mean().item(), 1e-6) if normalize else kept
    return torch.where(agrees, u, g if mode == "grad" else -u)


@accepts("M7", "M11")
@pytest.mark.parametrize(
    ("mode", "normalize"), [("zero", False), ("zero", True), ("grad", False), ("backtrack", False)]
)
def test_cautious(mode, normalize):
    (grads,) = [make_tensors(1)]
    updates = [g + noise_like(g, 77 + i) for i, g in enumerate(grads)]
    expected = [[cautious(u, g, mode, normalize) for u, g in zip(updates, grads, strict=True)]]
    for way in ({"foreach": False}, {"foreach": True}):
        got = outputs(lambda: [Noise(), m.Cautious(normalize, mode=mode)], [grads], **way)
        assert_equal_steps(got, expected)
        got = outputs(
            lambda: [Noise(), m.IntermoduleCautious(m.Identity(), m.Grad(), normalize, mode=mode)], [grads], **way
        )
        assert_equal_steps(got, expected)
        if mode == "zero":
            chain = lambda: [Noise(), m.Mul(m.UpdateGradientSignConsistency(normalize))]  # noqa: E731
            assert_equal_steps(outputs(chain, [grads], **way), expected)


@accepts("M7")
def test_cautious_of_the_catalogue():
    given = {"u": [1.0, 1.0, 2.0, 2.0], "g": [1.0, -1.0, 2.0, -2.0]}
    grads = [[torch.tensor(given["g"], dtype=torch.float64)]]
    (out,) = outputs(lambda: [m.Abs(), m.Cautious(normalize=True)], grads)
    assert out[0].tolist() == [2, 0, 4, 0]


@accepts("M8", "M11")
def test_scale_by_cosine_similarity():
    """One cosine for all tensors."""
    grads = [make_tensors(1)]
    updates = [g + noise_like(g, 77 + i) for i, g in enumerate(grads[0])]
    flat_u, flat_g = (torch.cat([t.flatten() for t in ts]) for ts in (updates, grads[0]))
    cosine = torch.nn.functional.cosine_similarity(flat_u, flat_g, dim=0)
    expected = [[u * cosine for u in updates]]
    assert_equal_steps(outputs(lambda: [Noise(), m.ScaleByGradCosineSimilarity()], grads), expected)
    assert_equal_steps(pure_outputs(lambda: [Noise(), m.ScaleByGradCosineSimilarity()], grads), expected)
    modules = lambda: [Noise(), m.ScaleModulesByCosineSimilarity(m.Identity(), m.Grad())]  # noqa: E731
    assert_equal_steps(outputs(modules, grads), expected)
    for chain, factor in [([], 1), ([m.Mul(3.0)], 3), ([m.Negate()], 1)]:
        (out,) = outputs(lambda c=chain: [*c, m.ScaleByGradCosineSimilarity()], grads)
        assert_equal_steps([out], [[factor * g for g in grads[0]]])


@accepts("M8")
def test_scale_by_cosine_similarity_of_a_right_angle():
    grads = [[torch.tensor([3.0, 4.0], dtype=torch.float64)]]
    (out,) = outputs(lambda: [m.GramSchimdt(m.Grad()), m.Add(m.Zeros()), m.ScaleByGradCosineSimilarity()], grads)
    assert out[0].abs().max() < 1e-12
    (out,) = outputs(lambda: [m.Zeros(), m.ScaleByGradCosineSimilarity()], grads)
    assert out[0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: m.EMA(1.0), "EMA: momentum=1.0; expected a number in"),
        (lambda: m.EMA(ema_init="ones"), "EMA: ema_init='ones'; expected 'zeros' or 'update'"),
        (lambda: m.EMA(debiased=True, ema_init="update"), "EMA: debiased=True corrects for starting at zero"),
        (lambda: m.EMASquared(pow=0), "EMASquared: pow=0; expected a number above 0"),
        (lambda: m.Debias2(pow=-1), "Debias2: pow=-1; expected a number above 0"),
        (lambda: m.Averaging(0), "Averaging: history_size=0; expected a whole number"),
        (lambda: m.MedianAveraging(2.5), "MedianAveraging: history_size=2.5; expected a whole number"),
        (lambda: m.WeightedAveraging([]), r"WeightedAveraging: weights=\(\); expected at least one"),
        (lambda: m.WeightedAveraging([1, -1], normalize=True), "sum up to 0, by which normalize=True would divide"),
        (lambda: m.Cautious(mode="one"), "Cautious: mode='one'; expected one of 'zero', 'grad', 'backtrack'"),
        (lambda: m.Cautious(True, mode="grad"), "Cautious: normalize=True makes up for elements"),
    ],
)
def test_bad_input(make, text):
    with pytest.raises(OptionError, match=text):
        make()
