"""Rivals timed in turn, each in a process of its own.

A benchmark is a module of this folder with a constant ``BENCHMARK``. It names cases; a case names rivals and the one
that the others are divided by. Two ways to measure:

``steps``   every rival's process is started, checked and warmed up; then, round by round, each executes one timed block
            when its turn comes (A B C A B C ...), so that the machine's noise meets all alike. Figures are medians of
            the ratios within a round.
``starts``  a fresh process per measurement, first with an empty compile cache, then, unless the case wants only that, with
            the one that it filled.
``lives``   a fresh process per measurement, alone on the machine, from its start through a few steps to its end: for memory
            over a whole life, and for whatever else its metrics tell. What the table shows is chosen by the case.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from benchmarks import figures, machine, memory
from benchmarks.environments import environment
from benchmarks.pictures import Curves
from benchmarks.worker_process import TreeWatch, WorkerFailure, WorkerProcess

MAX_STEPS_IN_BLOCK = 200
PAUSE_SECONDS = 0.05  # before a turn: the threads of the rival before it still spin for a moment


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One way to do the work of a case.

    Args:
        name: For the command line; unique within the case.
        label: For the tables.
        build: A function of a module, called in the rival's process with ``options``; returns a ``worker.Task``.
        check: Likewise; compares the rival's numbers with a reference and returns what it found, a dictionary whose
            ``verdict`` stands in the table; ``truegrad.check`` is an example.
        options: What both receive; plain JSON values.
        environment: Where its process runs, ``"current"`` or a key of ``environments.REQUIREMENTS``.
        command: Start this instead of ``python -m benchmarks.worker``; it must answer the same requests.
        ours: Printed in bold.
        note: A line under the table.
    """

    name: str
    label: str
    build: Callable[..., Any]
    check: Callable[..., Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: str = "current"
    command: tuple[str, ...] = ()
    ours: bool = False
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A piece of work and the rivals that do it.

    Args:
        name: For the command line and for file names.
        title: For the tables: what exactly is done.
        rivals: In the order of their turns and of the table.
        baseline: Name of the rival that the others are divided by.
        measure: See the module's docstring.
        rounds: How many, unless the command line says; None is the default of the measure.
        steps: Of each process in ``lives``, the first one included.
        columns: Of the table of ``lives``: quantities and metrics, each with its heading. ``*_bytes`` and ``*_seconds`` are
            written as such, and with the ratio to the baseline where they are quantities.
        checked: What the rivals' checks look at; the heading of the column with their verdicts.
        caches: The states of the compile caches that ``starts`` measures, ``"cold"`` first.
        shares_caches: The processes of all such cases of one run share their compile caches, which saves minutes where
            several cases compile the same; a first step then tells nothing.
    """

    name: str
    title: str
    rivals: tuple[Rival, ...]
    baseline: str
    measure: Literal["steps", "starts", "lives"] = "steps"
    rounds: int | None = None
    steps: int = 4
    columns: Mapping[str, str] = field(default_factory=dict)
    checked: str = "statistic"
    caches: Sequence[Literal["cold", "warm"]] = ("cold", "warm")
    shares_caches: bool = False


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What a module of this folder offers as ``BENCHMARK``.

    Args:
        name: The module's name.
        title: For the report.
        text: What is measured and how to read it, markdown.
        cases: Called with whether the quick form is wanted (small models, for tests); returns the cases.
        unavailable: Why nothing of it can be measured on this machine; empty where it can.
        conclusions: From the records of the cases that were measured to markdown that stands in front of the tables: what no
            single case tells, such as ratios between cases, and targets.
        curves: Likewise, pictures of one quantity against another.
    """

    name: str
    title: str
    text: str
    cases: Callable[[bool], tuple[Case, ...]]
    unavailable: Callable[[], str] = str
    conclusions: Callable[[Mapping[str, Any]], str] = lambda records: ""
    curves: Callable[[Mapping[str, Any]], Sequence[Curves]] = lambda records: ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how carefully to measure.

    Args:
        rounds: Turns of each rival (``steps``), or fresh processes of each rival (``starts``, ``lives``).
        block_seconds: How long a turn should take at least; it has one step or more.
        warm_up_steps: Steps before the first turn; the first of them compiles.
        threads: torch's threads in each rival; None leaves torch alone.
        seed: Of torch and Python, in each rival.
        limit_seconds: A rival that takes longer to answer has failed.
        check: Whether the rivals' numbers are checked first.
        quick: Whether the cases are in their quick form.
        caches: A folder for the compile caches of cases that share them.
    """

    rounds: int = 15
    block_seconds: float = 1.5
    warm_up_steps: int = 3
    threads: int | None = 2
    seed: int = 0
    limit_seconds: float = 900.0
    check: bool = True
    quick: bool = False
    caches: Path | None = None


Keep = Callable[[dict[str, Any]], object]


def run_case(case: Case, settings: Settings, *, keep: Keep | None = None) -> dict[str, Any]:
    """Measure a case; a rival that fails is part of the result, with its error.

    Args:
        case: What to measure.
        settings: How.
        keep: Called with the record, marked as unfinished, after each process of ``starts`` and ``lives``.
    """
    say(f"{case.name}: {case.title}")
    record: dict[str, Any] = {
        "title": case.title,
        "measure": case.measure,
        "baseline": case.baseline,
        "columns": dict(case.columns),
        "checked": case.checked,
        "shares_caches": case.shares_caches,
        "settings": {**vars(settings), "caches": str(settings.caches or "")},
        "rivals": {rival.name: _new_record(rival) for rival in case.rivals},
        **machine.moment(),
    }

    def keep_part() -> None:
        if keep is not None:
            figures.add_figures(record["rivals"], case.baseline)
            keep({**record, "unfinished": True})

    with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder:
        if case.shares_caches:
            settings = replace(settings, caches=settings.caches or Path(folder, "shared"))
        if case.measure == "steps":
            _measure_steps(case, settings, Path(folder), record["rivals"])
        elif case.measure == "starts":
            _measure_starts(case, settings, Path(folder), record["rivals"], keep_part)
        else:
            _measure_lives(case, settings, Path(folder), record["rivals"], keep_part)
    figures.add_figures(record["rivals"], case.baseline)
    return record


def say(line: str) -> None:
    """Progress, on the standard error."""
    tqdm.write(line, file=sys.stderr)


# --- steps ------------------------------------------------------------------------------------------------------------


@dataclass
class _Entrant:
    """A rival in a case: its process while it is alive, and its record."""

    rival: Rival
    record: dict[str, Any]
    process: WorkerProcess | None = None
    steps: int = 1


def _measure_steps(case: Case, settings: Settings, folder: Path, records: dict[str, Any]) -> None:
    entrants = [_Entrant(rival, records[rival.name]) for rival in case.rivals]
    with ExitStack() as stack:
        for number, entrant in enumerate(entrants):
            with _failures_recorded(entrant.record):
                _prepare(entrant, settings, folder / str(number), stack)
        for _ in tqdm(range(settings.rounds), desc=case.name, disable=None):
            for entrant in entrants:
                if entrant.process is not None and entrant.record["status"] == "ok":
                    with _failures_recorded(entrant.record):
                        _take_turn(entrant, settings)
        for entrant in entrants:
            if entrant.process is not None and entrant.record["status"] == "ok":
                with _failures_recorded(entrant.record):
                    entrant.record |= entrant.process.ask("describe", limit=settings.limit_seconds)


def _prepare(entrant: _Entrant, settings: Settings, folder: Path, stack: ExitStack) -> None:
    """Check the rival in a process that is thrown away, then start, build and warm up the one that will be timed."""
    rival, record = entrant.rival, entrant.record
    if rival.check is not None and settings.check:
        with _start(rival, settings, folder / "check", record) as process:
            target, inputs = _address(rival.check), _inputs(rival, settings)
            record |= process.ask("check", target=target, limit=settings.limit_seconds, **inputs)
    process = entrant.process = stack.enter_context(_start(rival, settings, folder / "timed", record))
    with TreeWatch(process.process_id) as watch:
        _build(process, rival, settings)
        warm_up = process.ask("warm_up", steps=settings.warm_up_steps, limit=settings.limit_seconds)["seconds"]
    record["first_step_seconds"] = warm_up[0]
    record["peak_life_bytes"] = memory.peak_bytes(process.process_id)
    record["peak_life_with_compilers_bytes"] = max(watch.peak_bytes, record["peak_life_bytes"] or 0)
    record["samples"] = {"seconds": [], "peak_bytes": [], "step_bytes": []}
    entrant.steps = min(MAX_STEPS_IN_BLOCK, max(1, round(settings.block_seconds / warm_up[-1])))
    milliseconds = warm_up[-1] * 1e3
    say(f"  {rival.label}: first step {warm_up[0]:.1f} s, last {milliseconds:.1f} ms; {entrant.steps} steps a turn")


def _take_turn(entrant: _Entrant, settings: Settings) -> None:
    assert entrant.process is not None
    process, record, samples = entrant.process, entrant.record, entrant.record["samples"]
    time.sleep(PAUSE_SECONDS)
    process.ask("settle", limit=settings.limit_seconds)
    resting = memory.resident_bytes(process.process_id)
    measured = memory.reset_peak(process.process_id)
    reply = process.ask("time", steps=entrant.steps, limit=settings.limit_seconds)
    samples["seconds"].append(reply["seconds"])
    if measured:  # otherwise the peak would be that of the compilation
        peak = memory.peak_bytes(process.process_id)
        samples["peak_bytes"].append(peak)
        samples["step_bytes"].append(peak - resting)
        record["peak_life_bytes"] = max(record["peak_life_bytes"], peak)
    if "device_bytes" in reply:
        samples.setdefault("device_bytes", []).append(reply["device_bytes"])


# --- starts -----------------------------------------------------------------------------------------------------------


def _measure_starts(
    case: Case, settings: Settings, folder: Path, records: dict[str, Any], keep_part: Callable[[], None]
) -> None:
    if settings.rounds:
        with _failures_recorded({}):  # read torch's files from the disk once, before anything is timed
            _one_start(case.rivals[0], settings, folder / "first", {})
    for number in tqdm(range(settings.rounds), desc=case.name, disable=None):
        for state in case.caches:
            for index, rival in enumerate(case.rivals):
                record = records[rival.name]
                if record["status"] == "ok":
                    with _failures_recorded(record):
                        start = _one_start(rival, settings, folder / f"{number}-{index}", record)
                        record["compiler"][state] = start.pop("compiler")
                        for quantity, value in start.items():
                            record["samples"].setdefault(f"{state}_{quantity}", []).append(value)
                        say(f"  {rival.label}, {state}: first step {start['first_step_seconds']:.1f} s")
                keep_part()


def _one_start(rival: Rival, settings: Settings, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """A process from its start through its first step to its end, with the compile caches in ``folder``."""
    record.setdefault("samples", {})
    record.setdefault("compiler", {})
    with _start(rival, settings, folder, record) as process:
        with TreeWatch(process.process_id) as watch:
            _build(process, rival, settings)
            first = process.ask("warm_up", steps=1, limit=settings.limit_seconds)["seconds"][0]
        ready = time.perf_counter() - process.started
        peak = memory.peak_bytes(process.process_id)
        description = process.ask("describe", limit=settings.limit_seconds)
    record |= {"versions": description["versions"], "metrics": description["metrics"]}
    return {
        "first_step_seconds": first,
        "ready_seconds": ready,
        "process_seconds": time.perf_counter() - process.started,
        "peak_bytes": peak,
        "peak_with_compilers_bytes": max(watch.peak_bytes, peak or 0),
        "compiler": description["compiler"],
    }


# --- lives ------------------------------------------------------------------------------------------------------------


def _measure_lives(
    case: Case, settings: Settings, folder: Path, records: dict[str, Any], keep_part: Callable[[], None]
) -> None:
    for number in range(settings.rounds):
        for index, rival in enumerate(case.rivals):
            record = records[rival.name]
            if record["status"] == "ok":
                with _failures_recorded(record):
                    life = _one_life(case, rival, settings, folder / f"{number}-{index}", record)
                    for quantity, value in life.items():
                        record.setdefault("samples", {}).setdefault(quantity, []).append(value)
                    say(
                        f"  {rival.label}: peak {life['peak_bytes'] / 2**20:.0f} MiB, last step {life['seconds']:.2f} s"
                    )
            keep_part()


def _one_life(case: Case, rival: Rival, settings: Settings, folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """A process from its start through its steps to its end."""
    with _start(rival, settings, folder, record) as process:
        with TreeWatch(process.process_id) as watch:
            _build(process, rival, settings)
            seconds = process.ask("warm_up", steps=1, limit=settings.limit_seconds)["seconds"]
        first_peak = memory.peak_bytes(process.process_id)
        apart = memory.reset_peak(process.process_id)
        for _ in tqdm(range(1, case.steps), desc=f"  {rival.label}", disable=None, leave=False):
            seconds += process.ask("warm_up", steps=1, limit=settings.limit_seconds)["seconds"]
        later_peak = memory.peak_bytes(process.process_id)
        record |= process.ask("describe", limit=settings.limit_seconds)
    return {
        "first_step_seconds": seconds[0],
        "seconds": seconds[-1],
        "peak_bytes": max(first_peak, later_peak),
        "later_peak_bytes": later_peak if apart else None,
        "peak_with_compilers_bytes": max(watch.peak_bytes, first_peak, later_peak),
    }


# --- all --------------------------------------------------------------------------------------------------------------


def _new_record(rival: Rival) -> dict[str, Any]:
    return {
        "label": rival.label,
        "status": "ok",
        "environment": rival.environment,
        "ours": rival.ours,
        "note": rival.note,
    }


def _start(rival: Rival, settings: Settings, folder: Path, record: dict[str, Any]) -> WorkerProcess:
    """Start the rival's process; its log lives in ``folder``, and its compile caches do unless the settings name another."""
    found = environment(rival.environment)
    if found.errors:
        record["environment_errors"] = found.errors
    folder.mkdir(parents=True, exist_ok=True)
    caches = settings.caches or folder
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"), "TRITON_CACHE_DIR": str(caches / "triton")}
    if settings.threads is not None:
        variables |= {"OMP_NUM_THREADS": str(settings.threads), "MKL_NUM_THREADS": str(settings.threads)}
    command = rival.command or (str(found.python), "-m", "benchmarks.worker")
    return WorkerProcess(command, variables=variables, log=folder / "log.txt")


def _build(process: WorkerProcess, rival: Rival, settings: Settings) -> None:
    process.ask("build", target=_address(rival.build), limit=settings.limit_seconds, **_inputs(rival, settings))


def _inputs(rival: Rival, settings: Settings) -> dict[str, Any]:
    return {"options": dict(rival.options), "threads": settings.threads, "seed": settings.seed}


def _address(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


@contextmanager
def _failures_recorded(record: dict[str, Any]) -> Iterator[None]:
    """Turn what goes wrong with one rival into a part of its record, so that the others go on."""
    try:
        yield
    except (WorkerFailure, OSError) as error:
        record |= {"status": "failed", "error": str(error), "details": getattr(error, "details", "")}
        say(f"  failed: {error}")
