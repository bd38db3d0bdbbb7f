"""The command ``graphopt``: what it prints, and how it ends."""

import importlib
import importlib.metadata
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import graphopt
from graphopt import cli
from graphopt.passes import LayerToLayer

MODELS = """
import torch
from torch import nn


def build():
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))), (torch.zeros(4, 16),)


def with_keywords():
    model, (x,) = build()
    return model, (), {"input": x}


def on_meta():
    (model, (x,)) = build()
    assert x.device.type == "meta"
    return model, (x,)


def without_arguments():
    return build()[0]


def misfit():
    return build()[0], (torch.zeros(4, 16), 1)


class Stubborn(nn.Linear):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


def stubborn():
    return Stubborn(2, 2), (torch.zeros(3, 2),)


def broken():
    import no_such_thing
"""


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "models_to_plan.py").write_text(MODELS)
    return tmp_path / "models_to_plan.py"


@pytest.fixture
def run():
    def call(*arguments: str):
        return CliRunner().invoke(cli.app, list(map(str, arguments)))

    return call


def error_of(result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_plan_prints_the_plan(models, run):
    result = run("plan", f"{models}:build", "--no-measure", "--store", "cpu", "--optimizer", "sgd")
    assert result.exit_code == 0, result.output
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(3)))
    expected = LayerToLayer(store="cpu").plan(model, torch.zeros(4, 16), optimizer="sgd", measure=False)
    assert result.stdout == f"{expected}\n"


def test_every_option_reaches_the_plan(models, run):
    options = "--microbatch-size 2 --optimizer tgadamw --device cpu --eager --prefetch 2 --no-measure".split()
    speeds = "--bandwidth 2e9 --flops 1e11".split()
    result = run("plan", "models_to_plan:with_keywords", "--store-path", "here/store", *options, *speeds, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    expected = {
        "store": "disk",
        "microbatch_size": 2,
        "eager": True,
        "prefetch": 2,
        "path": "here/store",
        "device": "cpu",
    }
    assert expected.items() <= found["options"].items()
    assert found["optimizer"] == "tgadamw"
    assert any(move["kind"] == "statistics" for move in found["moved"]["eager=False"])
    assert (found["machine"]["read"], found["machine"]["flops"]) == (2e9, 1e11)
    assert not (models.parent / "here").exists()


def test_meta_makes_the_model_without_memory(models, run):
    assert run("plan", f"{models.name}:on_meta", "--meta", "--no-measure").exit_code == 0
    assert isinstance(run("plan", f"{models.name}:on_meta", "--no-measure").exception, AssertionError)


def test_a_config_is_a_model(tmp_path, run):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    config.save_pretrained(tmp_path / "model")
    config_file = tmp_path / "model" / "config.json"
    result = run("plan", config_file, "--batch", "3", "--tokens", "10", "--no-measure", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["model"], found["num_samples"]) == ("LlamaForCausalLM", 3)
    layers = [stage for stage in found["stages"] if stage["name"].startswith("model.layers.")]
    matrices = 4 * 16 * 16 + 3 * 16 * 32
    attention = 2 * 2 * 10 * 10 * 16
    assert [stage["flops_per_sample"] for stage in layers] == [2 * 10 * matrices + attention] * 2
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert found["parameter_bytes"] == sum(parameter.nbytes for parameter in model.parameters())

    config_file.write_text('{"model_type": "nobody_has_heard_of_it"}')
    line = error_of(run("plan", tmp_path / "model", "--no-measure"), 2)
    assert "not the config.json of a causal language model that transformers" in line
    assert line.endswith("Give a function that makes the model: path/to/file.py:function")


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            "nothing",
            "MODEL 'nothing' is neither a config.json, nor a folder with one, nor package.module:function, nor",
        ),
        ("empty.json", "there is no empty.json. Give a Hugging Face config.json, or MODULE:FUNCTION"),
        ("absent.py:build", "there is no file absent.py"),
        ("absent.module:build", "there is no module 'absent' here or in the environment"),
        (
            "models_to_plan.py:biuld",
            "models_to_plan.py has no function 'biuld'; it has Stubborn, broken, build, misfit",
        ),
        ("models_to_plan.py:without_arguments", "returned Sequential; return (model, args) or (model, args, kwargs)"),
    ],
)
def test_models_that_are_none(models, run, model, text):
    assert text in error_of(run("plan", model, "--no-measure"), 2)


def test_errors_of_graphopt_are_one_line(models, run):
    line = error_of(run("plan", f"{models}:build", "--no-measure", "--optimizer", "lion"), 2)
    assert line.startswith("graphopt: optimizer='lion': what it keeps for each parameter is not known; known are")
    line = error_of(run("plan", f"{models}:stubborn", "--no-measure"), 1)
    assert line.startswith("graphopt: a graph of Stubborn cannot be captured, so its layers cannot be streamed")
    line = error_of(run("plan", f"{models}:build", "--bandwidth", "1e9"), 2)
    assert line.endswith("say what measuring would find out: add --no-measure")
    line = error_of(run("plan", f"{models}:misfit", "--no-measure"), 2)
    assert line.startswith(
        "graphopt: the arguments do not fit the forward of Sequential (too many positional arguments)"
    )
    line = error_of(run("plan", f"{models}:build", "--device", "toaster"), 2)
    assert line == "graphopt: --device toaster: no such kind of device; cpu, cuda or cuda:1"
    result = run("plan", f"{models}:build", "--store", "tape")
    assert result.exit_code == 2
    assert "tape" in result.stderr


def test_errors_of_the_users_code_keep_their_traceback(models, run):
    result = run("plan", f"{models}:broken")
    assert result.exit_code == 1
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "no_such_thing"


@pytest.mark.parametrize("module", ["typer", "rich.console"])
def test_without_its_extra_it_says_what_to_install(monkeypatch, module):
    monkeypatch.delitem(sys.modules, "graphopt.cli")
    monkeypatch.setattr(graphopt, "cli", None, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        SystemExit, match=r"the command line needs .*, which is not installed: pip install 'graphopt\[cli\]'"
    ):
        importlib.import_module("graphopt.cli")


def test_without_transformers_it_says_what_to_install(tmp_path, run, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = error_of(run("plan", tmp_path, "--no-measure"), 1)
    assert line.endswith("a config.json needs transformers: pip install 'graphopt[hf]'")


def test_as_a_module_and_as_a_script(models, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m graphopt", "plan", "models_to_plan:build", "--no-measure"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("graphopt", run_name="__main__")
    assert end.value.code == 0
    assert "from store='disk' to cpu; 4 samples; optimizer adamw" in capsys.readouterr().out
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="graphopt")
    assert script.load() is cli.main
