"""The benchmark of optimizer steps: chains written by hand are right, bytes and calls are counted, and what is concluded."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks import optim, optim_rivals, optim_tables
from benchmarks.figures import add_figures
from benchmarks.machine import ROOT
from benchmarks.optim_rivals import CHAINS, Foreach, Module

EQUAL = {"kind": "equal", "number": 3, "elements": 6}


def walk(chain, grads, start):
    """Where a parameter goes with these gradients, by hand."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Foreach([parameter], chain)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, grad)
    return parameter.detach()


@pytest.fixture
def numbers():
    torch.manual_seed(0)
    return [torch.randn(4, 3, dtype=torch.float64) for _ in range(5)], torch.randn(4, 3, dtype=torch.float64)


# --- parameters and chains --------------------------------------------------------------------------------------------


def test_sets_are_as_large_as_they_say():
    counted = {}
    for name, given in optim.SETS.items():
        shapes = optim_rivals.shapes(**given)
        counted[name] = len(shapes), sum(torch.Size(shape).numel() for shape in shapes)
    assert counted == {"bert-11m": (74, 11_201_594), "bert-110m": (202, 109_514_298), "small-1000": (1000, 1_000_000)}


def test_shapes_are_those_of_bert():
    transformers = pytest.importorskip("transformers")
    given = optim.TINY_BERT
    config = transformers.BertConfig(
        vocab_size=given["vocabulary"],
        hidden_size=given["hidden"],
        num_hidden_layers=given["layers"],
        num_attention_heads=2,
        intermediate_size=given["intermediate"],
        max_position_embeddings=given["positions"],
    )
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(config)
    assert sorted(optim_rivals.shapes(**given)) == sorted(tuple(p.shape) for p in model.parameters())


def test_adamw_by_hand_is_that_of_torch(numbers):
    grads, start = numbers
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.01)
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    torch.testing.assert_close(walk(CHAINS["adamw"], grads, start), parameter.detach(), rtol=1e-13, atol=0)


def test_laprop_and_lion_by_hand_are_their_equations(numbers):
    grads, start = numbers
    square = mean = momentum = torch.zeros_like(start)
    laprop, lion = start, start
    for grad in grads:
        square = 0.99 * square + 0.01 * grad**2
        mean = 0.9 * mean + 0.1 * grad / (square.sqrt() + 1e-8)
        laprop = laprop - 1e-3 * mean
        lion = lion - 1e-4 * (0.9 * momentum + 0.1 * grad).sign()
        momentum = 0.99 * momentum + 0.01 * grad
    torch.testing.assert_close(walk(CHAINS["laprop"], grads, start), laprop)
    torch.testing.assert_close(walk(CHAINS["lion"], grads, start), lion)


def test_signum_and_cautious_by_hand_follow_torch(numbers):
    grads, start = numbers
    momentum, adam = (torch.nn.Parameter(start.clone()) for _ in range(2))
    plain = torch.optim.SGD([momentum], lr=1.0, momentum=0.9), torch.optim.Adam([adam], lr=1e-3)
    signum = cautious = start
    for grad in grads:
        before = momentum.detach().clone(), adam.detach().clone()
        momentum.grad = adam.grad = grad
        for optimizer in plain:
            optimizer.step()
        signum = signum - 1e-4 * (before[0] - momentum.detach()).sign()
        went = before[1] - adam.detach()
        cautious = cautious - went * (went * grad > 0)
    torch.testing.assert_close(walk(CHAINS["signum"], grads, start), signum)
    torch.testing.assert_close(walk(CHAINS["cautious"], grads, start), cautious)


def test_norms_by_hand_grow_as_the_catalogue_says():
    normalize = optim_rivals.FOREACH["NormalizeByEMA"]
    update = torch.tensor([3.0, 4.0], dtype=torch.float64)
    step = normalize([torch.zeros_like(update)], Module("NormalizeByEMA", options=(("max_ema_growth", 1.5),)))
    norms = [step([update.clone()], [])[0].norm().item() for _ in range(4)]
    assert norms == pytest.approx([0.05, 0.075, 0.1125, 0.16138], rel=1e-4)


def test_a_module_that_is_missing_is_named():
    class Library:
        __name__ = "library"

    with pytest.raises(LookupError, match="library has no module Moon"):
        Module("Moon", 1).make(Library())


# --- rivals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["torch-fused", "torch-foreach", "torch-loop", "foreach"])
def test_steps_move_the_parameters_and_leave_the_gradients(method):
    held = optim_rivals.make_parameters(optim_rivals.shapes(**EQUAL))
    start = [(p.detach().clone(), p.grad.clone()) for p in held]
    step = optim_rivals.step_of(method, optim_rivals.optimizer(method, "adamw", held))
    step()
    for parameter, (before, grad) in zip(held, start, strict=True):
        assert (parameter != before).all()
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("chain", sorted(CHAINS))
def test_what_is_written_by_hand_passes_the_check_and_another_chain_does_not(chain, monkeypatch):
    torch.manual_seed(0)
    assert optim.check(method="foreach", chain=chain, device="cpu")["verdict"] == "same"
    *modules, rate = CHAINS[chain].modules
    slower = optim_rivals.Chain("slower", (*modules, Module("LR", 0.9 * rate.first)), 1)
    monkeypatch.setattr(optim_rivals, "optimizer", lambda method, chain, held: Foreach(held, slower))
    assert optim.check(method="foreach", chain=chain, device="cpu")["verdict"] == "another rule"


def test_bytes_are_those_of_the_chain_that_runs():
    def num_bytes(method, chain):
        task = optim.build(parameters=EQUAL, method=method, chain=chain, device="cpu")
        task.step()
        return task.metrics()["num_bytes"]

    assert num_bytes("foreach", "lion") == 18 * 20
    assert num_bytes("torch-fused", "lion") == 18 * 28  # AdamW stands beside every chain
    assert num_bytes("copy", "readme") == 18 * 44  # half of them read, half of them written


def test_calls_are_counted():
    def inner():
        return len("")

    found = optim.count_calls(lambda: [inner() for _ in range(3)])
    own = 1 + (sys.version_info < (3, 12))  # the function, and before 3.12 its comprehension
    assert found == {"num_calls": 6 + own, "num_python_calls": 3 + own, "num_c_calls": 3}


def test_a_start_is_timed_from_the_ready_optimizer():
    task = optim.build_first(parameters=EQUAL, method="torch-fused", chain="adamw", device="cpu")
    task.step()
    assert 0 < task.metrics()["construction_seconds"] < 60


@pytest.mark.slow
def test_compilations_are_counted():
    code = """if True:
        from benchmarks import optim
        import torch

        compiled = optim._count_compilations()
        function = torch.compile(lambda x: x + 1)
        for size in (3, 3, 5):
            function(torch.ones(size))
        print(len(compiled))
    """
    # What is compiled is not looked up; what Inductor knows of the C++ compiler is, for it takes long to find out.
    variables = {**os.environ, "TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=True)
    assert int(done.stdout) == 2


# --- what is concluded ------------------------------------------------------------------------------------------------


def record(baseline, measure, **rivals):
    records = {
        name: {"label": name, "status": "ok", "ours": "graphopt" in name, "samples": samples, "metrics": metrics}
        for name, (samples, metrics) in rivals.items()
    }
    add_figures(records, baseline)
    return {"measure": measure, "baseline": baseline, "rivals": records}


def timed(num_bytes, *seconds):
    return {"seconds": list(seconds)}, {"num_bytes": num_bytes}


def test_times_are_compared_by_the_byte_within_a_round():
    lion = record(
        "torch-fused",
        "steps",
        **{
            "torch-fused": timed(28e6, 0.01, 0.02),
            "graphopt": timed(20e6, 0.01, 0.02),
            "foreach": timed(20e6, 0.03, 0.06),
            "copy": timed(20e6, 0.005, 0.01),
        },
    )
    text = optim_tables.conclusions({"lion-bert-11m": lion})
    (line,) = (line for line in text.splitlines() if line.startswith("| Lion, LR |"))
    # 20 MB in 15 ms; a copy is twice as fast; the same time for 20 bytes as for 28; by hand three times as long; no torchzero
    assert line == (
        "| Lion, LR | 11 M in 74 tensors | 20 | 15.0 ms | 1.3 | 0.50x [0.50, 0.50] | 1.40x [1.40, 1.40] | 3.00x [3.00, 3.00] | — |"
    )


def test_targets_stand_beside_what_was_measured():
    adamw = record("torch-fused", "steps", **{"torch-fused": timed(28e6, 0.01), "graphopt": timed(28e6, 0.011)})
    starts = record("a", "starts", **{"graphopt-a": ({optim_tables.COLD: [2.0, 4.0]}, {"construction_seconds": 0.004})})
    compiled = {"num_compiled": 2, "num_compiled_in_first": 1}
    scheduled = record("a", "lives", **{"graphopt-a": ({}, compiled)})
    calls = record("a", "lives", **{f"graphopt-{number}": ({}, {"num_calls": 1500}) for number in (100, 1000)})
    tiny = record("a", "steps", **{f"graphopt-{number}": timed(1, number * 1e-6) for number in (100, 1000)})
    cases = {"adamw-bert-11m": adamw, "starts": starts, "compilations": scheduled, "calls": calls, "tiny": tiny}
    lines = optim_tables.conclusions(cases).splitlines()
    assert "| **graphopt** | 11.0 ms | 1.10x [1.10, 1.10] |" in lines
    assert "| **graphopt-a** | 3.0 s | 4.0 ms |" in lines
    assert "| **graphopt-a** | 2 | 1 |" in lines
    assert "| **graphopt** | 1,500 | 1,500 | 100 µs | 1.0 ms |" in lines
    for target in ("at most 1.1 of fused", "fused AdamW's (target: 1.5)", "(target: 5 s)", "scheduler (target: 2)"):
        assert any(target in line for line in lines)


def test_a_rival_that_failed_leaves_a_gap():
    adamw = record("torch-fused", "steps", **{"torch-fused": timed(28e6, 0.01), "graphopt": timed(28e6)})
    adamw["rivals"]["graphopt"] |= {"status": "failed", "metrics": {}}
    starts = record("a", "starts", **{"graphopt-a": ({}, {})})
    starts["rivals"]["graphopt-a"]["status"] = "failed"
    lines = optim_tables.conclusions({"adamw-bert-11m": adamw, "starts": starts}).splitlines()
    assert "| **graphopt** | failed | — |" in lines
    assert "| **graphopt-a** | failed | — |" in lines
