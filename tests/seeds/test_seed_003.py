"""The examples of seed 003, with only their import lines changed, and the names that it promises."""

import pytest
import torch
from torch import nn

from graphopt import optim as tz
from tests.optim.catalogue import accepts
from tests.optim.training import largest_difference, make_params, train

OVERVIEW = """
Adam Shampoo SOAP Muon SophiaH Adagrad FullMatrixAdagrad Lion RMSprop OrthoGrad Rprop
NAG HeavyBall EMA Averaging Medianveraging WeightedAveraging Cautious ScaleByGradCosineSimilarity MatrixMomentum
AdaptiveMatrixMomentum
ClipNorm ClipValue Normalize Centralize ClipNormByEMA NormalizeByEMA ClipValueByEMA ClipNormGrowth ClipValueGrowth
FDM RandomizedFDM MeZO SPSA RDSA GaussianSmoothing ForwardGradient
Newton NewtonCG NystromSketchAndSolve NystromPCG HigherOrderNewton
LBFGS LSR1 OnlineLBFGS BFGS DFP PSB SR1 SSVM BroydenBad BroydenGood ColumnUpdatingMethod FletcherVMM GradientCorrection
Greenstadt1 Greenstadt2 Horisho McCormick Pearson ProjectedNewtonRaphson ThomasOptimalMethod
PolakRibiere FletcherReeves HestenesStiefel DaiYuan LiuStorey ConjugateDescent HagerZhang HybridHS_DY ProjectedGradientMethod
Backtracking AdaptiveBacktracking StrongWolfe ScipyMinimizeScalar TrustRegion
LR PolyakStepSize Warmup
FFTProjection DCTProjection VectorProjection TensorizeProjection BlockPartition TensorNormsProjection GaLore
LaplacianSmoothing GaussianHomotopy
WeightDecay
Wrap
""".split()


def test_names_of_the_overview():
    assert [name for name in OVERVIEW if not hasattr(tz.m, name)] == []
    assert tz.wrappers.scipy.ScipyMinimize
    assert tz.wrappers.nlopt.NLOptOptimizer
    assert tz.wrappers.nevergrad.NevergradOptimizer


def test_basic_example(capsys):
    torch.manual_seed(0)
    # Define a simple model
    model = nn.Linear(10, 1)
    criterion = nn.MSELoss()
    inputs = torch.randn(5, 10)
    targets = torch.randn(5, 1)

    # Create an optimizer
    # The order of modules matters:
    # 1. ClipValue: clips gradients to (-10, 10) range.
    # 2. Adam: applies Adam update rule to clipped gradients.
    # 3. NormalizeByEMA: stabilizes the update by normalizing it to an exponential
    # moving average of past updates.
    # 4. WeightDecay - decoupled weight decay (can also move after LR to fully decouple)
    # 5. LR: Scales the computed update by the learning rate (supports LR schedulers).
    optimizer = tz.Modular(
        model.parameters(),
        tz.m.ClipValue(10),
        tz.m.Adam(),
        tz.m.NormalizeByEMA(max_ema_growth=1.1),
        tz.m.WeightDecay(1e-4),
        tz.m.LR(1e-1),
    )

    # Standard training loop
    for epoch in range(100):
        optimizer.zero_grad()
        output = model(inputs)
        loss = criterion(output, targets)
        loss.backward()
        optimizer.step()
        if (epoch + 1) % 10 == 0:
            print(f"Epoch {epoch + 1}, Loss: {loss.item()}")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 10


# ----------------------------------------------------------------------------------------------------------------------
# "Additionally many other optimizers can be easily defined via modules"


def run(modules, steps=range(50)):
    """Parameters after steps on random gradients of 0.1 times the update."""
    params = make_params()
    train(tz.Modular(params, *modules, tz.m.LR(0.1)), params, steps)
    return params


def grads_of(steps=range(50)):
    """For each step the gradients of `run`."""
    params = make_params()
    for seed in steps:
        train(torch.optim.SGD(params, 0.0), params, [seed])
        yield [p.grad.clone() for p in params]


def follow(rule):
    """Parameters after steps of 0.1 times what a rule with a memory makes of each gradient."""
    params = [p.detach().clone() for p in make_params()]
    memories = [{} for _ in params]
    for step, grads in enumerate(grads_of(), 1):
        for p, g, memory in zip(params, grads, memories, strict=True):
            p -= 0.1 * rule(g, memory, step)
    return params


def adam(g, memory, step):
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    return memory["m"] / (1 - 0.9**step) / ((memory["v"] / (1 - 0.999**step)).sqrt() + 1e-8)


@accepts("K1")
def test_grams():
    expected = follow(lambda *args: adam(*args).abs() * args[0].sign())
    assert largest_difference(run([tz.m.Adam(), tz.m.GradSign()]), expected) < 1e-12


@accepts("K2")
def test_laprop():
    def laprop(g, memory, step):
        memory["v"] = 0.99 * memory.get("v", 0) + 0.01 * g**2
        memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g / (memory["v"].sqrt() + 1e-8)
        return memory["m"]

    assert largest_difference(run([tz.m.RMSprop(), tz.m.EMA(0.9)]), follow(laprop)) < 1e-12


@accepts("K3")
def test_signum():
    def signum(g, memory, step):
        memory["b"] = 0.9 * memory.get("b", 0) + g
        return memory["b"].sign()

    assert largest_difference(run([tz.m.HeavyBall(), tz.m.Sign()]), follow(signum)) < 1e-13


RECIPES = {
    "full matrix version of Adam": lambda: tz.m.FullMatrixAdagrad(beta=0.999, inner=tz.m.EMA(0.9)),
    "cautious SOAP": lambda: [tz.m.SOAP(), tz.m.Cautious()],
    "GaLore": lambda: tz.m.GaLore([tz.m.GraftModules(tz.m.Shampoo(), tz.m.RMSprop()), tz.m.LR(1e-2)]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train_a_network(name):
    """What they compute is tested with their modules."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = torch.randn(64, 10)
    targets = inputs.square().mean(1, keepdim=True)
    optimizer = tz.Modular(model.parameters(), RECIPES[name](), *([] if name == "GaLore" else [tz.m.LR(1e-2)]))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# ----------------------------------------------------------------------------------------------------------------------
# "Here are some equivalent ways to make Adam in order of their involvement"


def recipe_1():
    return [tz.m.Adam()]


def recipe_2():
    # Adam is debiased RMSprop applied to EMA
    return [tz.m.RMSprop(0.999, debiased=True, init="zeros", inner=tz.m.EMA(0.9))]


def recipe_2_debiased():
    return [tz.m.RMSprop(0.999, debiased=True, init="zeros", inner=tz.m.EMA(0.9, debiased=True))]


def recipe_3():
    return [tz.m.DivModules(tz.m.EMA(0.9, debiased=True), [tz.m.SqrtEMASquared(0.999, debiased=True), tz.m.Add(1e-8)])]


def recipe_4():
    return [
        tz.m.DivModules(
            [tz.m.EMA(0.9), tz.m.Debias(beta1=0.9, beta2=0.999)], [tz.m.EMASquared(0.999), tz.m.Sqrt(), tz.m.Add(1e-8)]
        )
    ]


def recipe_5(amsgrad=False):
    return [
        tz.m.DivModules(
            [tz.m.EMA(0.9), tz.m.Debias(beta1=0.9)],
            [
                tz.m.Pow(2),
                tz.m.EMA(0.999),
                tz.m.AccumulateMaximum() if amsgrad else tz.m.Identity(),
                tz.m.Sqrt(),
                tz.m.Debias2(beta=0.999),
                tz.m.Add(1e-8),
            ],
        )
    ]


def of_torch(**options):
    params = make_params()
    train(torch.optim.Adam(params, 0.1, **options), params, range(20))
    return params


@accepts("A1", "A2", "A3", "A5")
@pytest.mark.parametrize("recipe", [recipe_1, recipe_2_debiased, recipe_3, recipe_5])
def test_ways_to_make_adam_equal_that_of_torch(recipe):
    assert largest_difference(run(recipe(), range(20)), of_torch()) < 1e-12


@accepts("A1", "A2", "A3", "A4", "A5")
def test_ways_to_make_adam_equal_each_other():
    """The fourth adds ``eps`` before the correction, as the paper's section 2 does; on Rosenbrock that is no matter."""
    results = [run(recipe(), range(20)) for recipe in (recipe_1, recipe_2_debiased, recipe_3, recipe_5)]
    assert max(largest_difference(results[0], result) for result in results[1:]) < 1e-13
    assert largest_difference(run(recipe_4(), range(20)), run([tz.m.Adam(eps_inside=True)], range(20))) < 1e-13


@accepts("A2")
def test_the_second_way_as_it_is_printed():
    """It does not correct the average of gradients; only with ``debiased=True`` in both is it Adam."""

    def rule(g, memory, step):
        return adam(g, memory, step) * (1 - 0.9**step)

    assert largest_difference(run(recipe_2()), follow(rule)) < 1e-12


@accepts("A5")
def test_amsgrad():
    expected = of_torch(amsgrad=True)
    assert largest_difference(run(recipe_5(amsgrad=True), range(20)), expected) < 1e-12
    assert largest_difference(run([tz.m.Adam(amsgrad=True)], range(20)), expected) < 1e-12


@accepts("O1", "A1", "A2", "A3", "A4", "A5")
def test_ways_to_make_adam_on_rosenbrock():
    def path(make):
        W = torch.tensor([-1.1, 2.5], dtype=torch.float64, requires_grad=True)
        optimizer = make(W)
        for _ in range(20):
            optimizer.zero_grad()
            rosen(*W).backward()
            optimizer.step()
        return W

    expected = path(lambda W: torch.optim.Adam([W], 0.1))
    for recipe in (recipe_1, recipe_2_debiased, recipe_3, recipe_5):
        found = path(lambda W, recipe=recipe: tz.Modular([W], *recipe(), tz.m.LR(0.1)))
        assert largest_difference([found], [expected]) < 1e-12
    found = path(lambda W: tz.Modular([W], *recipe_4(), tz.m.LR(0.1)))
    assert largest_difference([found], [expected]) < 1e-8


# ----------------------------------------------------------------------------------------------------------------------
# Closures


@pytest.mark.parametrize("kind", ["StrongWolfe", "Adam", "torch"])
def test_closure(kind):
    """The loop works with any optimizer."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    criterion = nn.MSELoss()
    dataloader = [(torch.randn(8, 4), torch.randn(8, 1))] * 10
    optimizer = {
        "StrongWolfe": lambda: tz.Modular(model.parameters(), tz.m.StrongWolfe()),
        "Adam": lambda: tz.Modular(model.parameters(), tz.m.Adam(), tz.m.LR(0.1)),
        "torch": lambda: torch.optim.LBFGS(model.parameters()),
    }[kind]()
    losses = []

    # basic training loop
    for inputs, targets in dataloader:

        def closure(backward=True):  # make sure it is True by default
            preds = model(inputs)  # noqa: B023
            loss = criterion(preds, targets)  # noqa: B023

            if backward:  # gradient approximations always call with backward=False.
                optimizer.zero_grad()
                loss.backward()

            return loss

        loss = optimizer.step(closure)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def rosen(x, y):
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def test_rosenbrock(capsys):
    W = torch.tensor([-1.1, 2.5], requires_grad=True)

    def closure(backward=True):
        loss = rosen(*W)
        if backward:
            W.grad = None  # same as opt.zero_grad()
            loss.backward()
        return loss

    opt = tz.Modular([W], tz.m.NewtonCG(), tz.m.StrongWolfe())
    for step in range(20):
        loss = opt.step(closure)
        print(f"{step} - {loss}")
    assert len(capsys.readouterr().out.splitlines()) == 20
    assert closure(False) < 1e-6


class Bench(nn.Module):
    """What the seed calls ``bench``: a function of two parameters."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(-1.1))
        self.y = nn.Parameter(torch.tensor(2.5))

    def forward(self):
        return rosen(self.x, self.y)


def test_module_combinations():
    torch.manual_seed(0)
    bench = Bench()
    opt = tz.Modular(
        bench.parameters(),
        tz.m.GaussianSmoothing(h=0.01, n_samples=10),
        tz.m.NewtonCG(hvp_method="forward"),
        tz.m.AdaptiveBacktracking(),
    )
    first = bench().item()

    def closure(backward=True):
        assert not backward  # gradient approximations always call with backward=False.
        return bench()

    for _ in range(100):
        opt.step(closure)
    assert bench().item() < first / 50


# ----------------------------------------------------------------------------------------------------------------------
# "Quick guide to implementing new modules"

Module, Var = tz.Module, tz.Var


class HeavyBall(Module):
    def __init__(self, momentum: float = 0.9, dampening: float = 0):
        defaults = dict(momentum=momentum, dampening=dampening)
        super().__init__(defaults)

    def step(self, var: Var):
        # a module takes a Var object, modifies it or creates a new one, and returns it
        # Var has a bunch of attributes, including parameters, gradients, update, closure, loss
        # for now we are only interested in update, and we will apply the heavyball rule to it.

        params = var.params
        update = var.get_update()  # list of tensors

        exp_avg_list = []
        for p, u in zip(params, update):  # noqa: B905
            state = self.state[p]
            settings = self.settings[p]
            momentum = settings["momentum"]
            dampening = settings["dampening"]

            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)

            buf = state["momentum_buffer"]
            u *= 1 - dampening

            buf.mul_(momentum).add_(u)

            # clone because further modules might modify exp_avg in-place
            # and it is part of self.state
            exp_avg_list.append(buf.clone())

        # set new update to var
        var.update = exp_avg_list
        return var


def test_guide_to_new_modules():
    params, others = make_params(), make_params()
    train(tz.Modular(params, HeavyBall(), tz.m.LR(0.1)), params, range(50))
    train(torch.optim.SGD(others, 0.1, momentum=0.9), others, range(50))
    assert largest_difference(params, others) < 1e-13
    assert (
        largest_difference(run([HeavyBall(dampening=0.5)], range(20)), run([tz.m.EMA(0.9, 0.5, lerp=False)], range(20)))
        < 1e-13
    )


def test_a_module_of_ones_own_has_options_in_groups_and_a_state_that_is_saved():
    (p, q) = make_params([(3,), (4, 3)])
    optimizer = tz.Modular([{"params": [p], "momentum": 0.0}, {"params": [q]}], HeavyBall(), tz.m.LR(0.1))
    expected = torch.optim.SGD(
        [{"params": (r := make_params([(3,), (4, 3)]))[:1], "momentum": 0.0}, {"params": r[1:]}], 0.1, momentum=0.9
    )
    train(optimizer, [p, q])
    train(expected, r)
    assert largest_difference([p, q], r) < 1e-13
    assert "heavyball.momentum_buffer" in optimizer.state_dict()["state"][1]


def test_specialized_base_modules():
    """Under the seed's names; the last is also spelled as elsewhere."""
    for name in ("GradApproximator", "LineSearch", "Projection", "QuasiNewtonH", "ConguateGradientBase"):
        assert issubclass(getattr(tz, name), Module)
    assert tz.ConguateGradientBase is tz.ConjugateGradientBase
