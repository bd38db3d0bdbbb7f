"""What holds for every public module in an optimizer: files, copies, resets, and checkpoints before the first step."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from graphopt.optim import Modular, m
from tests.optim.examples import MATRICES_ONLY, NAMES, RESIDUALS, is_matrix, residuals_of, with_rate
from tests.optim.examples import make as make_example
from tests.optim.training import set_gradients


def build(name):
    """The chain of a module, on all parameters of a model."""
    return [m.Split(is_matrix, make_example(name), m.Adam())] if name in MATRICES_ONLY else make_example(name)


def models():
    made = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double() for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    return made


def make(model, name):
    return Modular(model, with_rate(build(name), 0.01))


def needs_closure(optimizer):
    return any(entry.module.needs_closure for entry in optimizer._named)


def needs_residuals(optimizer):
    return any(type(entry.module).__name__ in RESIDUALS for entry in optimizer._named)


def train(optimizer, model, steps):
    """On gradients that are given, or with a closure; random numbers are those of the step."""
    params = list(model.parameters())
    for seed in steps:
        torch.manual_seed(seed)
        if not needs_closure(optimizer):
            set_gradients(params, seed)
            optimizer.step()
            continue

        def closure(backward=True):
            if needs_residuals(optimizer):
                return residuals_of(params)
            loss = sum(((p - 0.3) ** 2).sum() * (1 + i) for i, p in enumerate(params)) + (params[0] ** 4).sum()
            if backward:
                optimizer.zero_grad()
                loss.backward()
            return loss

        optimizer.step(closure)


def tensors(optimizer):
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        (owner, name): value
        for owner, p in zip(names, params, strict=True)
        for name, value in optimizer.state.get(p, {}).items()
    }


def assert_same(left, right):
    for (name, p), q in zip(left[1].named_parameters(), right[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=0, equal_nan=True), name
    ours, theirs = tensors(left[0]), tensors(right[0])
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert type(value) is type(theirs[key]), key
        if isinstance(value, torch.Tensor):
            assert value.shape == theirs[key].shape, key
            assert torch.allclose(value, theirs[key], rtol=0, atol=0, equal_nan=True), key
            assert value.dtype == theirs[key].dtype, key
            assert not value.requires_grad, key


@pytest.mark.parametrize("name", NAMES)
def test_files_copies_and_new_beginnings(name):
    """Bit for bit: from a file that is read with ``weights_only=True``, as a copy, and after a reset."""
    left, right = models()
    optimizer, resumed = make(left, name), make(right, name)
    train(optimizer, left, range(2))
    file = io.BytesIO()
    torch.save([left.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    copied, other = copy.deepcopy((optimizer, left))
    parameters, states = torch.load(file, weights_only=True)
    right.load_state_dict(parameters)
    resumed.load_state_dict(states)
    train(optimizer, left, range(2, 4))
    for pair in ((copied, other), (resumed, right)):
        train(*pair, range(2, 4))
        assert_same((optimizer, left), pair)
    fresh = make(other, name)
    other.load_state_dict(left.state_dict())
    optimizer.reset()
    train(optimizer, left, range(2))
    train(fresh, other, range(2))
    assert_same((optimizer, left), (fresh, other))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_asks_for_the_state_before_the_first_step(name):
    """Nothing moves; and where modules are rules, all of the state is there, and training is as without."""
    left, right = models()
    optimizer, untouched = make(left, name), make(right, name)
    found = get_optimizer_state_dict(left, optimizer)["state"]
    assert all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))
    if not optimizer.updates_each_parameter_alone:
        return
    train(optimizer, left, range(2))
    train(untouched, right, range(2))
    assert_same((optimizer, left), (untouched, right))
    names = {(owner, key) for owner, state in found.items() for key in state}
    assert names == set(tensors(untouched))
