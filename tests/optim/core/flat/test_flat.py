"""Programs, the passes they are cut into, and the ways to run them, against the rules one tensor at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.optim import Modular, Rule, m
from graphopt.optim.core.arithmetic import average, choose, dot, largest, norm, scalar, total, zeros
from graphopt.optim.core.bounds import DECAY, NON_NEGATIVE, numbers
from graphopt.optim.core.flat import phases, program
from graphopt.optim.core.flat.bucket import Bucket
from graphopt.optim.core.flat.foreach import Foreach
from graphopt.optim.core.flat.kind_run import path_of
from graphopt.optim.core.flat.program import GRAD, NUMEL, PARAM, Kind
from graphopt.optim.core.flat.ragged import Ragged


class TwoReductions(Rule):
    """Divides by its norm, subtracts its mean, then divides by the largest element: three reductions, one after another."""

    from typing import NamedTuple as _NamedTuple

    class State(_NamedTuple):
        exp_avg: Tensor
        length: Tensor

    bounds = numbers(beta=DECAY, eps=NON_NEGATIVE)

    def __init__(self, beta=0.5, eps=1e-3):
        super().__init__({"beta": beta, "eps": eps})

    def init(self, param, settings):
        return self.State(zeros(param), scalar(param))

    def update(self, update, state, settings, context):
        unit = update / (norm(update) + settings.eps)
        centred = unit - total(unit) / context.numel
        exp_avg = average(state.exp_avg, centred, settings.beta)
        length = choose(context.count == 1, norm(exp_avg, 1.0), state.length + dot(exp_avg, context.param))
        return exp_avg / (largest(exp_avg.abs()) + settings.eps) + state.exp_avg * length, self.State(exp_avg, length)


CHAINS = {
    "adam": lambda: [m.Adam(), m.WeightDecay(0.1), m.LR(0.1)],
    "amsgrad": lambda: [m.Adam(amsgrad=True, eps_inside=True), m.LR(0.1)],
    "readme": lambda: [
        m.ClipValue(1.0),
        m.Adam(),
        m.NormalizeByEMA(max_ema_growth=1.1),
        m.WeightDecay(1e-4),
        m.LR(0.1),
    ],
    "reductions": lambda: [TwoReductions(), m.Adam(), TwoReductions(0.9), m.LR(0.1)],
    "update": lambda: [m.NormalizeByEMA(max_ema_growth=None, ema_init="update"), m.LR(0.1)],
}
SHAPES = [(7, 3), (), (300,), (128,), (1,), (2, 64)]


def trace(modules, dtype=torch.float64):
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    optimizer = Modular(params, *modules, foreach=False)
    device = torch.device("cpu")
    first = params[0]
    settings_of = lambda rule: rule.get_settings(first)  # noqa: E731
    _, choices = program.read_settings(optimizer.modules, settings_of)
    kind = Kind(program.structure(optimizer.modules), choices, dtype, dtype, device, True, True, False, ())
    return optimizer, params, program.trace(kind, optimizer.modules, settings_of, path_of)


def states_of(optimizer, params):
    for rule in optimizer.modules:
        for param in params:
            rule.get_state(param, rule.get_settings(param))
    return [optimizer.state[param] for param in params]


def row_of(made, optimizer, param, count):
    values = [count]
    for rule in optimizer.modules:
        values += [v for n, v in rule.get_settings(param).items() if program.is_dynamic(rule, n, v)]
    return made.prologue(*[torch.tensor(float(value), dtype=torch.float64) for value in values])


def step_by_loop(optimizer, params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()


def gather(made, param, grad, state):
    named = {PARAM: param.detach(), GRAD: grad, NUMEL: torch.tensor(float(param.numel()), dtype=torch.float64), **state}
    return [
        named[name].reshape(-1) if not is_scalar else named[name]
        for name, is_scalar in zip(made.elements, made.scalars, strict=True)
    ]


def check(run, chain):
    """``run(made, optimizer, params, grads, states, count)`` steps a second optimizer; both must end equal."""
    torch.manual_seed(0)
    expected, expected_params, made = trace(CHAINS[chain]())
    torch.manual_seed(0)
    optimizer, params, _ = trace(CHAINS[chain]())
    states = states_of(optimizer, params)
    for count in range(1, 4):
        grads = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
        step_by_loop(expected, expected_params, grads)
        with torch.no_grad():
            run(made, optimizer, params, grads, states, count)
    for want, got, state in zip(expected_params, params, states, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
        for name, value in state.items():
            torch.testing.assert_close(value, expected.state[want][name], rtol=1e-12, atol=1e-13)


def run_body(made, optimizer, params, grads, states, count):
    for param, grad, state in zip(params, grads, states, strict=True):
        elements = gather(made, param, grad, state)
        outputs = made.body(row_of(made, optimizer, param, count), *elements)
        for target, output in zip(made.targets, outputs, strict=True):
            elements[target].copy_(output)


def run_phases(made, optimizer, params, grads, states, count):
    for param, grad, state in zip(params, grads, states, strict=True):
        elements = gather(made, param, grad, state)
        row, found = row_of(made, optimizer, param, count), []
        for phase in phases.cut(made):
            own = [elements[index] for index in phase.elements]
            outputs = phase.graph_module(row, *[found[index] for index in phase.numbers], *own)
            for target, output in zip(phase.targets, outputs, strict=False):
                own[target].copy_(output)
            found += outputs[len(phase.targets) :]


def run_foreach(made, optimizer, params, grads, states, count):
    elements = [gather(made, *row) for row in zip(params, grads, states, strict=True)]
    Foreach(made)(row_of(made, optimizer, params[0], count), *zip(*elements, strict=True))


def run_ragged(made, optimizer, params, grads, states, count):
    names = [name for name in made.elements if name not in (PARAM, GRAD, NUMEL)]
    bucket = Bucket(params, {name: [state[name] for state in states] for name in names}, made.scalar_names)
    elements = []
    for name, dtype in zip(made.elements, made.dtypes, strict=True):
        buffer = bucket.buffers.get(name)
        gathered = {PARAM: params, GRAD: grads}
        if name == NUMEL:
            buffer = bucket.rows.numel
        elements.append(bucket.gather(name, gathered[name], dtype) if buffer is None else buffer)
    outputs = Ragged(made, bucket.rows)(row_of(made, optimizer, params[0], count), *elements)
    for target, output in zip(made.targets, outputs, strict=True):
        elements[target].copy_(output)
    bucket.scatter(PARAM, params)
    for name in names:
        for state, view in zip(states, bucket.views[name], strict=True):
            state[name] = view.clone()


RUNS = {"body": run_body, "phases": run_phases, "foreach": run_foreach, "ragged": run_ragged}


def pytest_generate_tests(metafunc):
    if {"run", "chain"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("run", "chain"), [(run, chain) for run in RUNS for chain in CHAINS])


def test_every_way_to_run_a_program_equals_the_rules(run, chain):
    check(RUNS[run], chain)


def test_a_pass_for_each_level_of_reductions():
    _, _, made = trace(CHAINS["reductions"]())
    # norm; mean; norm of the average and its largest element; the same once more behind Adam; what follows
    assert len(phases.cut(made)) == 7
    assert made.keeps_apart
    _, _, made = trace(CHAINS["adam"]())
    assert len(phases.cut(made)) == 1
    assert not made.keeps_apart


def test_passes_read_what_they_need_and_no_more():
    _, _, made = trace(CHAINS["readme"]())
    first, second = phases.cut(made)
    name = lambda index: made.elements[index]  # noqa: E731
    assert {name(first.elements[target]) for target in first.targets} == {"adam.exp_avg", "adam.exp_avg_sq"}
    assert {name(index) for index in second.elements} == {
        PARAM, "adam.exp_avg", "adam.exp_avg_sq", "normalizebyema.exp_avg", "normalizebyema.norm",
    }  # fmt: skip


def test_numbers_stay_out_of_the_body():
    _, _, made = trace(CHAINS["adam"]())
    targets = [node.target for node in made.body.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.pow.Tensor_Tensor not in targets
    assert torch.ops.aten.pow.Tensor_Tensor in [node.target for node in made.prologue.graph.nodes]


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_rows_hold_any_sizes(sizes):
    params = [torch.nn.Parameter(torch.arange(float(size), dtype=torch.float64)) for size in sizes]
    bucket = Bucket(params, {}, min_rows=3)
    gathered = bucket.gather(PARAM, params, torch.float64)
    assert gathered.shape == (bucket.num_rows, 128)
    assert bucket.num_rows >= 3
    for param, part in zip(params, bucket.split(gathered), strict=True):
        assert torch.equal(part, param)
    columns = torch.arange(128)
    is_valid = columns < bucket.rows.num_valid.unsqueeze(1)
    sums = torch.zeros(len(params), dtype=torch.float64).index_add(0, bucket.rows.owner, (gathered * is_valid).sum(1))
    torch.testing.assert_close(sums, torch.stack([param.detach().sum() for param in params]))
    assert int(is_valid.sum()) == sum(sizes)


class Powered(Rule):
    """Has a number that is no hyper-parameter, and a list that is one."""

    def __init__(self, power, factors):
        super().__init__({"factors": factors})
        self.power = power

    def update(self, update, state, settings, context):
        return update.abs() ** self.power * update.sign() * settings.factors[0], state


CHANGES = {
    "a choice": (lambda: [m.Adam(), m.WeightDecay(0.1), m.LR(0.1)], lambda o: o.param_groups[0].update(ord=1)),
    "a choice of torch's kernel": (
        lambda: [m.Adam(eps=0.1), m.LR(0.1)],
        lambda o: o.param_groups[0].update(eps_inside=True),
    ),
    "more state": (lambda: [m.Adam(), m.LR(0.1)], lambda o: o.param_groups[0].update(amsgrad=True)),
    "a number from nothing": (
        lambda: [m.NormalizeByEMA(max_ema_growth=None), m.LR(0.1)],
        lambda o: o.param_groups[0].update(max_ema_growth=1.1),
    ),
    "an attribute": (lambda: [Powered(1.0, [1.0]), m.LR(0.1)], lambda o: setattr(o.modules[0], "power", 2.0)),
    "a list": (lambda: [Powered(1.0, [1.0]), m.LR(0.1)], lambda o: o.param_groups[0]["factors"].__setitem__(0, 3.0)),
    "another number": (lambda: [Powered(3.0, [1.0]), m.LR(0.1)], lambda o: None),
    "another list": (lambda: [Powered(1.0, [5.0]), m.LR(0.1)], lambda o: None),
}


@pytest.mark.parametrize("options", [{"foreach": True}, {}], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_is_followed(change, options):
    chain, apply = CHANGES[change]
    results = []
    for flags in ({"foreach": False}, options):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in [(30, 20)] * 40]
        optimizer = Modular(params, *chain(), **flags)
        for number in range(4):
            if number == 2:
                apply(optimizer)
            step_by_loop(optimizer, params, [torch.randn_like(param) for param in params])
        results.append([param.detach() for param in params])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


def test_nothing_is_traced_for_kernels_of_torch(monkeypatch):
    monkeypatch.setattr(program, "trace", None)
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    step_by_loop(
        Modular(params, m.Adam(), m.WeightDecay(0.1), m.LR(0.1)), params, [torch.ones(shape) for shape in SHAPES]
    )
    assert all(bool((param < 1).all()) for param in params)
