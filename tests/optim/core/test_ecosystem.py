"""`Modular` with what surrounds an optimizer: files, checkpoints, copies, hooks, loss scaling, trainers."""

import copy
import importlib.util
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from graphopt.optim import Modular, Module, m
from tests.optim.training import largest_difference, make_params, set_gradients, snapshot, train

SHAPES = [(), (4, 3), (4, 3), (5,), (0, 2)]
WAYS = [{"foreach": False}, {"foreach": True}, {}]
every_way = pytest.mark.parametrize("way", WAYS, ids=str)


class Velocity(Module):
    """A user's module with a state of its own for each parameter and for all."""

    def step(self, var):
        for p, u in zip(var.params, var.get_update(), strict=True):
            self.state[p]["velocity"] = u + 0.9 * self.state[p].get("velocity", torch.zeros_like(u))
        self.global_state["calls"] = self.global_state.get("calls", 0) + 1
        var.update = [self.state[p]["velocity"] / self.global_state["calls"] for p in var.params]
        return var


CHAINS = {
    "Adam": lambda: (m.ClipValue(2.0), m.Adam(amsgrad=True), m.WeightDecay(0.1), m.LR(0.05)),
    "norms": lambda: (m.NormalizeByEMA(0.9), m.WeightDecay(0.1), m.LR(0.05)),
    "decay behind": lambda: (m.Adam(), m.LR(0.05), m.WeightDecay(0.1)),  # moves parameters at a rate of zero
    "own module": lambda: (Velocity(), m.Adam(), m.LR(0.05)),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


def make(chain, params, **options):
    return Modular(params, *chain(), **options)


def tensors(optimizer):
    return {(i, name): value for i, state in enumerate(optimizer.state.values()) for name, value in state.items()}


def assert_same_state(left, right):
    ours, theirs = tensors(left), tensors(right)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[key]), key
            assert (value.dtype, value.shape) == (theirs[key].dtype, theirs[key].shape), key
        else:
            assert value == theirs[key], key


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_way
@every_chain
@pytest.mark.parametrize("num_steps", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_resumes_from_a_file_as_if_never_stopped(chain, way, num_steps, dtype):
    """Bit for bit, also one that was saved before its first step; options and dtypes of the state are those of the file."""
    params = make_params(SHAPES, dtype)
    optimizer = make(chain, params, **way)
    optimizer.param_groups[0]["lr"] = 0.025
    train(optimizer, params, range(num_steps))
    saved = through_a_file({"optimizer": optimizer.state_dict(), "params": snapshot(params)})
    train(optimizer, params, range(3, 6))
    others = [nn.Parameter(p) for p in saved["params"]]
    resumed = make(chain, others, **way)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == 0.025
    train(resumed, others, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert_same_state(optimizer, resumed)
    wide = torch.promote_types(dtype, torch.float32)
    for (_, name), value in tensors(resumed).items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == (torch.float64 if name == "step" else wide), name


@every_way
def test_an_optimizer_that_has_stepped_takes_another_state(way):
    chain = CHAINS["Adam"]
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, other = make(chain, params, **way), make(chain, others, **way)
    train(optimizer, params, range(3))
    train(other, others, range(7, 9))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    other.load_state_dict(optimizer.state_dict())
    before = {key: value.clone() for key, value in tensors(optimizer).items()}
    train(other, others, [3])
    assert all(torch.equal(value, before[key]) for key, value in tensors(optimizer).items())  # it was copied
    train(optimizer, params, [3])
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_the_form_is_torchs():
    params = make_params([(3,)])
    optimizer = make(CHAINS["Adam"], params)
    train(optimizer, params, [0])
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert list(saved["state"]) == [0]
    assert set(saved["state"][0]) == {"adam.exp_avg", "adam.exp_avg_sq", "adam.max_exp_avg_sq", "step"}
    assert saved["param_groups"][0]["params"] == [0]
    assert set(optimizer.option_names) <= set(saved["param_groups"][0])


@every_way
@every_chain
@pytest.mark.parametrize("num_steps", [0, 2])
def test_copies_and_pickles(chain, way, num_steps):
    """They go on by themselves, with options of single parameters."""
    params = make_params(SHAPES)
    modules = chain()
    modules[-1].set_param_groups([{"params": params[1], next(iter(modules[-1].defaults)): 0.01}])
    optimizer = Modular(params, *modules, **way)
    train(optimizer, params, range(num_steps))
    with torch.no_grad():
        pairs = [copy.deepcopy((optimizer, params)), pickle.loads(pickle.dumps((optimizer, params)))]
    train(optimizer, params, range(2, 5))
    for other, others in pairs:
        assert repr(other) == repr(optimizer)
        assert other.option_names == optimizer.option_names
        train(other, others, range(2, 5))
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
        assert_same_state(optimizer, other)


def test_a_copied_model_and_its_optimizer_stay_together():
    model = nn.Linear(3, 2)
    optimizer = Modular(model, m.Adam(), m.LR(0.1))
    others = copy.deepcopy({"model": model, "optimizer": optimizer})
    assert others["optimizer"].model is others["model"]
    assert others["optimizer"].param_groups[0]["params"][0] is others["model"].weight


def test_hooks_fire():
    params = make_params(SHAPES)
    optimizer = make(CHAINS["Adam"], params)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    train(optimizer, params, [0])
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saving", "saved", "loading", "loaded"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_a_hook_may_change_what_is_loaded():
    """What is checked and loaded is what the hooks return."""
    params = make_params(SHAPES)
    optimizer, other = make(CHAINS["Adam"], params), make(CHAINS["Adam"], params)
    train(optimizer, params, [0])
    saved = optimizer.state_dict()
    renamed = copy.deepcopy(saved)
    for state in renamed["state"].values():
        state["old.exp_avg"] = state.pop("adam.exp_avg")

    def rename(_, found):
        states = {
            key: {name.replace("old.", "adam."): value for name, value in state.items()}
            for key, state in found["state"].items()
        }
        return {**found, "state": states}

    other.register_load_state_dict_pre_hook(rename)
    other.load_state_dict(renamed)
    assert_same_state(optimizer, other)


@every_way
def test_gradient_scaler(way):
    """float32 with scaled gradients against float64 without; an infinite gradient skips the step and shrinks the scale."""
    plain, scaled = make_params(SHAPES), make_params(SHAPES, torch.float32)
    optimizers = make(CHAINS["Adam"], plain, **way), make(CHAINS["Adam"], scaled, **way)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for seed in range(6):
        scale = float(scaler.scale(torch.ones(())))
        scales.append(scale)
        for own in (plain, scaled):
            set_gradients(own, seed)
        for p in scaled:
            p.grad.mul_(scale)
        if seed == 3:
            scaled[1].grad[0, 0] = math.inf
        else:
            optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
    assert scales == [1024.0, 1024.0, 2048.0, 2048.0, 1024.0, 1024.0]
    assert largest_difference(plain, scaled) < 2e-6
    assert float(optimizers[1].state[scaled[1]]["step"]) == 5


# ----------------------------------------------------------------------------------------------------------------------
# torch.distributed.checkpoint


def models(number=2):
    made = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double() for _ in range(number)]
    for model in made:
        model.load_state_dict(made[0].state_dict())
    return made


@every_chain
@pytest.mark.parametrize("flatten", [False, True], ids=["", "flat"])
def test_distributed_checkpoint_after_steps(chain, flatten):
    """A new optimizer goes on bit for bit."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    left, right = models()
    optimizer, resumed = make(chain, left), make(chain, right)
    train(optimizer, list(left.parameters()), range(3))
    saved = through_a_file(get_optimizer_state_dict(left, optimizer, options=options))
    right.load_state_dict(left.state_dict())
    set_optimizer_state_dict(right, resumed, saved, options=options)
    for each, model in ((optimizer, left), (resumed, right)):
        train(each, list(model.parameters()), range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))
    assert_same_state(optimizer, resumed)


@every_chain
def test_distributed_checkpoint_before_the_first_step(chain):
    """It asks for the state by a step with zero gradients: all of the state is there, and nothing else has happened."""
    left, right = models()
    optimizer, untouched = make(chain, left), make(chain, right)
    before = snapshot(left.parameters())
    fresh = get_optimizer_state_dict(left, optimizer)
    assert largest_difference(left.parameters(), before) == 0.0
    assert all(p.grad is None for p in left.parameters())
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["num_steps"] == 0
    assert all(float(state["step"]) == 0 for state in fresh["state"].values())
    if not any(isinstance(module, Velocity) for module in optimizer.modules):
        for each, model in ((optimizer, left), (untouched, right)):
            train(each, list(model.parameters()), range(3))
        assert all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))
    else:
        train(untouched, list(right.parameters()), range(3))
    full = get_optimizer_state_dict(right, untouched)
    assert {name: set(state) for name, state in fresh["state"].items()} == {
        name: set(state) for name, state in full["state"].items()
    }
    for name, state in fresh["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.shape == full["state"][name][key].shape


def test_distributed_checkpoint_of_a_chain_with_a_closure():
    class Search(Module):
        needs_closure = True

        def step(self, var):
            var.get_loss(False)
            return var

    model, optimizer = models(1)[0], None
    optimizer = Modular(model, m.Adam(), Search(), m.LR(0.1))
    before = snapshot(model.parameters())
    found = get_optimizer_state_dict(model, optimizer)
    assert set(found["state"]["0.weight"]) == {"adam.exp_avg", "adam.exp_avg_sq", "step"}
    assert largest_difference(model.parameters(), before) == 0.0


def test_a_rate_of_zero_in_the_first_step_is_an_ordinary_step():
    """As under a warm-up that starts there, where gradients are not zero."""
    params, others = make_params(SHAPES), make_params(SHAPES)
    optimizer, reference = Modular(params, m.Adam(), m.LR(0.0)), torch.optim.Adam(others, 0.0)
    for each, own in ((optimizer, params), (reference, others)):
        train(each, own, [0])
        each.param_groups[0]["lr"] = 0.1
        train(each, own, [1])
    assert largest_difference(params, others) < 1e-13


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_groups_of_a_checkpoint_by_name(tmp_path):
    """Through a folder of torch.distributed.checkpoint, with two groups of their own rates."""
    import torch.distributed.checkpoint as dcp

    left, right = models()

    def build(model, lr):
        groups = [
            {"params": model[0].parameters(), "lr": lr},
            {"params": [*model[1].parameters(), *model[2].parameters()]},
        ]
        return Modular(groups, *CHAINS["Adam"]())

    optimizer, resumed = build(left, 0.3), build(right, 0.7)
    train(optimizer, list(left.parameters()), range(2))
    dcp.save({"optimizer": get_optimizer_state_dict(left, optimizer)}, checkpoint_id=tmp_path, no_dist=True)
    template = {"optimizer": get_optimizer_state_dict(right, resumed)}
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(right, resumed, template["optimizer"])
    assert [group["lr"] for group in resumed.param_groups] == [0.3, 0.05]
    right.load_state_dict(left.state_dict())
    for each, model in ((optimizer, left), (resumed, right)):
        train(each, list(model.parameters()), range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Trainers

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed"
)


@needs_accelerate
def test_accelerate():
    """Its wrapped optimizer, scheduler and accumulation do what a plain loop does."""
    from accelerate import Accelerator

    left, right = (nn.Linear(3, 1).double() for _ in range(2))
    right.load_state_dict(left.state_dict())
    data = torch.randn(8, 3, dtype=torch.float64)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = Modular(left, *CHAINS["Adam"]())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, wrapped, scheduler = accelerator.prepare(left, optimizer, scheduler)
    expected = Modular(right, *CHAINS["Adam"]())
    decay = torch.optim.lr_scheduler.ExponentialLR(expected, 0.5)
    for batch in data.split(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).square().mean())
            wrapped.step()
            scheduler.step()
            wrapped.zero_grad()
    for pair in data.split(4):
        for batch in pair.split(2):
            (right(batch).square().mean() / 2).backward()
        expected.step()
        decay.step()
        expected.zero_grad()
    assert largest_difference(model.parameters(), right.parameters()) < 1e-12
    assert wrapped.param_groups[0]["lr"] == expected.param_groups[0]["lr"]
    wrapped.load_state_dict(wrapped.state_dict())


@needs_accelerate
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_trainer(tmp_path):
    """Trains, saves, and goes on from the checkpoint as if it had not stopped."""
    import transformers

    transformers.logging.set_verbosity_error()

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(3, 1)

        def forward(self, x, labels):
            return {"loss": (self.linear(x) - labels).square().mean()}

    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(3, generator=generator), "labels": torch.ones(1)} for _ in range(12)]

    def run(resume, **options):
        model = Regression()
        optimizer = Modular(model.parameters(), *CHAINS["Adam"]())
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=2,
            num_train_epochs=1,
            save_steps=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
            **options,
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, scheduler))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(None)
    resumed = run(str(tmp_path / "out" / "checkpoint-3"))
    assert largest_difference(whole.parameters(), resumed.parameters()) == 0.0
    assert largest_difference(whole.parameters(), Regression().parameters()) > 0.01
