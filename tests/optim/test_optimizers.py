"""One table of all public optimizers, and what must hold for every one of them."""

import copy
import io
import itertools
import math
import pickle
import re

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphopt import annotations, optim
from graphopt.errors import GraphoptError, MissingAnnotation, OptionError, StaleAnnotation, UnsupportedError
from graphopt.optim import (
    Graft,
    OptimizerOptimizer,
    Sign,
    TGAdamW,
    TGLaProp,
    TGRMSProp,
    WeightDecayChain,
    WeightDecayToEMA,
    WeightDecayToInit,
)
from tests.optim.training import largest_difference, make_params, set_gradients, snapshot, train

# Each reads the statistic, and has a factor `lr` of the whole step.
MAKE = {
    "TGAdamW": lambda params, **o: TGAdamW(params, **{"lr": 0.05, **o}),
    "TGLaProp": lambda params, **o: TGLaProp(params, **{"lr": 0.05, **o}),
    "TGRMSProp": lambda params, **o: TGRMSProp(params, **{"lr": 0.05, **o}),
    "Graft": lambda params, **o: _wrap(Graft, params, o, torch.optim.SGD, lambda p: TGAdamW(p, lr=0.5)),
    "Sign": lambda params, **o: _wrap(Sign, params, o, lambda p: TGRMSProp(p, lr=0.05)),
    "OptimizerOptimizer": lambda params, **o: _wrap(OptimizerOptimizer, params, o, lambda p: TGLaProp(p, lr=0.05)),
}
DECAYS = {
    "plain": None,
    "chain": WeightDecayChain(WeightDecayToEMA(0.9), WeightDecayToInit()),
}
every_optimizer = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
every_decay = pytest.mark.parametrize("decay", DECAYS.values(), ids=DECAYS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
SHAPES = [(), (4, 3), (4, 3), (5,), (0, 2)]


def _wrap(cls, params, options, *inner):
    params = list(params)
    bare = [entry[1] if isinstance(entry, tuple) else entry for entry in params]
    return cls(params, *(make(bare) for make in inner), **options)


def everything(optimizer):
    """All tensors of an optimizer's states, by where they are."""
    found = {(index, name): v for index, s in enumerate(optimizer.state.values()) for name, v in s.items()}
    for role, inner in getattr(optimizer, "inner", {}).items():
        found |= {(role, *key): value for key, value in everything(inner).items()}
    return found


def test_the_table_is_complete():
    """Whatever ``graphopt.optim`` exports as an optimizer is tested here."""
    public = {
        name
        for name, value in vars(optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value.__name__ == name
    }
    assert set(MAKE) == public - {"Modular"}  # which is as many optimizers as there are chains: tests/optim/core


@every_optimizer
@every_decay
@every_dtype
def test_dtypes_and_shapes_stay(make, decay, dtype):
    params = make_params(SHAPES, dtype)
    optimizer = make(params, weight_decay=0.1, weight_decay_cls=decay)
    seen = []
    for seed in range(3):
        train(optimizer, params, [seed])
        assert all(p.dtype == p.grad.dtype == dtype for p in params)
        assert all(p.isfinite().all() for p in params)
        seen.append({key: (v.shape, v.dtype, v.device, v.stride()) for key, v in everything(optimizer).items()})
    assert seen[0] == seen[1] == seen[2]
    wide = torch.promote_types(dtype, torch.float32)
    for (*_, name), value in everything(optimizer).items():
        is_count = name.endswith("step") or name.startswith("num_")
        assert value.dtype == (torch.float32 if is_count else wide), name
        assert not value.requires_grad


@every_optimizer
@every_decay
def test_every_step_moves(make, decay):
    params = make_params([(4, 3), (5,)])
    optimizer = make(params, weight_decay_cls=decay)
    for seed in range(3):
        before = snapshot(params)
        train(optimizer, params, [seed])
        assert all(not torch.equal(a, b) for a, b in zip(params, before, strict=True))


@every_optimizer
@every_decay
@every_dtype
def test_resumes_from_a_file_as_if_never_stopped(make, decay, dtype):
    options = {"weight_decay": 0.3, "weight_decay_cls": decay}
    params = make_params(SHAPES, dtype)
    optimizer = make(params, **options)
    train(optimizer, params, range(3))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": snapshot(params)}, file)
    train(optimizer, params, range(3, 6))

    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed_params = [nn.Parameter(p) for p in loaded["params"]]
    resumed = make(resumed_params, lr=0.7, weight_decay_cls=decay)
    resumed.load_state_dict(loaded["optimizer"])
    train(resumed, resumed_params, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(params, resumed_params, strict=True))
    ours, theirs = everything(optimizer), everything(resumed)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
        assert value.dtype == theirs[key].dtype, key


@every_optimizer
@every_decay
def test_loading_copies(make, decay):
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, other = make(params, weight_decay_cls=decay), make(others, weight_decay_cls=decay)
    train(optimizer, params)
    other.load_state_dict(optimizer.state_dict())
    before = {key: value.clone() for key, value in everything(optimizer).items()}
    train(other, others)
    assert all(torch.equal(value, before[key]) for key, value in everything(optimizer).items())


@every_optimizer
@every_decay
def test_copies_and_pickles(make, decay):
    model = nn.Linear(3, 2).double()
    optimizer = make(model.parameters(), weight_decay_cls=decay)
    train(optimizer, list(model.parameters()))
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(optimizer, list(model.parameters()), [5])
    for other_model, other in copies:
        assert other.param_groups[0]["params"][0] is other_model.weight
        train(other, list(other_model.parameters()), [5])
        assert largest_difference(model.parameters(), other_model.parameters()) == 0.0
        assert repr(other.weight_decay_cls) == repr(decay)
        other.zero_grad()


@every_optimizer
@every_decay
def test_a_missing_statistic_is_named_and_nothing_changes(make, decay):
    params = make_params(SHAPES)
    optimizer = make(params, weight_decay=0.1, weight_decay_cls=decay)
    train(optimizer, params)
    set_gradients(params, 9)
    annotations.clear(params[2:3])
    before, states = snapshot(params), {key: value.clone() for key, value in everything(optimizer).items()}
    with pytest.raises(
        MissingAnnotation, match=r"1 of 5 parameters .* no sum_grad_squared: parameter 2 of group 0, shape \(4, 3\)"
    ):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert all(torch.equal(value, states[key]) for key, value in everything(optimizer).items())


@every_optimizer
def test_a_stale_statistic_is_named_and_nothing_changes(make):
    params = make_params(SHAPES)
    optimizer = make(params)
    set_gradients(params, 0)
    params[3].grad.add_(1.0)
    before = snapshot(params)
    with pytest.raises(StaleAnnotation, match=r"parameter 3 of group 0, shape \(5,\): .* not a rescaling"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@every_optimizer
@every_decay
def test_schedulers(make, decay):
    """The first step is proportional to the learning rate, decay included; and a scheduler sets it."""
    steps = []
    for factor in (1.0, 0.5, 0.0):
        params = make_params(SHAPES)
        optimizer = make(params, weight_decay=0.1, weight_decay_cls=decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t, f=factor: f if t == 0 else 0.0)
        before = snapshot(params)
        train(optimizer, params, [0])
        steps.append([p.detach() - old for p, old in zip(params, before, strict=True)])
        scheduler.step()
        before = snapshot(params)
        train(optimizer, params, [1])
        assert largest_difference(params, before) == 0.0
    assert largest_difference(steps[0], [2 * step for step in steps[1]]) < 1e-12
    assert largest_difference(steps[2], [torch.zeros_like(step) for step in steps[2]]) == 0.0


@every_optimizer
def test_a_tensor_is_a_learning_rate(make):
    number, tensor = make_params(), make_params()
    train(make(number, lr=0.25), number)
    train(make(tensor, lr=torch.tensor(0.25)), tensor)
    assert largest_difference(number, tensor) == 0.0


@every_optimizer
def test_closure_runs_once_with_gradients(make):
    (p,) = make_params([(4, 3)])
    optimizer = make([p])
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        annotations.publish(p, p.grad**2 / 3, 5)
        calls.append(loss.requires_grad)
        return loss

    before = p.detach().clone()
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == (before**2).sum()
    assert not torch.equal(p, before)


@every_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_gradients_and_statistics(make, set_to_none):
    params = make_params(SHAPES)
    optimizer = make(params)
    set_gradients(params, 0)
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(annotations.find(p, annotations.SUM_GRAD_SQUARED) is None for p in params)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in params)
    before = snapshot(params)
    optimizer.step()  # nothing to do, or gradients of zero whose statistic is zero
    assert all(p.isfinite().all() for p in params)
    if set_to_none:
        assert largest_difference(params, before) == 0.0


@every_optimizer
@every_decay
def test_parameters_without_gradient_are_left_alone(make, decay):
    params = make_params(SHAPES)
    optimizer = make(params, weight_decay=0.5, weight_decay_cls=decay)
    set_gradients(params, 0)
    params[1].grad = None
    before = snapshot(params)
    optimizer.step()
    assert torch.equal(params[1], before[1])
    assert not torch.equal(params[2], before[2])
    assert not optimizer.state[params[1]]


class Dtypes(TorchDispatchMode):
    """Remembers the dtypes of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


@every_optimizer
@every_decay
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_are_no_float64_temporaries(make, decay, dtype):
    params = make_params(SHAPES, dtype)
    optimizer = make(params, weight_decay=0.1, weight_decay_cls=decay)
    for seed in range(2):
        set_gradients(params, seed)
        with Dtypes() as dtypes:
            optimizer.step()
        assert torch.float32 in dtypes.seen
        assert torch.float64 not in dtypes.seen


@every_optimizer
@every_decay
def test_a_step_makes_no_more_calls_for_more_tensors(make, decay):
    """In the default way, tensors of one size are treated together: the operators are the same for 20 and for 40.

    What remains for each tensor are views, copies and the counts of its state.
    """

    class Calls(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket._qualified_op_name.partition("::")[2] in (
                "mul",
                "div",
                "sqrt",
                "lerp_",
                "sub",
                "abs",
            ):
                self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for number in (20, 40):
        params = make_params([(6, 3)] * number, torch.float32)
        optimizer = make(params, weight_decay=0.1, weight_decay_cls=decay)
        train(optimizer, params, [0])
        set_gradients(params, 1)
        with Calls() as calls:
            optimizer.step()
        counts.append(calls.count)
    assert counts[1] - counts[0] <= 20 * (isinstance(optimizer, OptimizerOptimizer) * 4)


@every_optimizer
def test_gradient_scaler(make):
    plain, scaled = make_params(SHAPES, torch.float32), make_params(SHAPES, torch.float32)
    optimizers = make(plain), make(scaled)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=2)
    for seed in range(5):
        set_gradients(plain, seed)
        set_gradients(scaled, seed)
        scale = float(scaler.scale(torch.ones(())))
        annotations.clear(scaled)
        for p, q in zip(plain, scaled, strict=True):  # what a backward of the scaled loss leaves behind
            q.grad.mul_(scale)
            annotations.publish(q, annotations.get(p, annotations.SUM_GRAD_SQUARED) * scale**2, 7)
        if seed == 3:
            scaled[1].grad[0, 0] = math.inf
            annotations.publish(scaled[1], torch.full_like(scaled[1], math.inf), 7)
        else:
            optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
    assert largest_difference(plain, scaled) < 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_optimizer
@every_decay
def test_cuda(make, decay):
    here, there = make_params(SHAPES, torch.float32), make_params(SHAPES, torch.float32)
    there = [nn.Parameter(p.detach().cuda()) for p in there]
    optimizers = [make(params, weight_decay=0.1, weight_decay_cls=decay) for params in (here, there)]
    for params, optimizer in zip((here, there), optimizers, strict=True):
        train(optimizer, params, range(10))
    assert largest_difference(here, [p.cpu() for p in there]) < 1e-4


@every_optimizer
def test_hooks_fire(make):
    params = make_params(SHAPES)
    optimizer = make(params)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    train(optimizer, params, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saved", "loaded"]


@every_optimizer
def test_step_inside_torch_compile(make):
    params, usual = make_params([(4, 3)]), make_params([(4, 3)])
    step = torch.compile(make(params).step, backend="eager")
    for seed in range(3):
        set_gradients(params, seed)
        step()
    train(make(usual), usual, range(3))
    assert largest_difference(params, usual) == 0.0


@every_optimizer
def test_named_parameters_and_their_errors(make):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = make(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"][3] == "1.bias"
    with pytest.raises(
        UnsupportedError, match=r"shape \(3,\) is complex \(torch.complex64\).*torch\.view_as_real\(param\)"
    ):
        make([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])


@every_optimizer
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "lr=-1.0; expected a number or a one-element tensor, at least 0"),
        ({"lr": torch.ones(2)}, "one-element"),
        ({"weight_decay": -0.5}, "weight_decay=-0.5; expected a number, at least 0"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
    ],
)
def test_bad_options_are_refused(make, options, text):
    params = make_params([(3,)])
    with pytest.raises(OptionError, match=re.escape(text)):
        make(params, **options)
    optimizer = make(params)
    with pytest.raises(OptionError, match=re.escape(text)):
        optimizer.add_param_group({"params": make_params([(3,)]), **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", [Graft, Sign, OptimizerOptimizer])
def test_a_state_without_the_inner_ones_is_refused(cls):
    params = make_params([(3,)])
    optimizer = MAKE[cls.__name__](params)
    train(optimizer, params)
    before = {key: value.clone() for key, value in everything(optimizer).items()}
    text = rf"{cls.__name__}\.load_state_dict: the first group lacks '\w+\.param_groups'.* Pass what {cls.__name__}\.state_"
    with pytest.raises(OptionError, match=text):
        optimizer.load_state_dict(torch.optim.Adam(params).state_dict())
    assert all(torch.equal(value, before[key]) for key, value in everything(optimizer).items())


@pytest.mark.parametrize("cls", [Graft, Sign, OptimizerOptimizer])
def test_inner_groups_may_be_others(cls):
    """In another order, and with options of their own, which are saved with them."""

    def make(params, lr):
        inner = [
            TGAdamW([{"params": params[3:]}, {"params": params[:3], "lr": lr, "betas": (0.5, 0.6)}], lr=lr / 2)
            for _ in range(1 + (cls is Graft))
        ]
        return cls([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}], *inner)

    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, resumed = make(params, 0.1), make(others, 0.7)
    train(optimizer, params)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    resumed.load_state_dict(optimizer.state_dict())
    assert all("." not in name for name in resumed.param_groups[0])
    for inner in resumed.inner.values():
        assert [group["lr"] for group in inner.param_groups] == [0.05, 0.1]
    train(optimizer, params, [7])
    train(resumed, others, [7])
    assert largest_difference(params, others) == 0.0


@every_optimizer
@every_decay
def test_distributed_checkpoint(make, decay):
    """It steps a new optimizer with zero gradients, to learn its state; and must not step one that has been used."""
    models = [nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make(model.parameters(), weight_decay_cls=decay) for model in models]
    params = [list(model.parameters()) for model in models]
    train(optimizers[0], params[0])
    optimizers[0].zero_grad()
    before = snapshot(params[1])
    states = {key: value.clone() for key, value in everything(optimizers[0]).items()}

    fresh = get_optimizer_state_dict(models[1], optimizers[1])
    saved = get_optimizer_state_dict(models[0], optimizers[0])
    assert largest_difference(params[1], before) == 0.0
    assert all(torch.equal(value, states[key]) for key, value in everything(optimizers[0]).items())
    assert {name: set(entry) for name, entry in fresh["state"].items()} == {
        name: set(entry) for name, entry in saved["state"].items()
    }

    models[1].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[1], optimizers[1], saved)
    for optimizer, p in zip(optimizers, params, strict=True):
        train(optimizer, p, [9])
    assert largest_difference(*params) == 0.0


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product([Graft, Sign, OptimizerOptimizer], repeat=2)))
def test_wrappers_wrap_wrappers(outer, inner):
    def make(params):
        return _wrap(outer, params, {}, *[lambda p: MAKE[inner.__name__](p)] * (2 if outer is Graft else 1))

    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer = make(params)
    train(optimizer, params, range(3))
    resumed = make(others)
    resumed.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    train(optimizer, params, [7])
    train(resumed, others, [7])
    assert largest_difference(params, others) == 0.0
    set_gradients(params, 8)
    annotations.clear(params)
    with pytest.raises(GraphoptError, match="have no sum_grad_squared"):
        optimizer.step()
