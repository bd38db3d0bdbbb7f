"""Whatever users do between steps: long random histories, against torch's AdamW and against tensors treated one by one."""

import copy
import io
import random

import pytest
import torch
from torch import nn

from graphopt.optim import Modular, m

SHAPES = [(), (3,), (4, 3), (0, 2), (17,), (2, 2, 2)]
DTYPES = [torch.float64, torch.float64, torch.complex128, torch.float32]


def adamw(groups):
    return torch.optim.AdamW(groups, 0.05, weight_decay=0.1)


def modular_adamw(way):
    return lambda groups: Modular(groups, m.Adam(), m.WeightDecay(0.1), m.LR(0.05), **way)


def long_chain(way):
    def modules():
        return (
            m.ClipValue(1.5),
            m.Adam(),
            m.NormalizeByEMA(0.9),
            m.HeavyBall(0.5),
            m.WeightDecay(0.1),
            m.LR(0.05),
        )

    return lambda groups: Modular(groups, *modules(), **way)


class Side:
    """An optimizer and its parameters."""

    def __init__(self, make, values, cut):
        self.params = [nn.Parameter(value.clone()) for value in values]
        self.make = make
        self.optimizer = make([{"params": self.params[:cut]}, {"params": self.params[cut:], "lr": 0.3}])


def set_option(group, name, value):
    """By the name that Modular has for it."""
    if name in ("beta1", "beta2") and "betas" in group:
        betas = list(group["betas"])
        betas[name == "beta2"] = value
        group["betas"] = tuple(betas)
    else:
        group["adam.eps" if name == "eps" and "adam.eps" in group else name] = value


# What may happen between two steps, to one side, with a number in [0, 1), a group and the place of a parameter.


def option(side, number, group, place):
    name = ["lr", "weight_decay", "beta1", "beta2", "eps"][int(number * 5)]
    set_option(group, name, 0.9 * number)


def tensor_rate(side, number, group, place):
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(number)
    else:
        group["lr"] = torch.tensor(number / 10, dtype=torch.float64)


def save_and_load(side, number, group, place):
    file = io.BytesIO()
    torch.save(side.optimizer.state_dict(), file)
    file.seek(0)
    if number < 0.5:
        side.optimizer = side.make([{"params": group["params"]} for group in side.optimizer.param_groups])
    side.optimizer.load_state_dict(torch.load(file, weights_only=True))


def deepcopy(side, number, group, place):
    with torch.no_grad():
        side.optimizer, side.params = copy.deepcopy((side.optimizer, side.params))


def other_data(side, number, group, place):
    for p in side.params:
        p.data = 1.5 * p.data


def other_state(side, number, group, place):
    for state in side.optimizer.state.values():
        for name, value in list(state.items()):
            if name != "step":
                state[name] = 2 * value.clone()


def late_group(side, number, group, place):
    side.params.append(nn.Parameter(torch.full((3,), number, dtype=torch.float64)))
    side.optimizer.add_param_group({"params": [side.params[-1]], "lr": 0.2})


def regroup(side, number, group, place):
    groups = side.optimizer.param_groups
    if len(groups[0]["params"]) > 1:
        groups[1]["params"].append(groups[0]["params"].pop())


def zero_grad(side, number, group, place):
    side.optimizer.zero_grad(set_to_none=number < 0.5)


def nothing(side, number, group, place):
    pass


def single_parameter(side, number, group, place):
    module, name = [(1, "beta2"), (2, "beta"), (4, "weight_decay"), (5, "lr")][int(number * 4)]
    side.optimizer.modules[module].set_param_groups([{"params": side.params[place], name: 0.9 * number}])


def freeze(side, number, group, place):
    group["frozen"] = not group["frozen"]


def choice(side, number, group, place):
    group["ema_init"] = "update" if number < 0.5 else "zeros"


def reset(side, number, group, place):
    side.optimizer.reset()


EVENTS = [
    nothing,
    option,
    tensor_rate,
    save_and_load,
    deepcopy,
    other_data,
    other_state,
    late_group,
    regroup,
    zero_grad,
]
OWN_EVENTS = [*EVENTS, single_parameter, freeze, choice, reset]


def compare(seed, sides, events, num_steps=10):
    """Both live through one history."""
    draw = random.Random(seed)
    history = []
    for step in range(num_steps):
        event, number = draw.choice(events), draw.random()
        index, place = draw.randrange(len(sides[0].optimizer.param_groups)), draw.randrange(len(sides[0].params))
        history.append(event.__name__)
        for side in sides:
            event(side, number, side.optimizer.param_groups[index], place)
        without = {i for i in range(len(sides[0].params)) if draw.random() < 0.1}
        if event is not zero_grad:
            for side in sides:
                generator = torch.Generator().manual_seed(100 * seed + step)
                for i, p in enumerate(side.params):
                    wide = torch.complex128 if p.is_complex() else torch.float64
                    grad = torch.randn(p.shape, generator=generator, dtype=wide).to(p.dtype)
                    p.grad = None if i in without else grad
        for side in sides:
            side.optimizer.step()
        for p, q in zip(*[side.params for side in sides], strict=True):
            tolerance = 1e-4 if p.dtype == torch.float32 else 1e-9
            torch.testing.assert_close(
                p.detach(), q.detach(), atol=tolerance, rtol=tolerance, msg=lambda text: f"{history}: {text}"
            )


def random_values(draw, seed, number, dtypes):
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(number):
        dtype = draw.choice(dtypes)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        values.append(torch.randn(draw.choice(SHAPES), generator=generator, dtype=wide).to(dtype))
    return values


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_adamw(seed, way):
    draw = random.Random(seed)
    values = random_values(draw, seed, draw.randint(2, 6), [torch.float64])
    cut = draw.randrange(1, len(values))
    compare(seed, [Side(make, values, cut) for make in (modular_adamw(way), adamw)], EVENTS)


@pytest.mark.parametrize("number", [4, 20])
@pytest.mark.parametrize("way", [{"foreach": True}, {}], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_long_chain_of_mixed_dtypes(seed, way, number):
    draw = random.Random(seed)
    values = random_values(draw, seed, number, DTYPES)
    cut = draw.randrange(1, len(values))
    sides = [Side(long_chain(each), values, cut) for each in (way, {"foreach": False})]
    compare(seed, sides, OWN_EVENTS, num_steps=7)
