"""An annotation and ``p.grad`` belong to the same gradient: whatever clears or rescales the one, clears or rescales the other."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn

import graphopt
from graphopt.annotations import (
    INIT_SCALE,
    KEYS,
    NUM_SAMPLES,
    STAGE,
    SUM_GRAD_SQUARED,
    clear,
    find,
    get,
    publish,
    reconcile,
)
from graphopt.errors import GraphoptError, MissingAnnotation, StaleAnnotation


def annotated(shape=(3, 2), dtype=torch.float64, num_samples=4):
    """A parameter with a gradient and a statistic, and copies of both."""
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    param.grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    squares = torch.rand(shape, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
    publish(param, squares.clone(), num_samples)
    graphopt.annotations.expose()
    return param, param.grad.clone(), squares


def test_get():
    param, _, squares = annotated()
    assert torch.equal(get(param, SUM_GRAD_SQUARED), squares)
    assert get(param, NUM_SAMPLES) == 4
    assert torch.equal(param.sum_grad_squared, squares)
    assert param.num_samples == 4


BY = {STAGE.name: "LayerToLayer", INIT_SCALE.name: "GradInit"}


def test_missing():
    param = nn.Parameter(torch.zeros(3, 2))
    graphopt.annotations.expose()
    for key in KEYS:
        assert find(param, key) is None
        assert not hasattr(param, key.name)
        by = BY.get(key.name, "TrueGrad")
        with pytest.raises(
            MissingAnnotation, match=rf"shape \(3, 2\) has no {key.name}; it is provided by the pass {by}"
        ):
            get(param, key)
        since = "before the model has been called" if key.is_lasting else "since the gradient was last cleared"
        with pytest.raises(AttributeError, match=f"no {key.name} {since}; it is provided by"):
            getattr(param, key.name)


def test_keys_say_what_they_are():
    further = {"sample_grad_norm", "sum_position_grad_squared", "grad_variance", "grad_snr", "stage", "init_scale"}
    assert {key.name for key in KEYS} == {"sum_grad_squared", "num_samples"} | further
    for key in KEYS:
        assert all((key.shape, key.unit, key.provider, key.doc))


RESCALINGS = {
    "div_": lambda p: p.grad.div_(8),
    "mul_": lambda p: p.grad.mul_(-3),
    "new tensor": lambda p: setattr(p, "grad", p.grad * 0.3),
    "one": lambda p: p.grad.mul_(1),
    "same values in a new tensor": lambda p: setattr(p, "grad", p.grad.clone()),
    "clip_grad_norm_": lambda p: nn.utils.clip_grad_norm_([p], 1e-2),
    "clip_grad_norm_ foreach": lambda p: nn.utils.clip_grad_norm_([p], 1e-2, foreach=True),
    "clip_grad_norm_ that clips nothing": lambda p: nn.utils.clip_grad_norm_([p], 1e6),
    "foreach": lambda p: torch._foreach_div_([p.grad], 4.0),
    "unscale": lambda p: torch._amp_foreach_non_finite_check_and_unscale_(
        [p.grad], torch.zeros(1), torch.tensor(0.125)
    ),
    "twice": lambda p: (p.grad.div_(2), reconcile([p]), p.grad.div_(2)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rescale", RESCALINGS.values(), ids=RESCALINGS)
def test_rescaling_is_followed(rescale, dtype):
    param, grad, squares = annotated((7, 30), dtype)
    rescale(param)
    factor = (param.grad.double() / grad.double()).median()
    tolerance = (
        {"rtol": 2e-2, "atol": 1e-6} if dtype in (torch.bfloat16, torch.float16) else {"rtol": 1e-5, "atol": 1e-9}
    )
    expected = (squares.double() * factor**2).to(squares.dtype)
    torch.testing.assert_close(get(param, SUM_GRAD_SQUARED), expected, **tolerance)
    torch.testing.assert_close(get(param, SUM_GRAD_SQUARED), expected, **tolerance)  # once, not at every reading
    assert get(param, NUM_SAMPLES) == 4


@pytest.mark.parametrize("shape", [(), (1,), (64,), (65,), (1000,), (3, 4, 5), (129, 7)])
def test_rescaling_of_any_shape(shape):
    param, _, squares = annotated(shape)
    param.grad.mul_(0.5)
    torch.testing.assert_close(param.sum_grad_squared, squares / 4)


def test_rescaling_of_a_gradient_that_is_not_contiguous():
    param, _, squares = annotated((6, 5))
    param.grad = (torch.randn(5, 6, dtype=torch.float64)).t()
    publish(param, squares.clone(), 4)
    param.grad.mul_(3)
    torch.testing.assert_close(param.sum_grad_squared, 9 * squares)


CHANGES = {
    "clip_grad_value_": lambda p: nn.utils.clip_grad_value_([p], 0.1),
    "noise": lambda p: p.grad.add_(torch.randn_like(p.grad)),
    "weight decay": lambda p: p.grad.add_(torch.ones_like(p.grad), alpha=0.1),
    "another gradient": lambda p: setattr(p, "grad", torch.randn_like(p.grad)),
    "sign": lambda p: p.grad.sign_(),
    "one entry": lambda p: p.grad.view(-1)[0].add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_changes_are_refused_until_cleared(change):
    param, _, _ = annotated()
    change(param)
    for _ in range(2):
        with pytest.raises(
            StaleAnnotation, match=r"shape \(3, 2\) was changed after backward in a way that is not a rescaling"
        ):
            get(param, SUM_GRAD_SQUARED)
    with pytest.raises(StaleAnnotation):
        _ = param.num_samples
    param.grad = None
    assert find(param, SUM_GRAD_SQUARED) is None


CLEARINGS = {
    "grad = None": lambda p: setattr(p, "grad", None),
    "zero_": lambda p: p.grad.zero_(),
    "clear": lambda p: clear([p]),
    "del": lambda p: delattr(p, "sum_grad_squared"),
    "zero_grad": lambda p: torch.optim.SGD([p]).zero_grad(),
    "zero_grad to zero": lambda p: torch.optim.SGD([p]).zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("clearing", CLEARINGS.values(), ids=CLEARINGS)
def test_clearing(clearing):
    param, _, _ = annotated()
    cleared = []
    publish(param, torch.ones(3, 2), 1, on_clear=lambda: cleared.append(1))
    clearing(param)
    assert find(param, SUM_GRAD_SQUARED) is None
    assert not hasattr(param, "num_samples")
    assert cleared == [1]


def test_a_gradient_of_zeros_keeps_its_statistic():
    """Per-sample gradients can cancel exactly."""
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.zeros(3)
    publish(param, torch.ones(3), 2)
    assert torch.equal(get(param, SUM_GRAD_SQUARED), torch.ones(3))


def test_silent_entries_are_recognised_by_the_norm():
    """All remembered entries are zero, as in an embedding of which few rows were looked up."""
    param = nn.Parameter(torch.zeros(1000, 64))
    param.grad = torch.zeros(1000, 64)
    param.grad[7, 3] = 2.0
    publish(param, torch.ones(1000, 64), 2)
    param.grad.mul_(0.5)
    torch.testing.assert_close(get(param, SUM_GRAD_SQUARED), torch.full((1000, 64), 0.25))
    param.grad.zero_()
    assert find(param, SUM_GRAD_SQUARED) is None


def test_values_assigned_by_hand():
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    graphopt.annotations.expose()
    param.sum_grad_squared = torch.ones(3)
    param.num_samples = 5
    assert torch.equal(get(param, SUM_GRAD_SQUARED), torch.ones(3))
    assert get(param, NUM_SAMPLES) == 5
    param.grad.mul_(2)
    assert torch.equal(get(param, SUM_GRAD_SQUARED), torch.full((3,), 4.0))


def test_problem_is_raised_on_reading():
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    publish(param, torch.ones(3), 1, problem="no good")
    with pytest.raises(StaleAnnotation, match="no good"):
        get(param, SUM_GRAD_SQUARED)


def test_reconcile_names_no_innocent():
    (good, _, squares), (bad, _, _) = annotated(), annotated()
    good.grad.mul_(2)
    bad.grad.add_(torch.randn(3, 2))
    with pytest.raises(StaleAnnotation):
        reconcile([bad, good])
    torch.testing.assert_close(good.sum_grad_squared, 4 * squares)


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_parameter_carry_nothing(duplicate):
    param, grad, _ = annotated()
    if duplicate == "deepcopy":
        clone = copy.deepcopy(param)
    elif duplicate == "pickle":
        clone = pickle.loads(pickle.dumps(param))
    else:
        file = io.BytesIO()
        torch.save(param, file)
        file.seek(0)
        clone = torch.load(file, weights_only=True)
    assert type(clone) is nn.Parameter
    assert find(clone, SUM_GRAD_SQUARED) is None
    assert vars(param) == {}
    assert torch.equal(param.grad, grad)
    assert find(param, SUM_GRAD_SQUARED) is not None


def test_statistics_die_with_their_parameter():
    param, _, _ = annotated()
    value = weakref.ref(get(param, SUM_GRAD_SQUARED))
    del param
    gc.collect()
    assert value() is None


def test_errors_are_graphopt_errors():
    assert issubclass(MissingAnnotation, GraphoptError)
    assert issubclass(MissingAnnotation, LookupError)
    assert issubclass(StaleAnnotation, GraphoptError)
    assert issubclass(StaleAnnotation, RuntimeError)
