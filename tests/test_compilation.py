"""The hand-off to compilers: equal statistics from each, and caches that the second process hits."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import OptionError

SCRIPT = """
import json, sys, torch, graphopt
from torch import nn
from torch._dynamo.utils import counters
from graphopt.passes import TrueGrad
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
graphopt.transform(model, [TrueGrad(**json.loads(sys.argv[1]))])
model(torch.randn(5, 3, 4)).square().sum().backward()
found = {key: value for group in ("inductor", "aot_autograd") for key, value in counters[group].items() if "cache" in key}
print(json.dumps([found, model[0].weight.sum_grad_squared.tolist()]))
"""


def run(folder, **options):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(options)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_second_process_hits_both_caches(tmp_path):
    cold, first = run(tmp_path)
    assert cold.get("autograd_cache_hit", 0) == 0
    assert not any("bypass" in key for key in cold), cold
    warm, second = run(tmp_path)
    assert warm.get("fxgraph_cache_hit", 0) >= 1, warm
    assert warm.get("autograd_cache_hit", 0) >= 1, warm
    assert warm.get("fxgraph_cache_miss", 0) == 0
    assert first == second
    other, _ = run(tmp_path, per="token")
    assert other.get("autograd_cache_hit", 0) == 0, other
    assert other.get("autograd_cache_miss", 0) >= 1, other


def test_compilers_agree():
    found = {}
    x = torch.randn(5, 3, dtype=torch.float64)
    for compiler in ("eager", "aot_eager", "inductor"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        graphopt.transform(model, compiler=compiler)
        model(x).square().sum().backward()
        found[compiler] = [(param.grad, param.sum_grad_squared, param.num_samples) for param in model.parameters()]
    torch.testing.assert_close(found["aot_eager"], found["eager"])
    torch.testing.assert_close(found["inductor"], found["eager"])


def test_unknown_compiler():
    with pytest.raises(OptionError, match="compiler='jit' is unknown; it is one of"):
        graphopt.transform(nn.Linear(3, 2), compiler="jit")


def test_inductor_settings_reach_inductor():
    with pytest.raises(OptionError, match="unknown options"):
        graphopt.transform(nn.Linear(3, 2), options={"no_such_setting": 1})
    graphopt.transform(nn.Linear(3, 2), options={"max_autotune": True, "epilogue-fusion": True})
