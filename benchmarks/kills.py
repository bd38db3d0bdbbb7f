"""Training from a disk store is killed at random moments, again and again: what is there when it is reopened?

``python -m benchmarks.kills [--kills 200]``, or ``python -m benchmarks.run kills``, which kills as often. The process that kills
forks the ones that train, so that each of them has everything imported; it has no threads at that time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results, run
from benchmarks.harness import Benchmark, Case, Rival, Settings
from benchmarks.tables import case_table
from benchmarks.worker import Task

KILLS, QUICK_KILLS = 200, 3
STEPS, QUICK_STEPS = 40, 6  # of a run; when it is through, the next begins in a new folder
WIDTH, DEPTH, BATCH, MICROBATCH = 256, 4, 8, 2
EARLY = 0.2  # of the kills fall before the first step is over, the others in one of the following
STEPS_TO_COME = 4  # a kill that is not early falls somewhere within so many steps
LIMIT_SECONDS = 120.0

# Where a kill found the training, by the last word that it had sent.
MOMENTS = {
    "": "opening",
    "opened": "forward",
    "forward": "forward",
    "backward": "backward",
    "update": "update",
    "end": "between",
}


# --- the process that is killed ---------------------------------------------------------------------------------------


def train(folder: Path, *, eager: bool, steps: int, report: int | None) -> None:
    """Train from whatever the folder holds to the end.

    Args:
        folder: Of the store, which is made if it does not exist.
        eager: As in ``LayerToLayer``.
        steps: Where the end is.
        report: A file descriptor for what happens, a line of JSON each.
    """
    import torch
    from torch import nn

    import graphopt
    from graphopt.passes import LayerToLayer

    def say(word: str, step: int, loss: str = "") -> None:
        if report is not None:
            os.write(report, json.dumps([word, step, loss]).encode() + b"\n")

    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.2)) for _ in range(DEPTH))
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 1))
    updates = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"store": "disk", "store_path": folder, "resume": True, "eager": eager}
    graphopt.transform(model, [LayerToLayer(**options, microbatch_size=MICROBATCH)], compiler="eager")
    stream = graphopt.stream(model)
    done = stream.resume(updates)
    say("opened", done)
    for step in range(done, steps):
        data = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))
        say("forward", step)
        loss = nn.functional.mse_loss(model(data), data.sum(1, keepdim=True))
        say("backward", step, loss.item().hex())
        loss.backward()
        say("update", step)
        updates.step()
        say("end", step)
        updates.zero_grad()
    stream.close()


# --- the process that kills -------------------------------------------------------------------------------------------


@dataclass
class Killing:
    """One training that is killed, again and again.

    Attributes:
        wanted: the losses of the uninterrupted run.
        finished: steps of which the training has said that they were over.
        begun: steps of which it has said that they had begun.
        problems: what should not be: a store that does not open, a step that is lost, another loss.
    """

    folder: Path
    eager: bool
    steps: int
    generator: random.Random
    wanted: list[str] = field(default_factory=list)
    finished: int = 0
    begun: int = 0
    runs: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    _seconds_to_first: float = 1.0
    _seconds_of_step: float = 0.1

    def prepare(self) -> None:
        """Train without an interruption, and learn how long that takes."""
        self._check_alone()
        child = self._start(self.folder / "whole")
        child.wait_for_words(None)
        if child.status:
            raise RuntimeError(f"the uninterrupted run ended with status {child.status}: {child.error}")
        ends = [moment for moment, (word, _, _) in child.words if word == "end"]
        self.wanted = [loss for _, (word, _, loss) in child.words if word == "backward"]
        self._seconds_to_first = ends[0]
        self._seconds_of_step = (ends[-1] - ends[0]) / (len(ends) - 1)
        shutil.rmtree(self.folder / "whole")

    def kill_once(self) -> None:
        """Start or go on, kill, and look at what was said until then."""
        while not self._interrupt():
            self._next_run()  # it was through before its turn came

    def finish(self) -> None:
        """Let the last run come to its end."""
        child = self._start(self._path)
        child.wait_for_words(None)
        self._look_at(child)
        if child.status or self.finished != self.steps:
            self.problems.append(f"the last run did not finish: status {child.status}, {child.error}")

    def facts(self) -> dict[str, Any]:
        """For the table."""
        seen = {f"killed_in_{moment}": self.moments[moment] for moment in dict.fromkeys(MOMENTS.values())}
        return {
            "kills": self.moments.total(),
            **seen,
            **{name: self.counts[name] for name in ("reopened", "steps_compared", "committed_unsaid", "repeated")},
            "runs": self.runs + 1,
            "step_ms": round(self._seconds_of_step * 1e3),
            "num_problems": len(self.problems),
            "problems": self.problems[:5],
        }

    def _interrupt(self) -> bool:
        """Kill a child at a random moment; false if it was through before that."""
        self._check_alone()
        child = self._start(self._path)
        if self.generator.random() < EARLY:
            child.wait_for_words(None, seconds=self.generator.uniform(0, self._seconds_to_first))
        else:
            child.wait_for_words("end")
            child.wait_for_words(None, seconds=self.generator.uniform(0, STEPS_TO_COME * self._seconds_of_step))
        killed = child.kill()
        self._look_at(child)
        if killed:
            self.moments[MOMENTS[child.words[-1][1][0] if child.words else ""]] += 1
        return killed

    def _look_at(self, child: _Child) -> None:
        """Compare what a child said with what must be."""
        if child.error:
            self.problems.append(f"a training failed: {child.error}")
        for _, (word, step, loss) in child.words:
            if word == "opened":
                self.counts["reopened"] += 1
                if not self.finished <= step <= self.begun:
                    self.problems.append(
                        f"the store was at step {step}, though {self.finished} were finished and {self.begun} begun"
                    )
                self.counts["committed_unsaid"] += step > self.finished  # killed between the commit and the word
                self.counts["repeated"] += step < self.begun
                self.finished = step
            elif word == "forward":
                self.begun = max(self.begun, step + 1)
            elif word == "end":
                self.finished = step + 1
            elif word == "backward":
                self.counts["steps_compared"] += 1
                if loss != self.wanted[step]:
                    self.problems.append(f"the loss of step {step} is {loss} and was {self.wanted[step]}")

    def _next_run(self) -> None:
        shutil.rmtree(self._path)
        self.runs += 1
        self.finished = self.begun = 0

    @property
    def _path(self) -> Path:
        return self.folder / str(self.runs)

    def _start(self, path: Path) -> _Child:
        return _Child.start(path, eager=self.eager, steps=self.steps)

    def _check_alone(self) -> None:
        others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        if others:
            raise RuntimeError(f"a process with the threads {others} must not be forked")


@dataclass
class _Child:
    """A forked process that trains.

    Attributes:
        words: what it said, and how many seconds after its start.
        status: how it ended, if it has; 0 is well.
        error: its traceback's last line.
    """

    process_id: int
    pipe: int
    started: float
    words: list[tuple[float, tuple[str, int, str]]] = field(default_factory=list)
    status: int | None = None
    error: str = ""
    _rest: bytes = b""

    @classmethod
    def start(cls, folder: Path, **options: Any) -> _Child:
        """Fork it; ``options`` are those of `train`."""
        reading, writing = os.pipe()
        started = time.perf_counter()
        process_id = os.fork()
        if process_id == 0:
            status = 1
            try:
                os.close(reading)
                train(folder, **options, report=writing)
                status = 0
            except BaseException as error:
                traceback.print_exc()
                os.write(writing, json.dumps(["error", 0, f"{type(error).__name__}: {error}"[:1000]]).encode() + b"\n")
            finally:
                os._exit(status)  # nothing that the parent has registered for its end
        os.close(writing)
        return cls(process_id, reading, started)

    def wait_for_words(self, until: str | None, *, seconds: float = LIMIT_SECONDS) -> None:
        """Listen until a word comes, the time is over, or the child ends; ``None`` is no word."""
        deadline = time.perf_counter() + seconds
        while self.status is None and (left := deadline - time.perf_counter()) > 0:
            if not select.select([self.pipe], [], [], left)[0]:
                break
            if self._listen() == 0:
                self._wait()
            if until in [word for _, (word, _, _) in self.words]:
                return
        if seconds == LIMIT_SECONDS and self.status is None:
            self.kill()
            self.error = self.error or f"it said nothing for {seconds:.0f} s"

    def kill(self) -> bool:
        """Kill it and hear its last words; false if it had ended by itself."""
        if self.status is not None:
            return False
        os.kill(self.process_id, signal.SIGKILL)
        while self._listen():
            pass
        return self._wait() == -signal.SIGKILL

    def _listen(self) -> int:
        received = os.read(self.pipe, 65536)
        *lines, self._rest = (self._rest + received).split(b"\n")
        now = time.perf_counter() - self.started
        for line in lines:
            word, step, text = json.loads(line)
            if word == "error":
                self.error = text
            else:
                self.words.append((now, (word, step, text)))
        return len(received)

    def _wait(self) -> int:
        os.close(self.pipe)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.process_id, 0)[1])
        return self.status


# --- the benchmark ----------------------------------------------------------------------------------------------------


def build(*, eager: bool, steps: int = STEPS) -> Task:
    """One step is one kill."""
    import torch
    from tqdm import tqdm

    from benchmarks import disk

    tqdm.set_lock(threading.RLock())  # its own is shared by all forks: one that is killed with it stops all that follow
    tqdm.monitor_interval = 0  # torch.fx has bars that are never shown, and each would want a thread that watches it
    torch.set_num_threads(1)  # with more, torch would have threads of its own, which a fork does not take along
    folder = disk.new_folder()
    train(folder / "first", eager=eager, steps=2, report=None)  # imports what is imported on first use
    killing = Killing(folder, eager, steps, random.Random(int(eager)))
    killing.prepare()

    def metrics() -> dict[str, Any]:
        killing.finish()
        return killing.facts()

    return Task(killing.kill_once, metrics)


def cases(quick: bool, kills: int | None = None) -> tuple[Case, ...]:
    """One case; a rival for each way to update."""
    kills = kills or (QUICK_KILLS if quick else KILLS)
    columns = {
        "kills": "kills",
        **{f"killed_in_{moment}": f"… in {moment}" for moment in dict.fromkeys(MOMENTS.values())},
        "reopened": "stores opened",
        "steps_compared": "losses compared",
        "repeated": "unfinished steps taken again",
        "committed_unsaid": "finished, killed before they could say so",
        "num_problems": "lost, refused or different",
    }
    rivals = tuple(
        Rival(
            name=f"eager={eager}",
            label=f"LayerToLayer(store='disk', eager={eager})",
            build=build,
            options={"eager": eager, "steps": QUICK_STEPS if quick else STEPS},
            ours=True,
        )
        for eager in (False, True)
    )
    return (
        Case(
            name="kills",
            title=f"{kills} times SIGKILL during training on the disk store, dropout, AdamW, {BATCH // MICROBATCH} micro-batches",
            rivals=rivals,
            baseline=rivals[0].name,
            measure="lives",
            rounds=1,
            steps=kills,
            columns=columns,
        ),
    )


def conclusions(records: Any) -> str:
    """Whether anything was lost."""
    lines = []
    for record in records.values():
        for rival in record["rivals"].values():
            facts = rival.get("metrics", {})
            if rival["status"] != "ok" or "kills" not in facts:
                lines.append(f"* {rival['label']}: failed, {rival.get('error', '')}")
                continue
            problems = (
                "; ".join(facts["problems"]) or "nothing but unfinished steps was lost, and all losses are those of an "
            )
            problems += "" if facts["problems"] else "uninterrupted run, bit for bit"
            lines.append(f"* {rival['label']}: killed {facts['kills']} times: {problems}.")
    return "\n".join(lines)


BENCHMARK = Benchmark(
    name="kills",
    title="Killed and reopened",
    text=(
        "A training process on the disk store is killed at a random moment, one in five before its first step is over. The next "
        "process opens the store, which verifies all checksums, and goes on. It must find every step that the one before "
        "had reported as finished, and no more than had begun; and the loss of every step must be that of a run that was "
        "never interrupted, bit for bit. When a run is through, the next begins in a new folder."
    ),
    cases=cases,
    conclusions=conclusions,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, help=f"how often, for each way to update (default {KILLS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_KILLS} kills: does it run at all?")
    parser.add_argument(
        "--output", type=Path, help="folder for the JSON (default benchmarks/results; quick: its scratch)"
    )
    options = parser.parse_args(arguments)
    (case,) = cases(options.quick, options.kills)
    folder = options.output or (results.SCRATCH_FOLDER if options.quick else results.FOLDER)
    settings = Settings(rounds=1, threads=1, quick=options.quick)
    record = run.measure_and_store(BENCHMARK.name, case, settings, folder)
    print(f"{case_table(case.name, record)}\n{conclusions({case.name: record})}")
    found = [rival.get("metrics", {}).get("num_problems") for rival in record["rivals"].values()]
    return 0 if found == [0] * len(found) else 1


if __name__ == "__main__":
    # The same functions under the module's own name: the rivals' processes import them by it.
    from benchmarks import kills

    sys.exit(kills.main())
