"""The command line, and the benchmarks that exist, in their quick form."""

import json

import pytest
import torch

from benchmarks import run, truegrad


@pytest.mark.parametrize("name", run.names())
@pytest.mark.parametrize("quick", [False, True])
def test_every_benchmark_is_well_formed(name, quick):
    benchmark = run.find(name)
    assert benchmark.name == name
    cases = benchmark.cases(quick)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = [rival.name for rival in case.rivals]
        assert len(set(names)) == len(names)
        assert case.baseline in names
        json.dumps([dict(rival.options) for rival in case.rivals])


def test_unknown_names_are_errors():
    with pytest.raises(SystemExit, match=r"no benchmark is called 'moon'; there are .*truegrad"):
        run.main(["moon"])
    with pytest.raises(SystemExit, match="no case is called moon; there are bert"):
        run.main(["truegrad", "--cases", "moon"])
    with pytest.raises(SystemExit, match="no rival is called moon; there are eager"):
        run.main(["truegrad", "--rivals", "moon"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_a_benchmark_that_cannot_run_here_says_why(capsys):
    assert run.main(["sums"]) == 0
    assert "sums is skipped: the kernel of graphopt::sums runs on CUDA devices" in "".join(capsys.readouterr())


@pytest.mark.slow
def test_truegrad_runs_in_its_quick_form(tmp_path, capsys):
    chosen = ["--cases", "mlp-64", "--rivals", "vmap-grad"]
    assert run.main(["truegrad", "--quick", *chosen, "--output", str(tmp_path)]) == 0
    assert "Quick form" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    rivals = json.loads(path.read_text())["cases"]["mlp-64"]["rivals"]
    assert {name: record["status"] for name, record in rivals.items()} == {"inductor": "ok", "vmap-grad": "ok"}
    assert rivals["vmap-grad"]["check"]["verdict"] == "exact"
    assert rivals["inductor"]["compiler"]["graphs"] == 1


def compare(statistic):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, -1.0])
    if statistic is not None:
        parameter.sum_grad_squared = torch.tensor(statistic)
    gradients, squares = {"p": parameter.grad.double()}, {"p": torch.tensor([4.0, 2.0], dtype=torch.float64)}
    return truegrad._compare({"p": parameter}, gradients, squares)


@pytest.mark.parametrize(
    ("statistic", "verdict"),
    [([4.0, 2.0], "exact"), ([4.0, 2.02], "rounded"), ([2.0, 4.0], "wrong"), ([float("nan"), 2.0], "wrong")],
)
def test_verdicts(statistic, verdict):
    found = compare(statistic)
    assert found["verdict"] == verdict
    assert found["gradient_relative_error"] == 0
    assert found["num_wrong"] == (verdict == "wrong")


def test_a_missing_statistic_is_named():
    found = compare(None)
    assert found["verdict"] == "none"
    assert found["missing"] == ["p"]
