"""What holds for every public module in an optimizer: files, copies, resets, and checkpoints before the first step."""

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from graphopt.optim import Modular, Module, m
from tests.optim.training import set_gradients

CLASSES = {name: cls for name, cls in vars(m).items() if isinstance(cls, type) and issubclass(cls, Module)}


def is_matrix(param):
    return param.ndim == 2


# Modules with arguments that are neither numbers nor modules, or that do not serve every parameter.
MAKE = {
    "Averaging": lambda: m.Averaging(2),
    "BlockPartition": lambda: m.BlockPartition(m.HeavyBall(), 3),
    "Clip": lambda: m.Clip(-1.0, 1.0),
    "ClipModules": lambda: m.ClipModules(m.HeavyBall(), -1.0, 1.0),
    "Freeze": lambda: m.Freeze(is_matrix),
    "GradientAccumulation": lambda: m.GradientAccumulation(m.HeavyBall(), 2),
    "Masked": lambda: m.Masked(is_matrix, m.HeavyBall()),
    "MedianAveraging": lambda: m.MedianAveraging(3),
    "Muon": lambda: m.Split(is_matrix, m.Muon(), m.Adam()),
    "Split": lambda: m.Split(is_matrix, m.Adam(), m.HeavyBall()),
    "Switch": lambda: m.Switch(m.HeavyBall(), m.Adam(), steps=2),
    "WeightedAveraging": lambda: m.WeightedAveraging([0.5, 0.3]),
    "WeightedMean": lambda: m.WeightedMean(m.HeavyBall(), m.Adam(), weights=[0.2, 0.8]),
    "WeightedSum": lambda: m.WeightedSum(m.HeavyBall(), m.Adam(), weights=[0.2, 0.8]),
}


def build(name):
    """An instance; modules inside are momenta, so that there is something to remember."""
    if name in MAKE:
        return MAKE[name]()
    cls, given = CLASSES[name], {}
    for argument, parameter in inspect.signature(cls).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return cls(m.HeavyBall(0.5), m.HeavyBall(0.9))
        if parameter.default is inspect.Parameter.empty:
            given[argument] = 0.5 if argument in cls.bounds else m.HeavyBall(0.5)
    return cls(**given)


def models():
    made = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double() for _ in range(2)]
    made[1].load_state_dict(made[0].state_dict())
    return made


def make(model, name):
    return Modular(model, build(name), m.LR(0.01))


def needs_closure(optimizer):
    return any(entry.module.needs_closure for entry in optimizer._named)


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


@pytest.mark.parametrize("name", CLASSES)
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


@pytest.mark.parametrize("name", CLASSES)
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
