"""Every script in examples/ runs in its quick form, ends well, prints no noise, and what it prints holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK_FORM = {
    "train_lm.py": ["--quick", "--out", "results/curves.png"],
    "train_larger_than_memory.py": ["--layers", "8", "--steps", "3", "--memory", "200"],
}
"""What makes an example quick; one that is not listed is quick as it stands."""


@cache
def run(script: str) -> tuple[subprocess.CompletedProcess[str], dict[str, bytes]]:
    """Run an example in an empty folder, once per session; return what it printed and the files it wrote."""
    command = [sys.executable, str(EXAMPLES / script), *QUICK_FORM.get(script, [])]
    with TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return done, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_succeeds_without_noise(script: str) -> None:
    done, _ = run(script)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_quick_form_names_only_examples_that_exist() -> None:
    assert all((EXAMPLES / script).is_file() for script in QUICK_FORM)


def test_train_larger_than_memory_trains_what_plain_pytorch_cannot() -> None:
    printed = run("train_larger_than_memory.py")[0].stdout
    needed, limit = (
        int(re.search(pattern, printed)[1]) for pattern in (r": (\d+) MB with gradients", r"limit: (\d+) MB")
    )
    assert limit < needed
    assert re.search(r"^plain PyTorch: .*memory", printed, re.MULTILINE)
    assert printed.endswith("plain PyTorch ran out of memory; graphopt trained\n")
    losses = [float(loss) for loss in re.findall(r"^graphopt: step \d+, loss ([\d.]+)", printed, re.MULTILINE)]
    assert losses == sorted(losses, reverse=True)


def test_gradinit_deep_trains_what_the_default_initialisation_leaves_at_chance() -> None:
    done, files = run("gradinit_deep.py")
    accuracy = {
        name: float(re.search(rf"^{name} initialisation: accuracy ([\d.]+)", done.stdout, re.MULTILINE)[1])
        for name in ("default", "learned")
    }
    assert accuracy["default"] < 0.2
    assert accuracy["learned"] > 0.7
    assert files["runs/gradinit_deep.png"].startswith(b"\x89PNG")


def test_train_lm_learns_and_covers_every_parameter() -> None:
    printed = run("train_lm.py")[0].stdout
    entropy = float(re.search(r"unigram entropy ([\d.]+) bits/byte", printed)[1])
    covered, total = re.search(r"squared per-sample gradients: (\d+) of (\d+) parameters", printed).groups()
    assert covered == total == "28"
    row = r"^{}\s+(\d\.\d+)\s+(\d\.\d+)\s+([\d,]+)\s+(-?[\d.]+) s\s+(\d+)$"
    for name in ("graphopt", "AdamW"):
        train, held_out, speed, _, recompiles = re.search(row.format(name), printed, re.MULTILINE).groups()
        assert float(train) < 6
        assert float(held_out) < entropy < 8
        assert int(speed.replace(",", "")) > 0
        assert recompiles == "0"


def test_train_lm_writes_curves_that_compare() -> None:
    _, files = run("train_lm.py")
    assert set(files) == {"results/curves.png", "results/curves.json"}
    assert files["results/curves.png"].startswith(b"\x89PNG")
    runs = json.loads(files["results/curves.json"])["runs"]
    ours, baseline = runs["graphopt"], runs["AdamW"]
    assert len(ours["train"]) == len(baseline["train"])
    assert ours["held_out"].keys() == baseline["held_out"].keys()
    assert ours["train"][0] == pytest.approx(baseline["train"][0], abs=0.05), "same weights, same first batch"


def test_train_lm_fails_when_it_learns_nothing() -> None:
    command = [sys.executable, str(EXAMPLES / "train_lm.py"), "--quick", "--steps", "10", "--lr", "0"]
    with TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    assert "FAILED: the held-out loss is not below the unigram entropy" in done.stderr
