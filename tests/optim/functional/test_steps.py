"""SGD, Adam and LARS of configs: against torch and loops; purity; in place; transforms of torch.func; errors."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.errors import OptionError
from graphopt.optim import Modular
from graphopt.optim.functional import (
    DEFAULT_OPTIMIZER_CONFIGS,
    DEFAULT_OPTIMIZER_STATES,
    OPTIMIZER_STEP,
    AdamConfig,
    AdamWDMode,
    LARSConfig,
    SGDConfig,
    adam,
    adam_step,
    default_sgd_state,
    get_optimizer_step,
    init_optimizer_state,
    lars,
    lars_step,
    register_optimizer,
    sgd,
    sgd_step,
)

NAMES = ["adam", "adamw", "decoupled_adam", "lars", "sgd"]
every_optimizer = pytest.mark.parametrize("name", NAMES)


def make_params(dtype=torch.float64):
    """Nested, with a scalar, zeros, and an empty tensor."""
    return {
        "layer": {"weight": torch.randn(4, 3, dtype=dtype), "bias": torch.zeros(4, dtype=dtype)},
        "rest": [torch.randn((), dtype=dtype), (torch.randn(2, 1, 2, dtype=dtype), torch.zeros(0, 3, dtype=dtype))],
    }


def make_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return pytree.tree_map(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype), params)


def train(name, params, config, num_steps=50, **options):
    state, step = init_optimizer_state(name, params), get_optimizer_step(name)
    for seed in range(num_steps):
        params, state = step(params, make_grads(params, seed), state, config, **options)
    return params, state


def assert_close(left, right, tolerance):
    for a, b in zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def train_torch(make, params, num_steps=50, schedule=None):
    own = [nn.Parameter(p.clone()) for p in pytree.tree_leaves(params)]
    optimizer = make(own)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) if schedule else None
    for seed in range(num_steps):
        for p, grad in zip(own, pytree.tree_leaves(make_grads(params, seed)), strict=True):
            p.grad = grad
        optimizer.step()
        if scheduler:
            scheduler.step()
    return own


def falling(step):
    return 1 / (1 + step)


# ----------------------------------------------------------------------------------------------------- the mathematics


@pytest.mark.parametrize(
    ("momentum", "weight_decay", "dampening", "nesterov", "schedule"),
    [
        *itertools.product([0.0, 0.9], [0.0, 0.1], [0.0], [False], [None, falling]),
        (0.9, 0.1, 0.5, False, None),
        (0.9, 0.1, 0.0, True, falling),
    ],
)
def test_sgd_is_that_of_torch(momentum, weight_decay, dampening, nesterov, schedule):
    options = {"momentum": momentum, "weight_decay": weight_decay, "dampening": dampening, "nesterov": nesterov}
    params = make_params()
    config = SGDConfig(max_lr=0.05, lr_schedule_value=schedule, **options)
    expected = train_torch(lambda ps: torch.optim.SGD(ps, lr=0.05, **options), params, schedule=schedule)
    news, state = train("sgd", params, config)
    assert_close(news, expected, 1e-12)
    assert state["step"] == 50


@pytest.mark.parametrize("schedule", [None, falling])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_is_that_of_torch(name, kind, weight_decay, schedule):
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    params = make_params()
    config = DEFAULT_OPTIMIZER_CONFIGS[name](max_lr=0.05, lr_schedule_value=schedule, **options)
    expected = train_torch(lambda ps: kind(ps, lr=0.05, **options), params, schedule=schedule)
    assert_close(train(name, params, config)[0], expected, 1e-12)


@pytest.mark.parametrize("schedule", [None, 0.5, falling])
def test_decoupled_adam(schedule):
    """Adam without decay, and then the decay: it follows the schedule, but not ``max_lr``."""
    params = make_params()
    config = AdamConfig(max_lr=0.05, weight_decay=0.1, mode=AdamWDMode.DECOUPLED, lr_schedule_value=schedule)
    news, _ = train("decoupled_adam", params, config, 20)
    own = [nn.Parameter(p.clone()) for p in pytree.tree_leaves(params)]
    optimizer = torch.optim.Adam(own)
    for step in range(20):
        factor = falling(step) if callable(schedule) else schedule or 1.0
        optimizer.param_groups[0]["lr"] = 0.05 * factor
        for p, grad in zip(own, pytree.tree_leaves(make_grads(params, step)), strict=True):
            p.grad = grad
        optimizer.step()
        for p in own:
            p.data *= 1 - 0.1 * factor
    assert_close(news, own, 1e-12)


def test_decay_of_decoupled_adam_follows_the_schedule_alone():
    params = make_params()
    zeros = pytree.tree_map(torch.zeros_like, params)
    for max_lr in (1e-3, 1.0):
        config = AdamConfig(max_lr=max_lr, weight_decay=0.1, mode=AdamWDMode.DECOUPLED, lr_schedule_value=falling)
        news, state = params, init_optimizer_state("decoupled_adam", params)
        for _ in range(5):
            news, state = adam_step(news, zeros, state, config)
        factor = torch.prod(torch.tensor([1 - 0.1 * falling(step) for step in range(5)], dtype=torch.float64))
        assert_close(news, pytree.tree_map(lambda p, factor=factor: p * factor, params), 1e-12)
    config.lr_schedule_value = 0.0
    assert_close(adam_step(params, zeros, init_optimizer_state("adam", params), config)[0], params, 0)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 0.0), (0.9, 0.1), (0.0, 0.1)])
def test_lars_is_a_loop_over_tensors(momentum, weight_decay):
    params = make_params()
    config = LARSConfig(
        max_lr=0.5, momentum=momentum, weight_decay=weight_decay, trust_coefficient=0.1, lr_schedule_value=falling
    )
    news, state = train("lars", params, config)
    own = [p.clone() for p in pytree.tree_leaves(params)]
    buffers = [torch.zeros_like(p) for p in own]
    for step in range(50):
        for p, buffer, grad in zip(own, buffers, pytree.tree_leaves(make_grads(params, step)), strict=True):
            update = grad + weight_decay * p
            length, size = update.square().sum() ** 0.5, p.square().sum() ** 0.5
            local = 0.5 * falling(step) * (0.1 * size / (length + 1e-8) if size > 0 and length > 0 else 1.0)
            buffer.mul_(momentum).add_(local * update)
            p -= buffer
    assert_close(news, own, 1e-12)
    if momentum:
        assert_close(state["momentum"], buffers, 1e-12)
    moved = [not torch.equal(a, b) for a, b in zip(pytree.tree_leaves(news), pytree.tree_leaves(params), strict=True)]
    assert moved == [True, True, True, True, False]  # the empty one cannot


def test_lars_does_not_feel_the_scale_of_the_loss():
    params = {"weight": torch.randn(4, 3)}
    config, results = LARSConfig(trust_coefficient=0.1), []
    for scale in (1.0, 1000.0):
        news, state = params, init_optimizer_state("lars", params)
        for seed in range(5):
            news, state = lars_step(news, {"weight": make_grads(params, seed)["weight"] * scale}, state, config)
        results.append(news)
    assert_close(*results, 1e-5)


def test_lars_falls_back_to_the_learning_rate_and_stays_finite():
    for param, grad in ((0.0, 2.0), (3.0, 0.0), (0.0, 0.0)):
        params, grads = [torch.full((3,), param)], [torch.full((3,), grad)]
        config = LARSConfig(max_lr=0.1, momentum=0.0, eps=0.0)
        (new,), _ = lars_step(params, grads, init_optimizer_state("lars", params), config)
        assert_close(new, torch.full((3,), param - 0.1 * grad), 1e-6)


@every_optimizer
def test_a_step_is_the_chain_in_an_optimizer_bit_for_bit(name):
    config = DEFAULT_OPTIMIZER_CONFIGS[name](weight_decay=0.01)
    params = make_params()
    news, _ = train(name, params, config, 5)
    own = train_torch(lambda ps: Modular(ps, config.modules(), foreach=False), params, 5)
    assert_close(news, own, 0)


@every_optimizer
def test_schedules_are_numbers_tensors_or_functions(name):
    params = make_params()
    results = [
        train(name, params, DEFAULT_OPTIMIZER_CONFIGS[name](weight_decay=0.1, lr_schedule_value=value), 5)
        for value in (0.25, torch.tensor(0.25, dtype=torch.float64), lambda step: 0.25)
    ]
    assert_close(results[0], results[1], 1e-15)
    assert_close(results[0], results[2], 1e-15)
    assert_close(train(name, params, DEFAULT_OPTIMIZER_CONFIGS[name](lr_schedule_value=0.0), 2)[0], params, 0)


@every_optimizer
def test_the_config_may_say_that_steps_were_made_before(name):
    """And its schedule sees them."""
    params, config = make_params(), DEFAULT_OPTIMIZER_CONFIGS[name](lr_schedule_value=falling)
    left, state = train(name, params, config, 3)
    resumed = {**state, "step": torch.zeros((), dtype=torch.float64)}
    grads, step = make_grads(params, 3), get_optimizer_step(name)
    expected = step(left, grads, state, config)[0]
    config.steps = 3
    assert_close(step(left, grads, resumed, config)[0], expected, 0)


def test_functions_of_the_buffers_alone():
    params, grads = make_params(), None
    for config, function, name, buffers in (
        (SGDConfig(weight_decay=0.1), sgd, "sgd", ["momentum"]),
        (LARSConfig(weight_decay=0.1), lars, "lars", ["momentum"]),
        (AdamConfig(weight_decay=0.1), adam, "adam", ["exp_avg", "exp_avg_sq"]),
    ):
        expected, state = params, init_optimizer_state(name, params)
        news, kept = params, [state[buffer] for buffer in buffers]
        for config.steps in range(3):
            grads = make_grads(params, config.steps)
            news, *kept = function(news, grads, *kept, config)
        config.steps = 0
        for seed in range(3):
            expected, state = get_optimizer_step(name)(expected, make_grads(params, seed), state, config)
        assert_close([news, kept], [expected, [state[buffer] for buffer in buffers]], 0)


# ---------------------------------------------------------------------------------------------------- pure functions


def tensors_of(*trees):
    return [leaf for tree in trees for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@every_optimizer
def test_nothing_is_changed_and_nothing_is_shared(name):
    """Two models may share one config: the number of steps is in the state."""
    config = DEFAULT_OPTIMIZER_CONFIGS[name](weight_decay=0.1)
    params, step = make_params(), get_optimizer_step(name)
    grads, state = make_grads(params, 0), init_optimizer_state(name, params)
    before = copy.deepcopy((params, grads, state, config))
    news, new_state = step(params, grads, state, config)
    assert_close((params, grads, state), before[:3], 0)
    assert config == before[3]
    assert pytree.tree_structure(news) == pytree.tree_structure(params)
    assert pytree.tree_structure(new_state) == pytree.tree_structure(state)
    old = {t.data_ptr() for t in tensors_of(params, grads, state) if t.numel()}
    assert not old & {t.data_ptr() for t in tensors_of(news, new_state) if t.numel()}
    again, _ = step(params, grads, state, config)
    assert_close(again, news, 0)


@every_optimizer
def test_in_place_is_the_same(name):
    params = make_params()
    for config in (DEFAULT_OPTIMIZER_CONFIGS[name](weight_decay=0.1), DEFAULT_OPTIMIZER_CONFIGS[name]()):
        expected = train(name, params, config, 3)
        own = pytree.tree_map(lambda p: nn.Parameter(p.clone()), params)
        state, step = init_optimizer_state(name, own), get_optimizer_step(name)
        for seed in range(3):
            news, new_state = step(own, make_grads(own, seed), state, config, inplace=True)
            assert news is own
            assert new_state is state
        assert_close((own, state), expected, 0)


class PeakMemory(TorchDispatchMode):
    """The most bytes of tensors made since the start that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors_of(args, kwargs or {})}
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage not in self.seen:
                self.seen[storage] = True
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _forget(self, size):
        self.alive -= size


@every_optimizer
def test_in_place_needs_no_more_memory_than_foreach(name):
    """For ten equal tensors temporaries of one suffice."""
    params = [torch.randn(1000) for _ in range(10)]
    state, config = init_optimizer_state(name, params), DEFAULT_OPTIMIZER_CONFIGS[name](weight_decay=0.1)
    grads = make_grads(params, 0)
    own = [nn.Parameter(p.clone()) for p in params]
    kind, options = (torch.optim.Adam, {}) if "adam" in name else (torch.optim.SGD, {"momentum": 0.9})
    optimizer = kind(own, lr=0.1, weight_decay=0.1, foreach=True, **options)
    for p, grad in zip(own, grads, strict=True):
        p.grad = grad
    optimizer.step()
    peaks = []
    for run in (lambda: get_optimizer_step(name)(params, grads, state, config, inplace=True), optimizer.step):
        gc.collect()
        with PeakMemory() as memory:
            run()
        peaks.append(memory.peak)
    assert 4000 < peaks[0] <= 1.1 * peaks[1]


def test_dtypes():
    """Each parameter keeps its own; state is at least float32."""
    params = [torch.randn(3, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)]
    for name in NAMES:
        news, state = train(name, params, DEFAULT_OPTIMIZER_CONFIGS[name](weight_decay=0.1), 3)
        assert [p.dtype for p in news] == [p.dtype for p in params]
        for key in set(state) - {"step"}:
            assert [t.dtype for t in state[key]] == [torch.float32] * 3 + [torch.float64]
        half = [params[0]]
        wide = [params[0].double()]
        config = DEFAULT_OPTIMIZER_CONFIGS[name](max_lr=0.01)
        assert_close(
            [p.double() for p in train(name, half, config, 1)[0]], train(name, wide, config, 1)[0], 0.02
        )  # rounding


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_complex_parameters(name):
    params = [torch.randn(3, dtype=torch.complex128)]
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    config = DEFAULT_OPTIMIZER_CONFIGS[name](max_lr=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
    news, state = params, init_optimizer_state(name, params)
    own = [nn.Parameter(params[0].clone())]
    optimizer = kind(own, lr=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
    for _ in range(3):
        own[0].grad = torch.randn(3, dtype=torch.complex128)
        news, state = get_optimizer_step(name)(news, [own[0].grad], state, config)
        optimizer.step()
    assert_close(news, own, 1e-12)


def test_graphs_of_autograd_are_kept_on_demand():
    params = [nn.Parameter(torch.randn(3))]
    loss = (params[0] ** 2).sum()
    grads = torch.autograd.grad(loss, params, create_graph=True)  # a tuple
    state = init_optimizer_state("sgd", params)
    news, new_state = sgd_step(params, grads, state, SGDConfig())
    assert not any(t.requires_grad for t in tensors_of(news, new_state))
    news, _ = sgd_step(params, grads, state, SGDConfig(max_lr=0.1, momentum=0.0), differentiable=True)
    news[0].sum().backward()
    assert_close(params[0].grad, torch.full((3,), 1 - 0.1 * 2), 1e-6)


@every_optimizer
def test_steps_that_are_left_out(name):
    """With ``found_inf`` of a scaler; nothing of the infinite gradient is left anywhere."""
    config, step = DEFAULT_OPTIMIZER_CONFIGS[name](weight_decay=0.1), get_optimizer_step(name)
    params, state = train(name, make_params(), config, 2)
    good, bad = make_grads(params, 7), pytree.tree_map(lambda p: torch.full_like(p, torch.nan), params)
    no, yes = torch.tensor(0.0), torch.tensor(1.0)
    expected = step(params, good, state, config)
    for options in ({}, {"inplace": True}):
        mine = copy.deepcopy((params, state))
        mine = step(mine[0], bad, mine[1], config, found_inf=yes, **options)
        assert_close(mine, (params, state), 0)
        assert_close(step(mine[0], good, mine[1], config, found_inf=no, **options), expected, 0)


# ------------------------------------------------------------------------------------------------- transforms of torch


@every_optimizer
def test_vmap_over_replicas(name):
    """Four models, each with a learning rate of its own, under a schedule."""
    replicas = [make_params() for _ in range(4)]
    rates = torch.tensor([1e-3, 1e-2, 0.1, 0.2], dtype=torch.float64)
    make, step = DEFAULT_OPTIMIZER_CONFIGS[name], get_optimizer_step(name)

    def train_one(params, rate):
        state = init_optimizer_state(name, params)
        config = make(max_lr=rate, weight_decay=0.1, lr_schedule_value=falling)
        for _ in range(3):
            params, state = step(params, pytree.tree_map(torch.sin, params), state, config)
        return params, state

    stacked = pytree.tree_map(lambda *ps: torch.stack(ps), *replicas)
    together = torch.func.vmap(train_one)(stacked, rates)
    for index, params in enumerate(replicas):
        alone = train_one(params, float(rates[index]))
        assert_close(pytree.tree_map(lambda t, index=index: t[index], together), alone, 1e-12)


@every_optimizer
def test_derivative_of_the_loss_after_three_steps(name):
    """By all numbers of the config at once, against finite differences."""
    params = {"w": torch.randn(3, dtype=torch.float64), "b": torch.randn((), dtype=torch.float64)}
    target = torch.randn(3, dtype=torch.float64)
    make, step = DEFAULT_OPTIMIZER_CONFIGS[name], get_optimizer_step(name)
    numbers = {"max_lr": 0.01 if name == "sgd" else 0.1, "weight_decay": 0.05, "lr_schedule_value": 0.7}
    numbers |= {"beta1": 0.8, "beta2": 0.9} if "adam" in name else {"momentum": 0.6}
    numbers |= {"trust_coefficient": 0.3} if name == "lars" else {}

    def loss_of(params):
        return ((params["w"] * params["b"].cos() - target) ** 4).sum()

    def loss_after(values):
        params_now, state = params, init_optimizer_state(name, params)
        options = dict(zip(numbers, values.unbind(), strict=True))
        if "adam" in name:
            options["betas"] = (options.pop("beta1"), options.pop("beta2"))
        for _ in range(3):
            params_now, state = step(params_now, torch.func.grad(loss_of)(params_now), state, make(**options))
        return loss_of(params_now)

    point = torch.tensor(list(numbers.values()), dtype=torch.float64)
    found = torch.func.grad(loss_after)(point)
    for index, direction in enumerate(torch.eye(len(point), dtype=torch.float64)):
        difference = (loss_after(point + 1e-5 * direction) - loss_after(point - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close(found[index], difference, rtol=1e-6, atol=1e-7)
    assert found.abs().min() > 1e-6


@pytest.mark.parametrize("name", ["decoupled_adam", "lars", "sgd"])
def test_one_graph_without_breaks(name):
    """Compiled once for all steps, with a schedule that is a function; gradients of torch.func inside."""
    params = make_params()
    make, step = DEFAULT_OPTIMIZER_CONFIGS[name], get_optimizer_step(name)
    graphs = []

    def count(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    def whole(params, grads, state, rate):
        return step(params, grads, state, make(max_lr=rate, weight_decay=0.1, lr_schedule_value=falling))

    compiled = torch.compile(whole, fullgraph=True, backend=count)
    ours = theirs = (params, init_optimizer_state(name, params))
    for seed in range(3):
        grads, rate = make_grads(params, seed), torch.tensor(0.1 / (1 + seed))
        ours = compiled(ours[0], grads, ours[1], rate)
        theirs = whole(theirs[0], grads, theirs[1], rate)
    assert_close(ours, theirs, 1e-12)
    assert len(graphs) == 1


# ------------------------------------------------------------------------------------------------------- by their names


def test_registries_have_the_same_names():
    assert set(DEFAULT_OPTIMIZER_CONFIGS) == set(DEFAULT_OPTIMIZER_STATES) == set(OPTIMIZER_STEP) == set(NAMES)


@every_optimizer
def test_config_state_and_step_of_a_name_train_a_model(name):
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x, y = torch.randn(16, 3), torch.randn(16, 1)
    config = DEFAULT_OPTIMIZER_CONFIGS[name](max_lr=10.0 if name == "lars" else 0.01)
    state, step = init_optimizer_state(name, model), get_optimizer_step(name)
    params = {key: p.detach() for key, p in model.named_parameters()}

    def loss_of(params):
        return ((torch.func.functional_call(model, params, (x,)) - y) ** 2).mean()

    losses = []
    for _ in range(5):
        grads, loss = torch.func.grad_and_value(loss_of)(params)
        params, state = step(params, grads, state, config)
        losses.append(loss)
    assert loss_of(params) < losses[0]
    assert state["step"] == 5
    assert set(state) - {"step"} == ({"exp_avg", "exp_avg_sq"} if "adam" in name else {"momentum"})
    assert all(set(state[key]) == set(params) for key in set(state) - {"step"})


@pytest.fixture
def registries():
    """As they are now, afterwards, too."""
    kept = [dict(registry) for registry in (DEFAULT_OPTIMIZER_CONFIGS, DEFAULT_OPTIMIZER_STATES, OPTIMIZER_STEP)]
    yield
    for registry, entries in zip(
        (DEFAULT_OPTIMIZER_CONFIGS, DEFAULT_OPTIMIZER_STATES, OPTIMIZER_STEP), kept, strict=True
    ):
        registry.clear()
        registry.update(entries)


@pytest.mark.usefixtures("registries")
def test_a_new_optimizer_is_one_call():
    def sign_step(params, grads, opt_state, config):
        news = pytree.tree_map(lambda p, g: p - config.max_lr * g.sign(), params, grads)
        return news, {**opt_state, "step": opt_state["step"] + 1}

    register_optimizer("sign", config=SGDConfig, state=default_sgd_state, step=sign_step)
    params = make_params()
    news, state = train("sign", params, DEFAULT_OPTIMIZER_CONFIGS["sign"](max_lr=0.5), 1)
    assert_close(news, pytree.tree_map(lambda p, g: p - 0.5 * g.sign(), params, make_grads(params, 0)), 0)
    assert state["step"] == 1
    with pytest.raises(OptionError, match=r"register_optimizer\('sign'\): there is one of this name; choose another"):
        register_optimizer("sign", config=SGDConfig, state=default_sgd_state, step=sgd_step)
    register_optimizer("sign", config=SGDConfig, state=default_sgd_state, step=sgd_step, replace=True)
    assert get_optimizer_step("sign") is sgd_step


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SGDConfig(max_lr=-1.0), r"SGDConfig\(max_lr=-1.0\); expected a number in \[0, inf\)"),
        (lambda: SGDConfig(momentum=1.0), r"SGDConfig\(momentum=1.0\); expected a number in \[0, 1\)"),
        (lambda: LARSConfig(eps="small"), r"LARSConfig\(eps='small'\); expected a number in \[0, inf\)"),
        (lambda: LARSConfig(trust_coefficient=True), r"LARSConfig\(trust_coefficient=True\)"),
        (lambda: AdamConfig(betas=(0.9, 1.0)), r"AdamConfig\(betas=\(0.9, 1.0\)\); expected two numbers in \[0, 1\)"),
        (lambda: AdamConfig(betas=0.9), r"AdamConfig\(betas=0.9\); expected two numbers"),
        (lambda: AdamConfig(mode="adamw"), r"AdamConfig\(mode='adamw'\); expected one of \['AdamWDMode.ORIGINAL', "),
        (
            lambda: AdamConfig(lr_schedule_value=-0.5),
            r"AdamConfig\(lr_schedule_value=-0.5\); expected a number in \[0, inf\), None, or a function of the number",
        ),
        (
            lambda: SGDConfig(nesterov=True, momentum=0.0),
            r"SGDConfig\(nesterov=True, momentum=0.0, dampening=0.0\); expected a momentum above 0 and no dampening",
        ),
        (
            lambda: init_optimizer_state("adamax", []),
            r"no optimizer 'adamax'; there are \['adam', .*register_optimizer",
        ),
        (lambda: get_optimizer_step("adamax"), r"no optimizer 'adamax'; there are \['adam', .*register_optimizer"),
    ],
)
def test_what_is_no_config(make, text):
    with pytest.raises(OptionError, match=text):
        make()


def test_assignments_are_checked():
    config = AdamConfig()
    with pytest.raises(OptionError, match=r"AdamConfig\(max_lr=-1\)"):
        config.max_lr = -1
    with pytest.raises(OptionError, match=r"AdamConfig has no hyper-parameter 'lr'; there are \['betas', 'eps'"):
        config.lr = 0.1
    assert config == AdamConfig()
    config.lr_schedule_value = lambda step: "one"
    with pytest.raises(
        OptionError, match=r"AdamConfig: lr_schedule_value returned 'one' for step .*; expected a number"
    ):
        train("adam", [torch.ones(2)], config, 1)


W, B = torch.ones(2, 2), torch.ones(2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"grads": {"w": W}}, r"a step of SGDConfig: grads: not of the structure .*expected 2, but got 1"),
        ({"grads": {"w": W, "c": B}}, r"missing key\(s\): \{'b'\}; extra key\(s\): \{'c'\}.* Pass one tensor for each"),
        ({"grads": [W, B]}, r"grads: not of the structure of the parameters"),
        (
            {"grads": {"w": W, "b": None}},
            r"grads: None for the parameter \['b'\] of shape \(2,\); pass a tensor of that",
        ),
        ({"grads": {"w": B, "b": B}}, r"grads: a tensor of shape \(2,\) for the parameter \['w'\] of shape \(2, 2\)"),
        (
            {"opt_state": {}},
            r"opt_state lacks \['momentum', 'step'\] and has \[\]; make it by init_optimizer_state\(\)",
        ),
        ({"opt_state": {"step": B.sum(), "momentum": [W, B]}}, r"opt_state\['momentum'\]: not of the structure"),
    ],
)
def test_what_does_not_belong_together(change, text):
    params = {"w": W.clone(), "b": B.clone()}
    given = {"grads": {"w": W, "b": B}, "opt_state": init_optimizer_state("sgd", params), **change}
    for inplace in (False, True):
        with pytest.raises(OptionError, match=text):
            sgd_step(params, given["grads"], given["opt_state"], SGDConfig(), inplace=inplace)
    assert_close(params, {"w": W, "b": B}, 0)


def test_dictionaries_may_be_in_another_order():
    params = {"w": torch.zeros(2), "b": torch.zeros(2)}
    state = init_optimizer_state("sgd", {"b": torch.zeros(2), "w": torch.zeros(2)})
    news, state = sgd_step(params, {"b": B, "w": 2 * B}, state, SGDConfig(max_lr=1.0))
    assert_close([news["w"], news["b"], state["momentum"]["w"]], [-2 * B, -B, 2 * B], 0)
