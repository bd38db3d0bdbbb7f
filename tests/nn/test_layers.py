"""Every class of graphopt.nn against its original: initial values, results, gradients, and the statistic of a loop over samples."""

import copy

import pytest
import torch
from torch import nn as torch_nn

from graphopt import nn
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from tests.nn.cases import CASES, REFUSED, N, build, total
from tests.oracle import from_losses, loop_over_samples

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def warm(module, inputs):
    """Values other than the initial zeros and ones; lazy modules become what they are."""
    with torch.no_grad():
        module(*copy.deepcopy(inputs))
        torch.manual_seed(4)
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.3)
    return module


def assert_like_torch(module, original, inputs, axes, num_samples):
    """One step of both; the statistic of a loop over samples of the original."""
    results = []
    for each in (module, original):
        each.zero_grad()
        torch.manual_seed(5)
        result = each(*inputs)
        total(result).backward()
        results.append(result)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    if axes is None:
        expected = from_losses(original, [total(original(*inputs))])
    else:
        expected = loop_over_samples(original, inputs, total, reduction="sum", axes=axes)
    for (name, param), (_, other) in zip(module.named_parameters(), original.named_parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad, **EXACT, msg=lambda text, n=name: f"{n}: {text}")
        found = find(param, SUM_GRAD_SQUARED)
        assert found is not None, name
        torch.testing.assert_close(
            found, expected[name].sum_grad_squared, **EXACT, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert find(param, NUM_SAMPLES) == num_samples
        assert isinstance(param, nn.TrueGradParameter)
        assert not isinstance(other, nn.TrueGradParameter)


def test_every_class_has_a_case():
    assert {case.name for case in CASES} | REFUSED == {cls.__name__ for cls in nn.modules}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_numbers_as_torch(case):
    inputs = case.batch(N)
    module, original = build(case, nn), build(case, torch_nn)
    torch.manual_seed(6)
    first = module(*inputs)
    torch.manual_seed(6)
    torch.testing.assert_close(first, original(*inputs))  # also: initial values
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in original.named_parameters()]
    for mine, theirs in zip(module.state_dict().values(), original.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    warm(module, inputs), warm(original, inputs)
    assert isinstance(module, nn.modules)
    for num_samples in (N, 3, 1, N):  # one trace serves the first two
        inputs = case.batch(num_samples)
        assert_like_torch(module, original, inputs, case.axes, num_samples)
    if case.one is not None:
        inputs = case.one()
        original.zero_grad()
        assert_like_torch(module, original, inputs, None, 1)
