"""Compiled kernels: equal to the rules, compiled once, and what happens when compiling fails."""

import copy

import pytest
import torch

from graphopt.optim import Modular, m
from graphopt.optim.core.flat import kernels, kind_run

README = lambda: [m.ClipValue(1.0), m.Adam(), m.NormalizeByEMA(max_ema_growth=1.1), m.WeightDecay(1e-4), m.LR(0.1)]  # noqa: E731
SMALL = [(40, 30)] * 260 + [(7,), ()]  # together enough for a kernel of rows
LONG = [(200, 100), (17000,), (3, 5, 7)]


def make(shapes, dtype=torch.float64, modules=README, **flags):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    return params, Modular(params, *modules(), **flags)


def train(params, optimizer, steps=3, seed=1, scheduler=None):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, dtype=torch.float64, generator=generator).to(param.dtype)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.fixture
def compilations(monkeypatch):
    """Counts what is compiled from an empty table of kernels."""
    found = []
    kind_run.long_kernel.cache_clear()
    kind_run.rows_kernel.cache_clear()
    original = kernels._compile
    monkeypatch.setattr(kernels, "_compile", lambda *args: found.append(args) or original(*args))
    return found


@pytest.mark.parametrize("shapes", [SMALL, LONG], ids=["small", "long"])
def test_kernels_equal_the_rules(shapes):
    params, optimizer = make(shapes, fused=True)
    expected, reference = make(shapes, foreach=False)
    for steps in (1, 2):
        train(params, optimizer, steps)
        train(expected, reference, steps)
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-11, atol=1e-12)
        for name, value in reference.state[want].items():
            torch.testing.assert_close(optimizer.state[param][name], value, rtol=1e-11, atol=1e-12)


def test_nothing_is_compiled_twice(compilations):
    params, optimizer = make(LONG, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    train(params, optimizer, 2, scheduler=scheduler)
    num_compilations = len(compilations)
    assert 0 < num_compilations <= 2
    optimizer.param_groups[0]["beta1"] = 0.8
    train(params, optimizer, 98, scheduler=scheduler)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(params, optimizer, 1)
    others, other = make([(20000,), (150, 130)], fused=True)
    train(others, other, 1)
    assert len(compilations) == num_compilations


def test_layouts_and_dtypes():
    params, optimizer = make([(64, 32, 3, 3), (5000,)], fused=True)
    params[0].data = params[0].data.to(memory_format=torch.channels_last)
    expected, reference = make([(64, 32, 3, 3), (5000,)], foreach=False)
    train(params, optimizer)
    train(expected, reference)
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-11, atol=1e-12)
    assert params[0].is_contiguous(memory_format=torch.channels_last)


def test_state_that_is_replaced_is_followed():
    params, optimizer = make(LONG, fused=True)
    expected, reference = make(LONG, foreach=False)
    train(params, optimizer)
    for entry in optimizer.state.values():
        for name, value in entry.items():
            entry[name] = value.clone()
    train(params, optimizer)
    train(expected, reference)
    train(expected, reference)
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-11, atol=1e-12)


def test_gradients_come_and_go():
    params, optimizer = make([*LONG, (50,), (60,)], fused=True)
    expected, reference = make([*LONG, (50,), (60,)], foreach=False)
    for pattern in ((0, 1, 2, 3, 4), (0, 3), (1, 2, 3, 4), (0, 1, 2, 3, 4)):
        for some, one in ((params, optimizer), (expected, reference)):
            for index, param in enumerate(some):
                param.grad = torch.full_like(param, 0.5 + index) if index in pattern else None
            one.step()
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-11, atol=1e-12)
        assert float(optimizer.state[param]["step"]) == float(reference.state[want]["step"])


def test_groups_with_other_numbers_share_a_kernel(compilations):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(17000, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5, "lr": 0.01}]
    optimizer = Modular(groups, *README(), fused=True)
    expected = [torch.nn.Parameter(param.detach().clone()) for param in params]
    groups = [{"params": expected[:1]}, {"params": expected[1:], "weight_decay": 0.5, "lr": 0.01}]
    reference = Modular(groups, *README(), foreach=False)
    train(params, optimizer)
    train(expected, reference)
    for param, want in zip(params, expected, strict=True):
        torch.testing.assert_close(param, want, rtol=1e-11, atol=1e-12)
    assert len(compilations) <= 2


def test_a_failed_compilation_is_said_or_raised(monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler")

    kind_run.long_kernel.cache_clear()
    monkeypatch.setattr(kernels, "compile_long", fail)
    params, optimizer = make([(800, 800)])
    with pytest.warns(UserWarning, match=r"runs uncompiled.*ClipValue, Adam.*no C\+\+ compiler.*foreach=True"):
        train(params, optimizer, 1)
    expected, reference = make([(800, 800)], foreach=False)
    train(expected, reference, 1)
    torch.testing.assert_close(params[0], expected[0], rtol=1e-11, atol=1e-12)
    params, optimizer = make(LONG, fused=True)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        train(params, optimizer, 1)
    assert all(map(torch.equal, params, before))


def test_the_processor_is_tried_where_its_word_is_not_enough(monkeypatch):
    from torch._inductor import compile_fx, cpu_vec_isa

    from graphopt import _compat
    from graphopt.optim.core.flat.tracing import FakeSizes

    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    usual, seen = cpu_vec_isa.VecISA.check_build, []

    def compile_once_the_processor_was_tried(*_):
        seen.append(cpu_vec_isa.VecISA.check_build)
        if len(seen) == 1:
            raise RuntimeError("the compiler does not know these instructions")
        return "a kernel"

    monkeypatch.setattr(compile_fx, "compile_fx_inner", compile_once_the_processor_was_tried)
    fakes = FakeSizes(5000)
    with fakes.active():
        tensor = torch.empty(fakes.sizes[0])
    graph = fakes.graph(lambda tensor: (tensor + 1,), [tensor])
    assert _compat.compile_kernel(graph, [tensor], fakes.mode, {}) == "a kernel"
    assert seen[0] is not usual
    assert seen[1] is usual
    assert cpu_vec_isa.VecISA.check_build is usual
