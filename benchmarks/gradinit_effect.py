"""What a learned initialisation brings: deep nets on real data, from several initialisations, with equal time for all.

An arm is an initialisation and a way to train. Each is run with every learning rate of a grid, from several seeds; the rate is
the one with the best mean score on the validation data, at each budget for itself; what is reported is the score on the test
data. An arm that learns its initialisation first has fewer steps of training: as many fewer as that has taken time.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from benchmarks.harness import Benchmark, Case, Rival
from benchmarks.pictures import Curves, Line
from benchmarks.tables import MISSING, table
from benchmarks.worker import Task

SEEDS = (10, 11, 12, 13, 14)  # the nets and the options of learning were chosen with 0 to 3
PROCESSES = 2  # of one thread each: the nets are too small for more
TIMED_STEPS, SKIPPED_STEPS = 20, 5  # of training, for its price
LEARNING_SEED = 1000  # learning sees other batches than training
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom, from 1

# Of GradInit's two forms that for SGD looks ahead along the gradient, in which, where inner gradients vanish, there is little
# but the last bias; that for Adam moves all weights by the same amount. Scales move at one pace in log space.
SGD = {"optimizer": "sgd", "lr": 2e-2, "space": "log"}
ADAM = {"optimizer": "adam", "lr": 2e-2, "space": "log"}
FEW, MANY = {"steps": 30}, {"steps": 100}  # from He's initialisation, which is not far off, and from the default
PLANS: dict[str, dict[str, Any]] = {
    "digits": {
        "problem": {"depth": 16, "channels": 16, "batch": 64},
        "rates": (0.03, 0.1, 0.2),
        "budget": 680,
        "every": 68,
        "early": 34,  # two epochs
        "reference": "he",
    },
    "characters": {
        "problem": {"layers": 12, "width": 64, "length": 32, "batch": 8},
        "rates": (3e-4, 1e-3, 3e-3),
        "budget": 500,
        "every": 50,
        "early": 100,
        "reference": "default",
    },
}
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    "digits": {
        "default": {"label": "PyTorch's default"},
        "he": {"label": "He", "start": "he"},
        "he-warm-up": {"label": "He, warm-up", "start": "he", "warm_up": 100},
        "lsuv": {"label": "LSUV", "start": "orthogonal", "learn": {"method": "lsuv"}},
        "gradinit-sgd": {"label": "GradInit for SGD", "learn": {**SGD, **MANY}},
        "gradinit-sgd-he": {"label": "GradInit for SGD, from He", "learn": {**SGD, **FEW, "start": "he"}},
        "gradinit-adam": {"label": "GradInit for Adam", "learn": {**ADAM, **MANY}},
        "gradinit-adam-he": {"label": "GradInit for Adam, from He", "learn": {**ADAM, **FEW, "start": "he"}},
    },
    "characters": {
        "default": {"label": "PyTorch's default"},
        "warm-up": {"label": "PyTorch's default, warm-up", "warm_up": 100},
        "he": {"label": "He", "start": "he"},
        "xavier": {"label": "Xavier", "start": "xavier"},
        "lsuv": {"label": "LSUV", "start": "orthogonal", "learn": {"method": "lsuv"}},
        "gradinit": {"label": "GradInit", "learn": {"optimizer": "adam", "lr": 1e-2, "steps": 60}},
        "gradinit-xavier": {
            "label": "GradInit from Xavier",
            "start": "xavier",
            "learn": {"optimizer": "adam", "lr": 1e-2, "steps": 60},
        },
    },
}
TITLES = {
    "digits": "{depth} convolutions of {channels} channels with ReLU and nothing else, scikit-learn's digits, batch {batch}, "
    "SGD with momentum 0.9, gradients clipped to 1",
    "characters": "A post-LN transformer of {layers} layers of {width}, {length} characters of Python's source, batch {batch}, "
    "Adam",
}


def build(*, name: str, plan: dict[str, Any], arm: dict[str, Any], seeds: Sequence[int], processes: int) -> Task:
    """All runs of an arm, in one step.

    Args:
        name: of the problem.
        plan: a value of ``PLANS``.
        arm: of ``ARMS``.
        seeds: of the initial weights and of the order of the data.
        processes: how many run at a time; with 1, this one.
    """
    found: dict[str, Any] = {}

    def step() -> None:
        with _workers(name, plan, arm, processes) as run:
            learned = list(run(_initialise, seeds))
            charge = math.ceil(statistics.median(start["seconds"] / start["step_seconds"] for start in learned))
            jobs = [(start, rate, charge) for start in learned for rate in plan["rates"]]
            runs = list(run(_train, jobs))
        facts = [{key: value for key, value in start.items() if key != "state"} for start in learned]
        found.update(plan=plan, charge=charge, starts=facts, runs=runs)

    return Task(step, lambda: found)


@contextmanager
def _workers(
    name: str, plan: dict[str, Any], arm: dict[str, Any], processes: int
) -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map`` over processes that have built the problem. They are forked, so this one must have used no threads yet."""
    if processes == 1:
        _enter(name, plan, arm)
        yield map
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _enter, (name, plan, arm)) as pool:
        yield pool.map


_here: dict[str, Any] = {}  # what a process works on


def _enter(name: str, plan: dict[str, Any], arm: dict[str, Any]) -> None:
    import torch

    from benchmarks.gradinit_problems import PROBLEMS

    torch.set_num_threads(1)
    _here.update(problem=PROBLEMS[name](**plan["problem"]), plan=plan, arm=arm)


def _initialise(seed: int) -> dict[str, Any]:
    """Make a net, learn its initialisation if the arm does, and say how long that took, and how long a step of training takes."""
    import torch

    import graphopt
    from benchmarks.gradinit_problems import START

    problem, arm = _here["problem"], _here["arm"]
    torch.manual_seed(seed)
    net = problem.net()
    START[arm.get("start", "default")](net)
    found: dict[str, Any] = {"seed": seed, "seconds": 0.0, "error": ""}
    before = _step_seconds(net, seed)
    if learn := arm.get("learn"):
        start = time.perf_counter()
        options = {"compiler": "eager", "progress": False, **learn}
        try:
            result = graphopt.learn_init(net, problem.loss, problem.batches(LEARNING_SEED + seed), **options)
        except graphopt.errors.InitError as error:
            found["error"] = str(error)
        else:
            found["num_constraint"] = sum(step.is_constraint for step in result.trajectory)
            found["num_steps"] = len(result.trajectory)
        found["seconds"] = time.perf_counter() - start
    found["step_seconds"] = (
        before + _step_seconds(net, seed)
    ) / 2  # before and after: the machine is not always as fast
    return {**found, "state": {key: value.numpy() for key, value in net.state_dict().items()}}


def _step_seconds(net: Any, seed: int) -> float:
    import copy

    seconds: list[float] = []
    net = copy.deepcopy(net)
    _steps(net, _here["plan"]["rates"][0], 0, seed, TIMED_STEPS, lambda step: seconds.append(time.perf_counter()))
    return statistics.median(end - start for start, end in pairwise(seconds[SKIPPED_STEPS:]))


def _train(job: tuple[dict[str, Any], float, int]) -> dict[str, Any]:
    """Train one net with one rate; its scores on validation and test data after the steps of `marks`."""
    import torch

    start, rate, charge = job
    problem, plan = _here["problem"], _here["plan"]
    net = problem.net()
    net.load_state_dict({key: torch.from_numpy(value) for key, value in start["state"].items()})
    wanted = marks(plan, charge)
    scores: dict[int, tuple[float, float]] = {}

    def look(step: int) -> None:
        if step in wanted:
            scores[step] = problem.scores(net)

    _steps(net, rate, _here["arm"].get("warm_up", 0), start["seed"], max(wanted), look)
    last = scores[max(wanted)][1]
    validation, test = zip(*(scores[step] for step in wanted), strict=True)
    return {
        "seed": start["seed"],
        "rate": rate,
        "steps": wanted,
        "validation": validation,
        "test": test,
        "has_learnt": problem.has_learnt(last),
    }


def marks(plan: Mapping[str, Any], charge: int) -> list[int]:
    """The steps of training after which an arm is scored: those of all budgets less what it is charged, and an early one."""
    charged = (budget - charge for budget in range(plan["every"], plan["budget"] + 1, plan["every"]))
    return sorted({*(step for step in charged if step > 0), plan["early"]})


def _steps(net: Any, rate: float, warm_up: int, seed: int, number: int, look: Callable[[int], object]) -> None:
    """Train; ``look`` is called after each step with its number, from 1."""
    import torch

    problem = _here["problem"]
    optimizer = problem.optimizer(net, rate)
    for step, batch in zip(range(1, number + 1), problem.batches(seed), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / warm_up) if warm_up else rate
        optimizer.zero_grad()
        problem.loss(net, batch).backward()
        if problem.clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), problem.clip)
        optimizer.step()
        look(step)


# --- the cases --------------------------------------------------------------------------------------------------------


def cases(quick: bool) -> tuple[Case, ...]:
    """One for each problem; its rivals are the arms, one after the other."""
    return tuple(_case(name, quick) for name in PLANS)


def _case(name: str, quick: bool) -> Case:
    plan, arms = dict(PLANS[name]), ARMS[name]
    if quick:
        small = {"digits": {"depth": 3, "channels": 4}, "characters": {"layers": 1, "width": 8}}[name]
        plan |= {"problem": {**plan["problem"], **small}, "budget": 60, "every": 20, "early": 10}
        arms = {
            key: {**arm, "learn": {**arm["learn"], **({"steps": 3} if "steps" in arm["learn"] else {})}}
            if "learn" in arm
            else arm
            for key, arm in arms.items()
        }
    seeds, processes = ((0, 1), 1) if quick else (SEEDS, PROCESSES)
    return Case(
        name=name,
        title=TITLES[name].format(**plan["problem"]),
        rivals=tuple(
            Rival(
                name=key,
                label=arm["label"],
                build=build,
                options={"name": name, "plan": plan, "arm": arm, "seeds": list(seeds), "processes": processes},
                ours=key.startswith("gradinit"),
            )
            for key, arm in arms.items()
        ),
        baseline=plan["reference"],
        measure="lives",
        rounds=1,
        steps=1,
        columns={"seconds": "all runs of the arm", "charge": "steps charged for the initialisation"},
    )


def unavailable() -> str:
    """Why nothing can be measured here; empty where it can."""
    if importlib.util.find_spec("sklearn") is None:
        return "the digits come from scikit-learn; type: pip install scikit-learn"
    return ""


# --- what they show together ------------------------------------------------------------------------------------------


def conclusions(records: Mapping[str, Any]) -> str:
    """A table for each problem."""
    return "\n\n".join(_table(name, records[name]) for name in PLANS if name in records)


def _table(name: str, record: Mapping[str, Any]) -> str:
    plan = _plan(name, record)
    half, budget = plan["budget"] // plan["every"] // 2 * plan["every"], plan["budget"]
    best = {key: chosen(name, plan, arm, budget) for key, arm in _arms(record).items()}
    rows = []
    for key, arm in _arms(record).items():
        early = chosen(name, plan, arm, plan["early"], charged=False)
        final, reference = best[key], best.get(plan["reference"])
        differences = (
            None
            if final is None or reference is None or key == plan["reference"]
            else [mine - theirs for mine, theirs in zip(final["test"], reference["test"], strict=True)]
        )
        label = f"**{arm['label']}**" if arm["ours"] else arm["label"]
        cells = (
            str(arm["charge"]),
            *(_interval(found and found["test"]) for found in (early, chosen(name, plan, arm, half), final)),
            _interval(differences, signed=True),
            MISSING if final is None else f"{final['rate']:g}",
            MISSING if final is None else f"{final['num_stalled']} of {len(final['test'])}",
            f"{sum(not run['has_learnt'] for run in arm['runs'])} of {len(arm['runs'])}",
        )
        rows.append((label, *cells))
    heads = (
        f"{record['title']}: test {'accuracy' if name == 'digits' else 'loss'}",
        "steps charged",
        f"after {plan['early']} steps, nothing charged",
        f"after {half}, charged",
        f"after {budget}, charged",
        f"less {record['rivals'][plan['reference']]['label']}",
        "rate",
        "stalled at that rate",
        "stalled at any rate",
    )
    return table(heads, rows)


def chosen(
    name: str, plan: Mapping[str, Any], arm: Mapping[str, Any], budget: int, *, charged: bool = True
) -> dict[str, Any] | None:
    """The runs of an arm at a budget, with the rate whose mean score on the validation data is best there.

    Returns:
        ``rate``, ``test`` (a score for each seed, in their order) and ``num_stalled``; None if the arm is still learning its
        initialisation.
    """
    step = budget - (arm["charge"] if charged else 0)
    if step <= 0:
        return None
    by_rate: dict[float, list[Any]] = {}
    for run in sorted(arm["runs"], key=lambda run: run["seed"]):
        by_rate.setdefault(run["rate"], []).append((run, list(run["steps"]).index(step)))
    sign = 1 if name == "digits" else -1
    rate = max(by_rate, key=lambda rate: sign * statistics.fmean(run["validation"][at] for run, at in by_rate[rate]))
    return {
        "rate": rate,
        "test": [run["test"][at] for run, at in by_rate[rate]],
        "num_stalled": sum(not run["has_learnt"] for run, _ in by_rate[rate]),
    }


def curves(records: Mapping[str, Any]) -> Sequence[Curves]:
    """Test scores against steps, what learning has cost included, each arm with its best rate for the whole budget."""
    found = []
    for name in PLANS:
        if name not in records:
            continue
        plan, lines = _plan(name, records[name]), []
        for arm in _arms(records[name]).values():
            final = chosen(name, plan, arm, plan["budget"])
            if final is None:
                continue
            runs = [run for run in arm["runs"] if run["rate"] == final["rate"]]
            points = []
            for at, step in enumerate(runs[0]["steps"]):
                if (step + arm["charge"]) % plan["every"] == 0:
                    mean, half = confidence([run["test"][at] for run in runs])
                    points.append((float(step + arm["charge"]), mean - half, mean, mean + half))
            lines.append(Line(label=arm["label"], points=points, ours=arm["ours"]))
        what = "accuracy" if name == "digits" else "loss"
        found.append(
            Curves(
                name=name,
                title=f"{TITLES[name].partition(',')[0].format(**plan['problem'])}: mean over seeds, 95% interval",
                x="steps of training, learning the initialisation included",
                y=f"test {what}",
                lines=lines,
                doubling=False,
                from_zero=name == "digits",
            )
        )
    return found


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half of its 95% interval by Student's t."""
    mean, number = statistics.fmean(values), len(values)
    if number < 2:
        return mean, math.nan
    return mean, T_95[min(number - 1, len(T_95)) - 1] * statistics.stdev(values) / math.sqrt(number)


def _interval(values: Sequence[float] | None, *, signed: bool = False) -> str:
    if not values:
        return MISSING
    mean, half = confidence(values)
    return f"{mean:{'+' if signed else ''}.3f} ± {half:.3f}"


def _arms(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arms that were measured, with what they found."""
    return {
        key: {"label": rival["label"], "ours": rival["ours"], **rival["metrics"]}
        for key, rival in record["rivals"].items()
        if rival["status"] == "ok" and "runs" in rival.get("metrics", {})
    }


def _plan(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    return next(plan for rival in record["rivals"].values() if (plan := rival.get("metrics", {}).get("plan")))


BENCHMARK = Benchmark(
    name="gradinit_effect",
    title="What a learned initialisation brings",
    text=(
        "Deep nets on real data, trained from several initialisations and seeds. Time is equal for all: an arm that learns its "
        "initialisation trains for as many steps less as learning would have paid for, *steps charged* (wall time of the whole "
        "call of `learn_init`, nothing compiled, by the median time of a training step). The learning rate is the best of a grid "
        "by mean validation score, at each budget for itself; figures are means over seeds of the test score with 95% intervals "
        "by Student's t, differences are paired by seed. A run has stalled if it knows no more at its end than chance, or than "
        "the frequencies of characters. GradInit for SGD looks ahead along the gradient, GradInit for Adam along its signs."
    ),
    cases=cases,
    unavailable=unavailable,
    conclusions=conclusions,
    curves=curves,
)
