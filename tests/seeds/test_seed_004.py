"""The example of seed 004, with only its import lines changed, beside what it clearly meant; registered, and against torch."""

import types
import typing as t

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from graphopt.optim.functional import (
    DEFAULT_OPTIMIZER_CONFIGS,
    DEFAULT_OPTIMIZER_STATES,
    OPTIMIZER_STEP,
    PARAMS_GRADS_TYPE,
    AdamConfig,
    LARSConfig,
    LRSchedulerConfig,
    SGDConfig,
    adam_step,
    build_lr_scheduler,
    get_optimizer_step,
    init_optimizer_state,
    register_optimizer,
    sgd_step,
)

tree = types.SimpleNamespace(map_structure=_pytree.tree_map)  # of dm-tree


@torch.no_grad()
def sgd(
    params: PARAMS_GRADS_TYPE,
    grads: PARAMS_GRADS_TYPE,
    momentum: PARAMS_GRADS_TYPE,
    config: SGDConfig,
) -> t.Tuple[PARAMS_GRADS_TYPE, PARAMS_GRADS_TYPE]:  # noqa: UP006
    """Functional implementation of the SGD optimizer.

    :param params: List of model parameters.
    :param grads: List of gradients of the model parameters.
    :param momentum: List of momentum values for each parameter.
    :param config: Configuration for the SGD optimizer.
    :return: Updated model parameters, momentum values, and state steps.

    """

    def _sgd(param, grad, momentum):
        """Inplace SGD update rule."""
        if config.weight_decay > 0:
            update = grad.add(param, alpha=config.weight_decay)

        if config.momentum > 0:
            momentum.mul_(config.momentum).add_(grad)
            update = momentum

        # Update for the current scheduled LR.
        current_lr = config.max_lr
        if config.lr_schedule_value is not None:
            current_lr *= config.lr_schedule_value

        param.sub_(current_lr * update)

    tree.map_structure(_sgd, params, grads, momentum)
    return params, momentum


@torch.no_grad()
def sgd_as_meant(params, grads, momentum, config):
    """The same, where weight decay enters the momentum, and there is an update without both."""

    def _sgd(param, grad, momentum):
        update = grad
        if config.weight_decay > 0:
            update = grad.add(param, alpha=config.weight_decay)
        if config.momentum > 0:
            momentum.mul_(config.momentum).add_(update)
            update = momentum
        current_lr = config.max_lr
        if config.lr_schedule_value is not None:
            current_lr *= config.lr_schedule_value
        param.sub_(current_lr * update)

    tree.map_structure(_sgd, params, grads, momentum)
    return params, momentum


@pytest.fixture
def register():
    """Registers a function of the seed's form; all is as before afterwards."""
    names = []

    def register(name, function):
        def step(params, grads, opt_state, config):
            params, momentum = function(params, grads, opt_state["momentum"], config)
            return params, {**opt_state, "momentum": momentum}

        register_optimizer(name, config=SGDConfig, state=DEFAULT_OPTIMIZER_STATES["sgd"], step=step)
        names.append(name)

    yield register
    for name in names:
        for registry in (DEFAULT_OPTIMIZER_CONFIGS, DEFAULT_OPTIMIZER_STATES, OPTIMIZER_STEP):
            del registry[name]


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 5)).double()


X, Y = torch.rand(50, 100, 10).double(), torch.rand(50, 100, 5).double()


def train(name, config, num_steps=50):
    """A loop as the seed's users write it: the model is a function of its parameters."""
    model = make_model()
    params = {key: param.detach() for key, param in model.named_parameters()}
    opt_state = init_optimizer_state(name, model)
    step = get_optimizer_step(name)
    for x, y in zip(X[:num_steps], Y, strict=False):

        def loss_fn(params, x=x, y=y):
            return nn.functional.mse_loss(torch.func.functional_call(model, params, (x,)), y)

        loss, vjp_fn = torch.func.vjp(loss_fn, params)
        grads = vjp_fn(torch.ones_like(loss))[0]
        params, opt_state = step(params, grads, opt_state, config)
    return list(params.values())


def train_torch(make, schedule=None):
    model = make_model()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule or (lambda step: 1.0))
    for x, y in zip(X, Y, strict=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return list(model.parameters())


def assert_close(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("schedule_value", [None, 0.5])
def test_example(register, schedule_value):
    """As it stands it is right for momentum without weight decay."""
    register("seed", sgd)
    config = SGDConfig(momentum=0.9, lr_schedule_value=schedule_value)
    expected = train_torch(lambda ps: torch.optim.SGD(ps, lr=0.1 * (schedule_value or 1.0), momentum=0.9))
    assert_close(train("seed", config), expected)
    assert_close(train("sgd", config), expected)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_example_as_it_was_meant(register, momentum, weight_decay):
    register("seed", sgd_as_meant)
    options = {"momentum": momentum, "weight_decay": weight_decay}
    expected = train_torch(lambda ps: torch.optim.SGD(ps, lr=0.1, **options))
    assert_close(train("seed", SGDConfig(**options)), expected)
    assert_close(train("sgd", SGDConfig(**options)), expected)


def test_what_the_text_names():
    """Config, state and stepper of every optimizer; Adam is AdamW, too; both are those of torch."""
    assert set(DEFAULT_OPTIMIZER_CONFIGS) == set(DEFAULT_OPTIMIZER_STATES) == set(OPTIMIZER_STEP)
    assert get_optimizer_step("sgd") is sgd_step
    assert get_optimizer_step("adam") is get_optimizer_step("adamw") is adam_step
    assert type(DEFAULT_OPTIMIZER_CONFIGS["adamw"]()) is type(DEFAULT_OPTIMIZER_CONFIGS["adam"]()) is AdamConfig
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        config = DEFAULT_OPTIMIZER_CONFIGS[name](max_lr=0.1, weight_decay=0.1)
        assert_close(train(name, config), train_torch(lambda ps, kind=kind: kind(ps, lr=0.1, weight_decay=0.1)))


def test_lars_moves_the_parameters():
    moved = train("lars", LARSConfig(trust_coefficient=0.1), 3)
    assert all(not torch.equal(p, q) for p, q in zip(moved, make_model().parameters(), strict=True))


@pytest.mark.parametrize("kind", ["constant", "rsqrt", "cosine", "linear_warmdown"])
def test_schedules(kind):
    schedule = build_lr_scheduler(LRSchedulerConfig(scheduler_type=kind, warmup_steps=5, total_steps=30))
    expected = train_torch(lambda ps: torch.optim.Adam(ps, lr=0.1), schedule)
    config = AdamConfig(max_lr=0.1, lr_schedule_value=schedule)
    assert_close(train("adam", config), expected)
    assert_close(train("adam", config), expected)  # the config counts nothing
