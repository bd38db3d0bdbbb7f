"""Chains of modules as pure functions under vmap, grad and compile; schedules, a user's own module, statistics; errors."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils import _pytree as pytree

from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED
from graphopt.errors import ClosureError, MissingAnnotation, OptionError, UnsupportedError
from graphopt.optim import Modular, Module, functional, m
from graphopt.optim.core import transform
from graphopt.optim.functional import Step, apply_updates, chain


class InPlaceHeavyBall(Module):
    """As the guide of seed 003 teaches it: it writes to its state and to the update."""

    def __init__(self, momentum=0.9, dampening=0):
        super().__init__(dict(momentum=momentum, dampening=dampening))

    def step(self, var):
        exp_avg_list = []
        for p, u in zip(var.params, var.get_update(), strict=True):
            state, settings = self.state[p], self.settings[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            u *= 1 - settings["dampening"]
            state["momentum_buffer"].mul_(settings["momentum"]).add_(u)
            exp_avg_list.append(state["momentum_buffer"].clone())
        var.update = exp_avg_list
        return var


CHAINS = {
    "adam": lambda lr: [m.Adam(), m.LR(lr)],
    "adamw": lambda lr: [m.ClipNorm(1.0), m.Adam(), m.WeightDecay(0.1), m.LR(lr)],
    "clipped by the norm of all": lambda lr: [m.ClipNorm(0.5, dim="global"), m.NAG(0.9), m.LR(lr)],
    "inner": lambda lr: [m.RMSprop(inner=[m.HeavyBall(0.8)]), m.Graft(m.Lion()), m.LR(lr)],
    "lars": lambda lr: [m.WeightDecay(0.1), m.LARS(0.1), m.LR(lr), m.HeavyBall()],
    "in place": lambda lr: [InPlaceHeavyBall(), m.NormalizeByEMA(), m.LR(lr)],
    "split": lambda lr: [m.Split(lambda p: p.dim() == 2, [m.Muon(method="svd")], [m.Adam()]), m.LR(lr)],
    "schedule": lambda lr: [m.Adam(beta1=lambda step: 0.9 / (1 + step)), m.LR(lr)],
}
every_chain = pytest.mark.parametrize("name", CHAINS)


def make_params():
    """Matrices first: there a chain for matrices has work."""
    generator = torch.Generator().manual_seed(3)
    new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {"layers": [{"w": new(4, 3), "b": new(4)}, {"w": new(2, 4), "b": new(2)}], "scale": new()}


def loss_of(params, target):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    for layer in params["layers"]:
        x = (x @ layer["w"].mT + layer["b"]).tanh()
    return ((x * params["scale"] - target) ** 2).sum()


def assert_close(left, right, tolerance):
    for a, b in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def train(name, params, lr, target, num_steps=3):
    optimizer = chain(*CHAINS[name](lr))
    state = optimizer.init(params)
    for _ in range(num_steps):
        updates, state = optimizer.update(grad(loss_of)(params, target), state, params)
        params = apply_updates(params, updates)
    return params


# ------------------------------------------------------------------------------------------------ transforms of torch


def test_an_ensemble_is_four_trainings():
    """One vmapped step for four small models, in a loop, against a loop of its own for each."""
    models = [nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double() for _ in range(4)]
    x, y = torch.randn(4, 8, 3, dtype=torch.float64), torch.randn(4, 8, 1, dtype=torch.float64)
    modules = [m.ClipNorm(1.0), m.Adam(), m.WeightDecay(0.01), m.LR(0.05)]
    optimizer = chain(*modules)

    def loss(params, x, y):
        return ((functional_call(models[0], params, (x,)) - y) ** 2).mean()

    def step(params, state, x, y):
        updates, state = optimizer.update(grad(loss)(params, x, y), state, params)
        return apply_updates(params, updates), state

    params, _ = stack_module_state(models)
    with torch.no_grad():  # these require gradients; without it, all steps would be one graph
        state = vmap(optimizer.init)(params)
        for _ in range(10):
            params, state = vmap(step)(params, state, x, y)
    assert not any(p.requires_grad for p in params.values())
    for index, model in enumerate(models):
        alone = Modular(model, copy.deepcopy(modules), foreach=False)
        for _ in range(10):
            alone.zero_grad()
            ((model(x[index]) - y[index]) ** 2).mean().backward()
            alone.step()
        assert_close([params[key][index] for key, _ in model.named_parameters()], list(model.parameters()), 1e-12)


@every_chain
def test_vmap(name):
    """Other parameters, other targets, other learning rates."""
    many = [pytree.tree_map(lambda p, c=c: p * c, make_params()) for c in (0.5, 1.0, 1.5, 2.0)]
    rates = torch.tensor([1e-3, 0.01, 0.1, 0.3], dtype=torch.float64)
    targets = torch.randn(4, 4, 2, dtype=torch.float64)
    stacked = pytree.tree_map(lambda *ps: torch.stack(ps), *many)
    together = vmap(lambda params, lr, target: train(name, params, lr, target))(stacked, rates, targets)
    for index, params in enumerate(many):
        alone = train(name, params, float(rates[index]), targets[index])
        assert_close(pytree.tree_map(lambda t, index=index: t[index], together), alone, 1e-12)


@every_chain
def test_derivative_by_the_learning_rate(name):
    """Of the loss after three steps, against finite differences."""
    params, target = make_params(), torch.full((4, 2), 0.3, dtype=torch.float64)

    def loss_after(lr):
        return loss_of(train(name, params, lr, target), target)

    lr = torch.tensor(0.05, dtype=torch.float64)
    difference = (loss_after(lr + 1e-6) - loss_after(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(grad(loss_after)(lr), difference, rtol=1e-6, atol=1e-6)
    assert difference.abs() > 1e-3


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda v: [m.Adam(beta1=v), m.LR(0.05)], 0.8),
        (lambda v: [m.Adam(beta2=v), m.LR(0.05)], 0.9),
        (lambda v: [m.Adam(eps=v), m.LR(0.05)], 0.1),
        (lambda v: [m.HeavyBall(v, dampening=0.1), m.LR(0.05)], 0.7),
        (lambda v: [m.ClipNorm(v), m.LR(0.5)], 0.1),
        (lambda v: [m.WeightDecay(v), m.LR(0.5)], 0.1),
        (lambda v: [m.HeavyBall(lambda step: v / (1 + step)), m.LR(0.05)], 0.7),
        (lambda v: [InPlaceHeavyBall(v), m.LR(0.05)], 0.7),
    ],
    ids=["beta1", "beta2", "eps", "momentum", "max_norm", "weight_decay", "schedule", "own module"],
)
def test_derivative_by_other_settings(make, value):
    params, target = make_params(), torch.full((4, 2), 0.3, dtype=torch.float64)

    def loss_after(setting):
        optimizer, news = chain(*make(setting)), params
        state = optimizer.init(news)
        for _ in range(3):
            updates, state = optimizer.update(grad(loss_of)(news, target), state, news)
            news = apply_updates(news, updates)
        return loss_of(news, target)

    point = torch.tensor(value, dtype=torch.float64)
    difference = (loss_after(point + 1e-5) - loss_after(point - 1e-5)) / 2e-5
    torch.testing.assert_close(grad(loss_after)(point), difference, rtol=1e-6, atol=1e-8)
    assert difference.abs() > 1e-5


def test_meta_learning_descends():
    """A learning rate is learned through three steps, for an ensemble at once."""
    params, target = make_params(), torch.full((4, 2), 0.3, dtype=torch.float64)

    def loss_after(log_lr):
        return loss_of(train("adam", params, log_lr.exp(), target), target)

    rates = torch.tensor([1e-3, 3e-3, 1e-2], dtype=torch.float64).log()
    before = vmap(loss_after)(rates)
    for _ in range(5):
        rates = rates - 0.5 * vmap(grad(loss_after))(rates).clamp(-1, 1)
    assert (vmap(loss_after)(rates) < before).all()


@pytest.mark.parametrize("name", ["adamw", "clipped by the norm of all", "schedule", "split"])
def test_one_graph_without_breaks(name):
    params, target = make_params(), torch.full((4, 2), 0.3, dtype=torch.float64)
    optimizer = chain(*CHAINS[name](0.05))

    def step(params, grads, state):
        updates, state = optimizer.update(grads, state, params)
        return apply_updates(params, updates), state

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    ours = theirs = params, optimizer.init(params)
    for _ in range(2):
        grads = grad(loss_of)(theirs[0], target)
        ours, theirs = compiled(ours[0], grads, ours[1]), step(theirs[0], grads, theirs[1])
    assert_close(ours, theirs, 1e-12)


def test_one_graph_of_gradients_and_step():
    """Through AOTAutograd's functional graphs, too."""
    params, target = make_params(), torch.full((4, 2), 0.3, dtype=torch.float64)
    optimizer = chain(m.Adam(), m.LR(0.05))

    def step(params, state, target):
        updates, state = optimizer.update(grad(loss_of)(params, target), state, params)
        return apply_updates(params, updates), state

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    state = optimizer.init(params)
    assert_close(compiled(params, state, target), step(params, state, target), 1e-12)


# ----------------------------------------------------------------------------------------------------- pure functions


@every_chain
def test_nothing_is_changed(name):
    """Neither what is passed in nor the modules; the same step again is the same."""
    params, target = make_params(), torch.full((4, 2), 0.3, dtype=torch.float64)
    modules = CHAINS[name](0.1)
    shown = repr(modules)
    optimizer = chain(*modules)
    state = optimizer.init(params)
    for _ in range(2):
        grads = grad(loss_of)(params, target)
        before = copy.deepcopy((params, grads, state))
        updates, new_state = optimizer.update(grads, state, params)
        assert_close((params, grads, state), before, 0)
        assert_close(optimizer.update(grads, state, params), (updates, new_state), 0)
        assert pytree.tree_structure(updates) == pytree.tree_structure(params)
        params, state = apply_updates(params, updates), new_state
    assert repr(modules) == shown


def test_schedules_are_functions_of_the_steps_made_before():
    """And leave the module as it was, between steps and in a `Modular` beside."""
    seen = []

    def falling(step):
        seen.append(float(step))
        return 1.0 / (1 + step)

    module = m.LR(falling)
    optimizer = chain(module)
    params, state = [torch.zeros(2)], optimizer.init([torch.zeros(2)])
    seen.clear()
    for step in range(3):
        updates, state = optimizer.update([torch.ones(2)], state, params)
        assert updates[0].tolist() == pytest.approx([1 / (1 + step)] * 2)
    assert seen == [0.0, 1.0, 2.0]
    assert module.defaults["lr"] == 1.0


def test_a_module_that_writes_to_its_state_is_the_rule():
    params, target = make_params(), torch.full((4, 2), 0.3, dtype=torch.float64)
    results = []
    for modules in ([InPlaceHeavyBall(0.9, 0.2)], [m.Mul(0.8), m.HeavyBall(0.9)]):
        optimizer, news = chain(modules, m.LR(0.1)), params
        state = optimizer.init(news)
        for _ in range(3):
            updates, state = optimizer.update(grad(loss_of)(news, target), state, news)
            news = apply_updates(news, updates)
        results.append(news)
    assert_close(*results, 1e-15)


def test_dtypes():
    params = {"half": torch.randn(3, dtype=torch.bfloat16), "wide": torch.randn(3, dtype=torch.float64)}
    optimizer = chain(m.Adam(), m.LR(0.1))
    state = optimizer.init(params)
    grads = {key: torch.ones(3) for key in params}  # float32 for both
    updates, state = optimizer.update(grads, state, params)
    news = apply_updates(params, updates)
    assert {key: p.dtype for key, p in news.items()} == {"half": torch.bfloat16, "wide": torch.float64}
    assert [entry["adam.exp_avg"].dtype for entry in state.states] == [torch.float32, torch.float64]
    torch.testing.assert_close(params["wide"] - news["wide"], torch.full((3,), 0.1, dtype=torch.float64))


def test_complex_parameters_are_pairs_of_real_ones():
    param = nn.Parameter(torch.randn(3, dtype=torch.complex128))
    theirs = torch.optim.Adam([param], lr=0.1)
    optimizer = chain(m.Adam(), m.LR(0.1))
    params = [param.detach().clone()]
    state = optimizer.init(params)
    for _ in range(3):
        param.grad = torch.randn(3, dtype=torch.complex128)
        updates, state = optimizer.update([param.grad], state, params)
        params = apply_updates(params, updates)
        theirs.step()
    assert_close(params, [param], 1e-14)


# ----------------------------------------------------------------------------------------------- what a step is told


def test_statistics():
    """A tree like the parameters, in any order of its keys, or one value for all of them."""
    params = {"w": torch.zeros(2, dtype=torch.float64), "b": [torch.zeros((), dtype=torch.float64)]}
    grads = pytree.tree_map(torch.ones_like, params)
    squares = {"b": [torch.tensor(4.0).double()], "w": torch.tensor([1.0, 9.0]).double()}
    optimizer = chain(m.TrueGradRMSprop(smoothing=0.0, eps=0.0), m.LR(1.0))
    step = Step(annotations={SUM_GRAD_SQUARED: squares, NUM_SAMPLES: 4})
    updates, _ = optimizer.update(grads, optimizer.init(params), params, step=step)
    found = [1 / (updates["w"] ** 2), 1 / updates["b"][0] ** 2]
    torch.testing.assert_close(found[0] / found[1], torch.tensor([1 / 4, 9 / 4]).double())

    def scaled(factor):
        notes = {SUM_GRAD_SQUARED: pytree.tree_map(lambda s: s * factor**2, squares), NUM_SAMPLES: 4}
        state = optimizer.init(params)
        return optimizer.update(grads, state, params, step=Step(annotations=notes))[0]

    factors = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    many = vmap(scaled)(factors)
    torch.testing.assert_close(many["w"], updates["w"] / factors[:, None])
    with pytest.raises(
        MissingAnnotation, match=r"no sum_grad_squared: pass step=Step\(annotations=\{SUM_GRAD_SQUARED: "
    ):
        optimizer.update(grads, optimizer.init(params), params)
    step = Step(annotations={SUM_GRAD_SQUARED: {"w": squares["w"]}, NUM_SAMPLES: 4})
    with pytest.raises(OptionError, match=r"Step\(annotations=\{SUM_GRAD_SQUARED: ...\}\): not of the structure"):
        optimizer.update(grads, optimizer.init(params), params, step=step)


def test_gradients_beside_the_updates():
    """A chain behind another optimizer sees what that one made, and the gradients."""
    params, updates, grads = [torch.zeros(2)], [torch.tensor([1.0, -2.0])], [torch.tensor([-3.0, -4.0])]
    optimizer = chain(m.Add([m.Grad()]), m.LR(1.0))
    news, _ = optimizer.update(updates, optimizer.init(params), params, step=Step(grads=grads))
    assert news[0].tolist() == [-2.0, -6.0]
    with pytest.raises(OptionError, match=r"Step\(grads=...\): a tensor of shape \(3,\) for the parameter \[0\]"):
        optimizer.update(updates, optimizer.init(params), params, step=Step(grads=[torch.ones(3)]))


def test_modules_that_evaluate_the_loss():
    params, target = make_params(), torch.full((4, 2), 0.3, dtype=torch.float64)
    optimizer = chain(m.Adam(), m.Backtracking())
    state, loss = optimizer.init(params), loss_of(params, target)
    before = copy.deepcopy(params)
    step = Step(loss_fn=lambda params: loss_of(params, target))
    updates, state = optimizer.update(grad(loss_of)(params, target), state, params, step=step)
    assert_close(params, before, 0)
    assert loss_of(apply_updates(params, updates), target) < loss
    with pytest.raises(ClosureError, match=r"Backtracking needs the loss as a function .*step=Step\(loss_fn=...\)"):
        optimizer.update(grad(loss_of)(params, target), state, params)
    params = [torch.ones(2, dtype=torch.complex64)]
    with pytest.raises(
        UnsupportedError, match=r"is complex, and .* Backtracking evaluates the loss; make torch.view_as"
    ):
        optimizer.update(params, optimizer.init(params), params, step=Step(loss_fn=lambda params: 0))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("grads", "text"),
    [
        ({"w": torch.ones(2)}, r"chain.update: updates: not of the structure .*expected 2, but got 1.*Pass one tensor"),
        ({"w": torch.ones(2), "c": torch.ones(2)}, r"missing key\(s\): \{'b'\}; extra key\(s\): \{'c'\}"),
        ([torch.ones(2), torch.ones(3)], "not of the structure of the parameters"),
        ({"w": torch.ones(2), "b": torch.ones(2)}, r"shape \(2,\) for the parameter \['b'\] of shape \(3,\); pass a"),
        ({"w": torch.ones(2), "b": None}, r"None for the parameter \['b'\] of shape \(3,\).*zeros if it got no grad"),
    ],
)
def test_gradients_of_another_structure(grads, text):
    params = {"w": torch.zeros(2), "b": torch.zeros(3)}
    optimizer = chain(m.Adam(), m.LR(0.1))
    with pytest.raises(OptionError, match=text):
        optimizer.update(grads, optimizer.init(params), params)


def test_other_errors():
    optimizer = chain(m.Adam(), m.LR(0.1))
    with pytest.raises(OptionError, match=r"the state of 1 parameters for 2 parameters; pass what init\(params\)"):
        optimizer.update([torch.ones(2)] * 2, optimizer.init([torch.ones(2)]), [torch.ones(2)] * 2)
    with pytest.raises(OptionError, match=r"chain\(\) without modules; pass at least one, such as m.LR\(0.1\)"):
        chain()
    with pytest.raises(OptionError, match=r"chain\(...\): Adam is a class; write Adam\(\)"):
        chain(m.Adam)
    with pytest.raises(OptionError, match=r"Adam: beta1=1.0; expected a number in \[0, 1\)"):
        chain(m.Adam(beta1=1.0))


def test_tuples_and_other_orders_of_keys():
    """`torch.autograd.grad` returns tuples."""
    optimizer = chain(m.LR(1.0))
    params = [{"w": torch.zeros(2), "b": torch.zeros(1)}, torch.zeros(3)]
    grads = ({"b": torch.ones(1), "w": 2 * torch.ones(2)}, 3 * torch.ones(3))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert_close(updates, [{"w": grads[0]["w"], "b": grads[0]["b"]}, grads[1]], 0)
    assert type(updates) is list


def test_names():
    for name in ("chain", "apply_updates", "Transform", "Step", "ChainState"):
        assert getattr(functional, name) is getattr(transform, name)
