"""Rules that step many tensors of equal shape by one call: the same numbers as one by one, whatever changes in between."""

import copy
import io
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from graphopt.optim import Modular, Rule, m
from graphopt.optim.core.arithmetic import average, when, zeros
from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from tests.optim.training import set_gradients


class GramState(NamedTuple):
    gram: Tensor
    exp_avg: Tensor


class Gram(Rule):
    """Divides by a matrix that is refreshed in every second step, behind an average; knows everything a rule can know."""

    bounds = numbers(eps=NON_NEGATIVE)
    State = GramState
    elementwise = False
    batches = True
    calls = 0

    def __init__(self, eps=0.1, square=True, inner=None):
        super().__init__({"eps": eps, "square": square}, inner=inner or [m.HeavyBall()])

    def init(self, param, settings):
        return GramState(torch.eye(param.shape[0], dtype=param.dtype), zeros(param))

    def update(self, update, state, settings, context):
        type(self).calls += 1

        def refreshed():
            return state.gram + update @ update.mT

        gram = when(context.count % 2 == 0, refreshed, lambda: state.gram)
        new = torch.linalg.solve(gram + settings.eps * torch.eye(gram.shape[0], dtype=gram.dtype), update)
        if settings.square:
            new = new * new.abs()
        new = new + 0.1 * context.param + context.grad + context.operands["inner"]
        return new, GramState(gram, average(state.exp_avg, new, 0.9))


SHAPES = [(3, 2)] * 6 + [(2, 3)] * 7 + [(5, 1), (0, 2)]


def make(way, modules, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    return params, Modular(params, *modules, m.LR(0.1), foreach=way)


def train(params, optimizer, steps):
    for seed in steps:
        set_gradients(params, seed)
        optimizer.step()


def assert_equal(left, right, tolerance=1e-12):
    for p, q in zip(left, right, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("way", [None, True])
def test_batches_are_called_once_and_equal_one_by_one(way):
    expected, one_by_one = make(False, [Gram()])
    train(expected, one_by_one, range(4))
    params, optimizer = make(way, [Gram()])
    Gram.calls = 0
    train(params, optimizer, range(4))
    assert Gram.calls == 4 * 3  # two batches and one alone; what is empty is not called
    assert_equal(params, expected)
    for p, q in zip(params, expected, strict=True):
        ours, theirs = optimizer.state[p], one_by_one.state[q]
        assert ours.keys() == theirs.keys()
        assert_equal(list(ours.values()), list(theirs.values()))


def restrict_gradients(params, optimizer):
    params[1].grad = None


def change_setting(params, optimizer):
    optimizer.param_groups[0]["gram.eps" if "gram.eps" in optimizer.param_groups[0] else "eps"] = 0.7


def change_one(params, optimizer):
    optimizer.modules[0].set_param_groups([{"params": params[2], "eps": 2.0}])


def change_choice(params, optimizer):
    optimizer.modules[0].set_param_groups([{"params": params[0], "square": False}])


def reload(params, optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def write_state(params, optimizer):
    optimizer.state[params[0]]["gram.exp_avg"].fill_(3.0)


def replace_state(params, optimizer):
    optimizer.state[params[0]]["gram.gram"] = 5 * torch.eye(3, dtype=torch.float64)


def reset(params, optimizer):
    optimizer.reset()


def tensor_setting(params, optimizer):
    optimizer.param_groups[0]["eps"] = torch.tensor([0.3])


CHANGES = [
    restrict_gradients,
    change_setting,
    change_one,
    change_choice,
    reload,
    write_state,
    replace_state,
    reset,
    tensor_setting,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_steps(change):
    results = []
    for way in (False, True):
        params, optimizer = make(way, [Gram()])
        for seed in range(5):
            set_gradients(params, seed)
            if seed == 2:
                change(params, optimizer)
            optimizer.step()
        results.append(params)
    assert_equal(*results)


def test_a_copy_goes_its_own_way():
    params, optimizer = make(True, [Gram()])
    train(params, optimizer, range(2))
    before = [p.detach().clone() for p in params]
    copied_params, copied = copy.deepcopy((params, optimizer))
    train(copied_params, copied, range(2, 4))
    assert_equal(params, before, 0)
    train(params, optimizer, range(2, 4))
    assert_equal(params, copied_params, 0)


CHAINS = {
    "Muon": lambda: [m.Muon(method="svd", dual_norm_correction=True)],
    "Orthogonalize": lambda: [m.Orthogonalize(method="svd", adjust_lr=True), m.MuonAdjustLR(), m.DualNormCorrection()],
    "inside Split": lambda: [m.Split(lambda p: p.shape[0] == 3, m.Muon(method="svd"), m.Adam())],
    "as an operand": lambda: [m.GraftModules(Gram(), m.RMSprop())],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    shapes = [shape for shape in SHAPES if 0 not in shape]
    results = []
    for way in (False, True):
        params, optimizer = make(way, CHAINS[name](), shapes)
        train(params, optimizer, range(3))
        results.append(params)
    assert_equal(*results, 1e-9)


def test_an_error_while_planning_leaves_no_half_plan():
    params, optimizer = make(True, [Gram(inner=m.Identity())])
    init = Gram.init

    def fails(self, param, settings):
        if param.shape == (2, 3):
            raise RuntimeError("no memory")
        return init(self, param, settings)

    set_gradients(params, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gram, "init", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            optimizer.step()
    expected, other = make(True, [Gram(inner=m.Identity())])
    for each, steps in ((params, optimizer), (expected, other)):
        set_gradients(each, 0)
        steps.step()
    assert_equal(params, expected)
