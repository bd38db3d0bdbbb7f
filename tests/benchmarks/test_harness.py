"""The harness: turns, failures, memory. The rivals are functions of this module, called in processes of their own."""

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.environments import environment
from benchmarks.figures import paired_ratio, summary
from benchmarks.harness import Case, Rival, Settings, run_case
from benchmarks.worker import Task

SETTINGS = Settings(rounds=3, block_seconds=0.0, warm_up_steps=1, threads=None)
MEBIBYTE = 2**20


def write_name(path, word):
    def step():
        with Path(path).open("a") as file:
            file.write(word)

    return Task(step, lambda: {"word": word})


def sleep(seconds):
    return Task(lambda: time.sleep(seconds))


def print_much():
    return Task(lambda: print("{" * 5000))


def fail_to_build():
    raise RuntimeError("no such luck\nsecond line")


def fail_at(number):
    calls = iter(range(number))

    def step():
        if next(calls, None) is None:
            raise ValueError("enough")

    return Task(step)


def die(signal_number):
    return Task(lambda: os.kill(os.getpid(), signal_number) if signal_number else os._exit(3))


def allocate(first, always):
    sizes = iter([first])

    def step():
        size = next(sizes, always)
        block = bytearray(size)
        block[::4096] = b"\1" * len(block[::4096])

    return Task(step)


def say_wrong(**options):
    return {"verdict": "wrong", "options": options}


def case(*rivals, **options):
    return Case(name="test", title="A test", rivals=rivals, baseline=rivals[0].name, **options)


def rival(name, build, **options):
    return Rival(name=name, label=name.upper(), build=build, options=options)


def test_rivals_take_turns(tmp_path):
    path = tmp_path / "log"
    measured = run_case(case(*(rival(name, write_name, path=str(path), word=name) for name in "abc")), SETTINGS)
    # One warm-up step each, then rounds of two steps that are not counted and one that is.
    assert path.read_text() == "abc" + 3 * "aaabbbccc"
    assert [len(record["samples"]["seconds"]) for record in measured["rivals"].values()] == [3, 3, 3]
    assert measured["rivals"]["b"]["metrics"] == {"word": "b"}


def test_ratios_are_to_the_baseline():
    measured = run_case(case(rival("short", sleep, seconds=0.02), rival("long", sleep, seconds=0.06)), SETTINGS)
    ratios = {name: record["figures"]["seconds"]["ratio"]["median"] for name, record in measured["rivals"].items()}
    assert ratios["short"] == 1
    assert 2 < ratios["long"] < 4


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (fail_to_build, {}, "RuntimeError: no such luck (while asked to build)"),
        (fail_at, {"number": 0}, "ValueError: enough (while asked to warm_up)"),
        (fail_at, {"number": 5}, "ValueError: enough (while asked to time)"),
        (die, {"signal_number": 0}, "the process ended with exit status 3 (while asked to warm_up)"),
        (die, {"signal_number": signal.SIGKILL}, "the process ended with signal SIGKILL (while asked to warm_up)"),
    ],
)
def test_a_failure_is_part_of_the_result(build, options, message):
    measured = run_case(case(rival("good", sleep, seconds=0.001), rival("bad", build, **options)), SETTINGS)
    assert measured["rivals"]["bad"]["status"] == "failed"
    assert measured["rivals"]["bad"]["error"] == message
    assert measured["rivals"]["good"]["status"] == "ok"
    assert len(measured["rivals"]["good"]["samples"]["seconds"]) == 3


def test_a_rival_that_hangs_has_failed():
    measured = run_case(case(rival("slow", sleep, seconds=60)), replace(SETTINGS, limit_seconds=1.0))
    assert measured["rivals"]["slow"]["error"] == "no answer within 1 s (while asked to warm_up)"


def test_what_a_library_prints_does_not_disturb():
    assert run_case(case(rival("loud", print_much)), SETTINGS)["rivals"]["loud"]["status"] == "ok"


def test_memory_of_the_first_step_is_kept_apart():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc")
    first, always = 300 * MEBIBYTE, 100 * MEBIBYTE
    record = run_case(case(rival("a", allocate, first=first, always=always)), SETTINGS)["rivals"]["a"]
    assert record["peak_life_bytes"] > first
    for peak, step in zip(record["samples"]["peak_bytes"], record["samples"]["step_bytes"], strict=True):
        assert peak < first
        assert always * 0.99 < step < always * 1.1


def test_checks_run_unless_they_are_turned_off():
    checked = case(Rival(name="a", label="A", build=sleep, check=say_wrong, options={"seconds": 0.001}))
    expected = {"verdict": "wrong", "options": {"seconds": 0.001}}
    assert run_case(checked, SETTINGS)["rivals"]["a"]["check"] == expected
    assert "check" not in run_case(checked, replace(SETTINGS, check=False))["rivals"]["a"]


def test_starts_are_fresh_processes(tmp_path):
    path = tmp_path / "log"
    starts = case(*(rival(name, write_name, path=str(path), word=name) for name in "ab"), measure="starts")
    measured = run_case(starts, replace(SETTINGS, rounds=2))
    assert path.read_text() == "a" + 2 * "abab"  # the first one only reads the files from the disk
    for record in measured["rivals"].values():
        assert set(record["compiler"]) == {"cold", "warm"}
        assert len(record["samples"]["warm_ready_seconds"]) == 2
        assert (
            record["figures"]["cold_process_seconds"]["median"] > record["figures"]["cold_first_step_seconds"]["median"]
        )


def test_an_unknown_environment_is_an_error():
    with pytest.raises(ValueError, match="no environment is called 'moon'"):
        environment("moon")


def test_an_environment_that_cannot_be_made_fails_its_rivals_only(tmp_path, monkeypatch):
    def fail(folder, with_pip):
        raise subprocess.CalledProcessError(1, ["python", "-m", "ensurepip"])

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    monkeypatch.setattr(environments.venv, "create", fail)
    apart = Rival(name="b", label="B", build=sleep, options={"seconds": 0}, environment="gradinit")
    measured = run_case(case(rival("a", sleep, seconds=0.001), apart), SETTINGS)["rivals"]
    assert [measured[name]["status"] for name in "ab"] == ["ok", "failed"]
    assert "no environment can be made here" in measured["b"]["environment_errors"]["gradinit==0.1.1"]


def test_figures():
    assert summary([]) is None
    assert summary([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    # The machine becomes ten times slower half-way; the ratio of each round does not see it.
    assert paired_ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert paired_ratio([2.0, None, 3.0], [1.0, 1.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert paired_ratio([2.0], []) is None
