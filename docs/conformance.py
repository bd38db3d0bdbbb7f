"""Measure what TrueGrad serves, and write it down: ``python -m docs.conformance`` from the root of the repository.

The zoo of architectures and the samples of every rule run against their oracles; ``docs/conformance.json`` has what came out, and
``docs/conformance.md`` is made of it. A test compares both with the zoo and the rules, without measuring again.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import logging
import os
import pkgutil
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

import graphopt
from graphopt.passes import TrueGrad
from graphopt.passes.truegrad import rules
from tests.models import double, smooth
from tests.oracle import loop_over_samples
from tests.zoo import measure
from tests.zoo.case import NUM_SAMPLES, Case
from tests.zoo.zoo import cases

FOLDER = Path(__file__).parent
RESULTS, PAGE = FOLDER / "conformance.json", FOLDER / "conformance.md"
COMPILER = "aot_eager"
ROUNDS = 15
INTRODUCTION = f"""\
# What TrueGrad serves

<!-- Written by `python -m docs.conformance`; edit docs/conformance.py instead. -->

Every row is a model that ran: its gradients and `sum_grad_squared` of every parameter against an oracle that shares no code with
graphopt, a loop over samples with autograd (for models whose samples meet in a batch normalisation: a copy of every parameter
for every sample). The tests run the same models and fail if an outcome differs from the one that stands here.

* **exact**, **fallback**, **refused**: number of trainable parameters. *Fallback* is exact too, with memory for one gradient per
  sample. *Refused* parameters are named by an error, with operator, module and source line (those that no graph reaches: by
  `graphopt.Report.of(model)`), and carry no statistic under `unsupported="skip"`. Parameters that the loss does not depend on are
  not counted.
* **error**: the largest relative error of a parameter's statistic, ‖found - expected‖ / ‖expected‖, in float64 unless float32 is
  said. The tests allow 1e-10 (float32: 1e-5).
* **graphs**: captured graphs; more than one where the model breaks Dynamo's capture.
* **time**: processor time of one step, forward and backward, with TrueGrad over the same step compiled without any pass, by the
  compiler `{COMPILER}` on one thread, medians of {ROUNDS} steps that alternate in one process. **It overstates the price**: the
  models are tiny ({NUM_SAMPLES} samples, widths of 4 to 12), so that a step is the overhead of calling operators, and this
  compiler fuses none of those that are added. What the statistic costs at a size that people train stands in
  [benchmarks/results](../benchmarks/results/README.md).
"""


def measured_zoo(names: Sequence[str], report: Callable[[str], None]) -> dict[str, Any]:
    """One entry for each model."""
    found = {}
    for name in names:
        start = time.perf_counter()
        torch._dynamo.reset()
        outcome = measure.run(cases[name], COMPILER)
        if wrong := outcome.names("wrong"):
            raise SystemExit(f"{name}: the statistic of {sorted(wrong)} is wrong by {outcome.error:.1e}")
        found[name] = {
            "exact": len(outcome.names("exact")),
            **{kind: sorted(outcome.names(kind)) for kind in ("fallback", "refused", "unused")},
            "error": outcome.error,
            "graphs": outcome.graphs,
            "time": None if outcome.model is None or not outcome.graphs else _zoo_ratio(cases[name], outcome.model),
        }
        report(f"{name}: {_counts(found[name])}, error {outcome.error:.1e}, {time.perf_counter() - start:.0f} s")
        gc.collect()
    return found


def measured_rules(names: Sequence[str], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """One entry for each sample of each of these rules."""
    found = []
    for rule, index, sample in rule_samples():
        if rule not in names:
            continue
        torch._dynamo.reset()
        torch.manual_seed(3)
        module, *inputs = sample()
        plain, batch = double(module, tuple(inputs))
        expected = loop_over_samples(plain, batch, smooth, reduction="sum")

        def step(model: nn.Module, batch: tuple[Any, ...] = batch) -> None:
            model.zero_grad()
            smooth(model(*batch)).backward()

        model = graphopt.transform(copy.deepcopy(plain), [TrueGrad()], compiler=COMPILER)
        ratio = _ratio(partial(step, _without_pass(plain, {})), partial(step, model))
        errors = [
            measure.relative_error(param.sum_grad_squared, expected[name].sum_grad_squared)
            for name, param in model.named_parameters()
            if param.requires_grad
        ]
        if not max(errors) <= 1e-10:
            raise SystemExit(f"{rule}-{index}: wrong by {max(errors):.1e}")
        counts = Counter(row.status.value for row in graphopt.Report.of(model).coverage)
        found.append(
            {
                "rule": rule,
                "index": index,
                "module": describe(module),
                "shapes": [list(value.shape) for value in inputs],
                **{kind: counts[kind] for kind in ("exact", "fallback")},
                "error": max(errors),
                "time": ratio,
            }
        )
        report(f"{rule}-{index}: {found[-1]['module']}, error {max(errors):.1e}")
    return found


def rule_samples() -> Iterator[tuple[str, int, Callable[[], tuple[Any, ...]]]]:
    """Name of the rule, number of the sample, its builder."""
    for info in sorted(pkgutil.iter_modules(rules.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{rules.__name__}.{info.name}")
        for index, sample in enumerate(module.SAMPLES):
            yield info.name, index, sample


def describe(module: nn.Module) -> str:
    """One line: a layer by its arguments, a model by its class and its layers' classes."""
    if not list(module.children()):
        return repr(module)
    layers = ", ".join(type(layer).__name__ for layer in module.modules() if not list(layer.children()))
    return f"{type(module).__name__.lstrip('_')}: {layers}"


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    return "\n".join(
        [INTRODUCTION, *_summary(results), *_zoo_tables(results["zoo"]), *_rules_table(results["rules"]), ""]
    )


def _summary(results: dict[str, Any]) -> Iterator[str]:
    zoo = results["zoo"].values()
    exact, fallback, refused = (sum(_count(row[kind]) for row in zoo) for kind in ("exact", "fallback", "refused"))
    yield (
        f"{len(zoo)} architectures, {sum(not row['refused'] for row in zoo)} of them served whole: {exact} parameters exact, "
        f"{fallback} fallback, {refused} refused. {len(results['rules'])} samples of rules. Measured with "
        f"torch {results['torch']} and transformers {results['transformers']} on {results['machine']}."
    )
    yield ""


def _zoo_tables(zoo: dict[str, Any]) -> Iterator[str]:
    yield "## Architectures"
    families: dict[str, list[str]] = {}
    for name in zoo:
        families.setdefault(cases[name].family, []).append(name)
    for family, names in families.items():
        yield from ("", f"### {family[0].upper()}{family[1:]}", "")
        yield "| model | exact | fallback | refused | error | graphs | time |"
        yield "|---|---|---|---|---|---|---|"
        for name in sorted(names):
            yield _zoo_row(name, zoo[name])
    notes = [f"* `{name}`: {_reasons(cases[name])}" for name, row in zoo.items() if row["refused"]]
    if notes:
        yield from ("", "### What is refused, and why", "", *sorted(notes))
    yield ""


def _zoo_row(name: str, row: dict[str, Any]) -> str:
    unit = " (float32)" if cases[name].dtype == torch.float32 else ""
    served = row["exact"] or row["fallback"]
    error = f"{row['error']:.0e}{unit}" if served else "—"
    cells = (name, row["exact"], len(row["fallback"]), len(row["refused"]), error, row["graphs"], _short(row["time"]))
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _reasons(case: Case) -> str:
    return "; ".join(f"`{pattern}` ({words})" for pattern, words in case.refused.items())


def _rules_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield from (
        "## Operators",
        "",
        "The samples in `passes/truegrad/rules/`, by the rule that they were written for.",
        "",
    )
    yield "| rule | module | input | exact | fallback | error | time |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        shapes = ", ".join("×".join(map(str, shape)) for shape in row["shapes"])
        cells = (
            f"`{row['rule']}`", f"`{row['module']}`", shapes, row["exact"], row["fallback"], f"{row['error']:.0e}",
            _short(row["time"]),
        )  # fmt: skip
        yield "| " + " | ".join(str(cell) for cell in cells) + " |"


def _short(ratio: float | None) -> str:
    return "—" if ratio is None else f"{ratio:.2f}"


def _count(value: int | list[str]) -> int:
    return value if isinstance(value, int) else len(value)


def _counts(row: dict[str, Any]) -> str:
    return ", ".join(f"{_count(row[kind])} {kind}" for kind in ("exact", "fallback", "refused") if row[kind])


def _zoo_ratio(case: Case, model: nn.Module) -> float:
    plain, batch = case.make()
    without = _without_pass(plain, {"sample_axis": case.sample_axis})
    return _ratio(partial(measure.step, case, without, batch), partial(measure.step, case, model, batch))


def _without_pass(plain: nn.Module, options: dict[str, Any]) -> nn.Module:
    return graphopt.transform(copy.deepcopy(plain), [], compiler=COMPILER, options=options)


def _ratio(without: Callable[[], None], step: Callable[[], None]) -> float:
    """Median processor time of the second over that of the first, one after the other in each round."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(ROUNDS + 2):
        for run, into in zip((without, step), seconds, strict=True):
            start = time.process_time()  # not spoilt by what else runs on the machine
            run()
            if index >= 2:  # the first compiles, the second allocates
                into.append(time.process_time() - start)
    return round(statistics.median(seconds[1]) / statistics.median(seconds[0]), 3)


def _machine() -> str:
    from benchmarks.machine import describe as describe_machine

    machine = describe_machine()
    return f"{machine['cpu']}, {machine['cores']} cores, one thread"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page from the results, and measure nothing")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="models or rules to measure anew; others stay as they are"
    )
    options = parser.parse_args(arguments)
    rule_names = sorted({rule for rule, _, _ in rule_samples()})
    if unknown := sorted({*(options.only or ())} - {*cases, *rule_names}):
        parser.error(f"no model and no rule is called {unknown}; there are {[*cases, *rule_names]}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"zoo": {}, "rules": []}
    if not options.page:
        _quiet()
        wanted = options.only or [*cases, *rule_names]
        results = merged(
            results,
            measured_zoo([name for name in wanted if name in cases], print),
            measured_rules([name for name in wanted if name in rule_names], print),
        )
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))
    return 0


def merged(results: dict[str, Any], zoo: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Earlier results with the new ones in their place; what is no longer in the zoo or among the rules falls out."""
    zoo = results["zoo"] | zoo
    again = {row["rule"] for row in rows}
    kept = [row for row in results["rules"] if row["rule"] not in again]
    known = {(rule, index) for rule, index, _ in rule_samples()}
    rows = sorted((row for row in kept + rows), key=lambda row: (row["rule"], row["index"]))
    return {
        "torch": torch.__version__,
        "transformers": importlib.import_module("transformers").__version__,
        "machine": _machine(),
        "zoo": {name: zoo[name] for name in cases if name in zoo},
        "rules": [row for row in rows if (row["rule"], row["index"]) in known],
    }


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    importlib.import_module("transformers").logging.set_verbosity_error()


if __name__ == "__main__":
    raise SystemExit(main())
