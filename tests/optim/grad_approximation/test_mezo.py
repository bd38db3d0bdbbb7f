"""MeZO: as random differences, in the memory of inference, and without a trace in the parameters."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphopt.errors import ClosureError, ModuleError, NonFiniteError, OptionError, UnsupportedError
from graphopt.optim import Modular, m
from graphopt.optim.core.transform import Step, apply_updates, chain
from graphopt.optim.grad_approximation.perturbed_reads import perturbed_reads
from tests.optim.catalogue import accepts
from tests.optim.problems import Problem, booth, in_plane


def closure_of(model, x, optimizer=None):
    def closure(backward=True):
        assert not backward
        assert not torch.is_grad_enabled()
        return (model(x) ** 2).mean()

    return closure


@accepts("G5")
@pytest.mark.parametrize("distribution", ["gaussian", "uniform", "sphere", "rademacher"])
def test_differences_of_a_linear_function_are_its_gradient_on_average(distribution):
    slope, samples = torch.tensor([1.0, -2.0], dtype=torch.float64), 400
    problem = Problem(lambda a, b: a @ slope + b * 3, [0.0, 0.0], 0.0)
    module = m.MeZO(h=0.1, n_samples=samples, distribution=distribution, seed=0, perturb="params")
    Modular(problem.params, module, m.LR(1.0)).step(problem.closure)
    errors = problem.vector + torch.tensor([1.0, -2.0, 3.0])
    assert float(errors.abs().max()) < 4 * ((14 + 9) / samples) ** 0.5
    assert problem.calls == [False] * 2 * samples


@accepts("G5")
def test_the_estimate_by_hand():
    """From the points at which the closure was called, for parameters with steps of their own."""
    seen = []
    problem = Problem(
        lambda a, b: seen.append((a.detach() + 0, b.detach() + 0)) or (a**3).sum() + b**2, [1.0, -2.0], 0.5
    )
    a, b = problem.params
    module = m.MeZO(h=0.1, n_samples=2, distribution="gaussian", seed=4).set_param_groups([{"params": b, "h": 0.01}])
    before = problem.vector
    Modular(problem.params, module, m.LR(1.0)).step(problem.closure)
    expected = torch.zeros(3, dtype=torch.float64)
    for (a_low, b_low), (a_high, b_high) in ((seen[0], seen[1]), (seen[2], seen[3])):
        z = torch.cat([(a_high - a_low) / 0.2, ((b_high - b_low) / 0.02).reshape(1)])
        change = float(((a_high**3).sum() + b_high**2 - (a_low**3).sum() - b_low**2) / 2)
        expected += z * change / torch.tensor([0.1, 0.1, 0.01], dtype=torch.float64) / 2
    assert torch.allclose(before - problem.vector, expected, rtol=1e-9)
    assert a.grad is not None


class Everything(nn.Module):
    """Ways in which a model reads its parameters."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.conv = nn.Conv2d(1, 2, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight  # tied
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        flat = torch.randn(10)  # two parameters in one piece of memory
        self.left, self.right = nn.Parameter(flat[:6]), nn.Parameter(flat[6:])
        self.flat = flat

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = self.norm(self.lstm(x)[0] + self.attention(x, x, x)[0]) * self.scale
        x = x + self.conv(x[:, None]).sum(1) + self.left.data + self.empty.sum()
        x = x + F.pad(self.right.view(2, 2).t().reshape(-1), (0, 2)) * self.flat.mean()
        return self.head(x).logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reads_are_seen_as_if_parameters_were_written(dtype):
    """All losses are, bit for bit, those of moving the parameters, which stay as they are."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (2, 5))
    losses = []
    for perturb in ("reads", "params"):
        torch.manual_seed(1)
        model = Everything().to(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        memory = [p.detach().double().numpy() for p in model.parameters()]  # of bfloat16, a copy
        seen = []

        def closure(backward, model=model, seen=seen, before=before, memory=memory, perturb=perturb):
            if perturb == "reads":
                assert all((now == b.double().numpy()).all() for now, b in zip(memory, before, strict=True))
            seen.append(model(tokens).double().sum())
            return seen[-1]

        module = m.MeZO(seed=0, h=0.05, perturb=perturb)
        Modular(model, module, m.LR(0.0)).step(closure)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        losses.append(torch.stack(seen))
    assert torch.equal(*losses)
    assert losses[0][0] != losses[0][1]


def test_compiled_models_are_seen():
    """Kernels of the compiler read memory: functions run uncompiled meanwhile."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(5, 3)
    grads = []
    for run in (model, torch.compile(model, backend="eager")):
        with torch.no_grad():
            run(x)
        Modular(model.parameters(), m.MeZO(seed=0), m.LR(0.0)).step(closure_of(run, x))
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert any(bool(g.any()) for g in grads[0])


def test_what_is_written_to_parameters_is_seen_until_the_end():
    """As by another module in front that moves them, and puts them back."""
    param = torch.tensor([1.0, 2.0], requires_grad=True)
    before = param.detach().clone()
    with torch.no_grad(), perturbed_reads([param], lambda _: before + 1) as reads:
        start = param.clone()
        assert start.tolist() == [2.0, 3.0]
        assert param.mul_(2) is param
        param[0] = 7.0
        assert (param + 0).tolist() == [7.0, 6.0]
        assert torch.add(param, 1, out=param.data) is not None
        assert param.detach().clone().tolist() == [8.0, 7.0]
        torch._foreach_add_([param.data], 1.0)
        assert (param * 1).tolist() == [9.0, 8.0]
        param.copy_(start)
        assert reads.num_reads > 5
    assert torch.equal(param, before)
    bits = param.data.view(torch.int32)
    text = r"memory of a parameter of torch.float32 is read as torch.int32"
    with torch.no_grad(), perturbed_reads([param], lambda _: before + 1), pytest.raises(UnsupportedError, match=text):
        bits.sum()


def test_behind_a_module_that_moves_parameters():
    vectors = []
    for perturb in ("reads", "params"):
        problem = in_plane(booth, 2)
        modules = m.GaussianHomotopy(2, 0.1, seed=0), m.MeZO(seed=1, perturb=perturb), m.LR(0.01)
        Modular(problem.params, *modules).step(problem.closure)
        vectors.append(problem.vector)
    assert torch.equal(*vectors)


class Memory:
    """The most bytes that tensors of the CPU held at once within the block, beyond those before it."""

    def __enter__(self):
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        return self

    def __exit__(self, *error):
        self.profile.__exit__(*error)
        held = self.peak = 0
        for event in self.profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                self.peak = max(self.peak, held)


SIZE, NUM_LAYERS = 256, 6
ONE = SIZE * SIZE * 4


def layers():
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(SIZE, SIZE, bias=False) for _ in range(NUM_LAYERS)])


@accepts("G5")
def test_the_memory_of_one_tensor():
    """Beside the activations; with an estimate that is handed on, beside that."""
    model, x = layers(), torch.randn(1, SIZE)
    closure = closure_of(model, x)
    small = ONE // 20
    optimizer = Modular(model, m.MeZO(lr=1e-3, n_samples=2))
    optimizer.step(closure)  # with what is made once
    with Memory() as memory:
        optimizer.step(closure)
    assert ONE <= memory.peak < ONE + small
    with Memory() as memory:
        Modular(model, m.MeZO(lr=1e-3, perturb="params")).step(closure)
    assert memory.peak > NUM_LAYERS * ONE
    module = m.MeZO(n_samples=2, distribution="sphere")
    optimizer = Modular(model, module, m.LR(1e-3))
    inside = []
    estimate = module.approximate

    def watched(*arguments):
        with Memory() as memory:
            result = estimate(*arguments)
        inside.append(memory.peak)
        return result

    module.approximate = watched
    optimizer.step(closure)
    assert inside[0] < (NUM_LAYERS + 1) * ONE + small


@accepts("G5")
def test_nothing_of_the_size_of_a_parameter_is_remembered():
    model, x = layers(), torch.randn(1, SIZE)
    for module in (m.MeZO(), m.MeZO(lr=1e-3)):
        optimizer = Modular(model, module)
        optimizer.step(closure_of(model, x))
        assert all(set(entry) == {"step"} for entry in optimizer.state.values())
        assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())


@accepts("G5")
@pytest.mark.parametrize("options", [{}, {"lr": 0.01}], ids=["estimate", "in place"])
def test_the_same_seed_is_the_same_run_also_from_the_middle(options):
    def make(problem):
        return Modular(problem.params, m.MeZO(seed=3, n_samples=2, **options), *([] if options else [m.LR(0.01)]))

    def run(saved_at=None):
        problem = in_plane(booth, 2)
        optimizer = make(problem)
        for step in range(6):
            if step == saved_at:
                state = optimizer.state_dict()
                optimizer = make(problem)
                optimizer.load_state_dict(state)
            optimizer.step(problem.closure)
        return problem.vector

    assert torch.equal(run(), run())
    assert torch.equal(run(), run(saved_at=3))


@accepts("G5")
def test_in_place_it_is_the_same_step():
    vectors, losses = [], []
    for modules in ([m.MeZO(seed=0), m.LR(0.01)], [m.MeZO(seed=0, lr=0.01)]):
        problem = in_plane(booth, 2)
        optimizer = Modular(problem.params, *modules)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for _ in range(5):
            losses.append(float(optimizer.step(problem.closure)))
            scheduler.step()
        vectors.append(problem.vector)
    assert torch.allclose(*vectors, rtol=1e-12)
    assert losses[:5] == pytest.approx(losses[5:], rel=1e-12)
    transform = chain(m.MeZO(seed=0, lr=0.01))
    params = [torch.tensor(0.0, dtype=torch.float64), torch.tensor(-8.0, dtype=torch.float64)]
    state, problem = transform.init(params), in_plane(booth, 2)
    updates, _ = transform.update(params, state, params, step=Step(loss_fn=lambda tree: booth(*tree)))
    Modular(problem.params, m.MeZO(seed=0, lr=0.01)).step(problem.closure)
    assert torch.allclose(torch.stack(apply_updates(params, updates)), problem.vector, rtol=1e-12)


def test_modules_that_evaluate_at_several_points_see_one_function():
    problem = in_plane(booth)
    optimizer = Modular(problem.params, m.MeZO(n_samples=2, h=1e-4), m.Backtracking())
    losses = [optimizer.step(problem.closure) for _ in range(40)]
    assert problem.loss < 0.01 * losses[0]
    assert set(problem.calls) == {False}


def test_a_model_is_trained():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 1), torch.randn(32, 4), torch.randn(32, 1)
    optimizer = Modular(model, m.MeZO(lr=0.05, seed=0, n_samples=4))
    losses = [float(optimizer.step(lambda backward: F.mse_loss(model(x), y))) for _ in range(40)]
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(32, 1)], 1), y).solution
    least = float((torch.cat([x, torch.ones(32, 1)], 1) @ best - y).square().mean())
    assert losses[-1] < least + 0.1 * (losses[0] - least)


# -- bad input


def test_an_error_in_the_closure_leaves_the_parameters():
    for perturb in ("reads", "params"):
        problem = in_plane(booth)
        optimizer = Modular(problem.params, m.MeZO(perturb=perturb), m.LR(0.1))
        before = problem.vector

        def closure(backward, problem=problem):
            if len(problem.calls) == 1:
                raise KeyboardInterrupt
            return problem.closure(backward)

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
        assert torch.equal(problem.vector, before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"perturb": "copies"}, "MeZO: perturb='copies'; expected one of reads, params"),
        ({"n_samples": True}, "n_samples=True; expected an integer of at least 1"),
        ({"lr": -0.1}, r"lr=-0\.1; expected a number in \[0, inf\)"),
        ({"distribution": "normal"}, "expected one of gaussian, "),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(OptionError, match=text):
        m.MeZO(**options)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}], ids=str)
def test_losses_that_are_not_finite_and_closures_that_cannot_be_used(options):
    problem = Problem(lambda x: (x * torch.nan).sum(), [1.0, 2.0])
    optimizer = Modular(problem.params, m.MeZO(**options), *([] if options else [m.LR(0.1)]))
    with pytest.raises(NonFiniteError, match=r"MeZO: the loss is nan.*nothing was changed"):
        optimizer.step(problem.closure)
    with pytest.raises(ClosureError, match=r"MeZO calls closure\(False\) for the loss alone"):
        optimizer.step(lambda: problem.params[0].sum())
    address = problem.params[0].detach().numpy()
    with pytest.raises(ModuleError, match=r"read no parameter by an operation of torch.*Use perturb='params'"):
        optimizer.step(lambda backward: float(address.sum()))
    assert problem.vector.tolist() == [1.0, 2.0]
    assert float(optimizer.state[problem.params[0]]["step"]) == 0
