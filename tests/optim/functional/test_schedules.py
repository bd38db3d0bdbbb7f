"""Schedules against their formulas; as functions of tensors; in torch's LambdaLR; errors."""

import math

import pytest
import torch
from torch import nn

from graphopt.errors import OptionError
from graphopt.optim.functional import SCHEDULES, LRSchedulerConfig, build_lr_scheduler, rsqrt_lr

CASES = [
    {
        "scheduler_type": kind,
        "warmup_steps": warmup,
        "warmup_start_value": start,
        "total_steps": 20,
        "lr_terminal_value": end,
    }
    for kind in SCHEDULES
    for warmup, start, end in ((5, 0.0, 0.0), (5, 0.2, 0.1), (0, 0.0, 0.1))
    if not (kind == "rsqrt" and warmup == 0)
]
every_case = pytest.mark.parametrize("case", CASES)


def reference(t, scheduler_type, warmup_steps, warmup_start_value, total_steps, lr_terminal_value):
    if t < warmup_steps:
        return warmup_start_value + (1 - warmup_start_value) * t / warmup_steps
    p = min((t - warmup_steps) / (total_steps - warmup_steps), 1)
    return {
        "constant": lambda: 1.0,
        "rsqrt": lambda: math.sqrt(warmup_steps / t),
        "cosine": lambda: lr_terminal_value + (1 - lr_terminal_value) * (1 + math.cos(math.pi * p)) / 2,
        "linear_warmdown": lambda: 1 + (lr_terminal_value - 1) * p,
    }[scheduler_type]()


@every_case
def test_formulas(case):
    """Of numbers and of tensors; cosine and warm-down stay at the terminal value."""
    schedule = build_lr_scheduler(LRSchedulerConfig(**case))
    values = [schedule(t) for t in range(45)]
    assert values == pytest.approx([reference(t, **case) for t in range(45)], abs=1e-15)
    assert values[case["warmup_steps"]] == 1.0
    of_tensors = torch.stack(
        [torch.as_tensor(schedule(torch.tensor(float(t), dtype=torch.float64)), dtype=torch.float64) for t in range(45)]
    )
    torch.testing.assert_close(of_tensors, torch.tensor(values, dtype=torch.float64), rtol=1e-14, atol=1e-15)
    if case["scheduler_type"] in ("cosine", "linear_warmdown"):
        assert values[20:] == pytest.approx([case["lr_terminal_value"]] * 25)


@every_case
def test_lambda_lr(case):
    schedule = build_lr_scheduler(LRSchedulerConfig(**case))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for t in range(25):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * reference(t, **case))
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["cosine", "linear_warmdown"])
@pytest.mark.parametrize("steps", [0, 5])
def test_a_schedule_that_ends_with_the_warm_up(kind, steps):
    schedule = build_lr_scheduler(LRSchedulerConfig(scheduler_type=kind, warmup_steps=steps, total_steps=steps))
    assert [schedule(t) for t in (steps, steps + 1, steps + 9)] == [1.0, 0.0, 0.0]


def test_the_default_is_constant():
    assert [build_lr_scheduler(LRSchedulerConfig())(t) for t in (0, 1, 100)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scheduler_type": "step"}, r"scheduler_type='step'\): no such schedule; there are \['constant', 'cosine', "),
        ({"scheduler_type": "rsqrt"}, "the schedule rsqrt with warmup_steps=0; expected at least 1"),
        ({"warmup_steps": -1}, "the schedule constant with warmup_steps=-1; expected at least 0"),
        ({"lr_terminal_value": -0.1}, r"LRSchedulerConfig\(lr_terminal_value=-0.1\); expected a factor of at least 0"),
        (
            {"scheduler_type": "cosine", "warmup_steps": 9, "total_steps": 5},
            "the schedule cosine with total_steps=5 and warmup_steps=9: it would end before the warm-up does",
        ),
    ],
)
def test_errors(options, text):
    with pytest.raises(OptionError, match=text):
        build_lr_scheduler(LRSchedulerConfig(**options))


def test_rsqrt_without_warm_up():
    with pytest.raises(OptionError, match="rsqrt with warmup_steps=0"):
        rsqrt_lr(3, 0)
