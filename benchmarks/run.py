"""Run a benchmark: ``python -m benchmarks.run truegrad [--cases bert mlp-256] [--quick]``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import benchmarks
from benchmarks import results
from benchmarks.harness import Benchmark, Case, Settings, run_case, say
from benchmarks.tables import case_table

QUICK = {"block_seconds": 0.0, "warm_up_steps": 2}
QUICK_ROUNDS = {"steps": 2, "starts": 1, "lives": 1}
DEFAULT_ROUNDS = {"steps": Settings.rounds, "starts": 3, "lives": 1}  # a fresh process takes a minute or more


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if a baseline failed."""
    options = _parser().parse_args(arguments)
    if options.list or not options.benchmark:
        return _list()
    benchmark = find(options.benchmark)
    if reason := benchmark.unavailable():
        say(f"{benchmark.name} is skipped: {reason}")
        return 0
    settings = _settings(options)
    cases = _chosen(benchmark.cases(settings.quick), options.cases, options.rivals)
    partial = settings.quick or options.rivals is not None
    folder = options.output or (results.SCRATCH_FOLDER if partial else results.FOLDER)
    baselines_ran = True
    with tempfile.TemporaryDirectory(prefix="graphopt-bench-caches-") as caches:
        for case in cases:
            rounds = QUICK_ROUNDS[case.measure] if settings.quick else case.rounds or DEFAULT_ROUNDS[case.measure]
            chosen = replace(settings, rounds=rounds if options.rounds is None else options.rounds)
            chosen = replace(chosen, caches=Path(caches) if case.shares_caches else None)
            record = measure_and_store(benchmark.name, case, chosen, folder)
            baselines_ran &= record["rivals"].get(case.baseline, {}).get("status") == "ok"
            print(case_table(case.name, record), flush=True)
    return 0 if baselines_ran else 1


def measure_and_store(benchmark: str, case: Case, settings: Settings, folder: Path) -> dict[str, Any]:
    """Measure a case and write it to the result file; what a run that is interrupted has measured is there, too."""

    def keep(record: dict[str, Any]) -> Path:
        return results.store(folder, benchmark, {case.name: record})

    record = run_case(case, settings, keep=keep)
    say(f"written to {keep(record)}")
    return record


def find(name: str) -> Benchmark:
    """The benchmark that the module ``benchmarks/<name>.py`` offers."""
    if name not in names():
        raise SystemExit(f"no benchmark is called {name!r}; there are {', '.join(names())}")
    benchmark: Benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    return benchmark


def names() -> list[str]:
    """The modules of this folder that offer a benchmark."""
    found = []
    for module in pkgutil.iter_modules(benchmarks.__path__):
        source = Path(benchmarks.__path__[0], f"{module.name}.py")
        if source.exists() and re.search(r"^BENCHMARK\b", source.read_text(), flags=re.MULTILINE):
            found.append(module.name)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("benchmark", nargs="?", help="see --list")
    parser.add_argument("--list", action="store_true", help="the benchmarks, their cases and their rivals")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these")
    parser.add_argument("--rivals", nargs="+", metavar="RIVAL", help="only these, and the baseline of each case")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds: does it run at all?")
    parser.add_argument("--rounds", type=int, help=f"turns of each rival (default {Settings.rounds}, fewer for some)")
    parser.add_argument("--block-seconds", type=float, help=f"length of a turn (default {Settings.block_seconds})")
    parser.add_argument("--threads", type=int, default=Settings.threads, help="torch's threads (default %(default)s)")
    parser.add_argument("--no-check", action="store_true", help="do not compare the rivals' numbers first")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for the JSON (default benchmarks/results; for quick and partial runs its folder scratch)",
    )
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    settings = Settings(threads=options.threads, check=not options.no_check, quick=options.quick)
    if options.quick:
        settings = replace(settings, **QUICK)
    return settings if options.block_seconds is None else replace(settings, block_seconds=options.block_seconds)


def _chosen(cases: tuple[Case, ...], wanted: list[str] | None, rivals: list[str] | None) -> list[Case]:
    known = [case.name for case in cases]
    if unknown := set(wanted or ()) - set(known):
        raise SystemExit(f"no case is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [case for case in cases if wanted is None or case.name in wanted]
    if rivals is None:
        return chosen
    known = list(dict.fromkeys(rival.name for case in chosen for rival in case.rivals))
    if unknown := set(rivals) - set(known):
        raise SystemExit(f"no rival is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [
        replace(case, rivals=tuple(rival for rival in case.rivals if rival.name in (*rivals, case.baseline)))
        for case in chosen
    ]


def _list() -> int:
    for name in names():
        benchmark = find(name)
        print(f"{name}: {benchmark.title}")
        for case in benchmark.cases(False):
            print(f"  {case.name}: {case.title}")
            for rival in case.rivals:
                print(f"    {rival.name}" + (" (baseline)" if rival.name == case.baseline else ""))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends workers, removes their caches
    raise SystemExit(main())
