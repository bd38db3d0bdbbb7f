"""What holds for every module that evaluates a closure, or that looks at all parameters as one vector."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from graphopt.errors import ClosureError, UnsupportedError
from graphopt.optim import Modular, m

CHAINS = {
    "FDM": lambda: [m.FDM(formula="forward2"), m.Adam(), m.LR(0.01)],
    "SPSA": lambda: [m.SPSA(seed=0, beta=0.5), m.LR(0.01)],
    "GaussianSmoothing": lambda: [m.GaussianSmoothing(n_samples=3, seed=1), m.LBFGS(3), m.Backtracking()],
    "Backtracking": lambda: [m.Backtracking(init=64.0)],
    "AdaptiveBacktracking": lambda: [m.Adam(), m.AdaptiveBacktracking(scale_beta=0.5)],
    "StrongWolfe": lambda: [m.StrongWolfe(), m.LR(0.9)],
    "BFGS": lambda: [m.BFGS(), m.Backtracking()],
    "DFP": lambda: [m.DFP(inner=m.Adam(), concat_params=False), m.LR(0.01)],
    "SR1": lambda: [m.SR1(reset_interval=5), m.StrongWolfe()],
    "LBFGS": lambda: [m.LBFGS(4, params_beta=0.1, grads_beta=0.1, z_beta=0.1), m.StrongWolfe()],
    "PolakRibiere": lambda: [m.PolakRibiere(), m.StrongWolfe(c2=0.1)],
    "FletcherReeves": lambda: [m.FletcherReeves(), m.StrongWolfe(c2=0.1)],
    "NewtonCG": lambda: [m.NewtonCG(maxiter=4, warm_start=True), m.Backtracking()],
    "VectorProjection": lambda: [m.VectorProjection([m.BFGS(), m.Adam(), m.Backtracking()], project_params=True)],
    "BlockPartition": lambda: [m.BlockPartition([m.BFGS(concat_params=False), m.LR(0.5)], 4), m.Backtracking()],
}
every = pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)


class Run:
    """A small model in training."""

    def __init__(self, make, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        self.inputs = torch.randn(8, 3, generator=generator).to(dtype)
        self.optimizer = Modular(self.model, *make())

    def closure(self, backward=True):
        loss = (self.model(self.inputs) - self.inputs[:, :1].sin()).square().mean()
        if backward:
            self.optimizer.zero_grad()
            loss.backward()
        return loss

    def steps(self, num):
        return [self.optimizer.step(self.closure) for _ in range(num)]

    @property
    def values(self):
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])


@every
def test_training_lowers_the_loss(make):
    run = Run(make)
    losses = run.steps(10)
    assert torch.isfinite(run.values).all()
    assert float(run.closure(False).detach()) < float(torch.as_tensor(losses[0]).detach())


@every
def test_saved_and_loaded_it_goes_on_bit_for_bit(make):
    run = Run(make)
    run.steps(4)
    file = io.BytesIO()
    torch.save({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = Run(make)
    fresh.model.load_state_dict(saved["model"])
    fresh.optimizer.load_state_dict(saved["optimizer"])
    both, pickled = copy.deepcopy((run.model, run.optimizer)), pickle.loads(pickle.dumps((run.model, run.optimizer)))
    run.steps(4)
    fresh.steps(4)
    assert torch.equal(run.values, fresh.values)
    for model, optimizer in (both, pickled):
        copied = Run(make)
        copied.model, copied.optimizer = model, optimizer
        copied.steps(4)
        assert torch.equal(run.values, copied.values)


@every
def test_reset_is_a_fresh_start(make):
    run = Run(make)
    run.steps(3)
    run.optimizer.reset()
    fresh = Run(make)
    fresh.model.load_state_dict(run.model.state_dict())
    assert torch.equal(run.values, fresh.values)
    run.steps(3)
    fresh.steps(3)
    assert torch.equal(run.values, fresh.values)


@every
def test_one_module_forgets(make):
    run = Run(make)
    run.steps(3)
    for module in run.optimizer.modules:
        module.reset()
    assert all(set(entry) == {"step"} for entry in run.optimizer.state.values())
    run.steps(1)


@every
def test_distributed_checkpoints(make):
    run = Run(make)
    before = run.values
    get_optimizer_state_dict(run.model, run.optimizer)
    assert torch.equal(run.values, before)
    plain = Run(make)
    run.steps(3)
    plain.steps(3)
    assert torch.equal(run.values, plain.values)
    fresh = Run(make)
    fresh.model.load_state_dict(run.model.state_dict())
    set_optimizer_state_dict(fresh.model, fresh.optimizer, get_optimizer_state_dict(run.model, run.optimizer))
    run.steps(2)
    fresh.steps(2)
    assert torch.equal(run.values, fresh.values)


@every
def test_without_a_closure(make):
    run = Run(make)
    before = run.values
    run.closure()
    needy = [(index, module) for index, module in enumerate(run.optimizer.modules, 1) if module.needs_closure]
    if not needy and "VectorProjection" not in repr(run.optimizer):
        run.optimizer.step()
        assert not torch.equal(run.values, before)
        return
    with pytest.raises(ClosureError) as caught:
        run.optimizer.step()
    if needy:
        index, module = needy[0]
        place = f"module {index} of {len(run.optimizer.modules)}, {type(module).__name__}"
        assert re.match(
            re.escape(place) + r" evaluates the loss, so step\(\) needs a closure; write", str(caught.value)
        )
    assert torch.equal(run.values, before)
    assert not run.optimizer.state


def test_the_closure_of_other_optimizers():
    run = Run(lambda: [m.BFGS(), m.StrongWolfe()])
    optimizer = run.optimizer
    first = run.closure(False)
    loss = optimizer.step(lambda: run.closure())  # without an argument: enough for those that need gradients alone
    assert loss == first
    for other in (torch.optim.Adam(run.model.parameters()), torch.optim.LBFGS(run.model.parameters(), max_iter=2)):
        other.step(run.closure)


def test_an_error_counts_no_step():
    run = Run(CHAINS["BFGS"])
    run.steps(2)
    state = copy.deepcopy(run.optimizer.state_dict())
    before = run.values

    def closure(backward=True):
        return run.closure(backward) * float("nan")

    with pytest.raises(FloatingPointError, match="the loss is nan"):
        run.optimizer.step(closure)
    after = run.optimizer.state_dict()
    assert torch.equal(run.values, before)
    assert after["param_groups"] == state["param_groups"]
    for index, entry in state["state"].items():
        assert list(after["state"][index]) == list(entry)
        assert all(torch.equal(torch.as_tensor(after["state"][index][k]), torch.as_tensor(v)) for k, v in entry.items())


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(3, 2, sparse=True)
    optimizer = Modular(embedding, m.LR(0.1), m.Backtracking())
    before = embedding.weight.detach().clone()

    def closure(backward=True):
        loss = embedding(torch.tensor([1])).sum()
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"parameter 'weight', shape .*: its gradient is sparse"):
            optimizer.step(closure)
    assert torch.equal(embedding.weight, before)


def test_frozen_groups_stay():
    run = Run(CHAINS["BFGS"])
    params = list(run.model.parameters())
    optimizer = Modular([{"params": params[:2]}, {"params": params[2:], "frozen": True}], m.BFGS(), m.Backtracking())
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        optimizer.step(run.closure)
    assert [torch.equal(a, b) for a, b in zip(before, params, strict=True)] == [False, False, True, True]
