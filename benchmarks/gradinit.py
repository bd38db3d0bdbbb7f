"""What a step of learning an initialisation costs: graphopt's GradInit against the package ``gradinit`` and PyTorch alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks import figures
from benchmarks.harness import Benchmark, Case, Rival
from benchmarks.tables import MISSING, duration, table
from benchmarks.worker import Task

SIZES = {"layers": 4, "hidden": 256, "heads": 4, "batch": 8, "length": 64}
SMALL = {"layers": 2, "hidden": 32, "heads": 2, "batch": 4, "length": 8}
DEPTHS, QUICK_DEPTHS = (4, 8, 16), (1, 2)
HAND_DEPTHS = (4, 16)  # of what is written by hand: enough to see how it grows
START_ROUNDS = 2
EXACT = 1e-5  # largest relative difference from the package gradinit, in float64
FLOOR = 1e-6  # derivatives below this part of the largest one are compared with that part
FASTER, GROWTH = (
    1.5,
    1.5,
)  # the targets: at least so many times as fast, and compiling 16 layers takes at most so many times 4
COLD = "cold_first_step_seconds"

LABELS = {
    "learn-init": "graphopt.learn_init",
    "learn-init-eager": "graphopt.learn_init, compiler=eager",
    "wrapper": "graphopt.GradInitWrapper",
    "wrapper-eager": "graphopt.GradInitWrapper, nothing compiled",
    "johngull": "gradinit 0.1.1",
    "by-hand": "torch.func, eager PyTorch",
    "by-hand-compiled": "torch.func and torch.compile",
}
BASELINES = {"constraint": ("johngull", "by-hand"), "look_ahead": ("by-hand", "johngull")}
NAMES = {"constraint": "constraint", "look_ahead": "look-ahead"}


def build(*, workload: dict[str, Any], branch: str, method: dict[str, Any], **_: Any) -> Task:
    """A step of learning the scales.

    Args:
        workload: Arguments of ``gradinit_rivals.bert``.
        branch: ``"constraint"`` or ``"look_ahead"``.
        method: ``{"name": a function of gradinit_rivals, and its options}``.
    """
    from benchmarks import gradinit_rivals

    work = gradinit_rivals.bert(**workload)
    number = sum(1 for _ in work.model.parameters())
    return Task(
        getattr(gradinit_rivals, method["name"])(work, branch, **_without_name(method)),
        lambda: {"num_parameters": number},
    )


def build_both(*, workload: dict[str, Any], method: dict[str, Any], **_: Any) -> Task:
    """A first constraint step and a first look-ahead step."""
    from benchmarks import gradinit_rivals

    _import_compilers()
    work = gradinit_rivals.bert(**workload)
    if method["name"] == "learn_init":
        return Task(lambda: _learn_both(work, **_without_name(method)))
    make = getattr(gradinit_rivals, method["name"])
    steps = [make(work, branch, **_without_name(method)) for branch in NAMES]
    return Task(lambda: [step() for step in steps])


def _learn_both(work: Any, compiler: str = "inductor") -> None:
    """One run of ``learn_init`` that takes either branch: it begins just above the bound."""
    import torch

    import graphopt

    parameters = list(work.model.parameters())
    gradient = torch.autograd.grad(work.loss(work.model, work.batch), parameters)
    gamma = 0.999 * sum(value.abs().sum().item() for value in gradient)
    options = {"gamma": gamma, "lr": 1e-2, "steps": 4, "compiler": compiler, "progress": False}
    result = graphopt.learn_init(work.model, work.loss, [work.batch], **options)
    taken = [step.is_constraint for step in result.trajectory]
    if len(set(taken)) != 2:
        raise RuntimeError(f"of the two branches only one was taken: {taken}")


def _import_compilers() -> None:
    """Import what the first compilation would, before anything is timed: the same for all methods."""
    from benchmarks import regions

    regions._import_compilers()


# --- the check --------------------------------------------------------------------------------------------------------


def check(*, small: dict[str, Any], branch: str, method: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Compare with the package ``gradinit`` in float64, on a small model: constraint branch, gradients of all scales.

    ``learn_init`` shows no gradient of a scale; of it the norm is compared, and in the look-ahead branch the loss after the step
    with what is written by hand.
    """
    sizes = {**small, "dtype": "float64", "small_numbers": True}
    if method["name"] == "learn_init":
        return _check_learn_init(sizes, branch, method)
    return _compare(_scale_gradients(sizes, method), _scale_gradients(sizes, {"name": "johngull"}))


def _check_learn_init(sizes: dict[str, Any], branch: str, method: dict[str, Any]) -> dict[str, Any]:
    import torch

    import graphopt
    from benchmarks import gradinit_rivals

    work = gradinit_rivals.bert(**sizes)
    options = {"gamma": gradinit_rivals.GAMMA[branch], "eta": gradinit_rivals.ETA, "steps": 1, "progress": False}
    (found,) = graphopt.learn_init(work.model, work.loss, [work.batch], **options, **_without_name(method)).trajectory
    plain = gradinit_rivals.ByHand(gradinit_rivals.bert(**sizes))
    gradient, _ = plain.gradient(plain.weights, plain.work.batch)
    if branch == "constraint":
        pair = found.grad_norm, sum(value.abs().sum().item() for value in gradient.values())
    else:
        after = {name: value - gradinit_rivals.ETA * gradient[name].sign() for name, value in plain.weights.items()}
        with torch.no_grad():
            pair = found.lookahead_loss, plain._loss(after, plain.ahead).item()
    error = abs(pair[0] - pair[1]) / abs(pair[1])
    verdict = "exact" if error <= EXACT and found.is_constraint == (branch == "constraint") else "wrong"
    return {"verdict": verdict, "max_relative_error": error}


def _scale_gradients(sizes: dict[str, Any], method: dict[str, Any]) -> dict[str, float]:
    """The derivative of the norm of the gradient with respect to each scale, at scales that are not 1."""
    import torch

    from benchmarks import gradinit_rivals

    work = gradinit_rivals.bert(**sizes)
    names = [name for name, _ in work.model.named_parameters()]
    values = torch.linspace(0.7, 1.4, len(names), dtype=torch.float64)
    if method["name"] == "by_hand":
        algorithm = gradinit_rivals.ByHand(work)
        step = algorithm.compiled if method.get("compiled") else algorithm.eager
        found = step(dict(zip(names, values.unbind(), strict=True)), 0.0)
        return {name: value.item() for name, value in found.items()}
    wrapped = _wrapped(work, method)
    scales = _by_parameter(work.model, wrapped)
    with torch.no_grad():
        for name, value in zip(names, values, strict=True):
            scales[name].copy_(value)
    wrapped.grad_loss(work.loss(work.model, work.batch), norm=1, gamma=0.0).backward()
    return {name: 0.0 if scale.grad is None else scale.grad.item() for name, scale in scales.items()}


def _wrapped(work: Any, method: dict[str, Any]) -> Any:
    if method["name"] == "johngull":
        from gradinit import GradInitWrapper

        return GradInitWrapper(work.model)
    import graphopt
    from graphopt.passes import GradInit, LayerToLayer

    if method.get("compiler", "inductor") is not None:
        graphopt.transform(work.model, [GradInit(), LayerToLayer()], compiler=method.get("compiler", "inductor"))
    return graphopt.GradInitWrapper(work.model)


def _by_parameter(model: Any, wrapped: Any) -> dict[str, Any]:
    """The scales by the names of their parameters; the package gradinit appends to these."""
    suffix = getattr(wrapped, "_postfix_scale", "")
    return {name.removesuffix(suffix): scale for name, scale in model.named_parameters()}


def _compare(found: dict[str, float], wanted: dict[str, float]) -> dict[str, Any]:
    floor = FLOOR * max(abs(value) for value in wanted.values())
    errors = {
        name: abs(found[name] - value) / max(abs(value), floor) if name in found else math.inf
        for name, value in wanted.items()
    }
    worst = max(errors, key=lambda name: errors[name])
    return {
        "verdict": "exact" if errors[worst] <= EXACT and len(found) == len(wanted) else "wrong",
        "max_relative_error": errors[worst],
        "worst_parameter": worst,
        "num_checked": len(wanted),
        "num_wrong": sum(not error <= EXACT for error in errors.values()),
    }


def _without_name(method: dict[str, Any]) -> dict[str, Any]:
    return {option: value for option, value in method.items() if option != "name"}


# --- the cases --------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> tuple[Case, ...]:
    """Both branches, and cold starts by depth."""
    sizes = SMALL if quick else SIZES
    return (*(_steps(branch, sizes, quick) for branch in NAMES), _starts(sizes, quick))


def _steps(branch: str, sizes: dict[str, Any], quick: bool) -> Case:
    compiler = "eager" if quick else "inductor"  # Inductor would take minutes
    methods: dict[str, dict[str, Any]] = {
        "johngull": {"name": "johngull"},
        "by-hand": {"name": "by_hand"},
        "learn-init": {"name": "learn_init", "compiler": "aot_eager" if quick else "inductor"},
        "learn-init-eager": {"name": "learn_init", "compiler": "eager"},
        "wrapper": {"name": "wrapper", "compiler": compiler},
        "wrapper-eager": {"name": "wrapper", "compiler": None},
        **({} if quick else {"by-hand-compiled": {"name": "by_hand", "compiled": True}}),
    }
    notes = {
        "johngull": "it lowers the loss itself: no step is looked ahead",
        "wrapper": "the same interface and objective as gradinit 0.1.1, which is no look-ahead",
        "wrapper-eager": "likewise",
    }
    first = BASELINES[branch]
    order = [*first, *(name for name in methods if name not in first)]
    return Case(
        name=branch,
        title=f"One {NAMES[branch]} step of GradInit on BERT, {sizes['layers']} layers of {sizes['hidden']}, "
        f"batch {sizes['batch']}, {sizes['length']} tokens, norms for Adam",
        rivals=tuple(
            Rival(
                name=name,
                label=LABELS[name],
                build=build,
                check=check if branch == "constraint" or name.startswith("learn") else None,
                options={"workload": sizes, "small": SMALL, "branch": branch, "method": methods[name]},
                environment="gradinit",
                ours=name.startswith(("learn", "wrapper")),
                note=notes.get(name, "") if branch == "look_ahead" else "",
            )
            for name in order
        ),
        baseline=first[0],
        checked="against gradinit 0.1.1" if branch == "constraint" else "loss after the step",
    )


def _starts(sizes: dict[str, Any], quick: bool) -> Case:
    depths = QUICK_DEPTHS if quick else DEPTHS
    ours = {"name": "learn_init", "compiler": "aot_eager" if quick else "inductor"}
    methods = [("learn-init", ours, depths)]
    if not quick:
        methods.append(("by-hand-compiled", {"name": "by_hand", "compiled": True}, HAND_DEPTHS))
    return Case(
        name="starts",
        title=f"First constraint and first look-ahead step on BERT with layers of {sizes['hidden']}, batch {sizes['batch']}, "
        f"{sizes['length']} tokens, in a new process with empty compile caches",
        rivals=tuple(
            Rival(
                name=f"{name}-{depth}",
                label=f"{LABELS[name]}, {depth} layers",
                build=build_both,
                options={"workload": {**sizes, "layers": depth}, "method": method},
                ours=name == "learn-init",
            )
            for name, method, depths in methods
            for depth in depths
        ),
        baseline=f"learn-init-{depths[0]}",
        measure="starts",
        rounds=None if quick else START_ROUNDS,
        caches=("cold",),
    )


# --- what they show together ------------------------------------------------------------------------------------------


def conclusions(records: Mapping[str, Any]) -> str:
    """How many times as fast, what the check says, and how compiling grows with depth."""
    parts = []
    steps = {branch: records[branch]["rivals"] for branch in NAMES if branch in records}
    if steps:
        parts.append(_step_table(steps))
    if "starts" in records:
        parts.append(_start_table(records["starts"]["rivals"]))
    return "\n\n".join(parts)


def _step_table(steps: Mapping[str, Mapping[str, Any]]) -> str:
    names = [name for name in LABELS if any(name in rivals for rivals in steps.values())]
    rows = []
    for name in names:
        label = LABELS[name]
        row = [f"**{label}**" if name.startswith(("learn", "wrapper")) else label]
        for branch, rivals in steps.items():
            seconds = figures.summary(figures.samples(rivals, name, "seconds"))
            row.append(MISSING if seconds is None else duration(seconds["median"]))
            row += [_times_as_fast(rivals, name, baseline) for baseline in BASELINES[branch]]
        check = steps.get("constraint", {}).get(name, {}).get("check") or {}
        error = check.get("max_relative_error")
        row.append(MISSING if error is None else f"{check['verdict']} ({error:.0e})")
        rows.append(row)
    heads = ["times as fast (target: at least 1.5 for the first)"]
    for branch in steps:
        heads += [f"{NAMES[branch]} step", *(f"than {LABELS[baseline]}" for baseline in BASELINES[branch])]
    foot = (
        f"The last column: derivatives of the norm with respect to all scales, in float64, against {LABELS['johngull']}; of "
        f"{LABELS['learn-init']}, which shows none, the norm. Where the norm is small {LABELS['johngull']} lowers the loss "
        "itself, and so does GradInitWrapper: there is no look-ahead step."
    )
    return f"{table([*heads, 'same numbers'], rows)}\n\n{foot}"


def _times_as_fast(rivals: Mapping[str, Any], name: str, baseline: str) -> str:
    if name == baseline:
        return "1"
    return _times(
        figures.paired_ratio(*(figures.samples(rivals, rival, "seconds") for rival in (baseline, name))),
    )


def _start_table(rivals: Mapping[str, Any]) -> str:
    depths = sorted({int(name.rpartition("-")[2]) for name in rivals})
    rows = []
    for method in ("learn-init", "by-hand-compiled"):
        cold = {depth: figures.samples(rivals, f"{method}-{depth}", COLD) for depth in depths}
        if not any(cold.values()):
            continue
        seconds = [figures.summary(cold[depth]) for depth in depths]
        cells = (MISSING if found is None else duration(found["median"]) for found in seconds)
        label = f"**{LABELS[method]}**" if method == "learn-init" else LABELS[method]
        rows.append((label, *cells, _times(figures.paired_ratio(cold[depths[-1]], cold[depths[0]]))))
    heads = ("first steps of both kinds, empty caches", *(f"{depth} layers" for depth in depths))
    return table((*heads, f"{depths[-1]} against {depths[0]} (target: {GROWTH:g})"), rows)


def _times(ratio: dict[str, float] | None) -> str:
    return MISSING if ratio is None else f"{ratio['median']:.2f}x [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"


BENCHMARK = Benchmark(
    name="gradinit",
    title="A step of learning an initialisation",
    text=(
        "GradInit (arXiv:2102.08098) takes one of two steps. Where the gradient's norm is above a bound, it lowers that norm, "
        "and differentiates the gradient to do so (*constraint*); else it lowers the loss after a step of the optimizer "
        "(*look-ahead*). Bounds of 0 and of infinity force the one or the other. All rivals get the same model, the same batch "
        "and the norm for Adam. A start is timed from the call of `learn_init` to the end of four iterations, among them both "
        "kinds of step; imports come before."
    ),
    cases=cases,
    conclusions=conclusions,
)
